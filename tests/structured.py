"""Decoding under grammars as an engine does it: draft, look at the trees, confirm; and what a grammar allows, found
without llguidance."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
import regex

from jaxspec import Generator, SamplingParams
from jaxspec.buckets import coarse_bucket
from jaxspec.serving.grammar import Grammar, Grammars
from jaxspec.speculation.state import Request
from jaxspec.targets.prompts import EncodedPrompt

SCHEMA = {
    "type": "object",
    "properties": {
        "shapes": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "color": {"enum": ["red", "green", "blue", "yellow", "purple", "orange"]},
                    "shape": {"enum": ["circle", "square", "triangle", "star"]},
                },
                "required": ["color", "shape"],
                "additionalProperties": False,
            },
            "minItems": 1,
            "maxItems": 3,
        },
        "count": {"type": "integer", "minimum": 0, "maximum": 20},
        "note": {"type": "string", "maxLength": 20},
    },
    "required": ["shapes", "count", "note"],
    "additionalProperties": False,
}


@dataclasses.dataclass(frozen=True)
class Answer:
    """Of one row."""

    tokens: list[int]
    text: str
    rounds: int
    ended: bool

    @property
    def acceptance(self) -> float:
        """Tokens per round, the first one, which prefill gives, left out."""
        return (len(self.tokens) - 1) / max(1, self.rounds)


def grammars_of(target) -> Grammars:
    return Grammars(target.tokenizer, target.model.vocab_size, target.stop_token_ids)


def answers(
    generator: Generator,
    prompts: Sequence[EncodedPrompt],
    sampling: Sequence[SamplingParams],
    grammars: Sequence[Grammar | None],
    limit: int = 160,
    follow: bool = True,
) -> list[Answer]:
    """The answers of a batch, with a look of the host in every round; `follow`: drafts follow the grammar."""
    programs, params, target = generator.programs, generator._params, generator.target
    capacity = coarse_bucket(max(len(prompt.input_ids) for prompt in prompts) + limit)
    size, ids = target.model.vocab_size, [prompt.input_ids for prompt in prompts]
    sampling = [each.resolved(generator.generation_defaults) for each in sampling]
    request = Request.of(sampling, ids, [limit] * len(prompts), target.stop_token_ids, size)
    pairs = zip(grammars, sampling, strict=True)
    matchers = [each and each.matcher(params.stop_token_ids) for each, params in pairs]
    everything = np.full((len(prompts), 1, -(-size // 32)), 2**32 - 1, np.uint32)
    allowed = everything.copy()
    for row, matcher in enumerate(matchers):
        if matcher:
            allowed[row] = matcher.start()
    read = programs.read(params, prompts, capacity)
    state = programs.begin(params, read, request, prompts, capacity, allowed=allowed)
    seen = [0] * len(prompts)
    while not np.asarray(state.done).all():
        tree = programs.draft(params, state)
        look = tree.tokens, tree.parents, state.tokens, state.counts, state.alone, state.done
        tokens, parents, said, counts, alone, done = jax.device_get(look)
        tokens, allowed = np.array(tokens), np.repeat(everything, tokens.shape[1], axis=1)
        for row, matcher in enumerate(matchers):
            if matcher and not done[row]:
                matcher.accept(said[row, seen[row] : counts[row]])
                seen[row] = counts[row]
                tokens[row], allowed[row] = matcher.tree(tokens[row], parents[row], follow and not alone[row])
        state = programs.confirm(params, state, tree._replace(tokens=tokens), allowed)
    said, counts, rounds = jax.device_get((state.tokens, state.counts, state.rounds))
    found = []
    for row, count in enumerate(counts):
        own = said[row, :count].tolist()
        ended = own[-1] in {*target.stop_token_ids, *sampling[row].stop_token_ids}
        text = target.tokenizer.decode(own[:-1] if ended else own)
        found.append(Answer(own, text, int(rounds[row]), ended))
    return found


def allowed_by(pattern: str, text: str, continuations: dict[int, str]) -> set[int]:
    """Which tokens may follow `text` in an answer that matches: those after which it still may come to match."""
    return {
        token
        for token, more in continuations.items()
        if regex.fullmatch(pattern, text + more, partial=True) is not None
    }


def matches(pattern: str, text: str) -> bool:
    return regex.fullmatch(pattern, text) is not None
