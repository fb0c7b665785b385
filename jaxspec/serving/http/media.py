"""Pictures and videos behind http(s) URLs, fetched so that a request cannot reach what only this machine can.

A URL is followed when its host is one of the allowed domains and every address that the host has is public. The name is
looked up once, and the connection goes to an address of that answer, so that a name whose answer changes (DNS
rebinding) changes nothing. A redirect is a new URL: it is checked and looked up in the same way. What a server says of
its content is not believed: the bytes go to `jaxspec.media.open_image` and `jaxspec.video.as_video`.
"""

import asyncio
import dataclasses
import functools
import ipaddress
import socket
import ssl
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx

MIB = 2**20
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
TEREDO = ipaddress.IPv6Network("2001::/32")
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
REDIRECTS = (301, 302, 303, 307, 308)
LOOKUPS = ThreadPoolExecutor(4, thread_name_prefix="jaxspec-dns")
"""A look-up cannot be ended from outside; so many may hang at once without hurting anything else."""


class Unfetchable(ValueError):
    """Why a URL is not fetched; without the image's name, which `RemoteMedia.fetch` puts before it."""


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host, from the system's resolver. Raises OSError where it has none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet. An IPv6 address that stands for an IPv4 one (mapped, 6to4,
    NAT64) is judged by that."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # with a zone, or no address at all
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip in NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip not in GLOBAL_UNICAST or ip in TEREDO:
            return False
        if ip.sixtofour is not None and not is_public(str(ip.sixtofour)):
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def domain_name(domain: str) -> str:
    """A domain as hosts are compared with it. Raises ValueError for what is no host name: a URL, a pattern, a port."""
    try:
        host = httpx.URL(f"http://{domain}/").raw_host.decode() if domain.isprintable() else ""
    except httpx.InvalidURL:
        host = ""
    if not host.strip(".") or any(character in domain for character in "/:@*?#[] "):
        raise ValueError(f"an allowed media domain is a host name such as example.org, got {domain!r}")
    return host.lower().removesuffix(".")


@dataclasses.dataclass(frozen=True)
class RemoteMedia:
    """Fetches what URLs in messages name.

    Args:
      domains: hosts that may be asked, each with its subdomains; an IP address stands for itself. None: nothing is
        fetched.
      max_bytes: of one file.
      seconds: for one file, with look-ups and redirects.
      max_redirects: that are followed.
      ports: that may be asked; others belong to other services of the host.
      resolve, allowed: the look-up, and whether an address may be connected to.
      verify: certificates that are trusted; by default those that httpx trusts.

    Raises ValueError for a domain that is none.
    """

    domains: Sequence[str] = ()
    max_bytes: int = 20 * MIB
    seconds: float = 5.0
    max_redirects: int = 3
    ports: Collection[int] = (80, 443)
    resolve: Callable[[str, int], Sequence[str]] = resolve
    allowed: Callable[[str], bool] = is_public
    verify: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "domains", tuple(map(domain_name, self.domains)))

    async def fetch(self, url: str, name: str = "image 1") -> bytes:
        """The bytes behind a URL. Raises ValueError, naming the image, in one sentence without addresses or anything
        else that the client does not know already."""
        try:
            async with asyncio.timeout(self.seconds):
                return await self._follow(url)
        except TimeoutError:
            raise ValueError(f"{name} took longer than {self.seconds:g} seconds to fetch") from None
        except Unfetchable as why:
            raise ValueError(f"{name} {why}") from None

    async def _follow(self, text: str) -> bytes:
        try:
            url = httpx.URL(text)
        except (httpx.InvalidURL, ValueError, TypeError):
            raise Unfetchable("has a URL that cannot be read") from None
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(
            verify=self._certificates, trust_env=False, limits=limits, timeout=self.seconds
        ) as client:
            for _ in range(1 + self.max_redirects):
                answer = await self._ask(client, url)
                if isinstance(answer, bytes):
                    return answer
                url = answer
        raise Unfetchable(f"is behind more than {self.max_redirects} redirects")

    @functools.cached_property
    def _certificates(self) -> ssl.SSLContext:
        return self.verify or httpx.create_ssl_context(trust_env=False)

    async def _ask(self, client: httpx.AsyncClient, url: httpx.URL) -> bytes | httpx.URL:
        """The content, or where it is to be found instead."""
        host = self._checked(url)
        for address in await self._addresses(host, url):
            request = client.build_request(
                "GET",
                url.copy_with(host=address, fragment=None),
                headers={"host": url.netloc.decode(), "accept-encoding": "identity", "user-agent": "jaxspec"},
                extensions={"sni_hostname": host},  # and the certificate is verified against it
            )
            try:
                response = await client.send(request, stream=True)
            except httpx.ConnectError:
                continue
            except httpx.HTTPError:
                break
            try:
                return await self._read(response, url)
            except httpx.HTTPError:
                raise Unfetchable("could not be read to its end") from None
            finally:
                await response.aclose()
        raise Unfetchable("could not be fetched: its host does not answer as it should")

    def _checked(self, url: httpx.URL) -> str:
        """The host of a URL that may be followed."""
        if url.scheme not in ("http", "https"):
            raise Unfetchable("has a URL that is neither data:, http: nor https:")
        if url.userinfo:
            raise Unfetchable("has a URL with a user name or password in it; give one without")
        host = url.raw_host.decode().lower().removesuffix(".")
        if not any(host == domain or is_subdomain(host, domain) for domain in self.domains):
            allowed = f"from {', '.join(self.domains)}" if self.domains else "in data: URLs only"
            raise Unfetchable(f"is on a host that is not allowed; images and videos may come {allowed}")
        if (url.port or (443 if url.scheme == "https" else 80)) not in self.ports:
            raise Unfetchable("has a URL with a port that is not allowed; leave it out")
        return host

    async def _addresses(self, host: str, url: httpx.URL) -> Sequence[str]:
        """What the host's name stands for, all of it public."""
        port = url.port or (443 if url.scheme == "https" else 80)
        loop = asyncio.get_running_loop()
        try:
            addresses = await loop.run_in_executor(LOOKUPS, self.resolve, host, port)
        except (OSError, UnicodeError):
            addresses = []
        if not addresses or not all(map(self.allowed, addresses)):
            raise Unfetchable("is on a host without a public address")  # one sentence: nobody learns which of the two
        return addresses

    async def _read(self, response: httpx.Response, url: httpx.URL) -> bytes | httpx.URL:
        if response.status_code in REDIRECTS and (location := response.headers.get("location")):
            return url.join(location)
        if response.status_code != 200:
            raise Unfetchable(f"could not be fetched: its host answers with status {response.status_code}")
        if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise Unfetchable("comes with a Content-Encoding, which nobody asked for")
        too_large = Unfetchable(f"is larger than {self.max_bytes} bytes")
        length = response.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.max_bytes:
            raise too_large
        content = bytearray()
        async for part in response.aiter_raw():
            content += part
            if len(content) > self.max_bytes:
                raise too_large
        return bytes(content)


def is_subdomain(host: str, domain: str) -> bool:
    try:
        ipaddress.ip_address(domain)
    except ValueError:
        return host.endswith(f".{domain}")
    return False
