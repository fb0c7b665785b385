"""Structured output: answers that follow a JSON schema or a regular expression, compiled by llguidance for a target.

grammars = Grammars(target.tokenizer, target.model.vocab_size, target.stop_token_ids)  # one per target
grammar = grammars.json_schema({"type": "object", ..})                                 # one per schema
matcher = grammar.matcher()                                                            # one per answer (matcher.py)
"""

import collections
import concurrent.futures
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
import transformers

from jaxspec.serving.matcher import Matcher, Vocabulary
from jaxspec.serving.schemas import pattern_text, schema_text

KEPT = 16
"""Compiled grammars that are kept for requests to come; their number bounds their memory."""
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON is written in one line. Where any white space may stand, a model that has little to say, or is small, says
white space until it has no tokens left; and the less freedom, the more can be drafted."""
LIMITS = llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
"""What a grammar may cost: 1 to 2 kB per state."""
STACK = 256 * 2**20
"""Bytes of stack for compiling. llguidance follows the references of a schema recursively, 5 kB for each level, and
where the stack ends so does the process: the longest chain that `MAX_SCHEMA` has room for takes 55 MB."""
NEEDED = frozenset((0x0A, *range(0x20, 0x7F)))
"""Bytes that a tokenizer must have tokens for: JSON is written with them, and then is free not to use others."""


class Grammar:
    """A compiled grammar; any number of answers may follow it at once, made in any threads. Made by `Grammars`.

    Copies of llguidance's matchers share what its lexer has learnt, and where that reaches a limit they all fail, for
    ever. So a copy is only taken of one that works, and a matcher that fails goes on with a lexer of its own: no answer
    depends on the others.
    """

    def __init__(self, compiled: Callable[[], llguidance.LLMatcher], vocabulary: Vocabulary) -> None:
        self._compiled, self._vocabulary = compiled, vocabulary
        self._initial = compiled()
        self._lock = threading.Lock()

    def matcher(self, stop_token_ids: Iterable[int] = ()) -> Matcher:
        """The state of an answer that has not begun; `stop_token_ids` are the request's own, beside the target's."""
        with self._lock:
            state = self._initial.deep_copy()
            state.compute_bitmask()
            if state.is_error():
                self._initial = self._compiled()
                state = self._initial.deep_copy()
        stops = dict.fromkeys((*self._vocabulary.stop_token_ids, *map(int, stop_token_ids)))
        return Matcher(state, self._compiled, self._vocabulary, tuple(stops))


class Grammars:
    """Makes grammars for a target. Threads may share one.

    The first grammar prepares the tokenizer, which takes a second where it is large.

    Args:
      tokenizer: of transformers, a fast one, with tokens for all of ASCII that can be printed.
      vocab_size: V, the target's logits; tokens behind it and ids without a token are never allowed.
      stop_token_ids: the target's. Where a grammar may end they are all allowed, and other special tokens never.

    Methods raise ValueError, one sentence, for what cannot be compiled, be it the grammar's or the tokenizer's fault.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, stop_token_ids: Sequence[int]) -> None:
        self._source = tokenizer, vocab_size, tuple(map(int, stop_token_ids))
        self._vocabulary: Vocabulary | None = None
        self._kept: collections.OrderedDict[str, Grammar] = collections.OrderedDict()
        self._lock = threading.Lock()

    def json_schema(self, schema: dict[str, Any]) -> Grammar:
        """Answers are JSON that `schema` describes, properties in the schema's order (docs/STRUCTURED.md has what is
        supported)."""
        text = schema_text(schema)
        try:
            source = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=LAYOUT)
        except ValueError as problem:
            raise ValueError(f"the JSON schema cannot be compiled: {one_sentence(str(problem))}") from None
        return self._compiled(source, text, "the JSON schema")

    def json_object(self) -> Grammar:
        """Answers are any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> Grammar:
        """Answers match `pattern`, in the syntax of Rust's `regex`, from their first character to their last."""
        text = pattern_text(pattern)
        return self._compiled(llguidance.LLMatcher.grammar_from_regex(text), text, "the regular expression")

    def _compiled(self, source: str, text: str, name: str) -> Grammar:
        with self._lock:
            if source in self._kept:
                self._kept.move_to_end(source)
                return self._kept[source]
            if self._vocabulary is None:
                self._vocabulary = vocabulary_of(*self._source)
            vocabulary = self._vocabulary
        # Two that ask for the same at once compile it twice: nobody waits for another's grammar.
        for character in text:
            if not vocabulary.lacking.isdisjoint(character.encode()):
                raise ValueError(f"{name} has the character {character!r}, which the target's tokenizer cannot spell")

        def compiled() -> llguidance.LLMatcher:
            matcher = llguidance.LLMatcher(vocabulary.tokenizer, source, log_level=0, limits=LIMITS)
            if matcher.is_error():
                raise ValueError(f"{name} cannot be compiled: {one_sentence(matcher.get_error())}")
            if warnings := matcher.get_grammar_warnings():
                raise ValueError(f"{name} cannot be followed: {one_sentence(warnings[0])}")
            return matcher

        grammar = Grammar(lambda: with_room(compiled), vocabulary)
        try:
            grammar.matcher().start()
        except RuntimeError:
            raise ValueError(f"{name} has no answer that the target's tokenizer can spell") from None
        with self._lock:
            grammar = self._kept.setdefault(source, grammar)
            self._kept.move_to_end(source)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return grammar


def with_room(function: Callable[[], Any]) -> Any:
    """What the function returns, in a thread with a stack of `STACK` bytes (only what is touched takes memory)."""
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        with _stack_size:
            usual = threading.stack_size(STACK)
            try:
                future = executor.submit(function)  # which starts the thread
            finally:
                threading.stack_size(usual)
        return future.result()


_stack_size = threading.Lock()


def vocabulary_of(tokenizer: Any, vocab_size: int, stop_token_ids: tuple[int, ...]) -> Vocabulary:
    """What grammars need to know of a target's tokens. Raises ValueError, one sentence, for a slow tokenizer, for one
    that cannot spell ASCII, and for a target without a stop token: its answers could not end."""
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
        raise ValueError(
            f"structured output needs a fast tokenizer (a folder with tokenizer.json), the target has a "
            f"{type(tokenizer).__name__}"
        )
    stops = [token for token in stop_token_ids if 0 <= token < vocab_size]
    if not stops:
        raise ValueError("structured output needs a target with a stop token, this one's answers could not end")
    highest = max((*tokenizer.get_vocab().values(), vocab_size - 1))
    try:
        ours = llguidance.hf.from_tokenizer(tokenizer, n_vocab=highest + 1, eos_token=stops[0])
    except Exception as problem:  # whatever llguidance and tokenizers raise for a kind that they cannot read
        raise ValueError(
            f"structured output cannot read the target's tokenizer: {one_sentence(str(problem))}"
        ) from None
    special = {token for token, each in tokenizer.added_tokens_decoder.items() if each.special}
    special |= {*tokenizer.all_special_ids, *stops}
    text, spelled = np.zeros(32 * -(-vocab_size // 32), bool), set()
    for token in range(vocab_size):
        if token in special or ours.is_special_token(token) or not (spelling := ours.decode_bytes([token])):
            continue
        text[token] = True
        if len(spelling) == 1:
            spelled.add(spelling[0])
    lacking = frozenset(range(256)) - spelled
    if missing := sorted(NEEDED & lacking):
        characters = " ".join(repr(chr(byte)) for byte in missing[:8])
        raise ValueError(
            f"structured output needs a tokenizer that can spell ASCII character by character, the target's has no "
            f"token for {len(missing)} of them: {characters}"
        )
    bits = np.packbits(text, bitorder="little").view(np.uint32)
    return Vocabulary(ours, vocab_size, tuple(stops), bits, lacking)


def one_sentence(problem: str) -> str:
    """The part of an error of llguidance that a reader needs: of a regular expression's the reason, else its first
    line."""
    if found := re.search(r"^error: (.*)$", problem, re.MULTILINE):
        return found[1]
    if "coerce_one_of" in problem:
        return "alternatives of oneOf that may hold at once; say anyOf"
    first = problem.strip().splitlines()[0] if problem.strip() else "no reason given"
    first = re.sub(r'^at \d+\(\d+\): (invalid regex ".*" \(in regex\): )?', "", first)
    return first if len(first) <= 300 else f"{first[:300]}.."
