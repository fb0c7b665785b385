"""A set of answers: what is written is what is read, and images are found by reference."""

import json
import resource
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from jaxspec.data.answers import ABOUT, Answer, AnswerEncoder, AnswerParts, AnswerSource, Part, Refused, serialized
from jaxspec.data.pictures import Pictures
from jaxspec.data.scenes import load_scenes
from jaxspec.demo.generation import numbered_scene
from jaxspec.demo.processor import build_processor
from jaxspec.demo.scenes import render
from jaxspec.distillation import finish_output, open_output
from jaxspec.media import open_image
from jaxspec.prompting import encode_prompt
from jaxspec.targets.llava import LlavaAdapter, LlavaConfig
from tests.helpers import config_for


def answer(number: int, images=()) -> Answer:
    ids = np.arange(number + 1, dtype=np.int32)
    return Answer(f"r{number}", ids, ids[::-1], tuple(images), number / 4, 2**32 - 1 - number)


def write_set(folder, answers, part_size=2, image_folder=None) -> AnswerParts:
    open_output(folder, {}, {"command": "distill", "image_folder": image_folder and str(image_folder)})
    parts = AnswerParts(folder, range(len(answers)), part_size)
    for part, numbers in enumerate(parts.ranges):
        parts.write(part, Part([answers[number] for number in numbers if answers[number]]))
    return parts


def test_what_is_written_is_what_is_read(tmp_path):
    answers = [answer(number, ["scenes/test/3"] * (number % 3)) for number in range(5)]
    about = finish_output(tmp_path, write_set(tmp_path, answers))
    assert (about["answers"], about["prompt_tokens"], about["refused"]) == (5, 15, [])
    assert about["with_images"] == 3
    source = AnswerSource(tmp_path)
    assert source.has_images is True
    assert len(source) == 5 and source.about == about
    for record, expected in zip(source, answers, strict=True):
        assert (record["id"], record["temperature"], record["seed"]) == (
            expected.id,
            expected.temperature,
            expected.seed,
        )
        for field in ("prompt_ids", "answer_ids"):
            np.testing.assert_array_equal(record[field], getattr(expected, field))
            assert record[field].dtype == np.int32
        assert len(record["images"]) == len(expected.images)


def test_records_have_one_order_of_fields():
    """Otherwise processes that make the same answers would write different bytes."""
    row = serialized(answer(3, ["one.png"]))
    fields = (b"answer_ids", b"id\x12", b"images", b"prompt_ids", b"seed", b"temperature")
    assert [row.count(field) for field in fields] == [1] * len(fields)
    assert sorted(map(row.index, fields)) == [row.index(field) for field in fields]


def test_a_part_without_answers_shifts_nothing(tmp_path):
    answers = [answer(0), answer(1), None, None, answer(4)]
    parts = write_set(tmp_path, answers)
    parts.write(1, Part([], [Refused(2, "r2", "broken"), Refused(3, "r3", "broken")]))
    about = finish_output(tmp_path, parts)
    assert [record["id"] for record in AnswerSource(tmp_path)] == ["r0", "r1", "r4"]
    assert [each["id"] for each in about["refused"]] == ["r2", "r3"]


def test_a_set_says_whether_it_has_images_where_it_knows(tmp_path):
    parts = write_set(tmp_path, [answer(number) for number in range(4)])
    finish_output(tmp_path, parts)
    assert AnswerSource(tmp_path).has_images is False
    older = json.loads(parts.report_file(1).read_text())
    del older["with_images"]
    parts.report_file(1).write_text(json.dumps(older))
    (tmp_path / ABOUT).unlink()
    open_output(tmp_path, {}, {"image_folder": None})
    about = finish_output(tmp_path, parts)
    assert about["answers"] == 4 and AnswerSource(tmp_path).has_images is None


def test_sets_that_are_not_there_or_not_finished(tmp_path):
    with pytest.raises(FileNotFoundError, match="make them with: python -m jaxspec distill --output"):
        AnswerSource(tmp_path / "none")
    parts = write_set(tmp_path, [None, None])
    with pytest.raises(ValueError, match="are not finished; go on with: distill"):
        AnswerSource(tmp_path)
    parts.write(0, Part([], [Refused(0, "r0", "the reason")]))
    with pytest.raises(ValueError, match="none of the 2 records could be answered; the first: r0: the reason"):
        finish_output(tmp_path, parts)


def test_a_full_disk_leaves_no_half_part(tmp_path):
    parts = AnswerParts(tmp_path, range(4), 2)
    parts.write(0, Part([answer(0), answer(1)]))
    before = sorted(path for path in tmp_path.iterdir() if path.is_file())
    limits = _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))  # the disk is full after 1,000 bytes of a file
    try:
        with pytest.raises(OSError, match="answers cannot be written: .*File too large"):
            parts.write(1, Part([answer(2), answer(3)]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path for path in tmp_path.iterdir() if path.is_file()) == before
    assert parts.finished(0) and not parts.finished(1)


def test_pictures_by_reference(tmp_path):
    scene = np.asarray(render(numbered_scene("test", 1)[0]))
    np.testing.assert_array_equal(open_image(Pictures(None)["scenes/test/1"]), scene)
    Image.fromarray(scene).save(tmp_path / "one.png")
    np.testing.assert_array_equal(open_image(Pictures(tmp_path)["one.png"]), scene)
    records = load_scenes(tmp_path / "data", "test", train_size=1, validation_size=1, test_size=3)
    prepared = Pictures(next((tmp_path / "data").glob("jaxspec_scenes/*/*")))
    for index in range(3):
        assert prepared[f"test/{index}"] == records[index]["images"][0]
    for pictures, reference, sentence in (
        (prepared, "test/3", "the split has 3 records"),
        (prepared, "one.png", "referred to as SPLIT/INDEX; got 'one.png'"),
        (prepared, "dev/0", "split must be one of"),
        (Pictures(None), "one.png", "referred to as scenes/SPLIT/NUMBER; got 'one.png'"),
        (Pictures(None), "scenes/dev/0", "split must be one of train, validation, test"),
    ):
        with pytest.raises(ValueError, match=sentence):
            pictures[reference]


def test_encoded_records_are_what_was_asked(tmp_path):
    processor = build_processor(tmp_path / "processor", scenes=300)
    adapter = LlavaAdapter(LlavaConfig.from_hf(config_for(processor)))
    target = SimpleNamespace(processor=processor, adapter=adapter)
    pictures = [Image.new("RGB", (40, 60), colour) for colour in ("red", "blue")]
    prompt = encode_prompt(target, "Compare the two.", pictures)
    encoder = AnswerEncoder(processor, adapter)
    record = {"prompt_ids": prompt.input_ids, "answer_ids": np.array([7, 8, 2], np.int32), "images": pictures}
    (again, tokens), example = encoder.encode_question(record), encoder.encode_record(record)
    assert tokens == 3
    np.testing.assert_array_equal(again.input_ids, prompt.input_ids)
    for ours, theirs in zip(again.images, prompt.images, strict=True):
        np.testing.assert_array_equal(ours.pixels, theirs.pixels)
    np.testing.assert_array_equal(example.prompt.input_ids[example.loss_mask], [7, 8, 2])
    with pytest.raises(ValueError, match="has 72 image tokens, its images have 36"):
        encoder.encode_question({**record, "images": pictures[:1]})


def test_other_settings_are_refused_by_name(tmp_path):
    open_output(tmp_path, {"seed": 0, "suffix": ""}, {"command": "first"})
    open_output(tmp_path, {"seed": 0, "suffix": ""}, {"command": "second"})
    assert json.loads((tmp_path / ABOUT).read_text())["command"] == "first"
    with pytest.raises(ValueError, match=r"other settings: seed \(there 0, here 1\); choose another"):
        open_output(tmp_path, {"seed": 1, "suffix": ""}, {})
