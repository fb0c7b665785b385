"""Turns one conversation about pictures into the arrays a model trains on.

The chat template and the processor decide every token, so that training sees exactly what generation will see. Only
the assistant's words count in the loss; which tokens those are is found from character positions, which holds for any
fast tokenizer whatever it does at the borders of segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from jaxspec.data.pipeline import Example
from jaxspec.media import open_images
from jaxspec.targets.contract import TargetConfig
from jaxspec.targets.prompts import EncodedPrompt

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}


class ConversationEncoder:
    """Encodes LLaVA-style conversations with one LLaVA-1.5-style processor (every picture takes as many tokens).

    Args:
      processor: what `transformers.AutoProcessor.from_pretrained` gives; its tokenizer must be a fast one.
      config: the target's.

    Raises:
      ValueError: the tokenizer isn't a fast one, or the processor has no chat template.
    """

    def __init__(self, processor, config: TargetConfig):
        if not getattr(processor.tokenizer, "is_fast", False):
            raise ValueError(f"The tokenizer must be a fast one; got {type(processor.tokenizer).__name__}.")
        if not processor.chat_template:
            raise ValueError("The processor must have a chat template; it has none.")
        self.processor, self.config = processor, config
        blank = processor(text=processor.image_token, images=[Image.new("RGB", (64, 64))], return_tensors="np")
        self.tokens_per_image = int(np.sum(blank["input_ids"] == processor.image_token_id))

    def __call__(self, images: Sequence[bytes], conversations: Sequence[dict[str, str]]) -> Example:
        """Encodes one conversation.

        Args:
          images: encoded pictures (PNG, JPEG, ...) in the order of their `<image>` markers.
          conversations: turns {"from": "human" | "gpt", "value": text}, alternating, the human first.

        Returns:
          The whole conversation, with a mask that is True on the assistant's tokens and the end-of-text token of each
          answer.

        Raises:
          ValueError: turns that don't alternate, or markers and pictures that differ in number.
        """
        messages = to_messages(conversations, len(images))
        text, spans = self._text_and_answers(messages)
        # The processor would do the same expansion, but it doesn't report character positions.
        marker = self.processor.image_token
        expanded = marker * self.tokens_per_image
        text, spans = _replace_tracking(text, marker, expanded, spans)
        encoded = self.processor.tokenizer(text, return_offsets_mapping=True, add_special_tokens=True)
        offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        mask = np.zeros(len(offsets), bool)
        for start, stop in spans:
            # Special tokens that the tokenizer adds have empty spans at 0, which are never within an answer.
            mask |= (offsets[:, 0] >= start) & (offsets[:, 1] <= stop) & (offsets[:, 1] > offsets[:, 0])
        ids, inputs = np.asarray(encoded["input_ids"], np.int32), {}
        if images:
            inputs = self.processor.image_processor(open_images(images), return_tensors="np")
        layouts = self.config.lay_out({**inputs, "input_ids": ids[None]})
        return Example(EncodedPrompt(ids, layouts, self.config.position_ids(ids, layouts)), mask)

    def encode_record(self, record: dict) -> Example:
        """A record of a data source with `images` and `conversations`."""
        return self(record["images"], record["conversations"])

    def _text_and_answers(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """The whole text with its image markers, and the (start, stop) characters of each answer."""
        end = self.processor.tokenizer.eos_token
        text, spans, rendered = "", [], ""
        for turn in range(0, len(messages), 2):
            prompt = self._render(messages[: turn + 1], prompt=True)
            full = self._render(messages[: turn + 2], prompt=False)
            if not (prompt.startswith(rendered) and full.startswith(prompt)):
                raise ValueError("The chat template must only append to earlier turns; this one rewrites them.")
            text += prompt[len(rendered) :]
            # Some templates leave the end-of-text token to the trainer; without it a model never learns to stop.
            answer = full[len(prompt) :].rstrip()
            answer = answer if answer.endswith(end) else answer + end
            spans.append((len(text), len(text) + len(answer)))
            text += answer
            rendered = full
        bos = self.processor.tokenizer.bos_token
        if bos and text.startswith(bos):
            # The tokenizer adds it itself.
            text, spans = text[len(bos) :], [(start - len(bos), stop - len(bos)) for start, stop in spans]
        return text, spans

    def _render(self, messages: list[dict], prompt: bool) -> str:
        return self.processor.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)


def to_messages(conversations: Sequence[dict[str, str]], n_images: int) -> list[dict]:
    """LLaVA-style turns as chat-template messages, each `<image>` marker as an image entry ahead of the turn's text.

    Raises:
      ValueError: no turns, turns that don't alternate human and gpt and end with gpt, or markers and pictures that
        differ in number.
    """
    roles = [ROLES.get(turn["from"]) for turn in conversations]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(
            f"A conversation must alternate human and gpt and end with gpt; got {[t['from'] for t in conversations]}."
        )
    markers = sum(turn["value"].count("<image>") for turn in conversations)
    if markers != n_images:
        raise ValueError(f"A conversation must have one <image> per picture; got {markers} for {n_images} pictures.")
    messages = []
    for role, turn in zip(roles, conversations, strict=True):
        content = [{"type": "image"}] * turn["value"].count("<image>")
        content = [*content, {"type": "text", "text": turn["value"].replace("<image>", "").strip()}]
        messages.append({"role": role, "content": content})
    return messages


def _replace_tracking(text: str, old: str, new: str, spans: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
    """Replaces `old` by `new` and moves the spans with the text they cover."""
    growth = len(new) - len(old)
    moved = [(start + growth * text.count(old, 0, start), stop + growth * text.count(old, 0, stop))
             for start, stop in spans]  # fmt: skip
    return text.replace(old, new), moved
