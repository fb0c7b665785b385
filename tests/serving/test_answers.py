"""How answers are written: numbers that JSON has, tokens that join to the text, shapes as the schema says."""

import json

import numpy as np
import pytest

from jaxspec.detokenizer import Detokenizer, TokenReader
from jaxspec.generator import Result
from jaxspec.metrics import GenerationStats, pooled
from jaxspec.serving.http.answers import PART, Answers, event, json_of, usage_of
from jaxspec.serving.http.schema import ChatCompletion, ChatCompletionChunk, Usage
from jaxspec.serving.requests import Served
from jaxspec.speculation.logprobs import Logprobs
from tests.scripted import byte_fallback_tokenizer
from tests.test_detokenizer import KINDS, tokenizer_of

SERVED = Served(0.5, 1.0, 2.0, 3)


def result_of(emitted: list[int], tokens: list[int], logprobs: Logprobs | None = None) -> Result:
    ids = np.array(tokens, np.int32)
    stats = GenerationStats.of(emitted, prompt_tokens=7, generated_tokens=len(ids), decode_seconds=0.5)
    return Result(ids, np.zeros(len(ids), bool), "text", "stop", stats, np.zeros(len(ids), np.int32), None, logprobs)


def test_no_number_leaves_that_json_does_not_have():
    """Without a drafter, without a round, without times: null."""
    for emitted in ([3], [0], [0, 0, 0]):
        usage = usage_of(7, [result_of(emitted, [5])], [None])
        json.dumps(usage, allow_nan=False)
        assert Usage.model_validate(usage).model_dump() == usage
        assert usage["metrics"]["speculative_decoding"]["draft_acceptance_rate"] is None
    assert usage["metrics"]["speculative_decoding"]["mean_acceptance_length"] is None


def test_usage_counts_the_prompt_once_and_every_choice():
    results = [result_of([1, 0, 2], [1, 2, 3]), result_of([4, 1, 0], [4, 5])]
    usage = usage_of(7, results, [SERVED, Served(0.1, 2.5, 2.6, 2)])
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (7, 5, 12)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    both = pooled([result.stats for result in results])
    told = usage["metrics"]["speculative_decoding"]
    assert told["rounds"] == both.rounds == 8
    assert told["mean_acceptance_length"] == both.mean_acceptance_length
    assert told["acceptance_at_position"] == list(both.acceptance_at_position)
    assert usage["metrics"]["queue_seconds"] == 0.5 and usage["metrics"]["time_to_first_token"] == 2.5


def test_answers_with_trees_of_different_depths_are_counted_together():
    shallow, deep = (result_of(emitted, [1]).stats for emitted in ([2, 3], [1, 0, 4, 1]))
    assert pooled([shallow, deep]).emitted == (3, 3, 4, 1)


@pytest.mark.parametrize("kind", ["byte_fallback", "gemma", "byte_level", "demo", "unigram", "word_piece"])
def test_spellings_join_to_the_text(kind):
    """Of any tokens, but that no answer begins within a word."""
    tokenizer = tokenizer_of(kind)
    reader = TokenReader(tokenizer)
    plain = [token for token in range(len(tokenizer)) if token not in reader.special]
    rng = np.random.default_rng(3)
    for _ in range(300):
        tokens = rng.choice(plain, 6).tolist()
        if (reader.name(tokens[0]) or "").startswith("##"):
            continue
        text = Detokenizer(reader)
        text.add(tokens)
        text.finish()
        joined = b"".join(reader.spelling(token) for token in tokens).decode(errors="replace")
        assert joined.lstrip(" ") == text.text


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_names_and_no_bytes(kind):
    reader = TokenReader(tokenizer_of(kind))
    answers = Answers("model", "fingerprint", reader, 7)
    for token in reader.special:
        entry = answers.entry(token, -1.5)
        assert entry == {"token": reader.name(token), "bytes": None, "logprob": -1.5}


def test_half_a_character_is_told_by_its_bytes():
    tokenizer = byte_fallback_tokenizer("a", "▁b")
    answers = Answers("model", "fingerprint", TokenReader(tokenizer), 7)
    halves = [answers.entry(tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>"), -1.0) for byte in "é".encode()]
    assert bytes(each["bytes"][0] for each in halves).decode() == "é"
    assert answers.entry(tokenizer.convert_tokens_to_ids("▁b"), -1.0)["token"] == " b"
    assert answers.entry(0, -np.inf)["logprob"] == -9999.0


def test_what_is_written_is_what_the_schema_says():
    logprobs = Logprobs(np.array([-0.5, -1.0]), np.array([[8], [9]]), np.array([[-0.5], [-0.75]]))
    answers = Answers("model", "fingerprint", TokenReader(tokenizer_of("demo")), 7)
    plain, told = result_of([1, 1], [4, 5]), result_of([1, 1], [8, 2], logprobs)
    whole = answers.completion([plain, told], [SERVED, None])
    assert ChatCompletion.model_validate(whole).model_dump(exclude_unset=True) == whole
    for chunk in (
        answers.chunk(1, {"role": "assistant", "content": ""}),
        answers.chunk(0, {"content": "x"}, answers.logprobs(told.tokens, told.logprobs)),
        answers.chunk(0, {}, finish_reason="length"),
        answers.usage_chunk([plain], [SERVED]),
    ):
        assert ChatCompletionChunk.model_validate(chunk).model_dump(exclude_unset=True) == chunk


def test_a_long_answer_is_written_in_parts_as_it_would_be_in_one():
    count, top = 400, 20
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 500, count)
    values = -rng.random((count, top))
    logprobs = Logprobs(values[:, 0], rng.integers(3, 500, (count, top)), values)
    answers = Answers("model", "fingerprint é", TokenReader(tokenizer_of("demo")), 7)
    results = [result_of([1, 1], [4, 5]), result_of([0] * count, tokens.tolist(), logprobs)]
    parts = list(answers.written(results, [SERVED, None]))
    whole = answers.completion(results, [SERVED, None])
    assert b"".join(parts).decode() == json.dumps(whole, ensure_ascii=False, separators=(",", ":"))
    assert len(parts) > 5 and max(map(len, parts)) < 2 * PART


@pytest.mark.parametrize("value", [{}, [], {"a": []}, [1, {}, [2]], None, 1.5, 'é"\n', {"é": [None, True]}])
def test_any_value_is_written_as_json_has_it(value):
    assert "".join(json_of(value)) == json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    assert json.loads("".join(json_of({"a": iter([value, value])}))) == {"a": [value, value]}
    assert "".join(json_of(iter([]))) == "[]"


def test_events_are_one_line_of_ascii():
    line = event({"text": "é\u2028\n猫"})
    assert line.isascii() and line.startswith(b"data: ") and line.endswith(b"\n\n")
    assert line.count(b"\n") == 2 and b"\r" not in line
    assert json.loads(line[6:]) == {"text": "é\u2028\n猫"}
