"""From token ids to text, token by token: what an answer says so far, and where a stop string ends it.

Decoding all tokens again for every piece is quadratic, and for many tokenizers wrong: a text that ends in half a
character is decoded to something else than its beginning is later. `tokenizers.decoders.DecodeStream` decodes little,
but loses complete characters of a tokenizer that spells in bytes (Llama 2, Gemma) when a stray byte follows them, and
cannot go on after that. Here the bytes of such tokens go through an incremental UTF-8 decoder; what other tokens say is
found by decoding each with the one before it. Every token is looked at a fixed number of times, alone, so the text does
not depend on how an answer is cut into pieces.
"""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_HALF = 3
"""Tokens of a character that is not complete yet: UTF-8 spells one in at most four bytes."""
CLEANED = (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m")
CLEANED += (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")
"""What transformers replaces, one after the other, where a folder says `clean_up_tokenization_spaces`."""
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class TokenReader:
    """What single tokens of a tokenizer stand for; every token id is looked up once. One serves any number of rows.

    Args:
      tokenizer: of transformers, fast or slow.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoders = [] if backend is None else decoder_types(backend.decoder)
        self.byte_level = decoders == ["ByteLevel"]
        self.byte_fallback = "ByteFallback" in decoders and "ByteLevel" not in decoders
        self.halves = backend is None or "ByteLevel" in decoders
        """Whether `decode` may show half a character as U+FFFD."""
        added = getattr(tokenizer, "added_tokens_decoder", {})
        # A fast tokenizer goes by its added tokens, a slow one by its lists of names.
        self.special = {token for token, each in added.items() if each.special}
        if backend is None:
            self.special |= set(tokenizer.all_special_ids)
        self.cleans = getattr(tokenizer, "clean_up_tokenization_spaces", False) and not (
            type(getattr(backend, "model", None)).__name__ == "BPE"
            and not getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
        )
        self._names: dict[int, str | None] = {}
        self._bytes: dict[int, bytes | None] = {}
        self._alone: dict[int, str] = {}

    def name(self, token: int) -> str | None:
        """How the vocabulary spells a token; None for an id that it has not."""
        if token not in self._names:
            self._names[token] = self.tokenizer.convert_ids_to_tokens(token)
        return self._names[token]

    def byte_string(self, token: int) -> bytes | None:
        """The bytes of a token that stands for bytes, b"" for an id that is not in the vocabulary; None for a token
        that stands for text."""
        if token not in self._bytes:
            self._bytes[token] = self._read_bytes(self.name(token))
        return self._bytes[token]

    def _read_bytes(self, name: str | None) -> bytes | None:
        if name is None:
            return b""
        if self.byte_level:
            spelt = [BYTE_OF[character] for character in name if character in BYTE_OF]
            return bytes(spelt) if len(spelt) == len(name) else name.encode()
        if self.byte_fallback and (found := BYTE_TOKEN.fullmatch(name)):
            return bytes([int(found[1], 16)])
        return None

    def spelling(self, token: int) -> bytes | None:
        """The bytes that a token adds to a text, spaces at its beginning included; None for a special token."""
        if token in self.special:
            return None
        data = self.byte_string(token)
        if data is None:
            data = self.decode([token, token])[len(self.alone(token)) :].encode()
        return data

    def alone(self, token: int) -> str:
        """`decode` of one token."""
        if token not in self._alone:
            self._alone[token] = self.decode([token])
        return self._alone[token]

    def decode(self, tokens: Sequence[int]) -> str:
        """The tokenizer's own decoding of tokens that belong together, before spaces are cleaned up."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Detokenizer:
    """The text of one answer while its tokens come.

    The text is that of the tokenizer's `decode(tokens, skip_special_tokens=True)` without leading spaces, but that a
    complete character stays one whatever incomplete bytes stand beside it; only these become U+FFFD, half a character
    at the end when the answer ends. (A slow tokenizer that changes the beginning of a text by what comes later cannot
    be followed in that.)

    Stop strings are looked for in the text with special tokens visible, each by its name at the place where it came, so
    a stop string may be or contain one. The stop string that is complete first ends the answer (of several complete at
    the same character, the longest); the text ends where it begins.

    Args:
      reader: of the tokenizer.
      stop: stop strings, none of them empty.
    """

    def __init__(self, reader: TokenReader, stop: Sequence[str] = ()) -> None:
        self.reader, self.stop = reader, tuple(stop)
        self.count = 0
        """Tokens taken: all that were given, or those up to the one that completed a stop string."""
        self.stopped = False
        """Whether a stop string has ended the answer."""
        self.ends: list[int] = []
        """Characters of the text that are complete after each token, the ones held back included."""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._before: list[int] = []  # tokens that the next one is decoded together with
        self._base, self._read = "", 0  # their text, and how many characters of it have been taken
        self._cleaners = [Replacer(*pair) for pair in CLEANED] if reader.cleans else []
        self._length = 0
        self._held, self._shown = "", []  # what may become a stop string, and which of its characters are text
        self._parts: list[str] = []
        self._handed = 0

    @property
    def text(self) -> str:
        """What is certain: no later token changes it."""
        return "".join(self._parts)

    def add(self, tokens: Iterable[int]) -> None:
        """Take the next tokens, up to the one that completes a stop string."""
        for token in map(int, tokens):
            if self.stopped:
                break
            self.count += 1
            if token in self.reader.special:
                self._match(self.reader.name(token) or "", shown=False)
            else:
                self._show(self._characters(token))
            self.ends.append(self._length)

    def finish(self) -> None:
        """The answer has ended: what was held back is text, half a character U+FFFD. Nothing may be added after it."""
        if not self.stopped:
            text = self._utf8.decode(b"", final=True) + self._base[self._read :]
            self._read = len(self._base)
            self._show(text)
            for index, cleaner in enumerate(self._cleaners):
                self._show(cleaner.rest(), self._cleaners[index + 1 :])
            if not self.stopped:
                self._release(len(self._held))

    def take(self) -> str:
        """The text that has become certain since the last call."""
        new = "".join(self._parts[self._handed :])
        self._handed = len(self._parts)
        return new

    def _characters(self, token: int) -> str:
        """What a token that is not special makes complete."""
        data = self.reader.byte_string(token)
        if data is None:
            return self._utf8.decode(b"", final=True) + self._plain(token)
        if data:
            self._before, self._base = [token], ""
            if not self.reader.byte_level:
                self._base = self.reader.alone(token)
            self._read = len(self._base)
        return self._utf8.decode(data)

    def _plain(self, token: int) -> str:
        """The same by the tokenizer's own decoding, together with the tokens before it that have not shown all."""
        before = self._before
        if len(before) > MAX_HALF + 1:
            near = [before[0], *before[-MAX_HALF:]]
            if self.reader.decode([*near, token]) == self.reader.decode(near):
                before.append(token)  # one of many that say nothing until others follow, such as spaces at the end
                return ""
        text = self.reader.decode([*before, token])
        half = self.reader.halves and text.endswith(REPLACEMENT) and len(before) <= MAX_HALF
        complete = len(text) - half
        new = text[self._read : complete]
        if half or not new:
            self._before, self._base, self._read = [*before, token], text, max(self._read, complete)
        else:
            self._before, self._base = [token], self.reader.alone(token)
            self._read = len(self._base)
        return new

    def _show(self, text: str, cleaners: "Sequence[Replacer] | None" = None) -> None:
        for cleaner in self._cleaners if cleaners is None else cleaners:
            text = cleaner.add(text)
        if not self._length:
            text = text.lstrip(" ")
        self._length += len(text)
        self._match(text, shown=True)

    def _match(self, text: str, shown: bool) -> None:
        """Look for stop strings, and let go what cannot become one."""
        if self.stopped:
            return
        self._held += text
        self._shown += [shown] * len(text)
        found = [(at + len(stop), at) for stop in self.stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._release(min(found)[1])
            self._held, self._shown = "", []
            self._length = len(self.text)
            self.ends = [min(end, self._length) for end in self.ends]
        else:
            held = max((common(self._held, stop) for stop in self.stop), default=0)
            self._release(len(self._held) - held)

    def _release(self, count: int) -> None:
        part = "".join(c for c, shown in zip(self._held[:count], self._shown, strict=False) if shown)
        if part:
            self._parts.append(part)
        self._held, self._shown = self._held[count:], self._shown[count:]


class Replacer:
    """`str.replace` of a text that comes in pieces."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new, self.held = old, new, ""

    def add(self, text: str) -> str:
        """What is certain after this piece."""
        *replaced, last = (self.held + text).split(self.old)
        keep = common(last, self.old)
        self.held = last[len(last) - keep :]
        return self.new.join([*replaced, last[: len(last) - keep]])

    def rest(self) -> str:
        """What no further piece completes."""
        rest, self.held = self.held, ""
        return rest


def detokenize(tokenizer: Any, tokens: Iterable[int]) -> str:
    """The text of a whole answer, as `Detokenizer` reads it."""
    row = Detokenizer(TokenReader(tokenizer))
    row.add(tokens)
    row.finish()
    return row.text


def common(text: str, start: str) -> int:
    """The longest end of `text` that `start` begins with, and is longer than."""
    longest = min(len(text), len(start) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(start[:n])), 0)


def decoder_types(decoder: Any) -> list[str]:
    """The steps of a fast tokenizer's decoder, sequences flattened; a step that only joins tokens is left out."""
    if decoder is None:
        return []

    def flat(step):
        return [each for inner in step["decoders"] for each in flat(inner)] if step["type"] == "Sequence" else [step]

    return [step["type"] for step in flat(json.loads(decoder.__getstate__())) if step["type"] != "Fuse"]


def byte_alphabet() -> dict[str, int]:
    """Which byte a character of a byte-level vocabulary stands for: printable ones for themselves, the others, in
    order, as the characters from U+0100 on (GPT-2's table, which all byte-level tokenizers share)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTE_OF = byte_alphabet()
