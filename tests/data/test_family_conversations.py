"""Every family's conversations: tokens and pixels are those of its processor, the loss falls on the answers alone."""

import functools
import io

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxspec import Target
from jaxspec.data.conversations import ConversationEncoder, to_messages
from jaxspec.demo.processor import CHAT_TEMPLATE, build_processor
from jaxspec.media import open_images
from jaxspec.prompting import encode_prompt
from jaxspec.targets.processors import process
from jaxspec.targets.prompts import stack_prompts
from jaxspec.targets.registry import family_of
from jaxspec.targets.target import full_logits
from tests.families import FAMILIES, family_target
from tests.folders import relative_error
from tests.helpers import config_for

SIZES = [(30, 20), (20, 50), (64, 64), (17, 23)]


def turn_template(begin: str, end: str, assistant: str, image: str, bos: str = "") -> str:
    """A template in the manner of Qwen's and Gemma's: each turn ends in a token of its own and a line break."""
    return (
        f"{{{{ '{bos}' }}}}{{% for message in messages %}}"
        f"{{% set role = '{assistant}' if message['role'] == 'assistant' else message['role'] %}}"
        f"{{{{ '{begin}' + role + '\\n' }}}}{{% for content in message['content'] %}}"
        f"{{% if content['type'] == 'image' %}}{{{{ '{image}' }}}}{{% else %}}{{{{ content['text'] }}}}{{% endif %}}"
        f"{{% endfor %}}{{{{ '{end}\\n' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{begin}{assistant}\\n' }}}}{{% endif %}}"
    )


TEMPLATES = {  # template, what it makes of an answer
    "llava": (CHAT_TEMPLATE, " {}</s>"),
    "llava_next": (CHAT_TEMPLATE, " {}</s>"),
    "qwen2_5_vl": (
        turn_template("<|im_start|>", "<|im_end|>", "assistant", "<|vision_start|><|image_pad|><|vision_end|>"),
        "{}<|im_end|>",
    ),
    "gemma3": (
        turn_template("<start_of_turn>", "<end_of_turn>", "model", "<start_of_image>", bos="<s>"),
        "{}<end_of_turn>",
    ),
    "llama": (
        "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + "
        "('</s>' if m['role'] == 'assistant' else ' ') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        " {}</s>",
    ),
}
ENDS = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """The encoder of a family, by name; one per module."""

    @functools.cache
    def encoder(name: str) -> ConversationEncoder:
        if name == "llava":
            processor = build_processor(tmp_path_factory.mktemp("processor"), scenes=300)
            hf_config = config_for(processor)
        else:
            hf_config, processor = FAMILIES[name]()
        processor.tokenizer.add_special_tokens({"additional_special_tokens": ENDS}, False)
        holder = processor.tokenizer if name == "llama" else processor
        holder.chat_template = TEMPLATES[name][0]
        hf_config.get_text_config().vocab_size = len(processor.tokenizer)
        family = family_of(hf_config)
        return ConversationEncoder(processor, family.adapter(family.config_from_hf(hf_config)))

    return encoder


@functools.cache
def picture(size: tuple[int, int]) -> bytes:
    rng, file = np.random.default_rng(size), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@st.composite
def conversations(draw, with_images: bool):
    """Pictures and one to three rounds of talk, perhaps behind a system turn; images stand in any question."""
    words = st.text("ab é😀\n.:1 ", min_size=1, max_size=12).filter(str.strip)
    turns, images = [], []
    if draw(st.booleans()):
        turns.append({"from": "system", "value": draw(words)})
    for _ in range(draw(st.integers(1, 3))):
        value = draw(words)
        for size in draw(st.lists(st.sampled_from(SIZES), max_size=2)) if with_images else ():
            value = f"<image>\n{value}" if draw(st.booleans()) else f"{value}<image>{draw(words)}"
            images.append(picture(size))
        turns += [{"from": "human", "value": value}, {"from": "gpt", "value": draw(words)}]
    return images, turns


@pytest.mark.parametrize("family", TEMPLATES)
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_conversations_are_read_as_in_generation(encoders, family, data):
    encoder = encoders(family)
    processor = encoder.processor
    images, turns = data.draw(conversations(with_images=family != "llama"))
    example = encoder(images, turns)
    ids, messages = example.prompt.input_ids, to_messages(turns, len(images))

    # The whole of it is what the processor makes of the whole,
    text = processor.apply_chat_template(messages, tokenize=False)
    inputs = process(processor, text, **({"images": open_images(images)} if images else {}))
    np.testing.assert_array_equal(ids, inputs["input_ids"][0])
    same_layouts(example.prompt.images, encoder.adapter.lay_out(inputs))

    # its beginning what generation asks the last answer with,
    target = Target(None, encoder.adapter, processor, None, ())
    prompt = encode_prompt(target, messages[:-1], images)
    same_layouts(example.prompt.images, prompt.images)
    np.testing.assert_array_equal(ids[: len(prompt.input_ids)], prompt.input_ids)
    if prompt.position_ids is not None:
        np.testing.assert_array_equal(example.prompt.position_ids[:, : len(prompt.input_ids)], prompt.position_ids)

    # the loss looks at the answers with their ends, and at nothing before the last question's end,
    answers = "".join(TEMPLATES[family][1].format(turn["value"].strip()) for turn in turns if turn["from"] == "gpt")
    assert processor.tokenizer.decode(ids[example.loss_mask]) == answers
    assert example.loss_mask[len(prompt.input_ids)] and not example.loss_mask[len(prompt.input_ids) - 1]

    # and its length is known without the pictures' pixels.
    assert encoder.length({"images": images, "conversations": turns}) == len(ids)


def same_layouts(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.index, other.index)
        for left, right in zip(leaves(one.pixels), leaves(other.pixels), strict=True):
            np.testing.assert_array_equal(left, right)


def leaves(pixels) -> list[np.ndarray]:
    flat = list(pixels.values()) if isinstance(pixels, dict) else [pixels]
    return [leaf for each in flat for leaf in (each if isinstance(each, list) else [each])]


@pytest.mark.parametrize("family", TEMPLATES)
def test_words_that_spell_control_tokens_are_words(encoders, family):
    """In questions and answers: they are learnt as they are written, and an answer has one end, its template's."""
    encoder = encoders(family)
    marks = [*ENDS, "<s>", "</s>", "<|image_pad|>", "<start_of_image>", *(["<image>"] if family == "llama" else [])]
    spelt = " ".join(marks)
    images = [] if family == "llama" else [picture(SIZES[0])]
    said = spelt.replace("<image>", "")
    turns = [question(f"{'<image>' * len(images)}What is {said}?"), {"from": "gpt", "value": f"That is {said}</s>"}] * 2
    turns[2] = question(f"And {said}?")
    example = encoder(images, turns)
    ids = example.prompt.input_ids
    answers = "".join(TEMPLATES[family][1].format(f"That is {said}</s>") for _ in range(2))
    assert encoder.tokenizer.decode(ids[example.loss_mask]) == answers
    plain = [{**turn, "value": turn["value"].replace("|", "!").replace("s", "z")} for turn in turns]
    usual = encoder(images, plain).prompt.input_ids
    special = encoder.tokenizer.convert_tokens_to_ids([*ENDS, "<s>", "</s>"])
    assert [(ids == token).sum() for token in special] == [(usual == token).sum() for token in special]
    target = Target(None, encoder.adapter, encoder.processor, None, ())
    asked = encode_prompt(target, to_messages(turns, len(images))[:-1], images)
    np.testing.assert_array_equal(ids[: len(asked.input_ids)], asked.input_ids)
    assert encoder.length({"images": images, "conversations": turns}) == len(ids)


@pytest.mark.parametrize("family", TEMPLATES)
def test_one_beginning_of_text_whoever_writes_it(encoders, family):
    encoder = encoders(family)
    ids = encoder([], [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]).prompt.input_ids
    assert (ids == encoder.tokenizer.bos_token_id).sum() == 1 and ids[0] == encoder.tokenizer.bos_token_id


def test_a_turned_photograph_has_the_length_of_what_is_seen(encoders):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (64, 16)).save(file, "JPEG", exif=exif)
    record = {"images": [file.getvalue()], "conversations": [question("<image>\nWhat?"), ANSWER]}
    encoder = encoders("llava_next")
    assert encoder.length(record) == len(encoder.encode_record(record).prompt.input_ids)


ANSWER = {"from": "gpt", "value": "That."}


def question(words: str) -> dict[str, str]:
    return {"from": "human", "value": words}


@pytest.mark.parametrize(
    ("family", "images", "turns", "message"),
    [
        ("llama", [picture(SIZES[0])], [question("<image>\nWhat?"), ANSWER], "reads no images; the conversation has 1"),
        ("llava", [b"none"], [question("<image>\nWhat?"), ANSWER], "image 1 cannot be read"),
        ("llava", [], [question("What?"), {"from": "gpt", "value": " "}], "an answer is empty"),
        ("llava", [], [question("What?"), ANSWER, {"from": "system", "value": "Go on."}], "must alternate"),
        ("llava", [picture(SIZES[0])], [question("Draw."), {"from": "gpt", "value": "<image>"}], "only questions may"),
    ],
)
def test_bad_conversations_are_named(encoders, family, images, turns, message):
    with pytest.raises(ValueError, match=message):
        encoders(family)(images, turns)


def test_a_template_that_rewrites_earlier_turns_is_refused(encoders, monkeypatch):
    encoder = encoders("llama")
    counting = "{{ messages | length }} " + TEMPLATES["llama"][0]
    monkeypatch.setattr(encoder.tokenizer, "chat_template", counting)
    with pytest.raises(ValueError, match="this one rewrites them"):
        encoder([], [question("One?"), ANSWER, question("Two?"), ANSWER])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_rows_of_a_mixed_batch_equal_each_alone(request, family):
    """Rows with no, one and two images of different sizes, and only text, long and short."""
    target = request.getfixturevalue("target") if family == "llava" else family_target(family)
    encoder = ConversationEncoder(target.processor, target.adapter)
    small, wide, tall = map(picture, SIZES[:3])
    prompts = [
        encoder(images, [question(words), ANSWER]).prompt
        for images, words in [
            ([], "Hello?"),
            ([wide], "<image>\nWhat is this?"),
            ([small, tall], "One <image> and another <image>, which is larger?"),
            ([], "What is a chart for, and how many shapes does it take to make one? " * 2),
        ]
    ]

    def logits(rows, length):
        batch = stack_prompts(target.adapter, rows, length)
        return np.asarray(full_logits(target.model, batch.input_ids, batch.lengths, batch.images, batch.position_ids))

    together = logits(prompts, 256)
    for row, prompt in enumerate(prompts):
        own = len(prompt.input_ids)
        assert relative_error(together[row, :own], logits([prompt], own)[0]) < 1e-5
