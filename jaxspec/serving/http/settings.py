"""How the HTTP server behaves: what a request may hold, what it is called, how long it may take."""

import dataclasses
import ipaddress

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
    max_total_body_bytes: int = 512 * MIB
    """Bytes of the bodies of all requests that are here, from when they come until the answer has been given."""
    max_images: int = 16
    """Images of one prompt (`--limit-mm-per-prompt`)."""
    max_videos: int = 1
    """Videos of one prompt."""
    max_pixels: int = 256_000_000
    """Pixels of all images and of all frames of videos of one prompt together; a single image may have 64 million."""
    max_n: int = 16
    """Choices of one request."""
    allowed_media_domains: tuple[str, ...] = ()
    """Hosts that images and videos may be fetched from; none by default: then only data: URLs are read."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that requests may have in their Host header; none, or "*" among them, for any."""
    request_timeout: float | None = 600.0
    """Seconds from the arrival of a request's headers to its last token, its body and the queue included; None waits
    for ever."""
    body_timeout: float = 60.0
    """Seconds that a request's body may take to arrive."""
    header_timeout: float = 10.0
    """Seconds that a request's headers may take to arrive."""
    keep_alive_timeout: float = 30.0
    """Seconds that a connection stays open without a request."""
    unread_timeout: float = 60.0
    """Seconds in which a client must take 64 KiB of an answer that waits for it, or what is left of it."""
    encode_threads: int = 2
    """Prompts that are tokenised and whose images are decoded at a time."""

    def __post_init__(self) -> None:
        if not self.served_model_name:
            raise ValueError("served_model_name must not be empty")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ValueError("the API key must be one or more printable ASCII characters")
        object.__setattr__(self, "allowed_media_domains", tuple(map(domain_name, self.allowed_media_domains)))
        object.__setattr__(self, "allowed_hosts", tuple(map(host_name, self.allowed_hosts)))
        for name, least in (
            ("max_body_bytes", 1),
            ("max_total_body_bytes", self.max_body_bytes),
            ("max_images", 0),
            ("max_videos", 0),
            ("max_pixels", 1),
            ("max_n", 1),
            ("encode_threads", 1),
        ):
            whole_number(name, getattr(self, name), least)
        for name in ("body_timeout", "header_timeout", "keep_alive_timeout", "unread_timeout"):
            if not real_number(name, getattr(self, name)) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        if self.request_timeout is not None and not real_number("request_timeout", self.request_timeout) > 0:
            raise ValueError(f"request_timeout must be greater than 0, got {self.request_timeout}")


def host_name(host: str) -> str:
    """A name as Host headers have it, without a port. Raises ValueError for what is none."""
    if host == "*":
        return host
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        try:
            return domain_name(host)
        except ValueError:
            raise ValueError(f"an allowed host is a name such as example.org, without a port, got {host!r}") from None
    return f"[{address}]" if address.version == 6 else str(address)
