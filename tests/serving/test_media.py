"""Remote images: what may be fetched, what may not, and that no answer of a name server opens a way inside."""

import asyncio
import contextlib
import gzip
import http.server
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxspec.serving.http.media import RemoteMedia, is_public

PICTURE = b"\x89PNG and so on"
CERTIFICATE = Path(__file__).parent / "pictures_example.pem"
HOST = "pictures.example"


class Pictures(http.server.BaseHTTPRequestHandler):
    """A host on the internet, as far as the tests are concerned."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        path, _, argument = self.path.partition("?")
        body, status, headers = PICTURE, 200, {}
        if path == "/large":
            body = bytes(2000)
        elif path == "/gzip":
            body, headers = gzip.compress(bytes(2000)), {"Content-Encoding": "gzip"}
        elif path == "/redirect":
            status, body, headers = 302, b"", {"Location": argument}
        elif path == "/around":
            status, body, headers = 302, b"", {"Location": f"/around?{int(argument) - 1}" if argument != "0" else "/"}
        elif path == "/missing":
            status, body = 404, b"no such thing"
        elif path == "/endless":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b"64\r\n" + bytes(100) + b"\r\n")
            return
        elif path == "/short":
            headers = {"Content-Length": "1000"}
            self.close_connection = True
        elif path in ("/slow", "/drip"):
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(100 if path == "/drip" else 0):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
                time.sleep(1.0)
            return
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving(address: str, port: int = 0, tls: bool = False) -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer((address, port), Pictures)
    server.asked, server.daemon_threads = [], True
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@pytest.fixture(scope="module")
def public() -> Iterator[http.server.ThreadingHTTPServer]:
    """What a name stands for that resolves to 127.0.0.1: here that counts as an address of the public internet."""
    with serving("127.0.0.1") as server:
        yield server


@pytest.fixture(scope="module")
def private(public) -> Iterator[http.server.ThreadingHTTPServer]:
    """What must not be reached: another address, with the same port."""
    with serving("127.0.0.2", public.server_port) as server:
        yield server


@pytest.fixture
def media(public, private):
    public.asked.clear()
    private.asked.clear()

    def made(**options) -> RemoteMedia:
        options = {
            "domains": (HOST,),
            "max_bytes": 1000,
            "ports": (public.server_port,),
            "resolve": lambda host, port: ["127.0.0.1"],
            "allowed": lambda address: address == "127.0.0.1" or is_public(address),
        } | options
        return RemoteMedia(**options)

    return made


def fetch(media: RemoteMedia, url: str) -> bytes:
    return asyncio.run(media.fetch(url, "image 2"))


def at(server, path: str = "/a.png", host: str = HOST, scheme: str = "http") -> str:
    return f"{scheme}://{host}:{server.server_port}{path}"


def test_bytes_come_back_and_the_host_is_asked_by_its_name(media, public):
    assert fetch(media(), at(public, "/a.png?size=3#part")) == PICTURE
    (path, headers), *more = public.asked
    assert not more and path == "/a.png?size=3"
    assert headers["host"] == f"{HOST}:{public.server_port}" and headers["accept-encoding"] == "identity"
    assert not {"authorization", "cookie", "referer"} & set(headers)


@pytest.mark.parametrize("host", [f"a.b.{HOST}", HOST.upper(), f"{HOST}."])
def test_a_domain_stands_for_its_subdomains_in_any_case(media, public, host):
    assert fetch(media(), at(public, host=host)) == PICTURE


@pytest.mark.parametrize(
    "host", ["example", f"not{HOST}", f"{HOST}.other.example", "other.example", "127.0.0.1", "2130706433", "[::1]"]
)
def test_other_hosts_are_not_even_looked_up(media, public, host):
    looked_up = []
    with pytest.raises(ValueError, match=r"^image 2 is on a host that is not allowed; images and videos may come"):
        fetch(media(resolve=lambda *asked: looked_up.append(asked) or ["127.0.0.1"]), at(public, host=host))
    assert not looked_up and not public.asked


def test_without_domains_nothing_is_fetched(media, public):
    with pytest.raises(ValueError, match="in data: URLs only"):
        fetch(media(domains=()), at(public))
    assert not public.asked


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://pictures.example/a", "neither data:, http: nor https:"),
        ("file:///etc/passwd", "neither"),
        ("//pictures.example/a", "neither"),
        ("http://user:secret@pictures.example/a", "user name or password"),
        ("http://pictures.example@other.example/a", "user name or password"),
        ("http://pictures.example:22/a", "port that is not allowed"),
        ("http://pictures.example:99999/a", "port that is not allowed"),
        ("http://[pictures.example/a", "not allowed"),
        ("http://pictures.example/a\r\nX: y", "cannot be read"),
        ("http://pictures.example/" + 70_000 * "a", "cannot be read"),
        ("http:///a", "not allowed"),
        ("", "neither"),
    ],
)
def test_urls_that_are_refused_as_they_stand(media, public, url, said):
    with pytest.raises(ValueError, match=said) as refused:
        fetch(media(), url)
    assert "secret" not in str(refused.value) and not public.asked


def test_only_the_usual_ports_are_asked_unless_told(public):
    with pytest.raises(ValueError, match="port that is not allowed"):
        fetch(RemoteMedia((HOST,)), at(public))


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.2"], ["169.254.169.254"], ["127.0.0.1", "10.0.0.1"], ["::ffff:127.0.0.2"], ["fe80::1%eth0"], []],
)
def test_a_host_with_any_address_inside_is_refused_without_a_word_of_it(media, private, addresses):
    with pytest.raises(ValueError) as refused:
        fetch(media(resolve=lambda host, port: addresses), at(private))
    assert str(refused.value) == "image 2 is on a host without a public address"
    assert not private.asked


def test_a_name_that_cannot_be_looked_up_is_told_in_the_same_words(media, public):
    def unknown(host: str, port: int) -> list[str]:
        raise OSError("no such host behind 10.0.0.53")

    with pytest.raises(ValueError, match="^image 2 is on a host without a public address$"):
        fetch(media(resolve=unknown), at(public))


def test_a_second_answer_of_the_name_server_is_never_used(media, public, private):
    """DNS rebinding: public for the check, private for the connection."""
    answers = [["127.0.0.1"], ["127.0.0.2"], ["127.0.0.2"]]
    assert fetch(media(resolve=lambda host, port: answers.pop(0)), at(public)) == PICTURE
    assert len(answers) == 2 and len(public.asked) == 1 and not private.asked


def test_a_name_that_is_rebound_between_redirects_is_refused(media, public, private):
    answers = [["127.0.0.1"], ["127.0.0.2"]]
    with pytest.raises(ValueError, match="without a public address"):
        fetch(media(resolve=lambda host, port: answers.pop(0)), at(public, "/redirect?/a.png"))
    assert not answers and not private.asked


def test_redirects_are_followed_three_times(media, public):
    assert fetch(media(), at(public, "/around?2")) == PICTURE
    public.asked.clear()
    with pytest.raises(ValueError, match="more than 3 redirects"):
        fetch(media(), at(public, "/around?3"))
    assert len(public.asked) == 4


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("http://127.0.0.2:{port}/secret", "not allowed"),
        ("http://localhost:{port}/secret", "not allowed"),
        ("http://inside.pictures.example:{port}/secret", "without a public address"),
        ("http://user@pictures.example:{port}/secret", "user name"),
        ("file:///etc/passwd", "neither"),
        ("http://pictures.example:1/", "port"),
        ("http://pictures.example:x/", "does not answer as it should"),
    ],
)
def test_a_redirect_is_checked_as_the_first_url_is(media, public, private, location, said):
    def names(host: str, port: int) -> list[str]:
        return ["127.0.0.2" if host.startswith("inside.") else "127.0.0.1"]

    with pytest.raises(ValueError, match=said) as refused:
        fetch(media(resolve=names), at(public, f"/redirect?{location.format(port=private.server_port)}"))
    assert not private.asked and "127.0.0.2" not in str(refused.value)


@pytest.mark.parametrize("path", ["/large", "/endless"])
def test_reading_stops_at_the_limit(media, public, path):
    with pytest.raises(ValueError, match="^image 2 is larger than 1000 bytes$"):
        fetch(media(), at(public, path))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/gzip", "Content-Encoding"),
        ("/missing", "answers with status 404"),
        ("/short", "could not be read to its end"),
    ],
)
def test_answers_that_are_no_file(media, public, path, said):
    with pytest.raises(ValueError, match=said):
        fetch(media(), at(public, path))


@pytest.mark.parametrize("path", ["/slow", "/drip"])
def test_time_is_counted_for_everything_together(media, public, path):
    started = time.monotonic()
    with pytest.raises(ValueError, match="took longer than 0.5 seconds to fetch"):
        fetch(media(seconds=0.5), at(public, path))
    assert time.monotonic() - started < 2


def test_a_look_up_that_hangs_is_not_waited_for(media, public):
    async def fetched() -> float:
        started = time.monotonic()
        with pytest.raises(ValueError, match="took longer"):
            await media(seconds=0.2, resolve=lambda *asked: time.sleep(1.5) or []).fetch(at(public), "image 1")
        return time.monotonic() - started

    assert asyncio.run(fetched()) < 1


def test_the_next_address_is_tried_where_one_does_not_answer(media, public):
    with serving("127.0.0.3") as gone:
        port = gone.server_port
    assert port
    two = media(resolve=lambda *asked: ["127.0.0.3", "127.0.0.1"], allowed=lambda address: True)
    assert fetch(two, at(public)) == PICTURE
    with pytest.raises(ValueError, match="does not answer as it should") as refused:
        fetch(media(resolve=lambda *asked: ["127.0.0.3"], allowed=lambda address: True), at(public))
    assert "127.0.0.3" not in str(refused.value)


def test_a_certificate_must_be_of_the_host_and_of_somebody_trusted(media):
    trusting = ssl.create_default_context(cafile=str(CERTIFICATE))
    with serving("127.0.0.1", tls=True) as server:
        options = {"ports": (server.server_port,), "domains": (HOST, "other.example")}
        assert fetch(media(verify=trusting, **options), at(server, scheme="https")) == PICTURE
        assert server.asked[0][1]["host"] == f"{HOST}:{server.server_port}"
        for fetcher, host in ((media(verify=trusting, **options), "other.example"), (media(**options), HOST)):
            with pytest.raises(ValueError, match="does not answer as it should"):
                fetch(fetcher, at(server, scheme="https", host=host))
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    "address",
    [
        *(
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "169.254.169.254",
            "172.16.0.1",
            "192.168.0.1",
            "192.0.2.1",
        ),
        *("224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00::1"),
        *("fec0::1", "ff02::1", "ff0e::1", "2001:db8::1", "2001::1", "100::1", "::127.0.0.1", "::ffff:10.0.0.1"),
        *("::ffff:169.254.169.254", "2002:a00:1::1", "2002:7f00:1::", "64:ff9b::a00:1", "64:ff9b::7f00:1"),
        *("64:ff9b:1::808:808", "", "localhost", "127.1", "0x7f000001", "2130706433"),
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"],
)
def test_addresses_that_are(address):
    assert is_public(address)


@pytest.mark.parametrize("spelt", ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1"])
def test_spellings_of_an_address_inside_are_seen_through_even_where_the_name_is_allowed(spelt):
    """The system's own resolver reads them all as 127.0.0.1."""
    with pytest.raises(ValueError, match="without a public address|an allowed media domain is"):
        fetch(RemoteMedia((spelt,)), f"http://{spelt}/")


@pytest.mark.parametrize(
    "domain", ["", ".", "http://a.example", "a.example/b", "*.a.example", "a.example:80", "a b", "a@b"]
)
def test_what_is_no_domain_is_refused_at_once(domain):
    with pytest.raises(ValueError, match="an allowed media domain is a host name"):
        RemoteMedia((domain,))
