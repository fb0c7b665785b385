"""Arguments that cannot be meant are one sentence each, before anything is compiled; near misses that can are taken."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxspec import Generator, SamplingParams, TreeConfig, Video
from jaxspec.metrics import AcceptanceWarning
from jaxspec.targets.prompts import EncodedPrompt
from tests.drafting import DRAFTERS, fresh_head

PICTURE = np.zeros((8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def generator(target) -> Generator:
    """Never asked for anything that it may answer."""
    return Generator(target, max_length=128)


@pytest.mark.parametrize(
    ("images", "found"),
    [
        ("photo.jpg", "one path, 'photo.jpg'"),
        (Path("photo.jpg"), "one path, 'photo.jpg'"),
        (b"GIF89a", "bytes"),
        (Image.fromarray(PICTURE), "one picture"),
        (PICTURE, "one array of shape (8, 8, 3)"),
        (PICTURE[..., 0], "one array of shape (8, 8)"),
        (Video([PICTURE]), "Video"),
        ({"image": PICTURE}, "dict"),
        (7, "int"),
    ],
)
def test_images_are_a_list(generator, images, found):
    for ask in (generator.generate, generator.stream):
        with pytest.raises(ValueError) as error:
            ask("hi", images=images)
        assert str(error.value) == f"images must be a list of images, got {found}; a single image is given as [image]"
    with pytest.raises(ValueError, match="images of prompt 1 must be a list of images, got"):
        generator.generate_batch(["hi", "ho"], [[], images])
    with pytest.raises(ValueError, match="images"):
        generator.generate_batch(["hi"], images)
    assert generator.compilations == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"sampling": {"temperature": 1}}, "sampling must be SamplingParams, got dict: {'temperature': 1}"),
        ({"sampling": None}, "sampling must be SamplingParams, got NoneType: None"),
        ({"sampling": SamplingParams(logit_bias={10**6: 1})}, "logit_bias has token 1000000, the target has only"),
        (
            {"sampling": SamplingParams(min_tokens=9), "max_new_tokens": 8},
            "min_tokens must be at most max_new_tokens (8), got 9",
        ),
        ({"max_new_tokens": None}, "max_new_tokens must be an integer, got None"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be an integer, got 2.0"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer, got True"),
        ({"max_new_tokens": "8"}, "max_new_tokens must be an integer, got '8'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": [4]}, "max_new_tokens must be an integer, got [4]"),
        ({"prompt": None}, "the prompt must be a string or a list of chat messages, got NoneType"),
        ({"prompt": 3}, "the prompt must be a string or a list of chat messages, got int"),
        ({"prompt": b"hi"}, "the prompt must be a string or a list of chat messages, got bytes"),
        ({"prompt": {"role": "user", "content": "hi"}}, "the prompt must be a string or a list of chat messages, got"),
    ],
)
def test_a_request_that_cannot_be_meant(generator, arguments, sentence):
    for ask in (generator.generate, generator.stream):
        with pytest.raises(ValueError) as error:
            ask(**{"prompt": "hi", **arguments})
        assert str(error.value).startswith(sentence)
    assert generator.compilations == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prompts": {"role": "user"}}, "generate_batch needs a list of prompts, got dict"),
        ({"prompts": None}, "generate_batch needs a list of prompts, got NoneType"),
        ({"prompts": ["hi", None]}, "prompt 1 must be a string or a list of chat messages, got NoneType"),
        ({"sampling": [SamplingParams(), {}]}, "sampling must be SamplingParams, got dict"),
        ({"max_new_tokens": [4, 1.5]}, "max_new_tokens must be an integer, got 1.5"),
        ({"max_new_tokens": np.array([4, 0])}, "max_new_tokens must be at least 1, got 0"),
        ({"images": "photo.jpg"}, "images must be a list with a list of images per prompt, got one path, 'photo.jpg'"),
    ],
)
def test_a_batch_that_cannot_be_meant(generator, arguments, sentence):
    with pytest.raises(ValueError) as error:
        generator.generate_batch(**{"prompts": ["hi", "ho"], **arguments})
    assert str(error.value).startswith(sentence)
    assert generator.compilations == 0


def test_pieces_and_encoded_prompts(generator):
    for rounds in (0, -1, 1.5, None):
        with pytest.raises(ValueError, match="rounds_per_piece must be"):
            generator.stream("hi", rounds_per_piece=rounds)
    with pytest.raises(ValueError, match="prompt 0 must be an EncodedPrompt, from encode_prompt; got str"):
        generator.generate_encoded(["hi"])
    assert generator.compilations == 0


@pytest.mark.parametrize(
    "ids", [[5, 6], np.array([5.0, 6.0]), np.array([[5, 6]]), None, "ab", np.array(5), np.array([True, False])]
)
def test_tokens_that_are_no_array_of_integers(generator, ids):
    with pytest.raises(ValueError, match=r"the tokens of a prompt must be an integer array \[S\], got"):
        generator.generate_encoded([EncodedPrompt(ids, [])])


def test_integers_of_all_kinds_and_lists_of_all_kinds(generator, pictures):
    limits = [np.int64(3), np.int32(4), np.array(5)]
    batch = generator._prepare(np.array(["a", "b", "c"]), None, SamplingParams(), limits, True)
    assert batch.limits == [3, 4, 5] and all(type(limit) is int for limit in batch.limits)
    assert generator._prepare(("a",), (None,), (SamplingParams(),), np.int16(7), True).limits == [7]
    same = np.stack([PICTURE, PICTURE])  # an array of pictures is several
    assert len(generator._prepare(["hi"], [same], SamplingParams(), 1, False).prompts[0].images) == 2


def test_max_length(target):
    positions = target.config.text.max_position_embeddings
    assert Generator(target).max_length == positions < 4096
    assert Generator(target, max_length=np.int64(positions)).max_length == positions
    for length in (positions + 1, 10**6):
        sentence = f"max_length must be at most {positions}, the positions of the target; got {length}"
        with pytest.raises(ValueError, match=sentence):
            Generator(target, max_length=length)
    for length in (64.0, True, "64"):
        with pytest.raises(ValueError, match="max_length must be an integer, got"):
            Generator(target, max_length=length)


def test_what_a_generator_is_made_of(target):
    with pytest.raises(ValueError, match="target must be a Target, from load_target; got str"):
        Generator("llava-hf/llava-1.5-7b-hf")
    with pytest.raises(ValueError, match="drafter must be a Drafter, from load_drafter; got str"):
        Generator(target, "vispec")
    with pytest.raises(ValueError, match="tree must be a TreeConfig, got int"):
        Generator(target, DRAFTERS["eagle2"](target), 3)


def test_a_drafter_of_another_target(target):
    drafter = DRAFTERS["eagle2"](target)
    text = dataclasses.replace(target.config.text, vocab_size=77)
    other = type("Other", (), {"config": type("Config", (), {"text": text})})
    misfit = dataclasses.replace(drafter, model=fresh_head(other, "eagle2", 0))
    with pytest.raises(ValueError, match=r"the eagle2 drafter was made for another target: vocab_size 77 \(target: "):
        Generator(target, misfit)


def test_a_drafter_that_was_loaded_for_another_target(target):
    foreign = dataclasses.replace(DRAFTERS["eagle2"](target), target_fingerprint="0123456789abcdef")
    own = Generator(target, dataclasses.replace(foreign, target_fingerprint=target.fingerprint()))
    for take in (lambda drafter: Generator(target, drafter), own.with_drafter):
        with pytest.raises(ValueError, match=f"loaded for the target 0123456789abcdef, not for {target.fingerprint()}"):
            take(foreign)
    with pytest.raises(ValueError, match="with_drafter needs a Drafter, from load_drafter; got NoneType"):
        own.with_drafter(None)


def warned(generator, requests, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            generator.generate(*requests[0], max_new_tokens=40, **options)
    return [str(each.message) for each in caught if each.category is AcceptanceWarning]


def test_a_useless_drafter_is_warned_of_once(target, generators, requests):
    """A head that knows nothing, and a good one whose record it does not reach."""
    random = Generator(target, DRAFTERS["random"](target), max_length=512)  # one that has warned nobody yet
    good = generators("eagle2")
    sampled = SamplingParams(temperature=1.0)
    assert warned(random, requests, sampling=sampled) == []  # sampling says little of a drafter
    assert len(said := warned(random, requests)) == 1 and "makes nothing faster" in said[0]
    assert random.acceptance_warning == said[0]
    assert warned(good, requests) == [] and good.acceptance_warning is None
    assert random.judges_drafter and not generators("lookup").judges_drafter  # it may have nothing to look up
    training = good.with_drafter(DRAFTERS["random"](target))
    assert warned(training, requests) == [] and training.acceptance_warning is None


def test_a_record_counts_for_its_own_tree(target):
    drafter = dataclasses.replace(DRAFTERS["eagle2"](target), about={"mean_acceptance_length": 50.0})
    assert Generator(target, drafter).acceptance_watch.recorded == 50.0
    assert Generator(target, drafter, TreeConfig(1, 2, 4)).acceptance_watch.recorded is None
