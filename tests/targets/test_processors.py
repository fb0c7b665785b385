"""A folder whose processor, template and config contradict each other is named when it is loaded, or by the one
sentence of the prompt that it cannot read."""

import json
import re
import shutil

import pytest
from PIL import Image

import jaxspec
from jaxspec.demo import target_path
from jaxspec.prompting import encode_prompt
from jaxspec.targets.processors import check_processor, load_processor, read_processor
from tests.families import family_target


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded target."""
    return shutil.copytree(target_path(), tmp_path / "target")


def edit(path, **values):
    """Keys of a JSON file set, or removed where None."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"num_additional_image_tokens": 0}, "num_additional_image_tokens must be 1, it is 0"),
        ({"num_additional_image_tokens": None}, "num_additional_image_tokens must be 1, it is 0"),
        ({"num_additional_image_tokens": 2}, "num_additional_image_tokens must be 1, it is 2"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy must be 'default', it is 'full'"),
        ({"patch_size": None}, "patch_size must be 24, it is None"),
        ({"patch_size": 12}, "patch_size must be 24, it is 12"),
    ],
)
def test_loading_names_the_key_and_its_value(folder, values, sentence):
    edit(folder / "processor_config.json", **values)
    with pytest.raises(ValueError, match=f"the folder's processor does not fit its config.json: {sentence}"):
        jaxspec.load_target(folder)


@pytest.mark.parametrize(
    ("token", "shown"), [(7, "7 ('#')"), (10**6, "1000000 (not in the tokenizer)"), (None, "32000 (not in the")]
)
def test_loading_names_another_image_token(folder, token, shown):
    edit(folder / "config.json", image_token_index=token, image_token_id=token)
    sentence = re.escape(f"config.json says that token {shown}") + ".*the processor writes 4 .'<image>'"
    with pytest.raises(ValueError, match=sentence):
        jaxspec.load_target(folder)


@pytest.mark.parametrize("values", [{}, {"vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}])
def test_spellings_that_give_the_right_number_are_as_good(folder, values):
    """Dropping a class token that was added, or neither."""
    edit(folder / "processor_config.json", **values)
    prompt = encode_prompt(jaxspec.load_target(folder), "What?", [Image.new("RGB", (9, 9))])
    assert prompt.images[0].tokens == 36


SETTINGS = {
    "llava_next": [("patch_size", 12, "patch_size must be 8, it is 12")],
    "gemma3": [
        ("image_seq_length", 3, "3 image tokens"),
        ("full_image_sequence", "<start_of_image>", "0 image tokens"),
    ],
    "qwen2_5_vl": [
        ("image_processor.patch_size", 16, "patch_size must be 8, it is 16"),
        ("image_processor.merge_size", 1, "merge_size must be 2, it is 1"),
        ("image_processor.temporal_patch_size", 1, "temporal_patch_size must be 2, it is 1"),
    ],
}


@pytest.mark.parametrize("family", SETTINGS)
def test_every_family_is_checked(family):
    target = family_target(family)
    check_processor(target.processor, target.adapter)
    for name, value, sentence in SETTINGS[family]:
        holder, _, attribute = name.rpartition(".")
        holder = getattr(target.processor, holder) if holder else target.processor
        right = getattr(holder, attribute)
        setattr(holder, attribute, value)
        if attribute == "image_seq_length":  # the processor has put it into its text already
            holder.full_image_sequence, whole = "\n\n<start_of_image>" + "<image>" * value, holder.full_image_sequence
            sentence = "image_seq_length must be 4, it is 3"
        with pytest.raises(ValueError, match=sentence):
            check_processor(target.processor, target.adapter)
        setattr(holder, attribute, right)
        if attribute == "image_seq_length":
            holder.full_image_sequence = whole
    check_processor(target.processor, target.adapter)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('alternate') }}", "the chat template refuses the messages: alternate"),
        ("{{ messages[0]['content'] + 1 }}", "the chat template refuses the messages: a value has the wrong type"),
        ("{% for message in messages %}", "the chat template refuses the messages: Unexpected end of template"),
        ("{{ nothing.there }}", "the chat template refuses the messages: 'nothing' is undefined"),
        ("no images", "the prompt has 0 <image> marks but 1 images were given"),
        ("", "the target has no chat template"),
    ],
)  # fmt: skip
def test_templates_that_fail(template, sentence):
    target = family_target("llava_next")
    target.processor.chat_template = template
    with pytest.raises(ValueError, match=sentence):
        encode_prompt(target, "What?", [Image.new("RGB", (20, 30))])


def test_whatever_a_processor_raises_is_a_sentence(monkeypatch):
    target = family_target("llava_next")
    monkeypatch.setattr(target.processor, "replace_image_token", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ValueError, match=r"the processor refuses the prompt: .*\(division by zero\)") as caught:
        encode_prompt(target, "What?", [Image.new("RGB", (20, 30))])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


BROKEN = {
    "processor_config.json": (
        "{",
        "[]",
        '{"image_processor": 5}',
        b"\xff\xfe",
    ),
    "tokenizer.json": ("", "{}", "[]", b"\xff\xfe"),
    "tokenizer_config.json": ("null", '"x"', b"\xff\xfe"),
    "chat_template.jinja": (b"\xff\xfe",),
    "special_tokens_map.json": ("[",),
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name in BROKEN for content in BROKEN[name]])
def test_files_of_a_processor_that_are_broken(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(str(folder))) as told:
        read_processor(load_processor, folder, images=True)
    assert len(str(told.value)) < 500 and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("name", "noun"), [("tokenizer.json", "tokenizer"), ("processor_config.json", "image processor")]
)
def test_files_of_a_processor_that_are_missing(folder, name, noun):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {noun}: none of {name}, "):
        jaxspec.load_target(folder)


def test_a_processor_without_its_parts(folder):
    edit(folder / "processor_config.json", processor_class="Unknown")
    with pytest.raises(ValueError, match=re.escape(f"the processor of {folder} is a ")):
        jaxspec.load_target(folder)
