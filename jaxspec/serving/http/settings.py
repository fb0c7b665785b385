"""How the HTTP server behaves: what a request may hold, what it is called, how long it may take."""

import dataclasses

from jaxspec.checks import real_number, whole_number
from jaxspec.serving.http.media import domain_name

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class HttpSettings:
    """Limits and names of the HTTP server. Raises ValueError for values out of range."""

    served_model_name: str = "jaxspec"
    """What requests call the model; others are answered with 404."""
    api_key: str | None = dataclasses.field(default=None, repr=False)
    """What requests must carry as `Authorization: Bearer ..` on all paths but /health; None asks for nothing."""
    max_body_bytes: int = 64 * MIB
    """Bytes of a request's body."""
    max_images: int = 16
    """Images of one prompt (`--limit-mm-per-prompt`)."""
    max_videos: int = 1
    """Videos of one prompt."""
    max_pixels: int = 256_000_000
    """Pixels of all images of one prompt together; a single image may have 64 million."""
    max_n: int = 16
    """Choices of one request."""
    allowed_media_domains: tuple[str, ...] = ()
    """Hosts that images may be fetched from; none by default: then only data: URLs are read."""
    request_timeout: float | None = 600.0
    """Seconds from a request's arrival to its last token, the queue included; None waits for ever."""
    body_timeout: float = 60.0
    """Seconds that a request's body may take to arrive."""
    header_timeout: float = 10.0
    """Seconds that a request's headers may take to arrive."""
    keep_alive_timeout: float = 30.0
    """Seconds that a connection stays open without a request."""
    encode_threads: int = 2
    """Prompts that are tokenised and whose images are decoded at a time."""

    def __post_init__(self) -> None:
        if not self.served_model_name:
            raise ValueError("served_model_name must not be empty")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ValueError("the API key must be one or more printable ASCII characters")
        object.__setattr__(self, "allowed_media_domains", tuple(map(domain_name, self.allowed_media_domains)))
        for name, least in (
            ("max_body_bytes", 1),
            ("max_images", 0),
            ("max_videos", 0),
            ("max_pixels", 1),
            ("max_n", 1),
            ("encode_threads", 1),
        ):
            whole_number(name, getattr(self, name), least)
        for name in ("body_timeout", "header_timeout", "keep_alive_timeout"):
            if not real_number(name, getattr(self, name)) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        if self.request_timeout is not None and not real_number("request_timeout", self.request_timeout) > 0:
            raise ValueError(f"request_timeout must be greater than 0, got {self.request_timeout}")
