"""Videos over HTTP: one is answered as the library answers it, and one that is a bomb is refused before it goes off."""

import asyncio
import base64
import io
import struct
from collections.abc import Iterator

import av
import httpx
import pytest
from PIL import Image

from jaxspec import Generator, Video
from jaxspec.serving.engine import Engine
from jaxspec.serving.http.app import make_app
from jaxspec.serving.http.messages import VIDEO
from jaxspec.serving.http.settings import HttpSettings
from jaxspec.serving.requests import EngineSettings
from tests.families import family_target
from tests.test_video import frames_of, gif_of

PARAM = "messages.0.content.0.video_url"
QUESTION = "What happens?"
LENGTH = 512


@pytest.fixture(scope="module")
def target():
    return family_target("qwen2_5_vl")


@pytest.fixture(scope="module")
def app(target) -> Iterator:
    with Engine(target, settings=EngineSettings(max_length=LENGTH, max_num_seqs=1, warm_up=False)) as engine:
        yield make_app(engine, HttpSettings(max_pixels=100_000, max_videos=2))


def animation(kind: str) -> bytes:
    file = io.BytesIO()
    first, *others = frames_of(6)
    first.save(file, kind, save_all=True, append_images=others, duration=300, loop=0)
    return file.getvalue()


def film(frames: int = 8) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", "mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(frames):
            picture = Image.new("RGB", (64, 48), (20 * index % 256, 90, 200))
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return file.getvalue()


def ask(app, *contents: bytes) -> httpx.Response:
    urls = ["data:video/mp4;base64," + base64.b64encode(content).decode() for content in contents]
    parts = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": QUESTION}]
    body = {"model": "jaxspec", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8}

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=300) as client:
            return await client.post("/v1/chat/completions", json=body)

    return asyncio.run(post())


@pytest.mark.parametrize(
    "make", [film, lambda: animation("GIF"), lambda: animation("WEBP")], ids=["mp4", "gif", "webp"]
)
def test_an_answer_about_a_video_is_the_librarys(app, target, make):
    content = make()
    response = ask(app, content)
    assert response.status_code == 200, response.text
    expected = Generator(target, max_length=LENGTH).generate(QUESTION, [Video.open(content)], max_new_tokens=8)
    (choice,) = response.json()["choices"]
    assert choice["message"]["content"] == expected.text
    usage = response.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (expected.stats.prompt_tokens, len(expected.tokens))


def refused(response: httpx.Response) -> str:
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == PARAM, response.text
    assert error["message"].startswith("video cannot be read: ")
    return error["message"]


def test_frames_that_are_too_large_are_refused_by_their_header(app):
    content = bytearray(animation("GIF"))
    content[6:10] = struct.pack("<HH", 5000, 5000)
    assert f"it has frames of 5000 x 5000 pixels; the limit is {VIDEO.frame_pixels}" in refused(
        ask(app, bytes(content))
    )


def test_more_frames_than_may_be_are_refused(app):
    assert f"it has more than {VIDEO.frames} frames" in refused(ask(app, gif_of(VIDEO.frames + 5)))


def test_frames_that_would_be_kept_count_with_those_of_the_other_videos(app):
    content = film(60)  # 15 seconds, 30 frames of 64 x 48: 92,160 pixels
    response = ask(app, content)
    assert response.status_code == 200, response.text
    assert "4 frames of 64 x 48 pixels would be taken of it; the limit is" in ask(app, content, film()).text


def test_what_is_no_video_is_one_sentence(app):
    for content in (b"", b"no video", b"\x00\x00\x00\x18ftypmp42" + bytes(40)):
        refused(ask(app, content))
