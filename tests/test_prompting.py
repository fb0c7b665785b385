"""Bad input is one clear sentence, before anything is compiled; images of every mode open as RGB."""

import base64
import dataclasses
import functools
import io
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxspec import Generator, SamplingParams, Video
from jaxspec.media import open_image
from jaxspec.prompting import encode_prompt
from jaxspec.targets.prompts import EncodedPrompt, check_prompt
from tests.families import family_target

targets = functools.cache(family_target)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))


def encoded(picture=PICTURE, kind="PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def data_url(payload: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(payload).decode()


@pytest.fixture(scope="module")
def generator(target):
    return Generator(target, max_length=256)


@pytest.fixture
def refuses(generator):
    """Checks that a request is refused with exactly these words, with nothing compiled."""

    def check(message, prompt="Hello", images=(), **options):
        with pytest.raises(ValueError, match=re.escape(message)):
            generator.generate(prompt, images, **options)
        assert generator.compilations == 0

    return check


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"not a picture", b"", encoded()[:60], encoded()[: len(encoded()) // 2]])
def test_unreadable_image(refuses, tmp_path, content):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    refuses(f"image 1 ({path}) cannot be read: ", images=[path])
    refuses(f"image 2 ({path}) cannot be read: ", images=[PICTURE, str(path)])
    refuses("image 1 cannot be read: ", images=[content])
    refuses("image 1 cannot be read: ", [user({"type": "image_url", "image_url": {"url": data_url(content)}})])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_every_damaged_file_is_refused_by_name_or_opened(kind):
    content = encoded(PICTURE, kind)
    refused = 0
    for at in range(0, len(content), max(1, len(content) // 40)):
        flipped = bytes([*content[:at], content[at] ^ 0xFF, *content[at + 1 :]])
        for damaged in (content[:at], flipped):
            try:
                assert open_image(damaged, "image 3").mode == "RGB"
            except ValueError as error:
                assert str(error).startswith("image 3 "), error
                refused += 1
    assert refused


def test_missing_image(refuses, tmp_path):
    refuses(f"image 1 ({tmp_path / 'none.png'}) does not exist", images=[tmp_path / "none.png"])
    refuses(f"image 1 ({tmp_path}) does not exist", images=[tmp_path])  # a folder is no image
    refuses("image 1 (https://example.org/cat.png) does not exist", images=["https://example.org/cat.png"])


def test_empty_image(refuses):
    refuses("image 1 is empty: shape (0, 5, 3)", images=[np.zeros((0, 5, 3), np.uint8)])
    refuses("image 1 is empty: shape (5, 0, 3)", images=[np.zeros((5, 0, 3), np.uint8)])
    refuses("image 2 is empty: 0 x 4 pixels", images=[PICTURE, Image.new("RGB", (0, 4))])


def test_too_large_image(refuses):
    refuses("image 1 has 8001 x 8000 pixels; the limit is 64000000", images=[Image.new("1", (8001, 8000))])


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint16), np.zeros((4, 4, 3), np.int64)],
    ids=lambda a: str(a.dtype),
)
def test_array_of_another_dtype(refuses, array):
    refuses(f"image 1 has dtype {array.dtype}; give uint8", images=[array])


def test_array_of_another_shape(refuses):
    for shape in ((), (4,), (1, 4, 4, 3)):
        refuses(f"image 1 has shape {shape}; give [H, W, 3]", images=[np.zeros(shape, np.uint8)])
    refuses("image 1 cannot be read: ", images=[np.zeros((4, 4, 5), np.uint8)])


def test_image_of_another_type(refuses):
    refuses("image 1 has type int; give a PIL image, a path, bytes or an array", images=[7])
    refuses("image 1 has type NoneType; give a PIL image, a path, bytes or an array", images=[None])


def test_bad_data_url(refuses):
    def message(url):
        return [user({"type": "image_url", "image_url": {"url": url}})]

    refuses("image 1 is a data: URL that is not base64", message("data:image/png,abc"))
    refuses("image 1 is not valid base64: ", message("data:image/png;base64,@@@"))
    refuses("image 1 cannot be read: ", message("data:image/png;base64,"))


@pytest.mark.parametrize("url", ["https://example.org/cat.png", "/etc/hostname", "file:///etc/hostname", ""])
def test_messages_open_no_files(refuses, url):
    """Messages come from clients of a server; a path in them must not open the server's files."""
    refuses(
        "image_url must hold a data: URL",
        [user({"type": "image_url", "image_url": {"url": url}})],
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "1", "P", "CMYK", "YCbCr", "I;16"])
def test_every_mode_opens_as_rgb(mode):
    if mode == "I;16":
        grey = np.asarray(PICTURE.convert("L"))
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
        expected = np.repeat(grey[..., None], 3, axis=2)
    else:
        picture = PICTURE.convert(mode)
        expected = np.asarray(picture.convert("RGB"))
    assert picture.mode == mode
    opened = [picture]
    if mode != "YCbCr":  # TIFF keeps every other mode
        opened += [encoded(picture, "TIFF")]
    if mode in ("RGBA", "LA", "P", "I;16"):
        opened += [encoded(picture, "PNG"), data_url(encoded(picture, "PNG"))]
    for image in opened:
        result = open_image(image)
        assert result.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(result), expected)


def test_every_source_gives_the_same_pixels(target, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(encoded())
    sources = [PICTURE, np.asarray(PICTURE), path, str(path), encoded(), data_url(encoded())]
    results = [encode_prompt(target, "What is this?", [source]) for source in sources]
    url = [user({"type": "image_url", "image_url": {"url": data_url(encoded())}}, text("What is this?"))]
    results += [
        encode_prompt(target, url),
        encode_prompt(target, [user({"type": "image"}, text("What is this?"))], [PICTURE]),
        encode_prompt(target, [user({"type": "image", "image": PICTURE}, text("What is this?"))]),
        encode_prompt(target, "USER: <image>\nWhat is this? ASSISTANT:", [PICTURE], raw=True),
    ]
    for result in results:
        np.testing.assert_array_equal(result.input_ids, results[0].input_ids)
        (image,) = result.images
        np.testing.assert_array_equal(image.pixels, results[0].images[0].pixels)
        assert image.tokens == 36


# -- messages ----------------------------------------------------------------------------------------------------------


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def test_marks_and_images_that_do_not_match(refuses):
    refuses("the prompt has 2 <image> marks but 1 images were given", "<image><image> a", [PICTURE], raw=True)
    refuses("the prompt has 1 <image> marks but 2 images were given", "<image> a", [PICTURE] * 2, raw=True)
    refuses("the prompt has 0 <image> marks but 1 images were given", "a", [PICTURE], raw=True)
    refuses("the prompt has 1 <image> marks but 0 images were given", "what does <image> mean?", raw=True)
    image = {"type": "image"}
    refuses("the messages have more image parts than the 1 images given", [user(image, image)], [PICTURE])
    refuses("3 images were given but the messages have 1 for them", [user(image, text("a"))], [PICTURE] * 3)


def test_malformed_messages(refuses):
    known = "is not supported; use text, image, image_url or video"
    refuses(f"content part type 'audio' {known}", [user({"type": "audio"})])
    refuses(f"content part type None {known}", [user({"text": "a"})])
    refuses("a message needs role and content, got keys role", [{"role": "user"}])
    refuses("a message must be a dict with role and content, got str", ["Hello"])
    refuses("a message's content must be a string or a list of parts, got int", [{"role": "user", "content": 3}])
    refuses(f"content part type 'Hello' {known}", [user("Hello")])
    refuses("a text part needs text, a string; got None", [user({"type": "text"})])
    refuses('an image_url part needs image_url: {"url": "data:..."}, got None', [user({"type": "image_url"})])
    refuses("an image_url part needs image_url", [user({"type": "image_url", "image_url": "data:image/png;base64,"})])
    refuses("a raw prompt must be a string, got list", [user(text("a"))], raw=True)


def test_a_batch_is_a_list(generator):
    with pytest.raises(ValueError, match="generate_batch needs a list of prompts, got one string"):
        generator.generate_batch("Hello")
    assert generator.compilations == 0


def test_limits_may_be_numpy_integers(generators):
    assert len(generators("autoregressive").generate("Hello", max_new_tokens=np.int64(3)).tokens) <= 3


def test_turns_keep_their_order(target):
    messages = [
        user(text("First?"), {"type": "image"}),
        {"role": "assistant", "content": "Yes."},
        user({"type": "image", "image": PICTURE}, text("Second?")),
    ]
    other = PICTURE.rotate(90)
    result = encode_prompt(target, messages, [other])
    words = re.sub("(<image>)+", "<image>", target.tokenizer.decode(result.input_ids))
    assert words == "<s>USER: <image>\nFirst? ASSISTANT: Yes.</s>USER: <image>\nSecond? ASSISTANT:"
    for image, picture in zip(result.images, (other, PICTURE), strict=True):
        np.testing.assert_array_equal(image.pixels, encode_prompt(target, "a", [picture]).images[0].pixels)


def test_empty_prompts(refuses):
    empty = "the prompt is empty; give a text, or messages with some content"
    for prompt in ("", " \n", [], [user()], [user(text(" "))], [{"role": "user", "content": ""}, user(text("\n"))]):
        refuses(empty, prompt)
    refuses(empty, "", [PICTURE])
    refuses(empty, "", raw=True)


def test_prompts_of_another_type(refuses):
    for prompt in (7, None, b"Hello", {"role": "user", "content": "Hello"}):
        refuses(f"the prompt must be a string or a list of chat messages, got {type(prompt).__name__}", prompt)
    refuses("a raw prompt must be a string, got list", [user("text")], raw=True)
    refuses("a message's content must be a string or a list of parts, got NoneType", [{"role": "a", "content": None}])
    refuses("a message's content must be a string or a list of parts, got bytes", [{"role": "a", "content": b"a"}])
    refuses("a message's role must be a string, got NoneType", [{"role": None, "content": "a"}])
    refuses("content part type ['text'] is not supported", [user({"type": ["text"]})])
    refuses("a content part must be a dict with a type, got 'text'", [user("text")])


def test_images_that_are_no_list(refuses, target):
    for images in ("photo.jpg", PICTURE, np.zeros((8, 8, 3), np.uint8), encoded(), Video([PICTURE])):
        refuses("images must be a list of images, got", images=images)
        with pytest.raises(ValueError, match="a single image is given as"):
            encode_prompt(target, "Hello", images)
    refuses("images must be a list of images, got int", images=3)


def test_texts_that_utf8_cannot_hold(refuses):
    refuses("the prompt cannot be written as UTF-8: character 4 is '\\ud800'", "bad \ud800 text")
    refuses("the prompt cannot be written as UTF-8: character 0 is '\\udfff'", "\udfff<image>", raw=True)
    refuses("a text by user cannot be written as UTF-8: character 1", [user(text("a\udcff"))])
    refuses("a message's role cannot be written as UTF-8: character 0", [{"role": "\ud800", "content": "a"}])


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_message_opens_no_local_file_unless_allowed(refuses, target, tmp_path, kind):
    """As a string or a `Path`, alone or as a frame: not even to find out whether it is there."""
    path = tmp_path / "picture.png"
    path.write_bytes(encoded())
    sources = [str(path), path, "/etc/passwd", "file:///etc/passwd", "https://example.org/cat.png", ""]
    sources += [[source] for source in sources] + [(PICTURE, path), Video([PICTURE, str(path)])]
    for source in sources if kind == "video" else sources[:6]:
        refuses(f"a message's {kind} names a file, ", [user({"type": kind, kind: source}, text("What?"))])
    if kind == "image":
        message = [user({"type": "image", "image": str(path)}, text("What?"))]
        opened = Generator(target, max_length=256, allow_local_files=True).generate(message, max_new_tokens=1)
        assert len(opened.tokens) == 1
        expected = encode_prompt(target, "What?", [path])
        for source in (path, str(path)):
            message = [user({"type": "image", "image": source}, text("What?"))]
            prompt = encode_prompt(target, message, allow_local_files=True)
            np.testing.assert_array_equal(prompt.images[0].pixels, expected.images[0].pixels)


# -- tokens and features -----------------------------------------------------------------------------------------------


def test_tokens_outside_the_embedding(target, generator):
    rows, prompt = target.config.text.vocab_size, encode_prompt(target, "Hello")
    for token, shown in ((rows, f"token {rows}"), (-1, "token -1,"), (2**40, f"token {2**40},")):
        ids = np.array([*prompt.input_ids.tolist(), token])
        message = re.escape(f"the prompt has {shown}") + f".*the target's embedding has only {rows} rows"
        with pytest.raises(ValueError, match=message):
            target.logits({"input_ids": ids[None]})
        with pytest.raises(ValueError, match="embedding has only"):
            generator.generate_encoded([dataclasses.replace(prompt, input_ids=ids)])
    with pytest.raises(ValueError, match="a prompt needs at least one token"):
        generator.generate_encoded([dataclasses.replace(prompt, input_ids=prompt.input_ids[:0])])
    with pytest.raises(ValueError, match="a prompt needs at least one token"):
        target.logits({"input_ids": np.ones((1, 3), np.int64), "attention_mask": np.zeros((1, 3), np.int64)})
    assert generator.compilations == 0


def test_image_tokens_without_images(target, generator):
    ids = np.array([1, *[target.config.image_token_id] * 36, 5])
    for call in (
        lambda: target.logits({"input_ids": ids[None]}),
        lambda: generator.generate_encoded([EncodedPrompt(ids, [])]),
    ):
        with pytest.raises(ValueError, match="the prompt has 36 image tokens, its images have 0 features"):
            call()
    assert generator.compilations == 0


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), family=st.sampled_from(["llava_next", "qwen2_5_vl", "gemma3"]))
def test_every_image_has_as_many_tokens_as_features(data, family):
    """Whatever the sizes, the number of images and what stands between them; with one token more or less for any of
    them, or an image more or less, one sentence says so."""
    target = targets(family)
    sizes = data.draw(st.lists(st.tuples(st.integers(8, 70), st.integers(8, 70)), min_size=1, max_size=3))
    parts = []
    for size in sizes:
        parts.append({"type": "image", "image": Image.new("RGB", size, (200, 30, 90))})
        parts += [text("and")] * data.draw(st.integers(0, 1))
    prompt = encode_prompt(target, [user(*parts, text("What?"))])
    adapter, ids, images = target.adapter, prompt.input_ids, prompt.images
    check_prompt(adapter, ids, images)
    assert [image.tokens for image in images] == [
        encode_prompt(target, "What?", [part["image"]]).images[0].tokens for part in parts if part["type"] == "image"
    ]
    place = data.draw(st.sampled_from(np.flatnonzero(adapter.is_image(ids)).tolist()))
    wrong = [
        (np.delete(ids, place), images),
        (np.insert(ids, place, ids[place]), images),
        (ids, images[1:]),
        (ids, [*images, images[0]]),
    ]
    for ids, images in wrong:
        with pytest.raises(ValueError, match=r"the prompt has \d+ image tokens, its images have \d+ features"):
            check_prompt(adapter, ids, images)


def test_features_of_one_image_never_make_up_for_another(target):
    """The totals agree; each image by itself does not."""
    prompt = encode_prompt(target, [user({"type": "image"}, text("and"), {"type": "image"})], [PICTURE] * 2)
    marks = np.flatnonzero(target.adapter.is_image(prompt.input_ids))
    ids = np.insert(np.delete(prompt.input_ids, marks[-1]), marks[0], prompt.input_ids[marks[0]])
    with pytest.raises(
        ValueError, match=r"72 image tokens, its images have 72 features; image 1 has 37 tokens for 36 features"
    ):
        check_prompt(target.adapter, ids, prompt.images)


# -- limits ------------------------------------------------------------------------------------------------------------


def test_prompt_longer_than_max_length(refuses):
    message = "prompt 0 has 256 tokens; with max_length 256 it may have at most 255"
    refuses(message, "~" * 255, raw=True)  # one token each, after the first
    prompt = "<image>" * 4 + "~" * 120  # 36 tokens an image, one a tilde, after the first token
    refuses("prompt 0 has 265 tokens; with max_length 256", prompt, [PICTURE] * 4, raw=True)


@pytest.mark.parametrize("count", [0, -3])
def test_no_new_tokens(refuses, count):
    refuses(f"max_new_tokens must be at least 1, got {count}", max_new_tokens=count)


def test_lists_that_do_not_match(generator):
    cases = [
        ("a batch needs at least one prompt, got none", {"prompts": []}),
        ("images has 1 entries for 2 prompts", {"prompts": ["a", "b"], "images": [[PICTURE]]}),
        ("sampling has 3 entries for 2 prompts", {"prompts": ["a", "b"], "sampling": [SamplingParams()] * 3}),
        ("max_new_tokens has 1 entries for 2 prompts", {"prompts": ["a", "b"], "max_new_tokens": [5]}),
        ("prompt 1 has 301 tokens; with max_length 256", {"prompts": ["a", "~" * 300], "raw": True}),
        ("max_new_tokens must be at least 1, got 0", {"prompts": ["a", "b"], "max_new_tokens": [5, 0]}),
    ]
    for message, arguments in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            generator.generate_batch(**arguments)
    assert generator.compilations == 0


def test_max_length_of_one(target):
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        Generator(target, max_length=1)


def test_bad_stream_fails_at_its_first_piece(generator):
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        next(generator.stream("a", max_new_tokens=0))
    assert generator.compilations == 0
