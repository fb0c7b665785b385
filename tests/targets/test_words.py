"""What people write is read as text, whatever it spells; everything else is read as by the tokenizer itself."""

import functools

import numpy as np
import pytest
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxspec.prompting import encode_prompt
from jaxspec.targets.processors import TextProcessor, process
from jaxspec.targets.words import GUARD, control_tokens, guard_messages
from tests.families import family_target

CONTROL = ["<s>", "</s>", "<image>", "<|im_end|>"]
IMAGE_FAMILIES = {
    "llava_next": ["<image>", "</s>"],
    "qwen2_5_vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "</s>"],
    "gemma3": ["<start_of_image>", "<image>", "<end_of_image>", "</s>"],
}
targets = functools.cache(family_target)
few = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def trained(kind: str) -> transformers.PreTrainedTokenizerFast:
    """A small tokenizer in the manner of Llama 2 (a space ahead of every stretch of text, bytes for what it does not
    know), of newer Llama and Gemma folders (a space ahead of the first) or of Qwen (bytes throughout)."""
    alphabet = [f"<0x{value:02X}>" for value in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind != "qwen"))
    if kind == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>", *(alphabet if kind != "qwen" else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet if kind == "qwen" else [], show_progress=False
    )
    tokenizer.train_from_iterator(["the image of a house <im age> | s / end", "images im_end of <|the"] * 20, trainer)
    state = tokenizer.to_str()
    tokenizer = Tokenizer.from_str(state)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>", AddedToken("<|im_end|>", lstrip=True)]})
    fast.add_tokens(["<tool>"])
    return fast


tokenizer_of = functools.cache(trained)
TOKENIZERS = ("llama", "metaspace", "qwen")
pieces = st.lists(
    st.one_of(
        st.sampled_from([*CONTROL, "<tool>", "<im", "age>", "<", "|>", " "]), st.text("ais <>|é猫\n", max_size=6)
    ),
    max_size=6,
).map("".join)


@pytest.mark.parametrize("kind", TOKENIZERS)
@few
@given(words=st.text("ais <>|/é猫\n", max_size=20), control=st.lists(st.sampled_from(CONTROL), max_size=3))
def test_a_text_without_such_words_has_the_tokenizers_ids_and_offsets(kind, words, control):
    """The respelt tokenizer is the tokenizer."""
    tokenizer = tokenizer_of(kind)
    text = words.join(["", *control, ""])
    for special in (True, False):
        expected = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids, spans = control_tokens(TextProcessor(tokenizer)).encode(text, special)
        assert ids == expected["input_ids"] and list(map(tuple, expected["offset_mapping"])) == spans


@pytest.mark.parametrize("kind", TOKENIZERS)
@few
@given(first=pieces, second=pieces)
@example(first="<im", second="age>")
@example(first="<image><image></s>", second="<<image>image>")
def test_words_never_become_control_tokens(kind, first, second):
    """Nor does what they spell together; the words themselves are all there, the template's tokens, too."""
    tokenizer = tokenizer_of(kind)
    messages = [{"role": "user", "content": [{"type": "text", "text": each} for each in (first, second)]}]
    (message,) = guard_messages(TextProcessor(tokenizer), messages)
    words = "".join(part["text"] for part in message["content"])
    assert words.replace(GUARD, "") == first + second
    ids = process(TextProcessor(tokenizer), f"</s>{words}<|im_end|>")["input_ids"][0].tolist()
    special = [number for number in ids if number in tokenizer.convert_tokens_to_ids(CONTROL)]
    assert special == tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<|im_end|>"])
    start, end = ids.index(special[1]) + 1, ids.index(special[2])
    decoded = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
    kept = (
        (first + second).rstrip()
        if kind != "qwen"
        else tokenizer.backend_tokenizer.normalizer.normalize_str(first + second).rstrip()
    )
    assert decoded.strip() == kept.strip()


def test_spaces_that_a_template_strips_join_no_control_token():
    messages = [{"role": "user", "content": [{"type": "text", "text": each} for each in ("a <im \n", " age>")]}]
    (message,) = guard_messages(TextProcessor(tokenizer_of("qwen")), messages)
    stripped = "".join(part["text"].strip() for part in message["content"])
    assert "<image>" not in stripped and stripped.replace(GUARD, "") == "a <image>"


def test_a_slow_tokenizer_refuses_such_words_by_name():
    class Slow:
        is_fast, bos_token, added_tokens_decoder, image_token = False, None, {}, "<image>"

        def __len__(self):
            return 7

    processor = TextProcessor(Slow())
    (message,) = guard_messages(processor, [{"role": "user", "content": [{"type": "text", "text": "an <image>"}]}])
    with pytest.raises(ValueError, match="these words spell a control token of the target .<image>"):
        process(processor, message["content"][0]["text"])


# -- through the chat template and the processor -----------------------------------------------------------------------


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_questions_may_spell_marks(family):
    """Words between real images: each image keeps its features, the words are in the prompt as they were written."""
    target = targets(family)
    spelt = " and ".join(IMAGE_FAMILIES[family])
    pictures = [Image.new("RGB", (20 + 20 * index, 30), (90 * index, 50, 9)) for index in range(2)]
    image = {"type": "image"}
    parts = [image, {"type": "text", "text": f"What does {spelt} mean?"}, image, {"type": "text", "text": spelt}]
    prompt = encode_prompt(target, [{"role": "user", "content": parts}], pictures)
    assert len(prompt.images) == 2
    words = prompt.input_ids[~target.adapter.is_image(prompt.input_ids)]
    text = target.tokenizer.decode(words)
    assert f"What does {spelt} mean?" in text and text.count(spelt) == 2
    plain = [{**part, "text": part["text"].replace("<", "(")} if "text" in part else part for part in parts]
    usual = encode_prompt(target, [{"role": "user", "content": plain}], pictures)
    control = target.tokenizer.convert_tokens_to_ids(IMAGE_FAMILIES[family])
    counts = [[int((each.input_ids == token).sum()) for token in control] for each in (prompt, usual)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "llava_next"])
def test_roles_and_answers_are_words(family):
    target = targets(family)
    talk = [
        {"role": "user", "content": "Is </s> the end?"},
        {"role": "assistant", "content": "No, </s> is text, <s> too."},
        {"role": "user", "content": "So?"},
    ]
    ids = encode_prompt(target, talk).input_ids
    changed = [{**each, "content": each["content"].replace("s>", "S>")} for each in talk]
    usual = encode_prompt(target, changed).input_ids
    for token in target.tokenizer.convert_tokens_to_ids(["<s>", "</s>"]):
        assert (ids == token).sum() == (usual == token).sum()
    assert "No, </s> is text, <s> too." in target.tokenizer.decode(ids)


def test_raw_prompts_hold_marks():
    target = targets("llava_next")
    prompt = encode_prompt(target, "<image>What?</s>", [Image.new("RGB", (20, 30))], raw=True)
    assert prompt.input_ids[-1] == target.tokenizer.eos_token_id and len(prompt.images) == 1
    np.testing.assert_array_equal(prompt.input_ids[1:2], target.config.image_token_id)
