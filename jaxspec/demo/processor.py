"""Builds the demo target's processor: ordinary LLaVA-1.5 files that `transformers.AutoProcessor` loads.

The tokenizer is small (640 tokens), since a vocabulary of 32 000 would spend most of the embedded weights on words the
demo never says. It still encodes any text, byte by byte where it must.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import transformers  # noqa: F401 - on import it sets the level that `quiet` changes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jaxspec.demo.generation import conversation_of, numbered_scene
from jaxspec.quiet import quiet

with quiet("transformers"):  # without torchvision it takes the processor that reads with PIL, as we want, and says so
    from transformers import AutoProcessor, CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

VOCABULARY_SIZE = 640
IMAGE_SIZE = 144
PATCH_SIZE = 24
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ':' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ ' ' + content['text'] + '</s>' }}{% endgeneration %}{% endfor %}"
    "{% else %}"
    "{% if message['role'] != 'system' %}{{ ' ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""llava-hf/llava-1.5-7b-hf's template, except that an answer ends in `</s>` as in LLaVA's own training text."""


def build_processor(folder: str | os.PathLike[str], scenes: int = 6000) -> LlavaProcessor:
    """Trains the tokenizer, writes all processor files to `folder` and returns the processor.

    Args:
      folder: where the files go; made if absent.
      scenes: how many training scenes' questions and answers the tokenizer learns from.
    """
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ),
        tokenizer=wrapped_tokenizer(scenes),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    return processor


def processor_at(folder: str | os.PathLike[str]) -> LlavaProcessor:
    """The demo's processor in `folder`, built there first where it is missing."""
    if not pathlib.Path(folder, "processor_config.json").exists():
        build_processor(folder)
    with quiet("transformers"):
        return AutoProcessor.from_pretrained(folder, local_files_only=True)


def train_tokenizer(scenes: int = 6000) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `VOCABULARY_SIZE` tokens, learnt from the first `scenes` training scenes.

    Raises:
      ValueError: the text is too little to fill the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    # No space is put in front of a text, so that pieces of a conversation encode as they do within the whole.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(scenes), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY_SIZE:
        raise ValueError(
            f"{scenes} scenes give {tokenizer.get_vocab_size()} tokens; the vocabulary must have {VOCABULARY_SIZE}."
        )
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", start)]
    )
    return tokenizer


def wrapped_tokenizer(scenes: int = 6000, **special: str) -> PreTrainedTokenizerFast:
    """The trained tokenizer as transformers uses it; `special` names further special tokens, such as `boi_token`."""
    return PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(scenes),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", **special},
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=2048,
    )


def _texts(scenes: int) -> Iterator[str]:
    for index in range(scenes):
        _, turns = numbered_scene("train", index)
        for message in conversation_of(turns):
            speaker = "USER: " if message["from"] == "human" else "ASSISTANT: "
            yield speaker + message["value"].removeprefix("<image>")
