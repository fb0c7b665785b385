"""Turns one conversation about pictures into the arrays a model trains on.

The chat template and the family's own processor decide every token and pixel, so that training sees exactly what
generation will see. Only the assistant's words count in the loss, each answer with the token that ends it. Which tokens
those are is found from character positions: a processor puts some text in place of an image's mark, which text depends
on nothing but the image's size, and so the text that the tokenizer saw is known. This holds for any family and any fast
tokenizer, whatever it does at the borders of segments.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxspec.data.formats import MARK, ROLES, check_turns
from jaxspec.data.records import Example
from jaxspec.media import image_size, open_images
from jaxspec.targets.adapter import PromptAdapter
from jaxspec.targets.processors import adds_special, process, reader, render
from jaxspec.targets.prompts import EncodedPrompt
from jaxspec.targets.words import guard_messages


class ConversationEncoder:
    """Encodes conversations with the processor of any target family.

    Args:
      processor: a target's; its tokenizer must be a fast one.
      adapter: the target's.

    Raises:
      ValueError: the tokenizer isn't a fast one, or there is no chat template.
    """

    def __init__(self, processor: Any, adapter: PromptAdapter) -> None:
        self.processor, self.adapter, self.tokenizer = processor, adapter, processor.tokenizer
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(f"The tokenizer must be a fast one; got {type(self.tokenizer).__name__}.")
        if not (getattr(processor, "chat_template", None) or self.tokenizer.chat_template):
            raise ValueError("The processor must have a chat template; it has none.")
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        self._ends = tuple({*special, self.tokenizer.eos_token})
        self._expansions: dict[tuple[int, int], str] = {}

    def __call__(self, images: Sequence[bytes | str], conversations: Sequence[dict[str, str]]) -> Example:
        """Encodes one conversation.

        Args:
          images: encoded pictures (PNG, JPEG, ...) or their paths, in the order of their `<image>` marks.
          conversations: turns {"from", "value"} that alternate "human" and "gpt", behind at most one "system" turn.

        Returns:
          The whole conversation, with a mask that is True on the assistant's tokens and the end-of-turn token of each
          answer. An answer that its template doesn't end gets the tokenizer's end-of-text token, for a model that
          never sees it never learns to stop.

        Raises:
          ValueError: turns that don't alternate, marks and pictures that differ in number, pictures that cannot be
            read, a target that reads none.
        """
        text, answers = self._text_and_answers(images, conversations)
        pictures = open_images(images)
        inputs = process(self.processor, text, **({"images": pictures} if pictures else {}))
        ids = np.asarray(inputs["input_ids"][0], np.int32)
        expanded, answers = self._expand(text, answers, [picture.size for picture in pictures])
        encoded = self._tokenize(expanded, return_offsets_mapping=True)
        if encoded["input_ids"] != ids.tolist():
            raise ValueError("The processor must expand an image by its size alone; this one does something else.")
        starts, stops = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        mask = np.zeros(len(ids), bool)
        for start, stop in answers:  # special tokens that the tokenizer adds span 0 characters and are in no answer
            mask |= (starts < stop) & (stops > start)
        return Example(EncodedPrompt.of(self.adapter, ids, self.adapter.lay_out(inputs), self.tokenizer), mask)

    def encode_record(self, record: dict) -> Example:
        """A record of a data source with `images` and `conversations`."""
        return self(record["images"], record["conversations"])

    def encode_question(self, record: dict) -> tuple[EncodedPrompt, int]:
        """What a record says up to its first answer, and how many tokens that has."""
        turns = record["conversations"]
        end = next(index for index, turn in enumerate(turns) if ROLES[turn["from"]] == "assistant") + 1
        marks = sum(turn["value"].count(MARK) for turn in turns[:end])
        example = self(record["images"][:marks], turns[:end])
        prompt, start = example.prompt, int(example.loss_mask.argmax())
        positions = None if prompt.position_ids is None else prompt.position_ids[:, :start]
        return EncodedPrompt(prompt.input_ids[:start], prompt.images, positions), int(example.loss_mask.sum())

    def length(self, record: dict) -> int:
        """How many tokens `encode_record` will give, without decoding a picture."""
        text, answers = self._text_and_answers(record["images"], record["conversations"])
        sizes = [image_size(image, f"image {number}") for number, image in enumerate(record["images"], 1)]
        return len(self._tokenize(self._expand(text, answers, sizes)[0])["input_ids"])

    def _text_and_answers(self, images, conversations) -> tuple[str, list[tuple[int, int]]]:
        """The whole text with its image marks, and the (start, stop) characters of each answer."""
        messages = guard_messages(self.processor, to_messages(conversations, len(images)))
        if images and not self.adapter.image_token_ids:
            raise ValueError(f"This target reads no images; the conversation has {len(images)}.")
        text, answers, rendered = "", [], ""
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = render(self.processor, messages[:turn], prompt=True)
            full = render(self.processor, messages[: turn + 1], prompt=False)
            if not (prompt.startswith(rendered) and full.startswith(prompt)):
                raise ValueError("The chat template must only append to earlier turns; this one rewrites them.")
            text += prompt[len(rendered) :]
            answer = full[len(prompt) :].rstrip()
            if answer.endswith(self._ends):
                after = full[len(prompt) + len(answer) :]
            else:
                answer, after = answer + self.tokenizer.eos_token, ""
            answers.append((len(text), len(text) + len(answer)))
            text += answer + after
            rendered = full
        return text, answers

    def _expand(self, text: str, answers, sizes: Sequence[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
        """The text as the tokenizer sees it, for images of these (width, height), and where the answers are in it."""
        if not sizes:
            return text, answers
        mark = self.adapter.image_mark(self.processor)
        assert mark is not None  # a target that reads no images was refused
        first, *pieces = text.split(mark)
        if len(pieces) != len(sizes):
            raise ValueError(f"The chat template must mark each image once; got {len(pieces)} marks for {len(sizes)}.")
        expanded, ends, growth, at = first, [], [0], len(first)
        for piece, size in zip(pieces, sizes, strict=True):
            at += len(mark)
            ends.append(at)
            expanded += self._expansion(mark, size)
            growth.append(len(expanded) - at)
            expanded += piece
            at += len(piece)
        shifts = [growth[np.searchsorted(ends, start, side="right")] for start, _ in answers]  # no mark in an answer
        return expanded, [(start + by, stop + by) for (start, stop), by in zip(answers, shifts, strict=True)]

    def _expansion(self, mark: str, size: tuple[int, int]) -> str:
        """What the processor puts in place of the mark of an image of that (width, height)."""
        if size not in self._expansions:
            blank = Image.new("RGB", size)
            alone = self.processor(text=[mark], images=[blank], return_tensors="np", add_special_tokens=False)
            text = self.tokenizer.decode(alone["input_ids"][0], clean_up_tokenization_spaces=False)
            self._expansions[size] = sys.intern(text)  # few sizes expand differently
        return self._expansions[size]

    def _tokenize(self, text: str, **options) -> dict[str, list]:
        reading = reader(self.processor, text).tokenizer
        return reading(text, add_special_tokens=adds_special(self.tokenizer, text), **options)


def to_messages(conversations: Sequence[dict[str, str]], n_images: int) -> list[dict]:
    """LLaVA-style turns as chat-template messages. A turn's only `<image>` mark becomes an image entry ahead of its
    text, as in LLaVA's own training; where there are several, each stands where its mark stands.

    Raises:
      ValueError: turns that are not as `jaxspec.data.formats.check_turns` wants them, or marks and pictures that differ
        in number.
    """
    check_turns(conversations)
    marks = sum(turn["value"].count(MARK) for turn in conversations)
    if marks != n_images:
        raise ValueError(f"A conversation must have one {MARK} per picture; got {marks} for {n_images} pictures.")
    return [{"role": ROLES[turn["from"]], "content": to_parts(turn["value"].strip())} for turn in conversations]


def to_parts(words: str) -> list[dict]:
    """The entries of one message."""
    image, (first, *rest) = {"type": "image"}, words.split(MARK)
    if len(rest) < 2:
        text = words.replace(MARK, "").strip()
        return [image] * len(rest) + [{"type": "text", "text": text}]
    parts = [{"type": "text", "text": first}]
    for piece in rest:
        parts += [image, {"type": "text", "text": piece}]
    return [part for part in parts if part["type"] == "image" or part["text"].strip()]
