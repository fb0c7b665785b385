"""What a chat request asks for, in the engine's words: sampling, length, grammar.

Nothing is ignored: what the engine cannot do is refused with the parameter's name.
"""

import contextlib
import dataclasses
import json
import secrets
from collections.abc import Generator
from typing import Any

from jaxspec.serving.http.errors import ApiError
from jaxspec.serving.http.schema import ChatRequest, JsonObjectFormat, JsonSchemaFormat
from jaxspec.speculation.params import SamplingParams

SAMPLING = (
    *("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens"),
    *("stop", "stop_token_ids"),
)
"""Parameters that `SamplingParams` has by the same names and with the same meaning."""


@dataclasses.dataclass(frozen=True)
class GrammarSource:
    """What an answer must follow, and the parameter that says so."""

    param: str
    kind: str  # the method of `jaxspec.serving.grammar.Grammars` that compiles it
    source: Any = None  # the schema, the expression; None for any JSON object

    def compiled(self, grammars: Any) -> Any:
        """The grammar, by a `jaxspec.serving.grammar.Grammars`. Raises ValueError for what cannot be compiled."""
        compile_it = getattr(grammars, self.kind)
        return compile_it() if self.kind == "json_object" else compile_it(self.source)


def sampling_of(request: ChatRequest) -> SamplingParams:
    """How the request samples; what it leaves out stays unset. Without a seed one is drawn. Raises ApiError."""
    given: dict[str, Any] = {name: getattr(request, name) for name in SAMPLING}
    given["top_k"] = 0 if request.top_k == -1 else request.top_k
    given["seed"] = secrets.randbits(32) if request.seed is None else request.seed
    if request.logit_bias is not None:
        given["logit_bias"] = biases(request.logit_bias)
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs", "invalid_value")
    if request.logprobs:
        given["logprobs"] = request.top_logprobs or 0
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        with naming(name):
            SamplingParams(**{name: value})
    return SamplingParams(**given)


def choices_of(sampling: SamplingParams, n: int) -> list[SamplingParams]:
    """Those of the n choices of a request: each has a seed of its own."""
    return [dataclasses.replace(sampling, seed=(sampling.seed + index) % 2**32) for index in range(n)]


def biases(given: dict[str, float]) -> dict[int, float]:
    """OpenAI's `logit_bias`, whose keys are token ids as texts. Raises ApiError."""
    for key in given:
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            sentence = f"logit_bias must have token ids as keys, got {key[:20]!r}"
            raise ApiError(400, sentence, "logit_bias", "invalid_value")
    return {int(key): value for key, value in given.items()}


def limit_of(request: ChatRequest, room: int) -> int:
    """Most tokens of an answer, where the prompt leaves room for so many. Raises ApiError."""
    asked = {name: getattr(request, name) for name in ("max_completion_tokens", "max_tokens")}
    values = {value for value in asked.values() if value is not None}
    if len(values) > 1:
        sentence = "max_tokens is the older name of max_completion_tokens and must not differ from it"
        raise ApiError(400, sentence, "max_tokens", "invalid_value")
    return min(*values, room) if values else room


def grammar_of(request: ChatRequest) -> GrammarSource | None:
    """What the answer must follow, if anything. Raises ApiError for more than one thing, and together with min_tokens:
    a grammar says itself when an answer may end."""
    found: list[GrammarSource] = []
    match request.response_format:
        case JsonObjectFormat():
            found.append(GrammarSource("response_format", "json_object"))
        case JsonSchemaFormat(json_schema=asked):
            found.append(GrammarSource("response_format", "json_schema", asked.json_schema))
    if request.regex is not None:
        found.append(GrammarSource("regex", "regex", request.regex))
    if (outputs := request.structured_outputs) is not None:
        if (outputs.json_schema is None) == (outputs.regex is None):
            raise ApiError(400, "structured_outputs needs one of json and regex", "structured_outputs", "invalid_value")
        if outputs.regex is not None:
            found.append(GrammarSource("structured_outputs", "regex", outputs.regex))
        else:
            found.append(GrammarSource("structured_outputs", "json_schema", schema_of(outputs.json_schema)))
    if len(found) > 1:
        names = " and ".join(each.param for each in found)
        raise ApiError(400, f"{names} cannot be given together", found[-1].param, "invalid_value")
    if found and request.min_tokens:
        raise ApiError(400, f"min_tokens cannot be given with {found[0].param}", "min_tokens", "invalid_value")
    return found[0] if found else None


def schema_of(given: str | dict[str, Any] | None) -> dict[str, Any]:
    """A JSON schema, which vLLM's clients may give as a text. Raises ApiError."""
    if isinstance(given, str):
        with contextlib.suppress(ValueError, RecursionError):
            given = json.loads(given)
    if not isinstance(given, dict):
        raise ApiError(
            400, "structured_outputs.json must be a JSON schema, an object", "structured_outputs", "invalid_value"
        )
    return given


@contextlib.contextmanager
def naming(param: str | None) -> Generator[None]:
    """A ValueError within becomes a refusal that names the parameter; by default the one its sentence begins with."""
    try:
        yield
    except ValueError as error:
        sentence = str(error)
        first = sentence.split(" ", 1)[0]
        known = param or (first if first in ChatRequest.model_fields else None)
        raise ApiError(400, sentence, known, "invalid_value") from error
