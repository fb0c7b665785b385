"""Processors where transformers' own cannot be had: text models have none, Qwen2.5-VL's wants torchvision for videos.

Both answer to what `jaxspec.prompting` asks of a processor: `apply_chat_template(messages, add_generation_prompt)` and
`processor(text=[..], images=[..], return_tensors="np")`.
"""

import json
from pathlib import Path

import numpy as np
import transformers


class TextProcessor:
    """A tokenizer in the role of a processor."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> "TextProcessor":
        return cls(transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True))

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = False, tokenize: bool = False):
        # Templates of text models want strings, not parts.
        flat = [
            {**message, "content": "".join(part.get("text", "") for part in message["content"])}
            if not isinstance(message["content"], str)
            else message
            for message in messages
        ]
        return self.tokenizer.apply_chat_template(flat, add_generation_prompt=add_generation_prompt, tokenize=tokenize)

    def __call__(self, text: list[str], images=None, return_tensors: str = "np") -> dict:
        # A template has written the special tokens already.
        bos = self.tokenizer.bos_token
        return dict(
            self.tokenizer(
                text,
                return_tensors=return_tensors,
                add_special_tokens=not (bos and all(each.startswith(bos) for each in text)),
            )
        )


class QwenProcessor:
    """Qwen2.5-VL's tokenizer and image processor; each `<|image_pad|>` becomes as many as its image has tokens."""

    def __init__(self, tokenizer, image_processor, chat_template: str | None = None):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.chat_template = chat_template or tokenizer.chat_template
        self.image_token = "<|image_pad|>"

    @classmethod
    def load(cls, folder: Path) -> "QwenProcessor":
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        image_processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        return cls(tokenizer, image_processor, chat_template_of(folder))

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = False, tokenize: bool = False):
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=tokenize,
        )

    def __call__(self, text: list[str], images=None, return_tensors: str = "np") -> dict:
        inputs, counts = {}, iter(())
        if images:
            inputs = dict(self.image_processor(images, return_tensors=return_tensors))
            merged = self.image_processor.merge_size**2
            counts = iter(int(np.prod(grid)) // merged for grid in np.asarray(inputs["image_grid_thw"]))
        expanded = []
        for each in text:
            pieces = each.split(self.image_token)
            expanded.append(pieces[0] + "".join(self.image_token * next(counts, 1) + piece for piece in pieces[1:]))
        return {**self.tokenizer(expanded, return_tensors=return_tensors), **inputs}


def chat_template_of(folder: Path) -> str | None:
    """The template that older folders keep in chat_template.json, newer ones in chat_template.jinja."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text()
    if (folder / "chat_template.json").exists():
        return json.loads((folder / "chat_template.json").read_text())["chat_template"]
    return None


def load_processor(folder: Path):
    """The processor of a folder, by transformers."""
    return transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
