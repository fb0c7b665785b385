"""What is written back: completions, chunks of a stream, usage, log-probabilities, in OpenAI's shapes.

The shapes are those of jaxspec/serving/http/schema.py. No number that JSON has no word for leaves here.
"""

import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxspec.detokenizer import TokenReader
from jaxspec.generator import Result
from jaxspec.metrics import pooled
from jaxspec.serving.requests import Served
from jaxspec.speculation.logprobs import Logprobs

PART = 64 * 2**10
"""Characters of the parts in which a long answer is written."""
LEAST_LOGPROB = -9999.0
"""What OpenAI writes for a token that cannot be."""


class Answers:
    """Writes the answer to one request.

    Args:
      model: its name as it is served.
      fingerprint: of the model behind the name.
      reader: how tokens are spelt.
      prompt_tokens: of the request.
    """

    def __init__(self, model: str, fingerprint: str, reader: TokenReader, prompt_tokens: int) -> None:
        self.reader, self.prompt_tokens = reader, prompt_tokens
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(16)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def completion(
        self,
        results: Sequence[Result],
        served: Sequence[Served | None],
        collect: Callable[[Iterator[dict[str, Any]]], Any] = list,
    ) -> dict[str, Any]:
        """The whole answer, a result for each choice. `collect` is what the log-probabilities of tokens go into."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": result.text, "refusal": None},
                "logprobs": self.logprobs(result.tokens, result.logprobs, collect),
                "finish_reason": result.finish_reason,
            }
            for index, result in enumerate(results)
        ]
        usage = usage_of(self.prompt_tokens, results, served)
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage}

    def written(self, results: Sequence[Result], served: Sequence[Served | None]) -> Iterator[bytes]:
        """`completion` as JSON, in parts that are made when they are asked for: sixteen choices with twenty
        alternatives for every token are a hundred megabytes, and ten times as much as Python objects."""
        part: list[str] = []
        size = 0
        for text in json_of(self.completion(results, served, iter)):
            part.append(text)
            size += len(text)
            if size >= PART:
                yield "".join(part).encode()
                part, size = [], 0
        yield "".join(part).encode()

    def chunk(
        self, index: int, delta: dict[str, str], logprobs: dict | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        """A piece of one choice."""
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, results: Sequence[Result], served: Sequence[Served | None]) -> dict[str, Any]:
        """The last chunk of a stream that was asked for it."""
        usage = usage_of(self.prompt_tokens, results, served)
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage}

    def logprobs(
        self, tokens: np.ndarray, told: Logprobs | None, collect: Callable[[Iterator[dict[str, Any]]], Any] = list
    ) -> dict[str, Any] | None:
        """Those of tokens i32 `[n]`, every one that was generated, a stop token at the end included."""
        return None if told is None else {"content": collect(self.entries(tokens, told)), "refusal": None}

    def entries(self, tokens: np.ndarray, told: Logprobs) -> Iterator[dict[str, Any]]:
        """Token by token."""
        for token, logprob, ids, values in zip(
            map(int, tokens), told.token_logprobs, told.top_ids, told.top_logprobs, strict=True
        ):
            top = [self.entry(int(each), value) for each, value in zip(ids, values, strict=True)]
            yield {**self.entry(token, logprob), "top_logprobs": top}

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        """One token: as text, as bytes (of all tokens they join to the text), with its log-probability."""
        spelling = self.reader.spelling(token)
        text = self.reader.name(token) or "" if spelling is None else spelling.decode(errors="replace")
        value = max(float(logprob), LEAST_LOGPROB)
        return {"token": text, "bytes": None if spelling is None else list(spelling), "logprob": value}


def usage_of(prompt_tokens: int, results: Sequence[Result], served: Sequence[Served | None]) -> dict[str, Any]:
    """Tokens, and what speculation and waiting did, over all choices. The prompt counts once."""
    generated, times = sum(len(result.tokens) for result in results), [each for each in served if each is not None]
    speculation = pooled([result.stats for result in results])
    decoding = sum(result.stats.decode_seconds for result in results)
    metrics = {
        "speculative_decoding": {
            "rounds": speculation.rounds,
            "mean_acceptance_length": speculation.mean_acceptance_length,
            "mean_accepted_draft_tokens": speculation.mean_accepted_draft_tokens,
            "acceptance_at_position": list(speculation.acceptance_at_position),
            "conditional_acceptance": list(speculation.conditional_acceptance),
            "draft_acceptance_rate": speculation.draft_acceptance_rate,
        },
        "queue_seconds": max((each.queue_seconds for each in times), default=None),
        "time_to_first_token": max((each.first_token_seconds for each in times), default=None),
        "total_seconds": max((each.total_seconds for each in times), default=None),
        "decode_tokens_per_second": (generated - len(results)) / decoding if decoding else None,
    }
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": min((each.cached_tokens for each in times), default=0)},
        "metrics": without_nan(metrics),
    }


def without_nan(value: Any) -> Any:
    """The same with null in place of numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {name: without_nan(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_of(value: Any) -> Iterator[str]:
    """The JSON of a value in small parts. It may hold iterators, which are arrays whose elements are made one by one;
    between two parts other threads have their turn."""
    if isinstance(value, dict):
        before = "{"
        for name, each in value.items():
            yield f"{before}{compact(name)}:"
            yield from json_of(each)
            before = ","
        yield "}" if value else "{}"
    elif isinstance(value, list):
        before = "["
        for each in value:
            yield before
            yield from json_of(each)
            before = ","
        yield "]" if value else "[]"
    elif isinstance(value, Iterator):
        yield "["
        for number, each in enumerate(value):
            yield f",{compact(each)}" if number else compact(each)
        yield "]"
    else:
        yield compact(value)


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event. Only ASCII: some clients take other characters for the end of a line."""
    return f"data: {json.dumps(value, allow_nan=False)}\n\n".encode()


DONE = b"data: [DONE]\n\n"
