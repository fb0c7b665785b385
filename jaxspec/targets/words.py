"""What people write is text, whatever it spells: `<image>` in a question is seven characters and no picture.

A chat template joins the words of a conversation and the model's control tokens into one string, in which processor and
tokenizer see control tokens wherever they are spelt. So words that spell one are guarded ahead of the template: a
character that no text can hold (half of a surrogate pair) goes into each. What has guards in it is read by a copy of
the tokenizer whose control tokens are spelt as nobody can guess: the template's own are respelt, the words stay as they
are. Words without control tokens take no part in this; their ids are those of the tokenizer.

transformers' own `sanitize_control_tokens` (since 5.24) reads words piece by piece, which changes ids where two pieces
meet, wants a template that writes the first token itself and gives no character positions, which training needs.
"""

import dataclasses
import functools
import json
import re
import secrets
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
import transformers

GUARD = "\udfff"
BYTE = re.compile("<0x[0-9A-F]{2}>")
"""Tokens that stand for bytes: no control tokens, even where a tokenizer calls them special."""


def guard_messages(processor: Any, messages: Sequence[Mapping]) -> list[dict]:
    """Chat messages, whose content is a list of parts, with every control token in their roles and texts guarded."""
    words = [text for message in messages for text in (message["role"], *texts_of(message))]
    guarded = iter(control_tokens(processor).guard(words))
    made = []
    for message in messages:
        role = next(guarded)
        parts = [{**part, "text": next(guarded)} if part["type"] == "text" else part for part in message["content"]]
        made.append({**message, "role": role, "content": parts})
    return made


def texts_of(message: Mapping) -> list[str]:
    return [part["text"] for part in message["content"] if part["type"] == "text"]


@dataclasses.dataclass(frozen=True)
class Respelt:
    """A tokenizer whose control tokens have other spellings, and these by the usual ones."""

    backend: tokenizers.Tokenizer
    spellings: dict[str, str]


class ControlTokens:
    """The control tokens of a processor: the tokenizer's special tokens and the marks of images and videos."""

    def __init__(self, tokenizer: Any, marks: frozenset[str]) -> None:
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special = {name for name in special if not BYTE.fullmatch(name)}
        self.tokenizer = weakref.proxy(tokenizer)  # which `KNOWN` must not keep alive
        self.names = sorted(special | marks, key=lambda name: (-len(name), name))  # the longest is the one that is read
        self.pattern = re.compile("|".join(map(re.escape, self.names)) or "(?!)")
        compact = [name for name in map(without_spaces, self.names) if len(name) > 1]
        self.compact_pattern = re.compile(f"(?=({'|'.join(map(re.escape, compact)) or '(?!)'}))")

    def guard(self, words: Sequence[str]) -> list[str]:
        """The words with a guard in every control token that they spell, also across their borders and whatever spaces
        a template strips."""
        compact = without_spaces("".join(words))
        found = [match.start() for match in self.compact_pattern.finditer(compact)]
        if not found:
            return list(words)
        starts, place, made = set(found), 0, []
        for text in words:
            guarded = []
            for character in text:
                guarded.append(character)
                if not character.isspace():
                    guarded += [GUARD] * (place in starts)
                    place += 1
            made.append("".join(guarded))
        return made

    def encode(self, text: str, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text with guards, and the characters of it (start, stop) that each stands for.

        Raises ValueError where the tokenizer cannot be respelt.
        """
        pieces, starts, stops, at = [], [], [], 0
        for match in [*self.pattern.finditer(text), None]:
            end = len(text) if match is None else match.start()
            places = [place for place in range(at, end) if text[place] != GUARD]
            pieces.append("".join(text[place] for place in places))
            starts += places
            stops += [place + 1 for place in places]
            if match is not None:
                name = match.group()
                pieces.append(self.respelt.spellings.get(name, name))
                starts += [match.start()] * len(pieces[-1])
                stops += [match.end()] * len(pieces[-1])
                at = match.end()
        encoding = self.respelt.backend.encode("".join(pieces), add_special_tokens=add_special_tokens)
        spans = [(starts[a], stops[b - 1]) if b > a else (0, 0) for a, b in encoding.offsets]
        return encoding.ids, spans

    @functools.cached_property
    def respelt(self) -> Respelt:
        """Made when words with a control token first come along: for a large vocabulary it takes a second or two."""
        refusal = f"these words spell a control token of the target ({', '.join(self.names[:3])}, ..), and"
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(f"{refusal} its tokenizer, not a fast one, would read it as such")
        usual = self.tokenizer.backend_tokenizer
        state, key = json.loads(usual.to_str()), secrets.token_hex(8)
        added = {entry["content"] for entry in state["added_tokens"]}
        spellings = {name: f"{name[0]}{key}{name[1:]}" for name in self.names if name in added}

        def spelt(name):
            return spellings.get(name, name)

        for entry in state["added_tokens"]:
            entry["content"] = spelt(entry["content"])
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {spelt(name): number for name, number in model["vocab"].items()}
        else:  # of a unigram model
            model["vocab"] = [[spelt(name), score] for name, score in model["vocab"]]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = spelt(model["unk_token"])
        state["padding"] = state["truncation"] = None
        try:
            backend = tokenizers.Tokenizer.from_str(json.dumps(state))
        except Exception as error:  # whatever the library raises
            raise ValueError(f"{refusal} its tokenizer cannot be respelt: {error}") from error
        if any(backend.token_to_id(other) != usual.token_to_id(name) for name, other in spellings.items()):
            raise ValueError(f"{refusal} its tokenizer cannot be respelt: ids would change")
        return Respelt(backend, spellings)


def without_spaces(text: str) -> str:
    return "".join(text.split())


KNOWN: weakref.WeakKeyDictionary[Any, tuple[tuple, ControlTokens]] = weakref.WeakKeyDictionary()
MARKS = ("image_token", "video_token", "boi_token", "eoi_token")
"""Where processors and tokenizers keep the marks of images and videos."""


def control_tokens(processor: Any) -> ControlTokens:
    """Those of a processor, found anew only where its tokenizer has been given more tokens."""
    tokenizer = processor.tokenizer
    given = (getattr(holder, name, None) for holder in (processor, tokenizer) for name in MARKS)
    marks = frozenset(mark for mark in given if mark)
    state, known = KNOWN.get(tokenizer, (None, None))
    if known is None or state != (len(tokenizer), marks):
        known = ControlTokens(tokenizer, marks)
        KNOWN[tokenizer] = (len(tokenizer), marks), known
    return known


class GuardedTokenizer:
    """A tokenizer for texts with guards, in the place where a processor keeps its own."""

    def __init__(self, tokenizer: Any, control: ControlTokens) -> None:
        self.tokenizer, self.control = tokenizer, control

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(
        self,
        text: str | list[str],
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
        **options: Any,
    ) -> transformers.BatchEncoding:
        """`input_ids`, `attention_mask` and, on demand, `offset_mapping` as of the tokenizer; of one text without a
        batch. Padding and truncation are no options here."""
        del options
        texts = [text] if isinstance(text, str) else text
        ids, spans = zip(*(self.control.encode(each, add_special_tokens) for each in texts), strict=True)
        made = {"input_ids": list(ids), "attention_mask": [[1] * len(each) for each in ids]}
        if return_offsets_mapping:
            made["offset_mapping"] = list(spans)
        if isinstance(text, str):
            made = {name: values[0] for name, values in made.items()}
        return transformers.BatchEncoding(made, tensor_type=return_tensors)
