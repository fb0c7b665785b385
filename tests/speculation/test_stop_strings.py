"""Stop strings and pieces where a model spells in bytes: found at the same place whatever follows and however the
answer is sliced, and a row that one has ended decodes no further."""

import numpy as np
import pytest

from jaxspec import Generator, SamplingParams
from tests.scripted import byte_fallback_tokenizer, byte_tokens, prompt_of, scripted_drafter, scripted_target

WORDS = ("▁once", "▁upon", "▁a", "▁time")
ARMS = ("autoregressive", "drafted")
LIMIT = 30


@pytest.fixture(scope="module")
def tokenizer():
    return byte_fallback_tokenizer(*WORDS)


@pytest.fixture(scope="module")
def answer(tokenizer) -> list[int]:
    """A character in three bytes, words with a special token among them, one in two bytes, one in a byte for ever."""
    words, mark = tokenizer.convert_tokens_to_ids([*WORDS]), tokenizer.convert_tokens_to_ids("<|eot|>")
    return [*byte_tokens(tokenizer, "猫"), *words[:2], mark, *words[2:], *byte_tokens(tokenizer, "ñ\n")]


PROMPT = prompt_of(1)
TEXT = "猫 once upon a timeñ"  # and then newlines
CASES = {  # stop strings: (text, tokens kept)
    ("猫",): ("", 3),
    (" once",): ("猫", 4),
    ("time", "a time"): ("猫 once upon ", 8),  # both are complete at the same character: the longer one counts
    (" a time\n", "me"): ("猫 once upon a ti", 8),  # further left, but it never comes
    ("<|eot|>",): ("猫 once upon", 6),
    ("upon<|eot|>",): ("猫 once ", 6),
    ("upon a",): (None, None),  # a special token stands between
    ("\n\n\n",): (TEXT, 13),
    ("\N{REPLACEMENT CHARACTER}",): (None, None),  # no half character is ever seen
    ("nothing", "ñ"): ("猫 once upon a time", 10),
}


@pytest.fixture(scope="module")
def generators(tokenizer, answer) -> dict[str, Generator]:
    target = scripted_target(tokenizer, [1, *answer])
    chain = dict(zip([1, *answer], [*answer, answer[-1]], strict=True)) | {answer[4]: answer[0]}  # one draft is wrong
    drafter = scripted_drafter(len(tokenizer), chain, {})
    return {name: Generator(target, drafter if name == "drafted" else None, max_length=128) for name in ARMS}


@pytest.fixture(scope="module")
def whole(generators):
    return {name: ask(generator) for name, generator in generators.items()}


def ask(generator, limit=LIMIT, **sampling):
    return generator.generate_encoded([PROMPT], SamplingParams(**sampling), limit)[0]


def pieces_of(generator, rounds, limit=LIMIT, **sampling):
    return list(generator._batch([PROMPT], SamplingParams(**sampling), limit).pieces(rounds))


def test_the_script_is_said(whole, answer):
    """What the tests below cut short; the drafter is right most of the time."""
    for result in whole.values():
        assert result.tokens.tolist() == [*answer, *answer[-1:] * (LIMIT - len(answer))]
        assert result.text == TEXT + "\n" * (LIMIT - len(answer) + 1)
        assert result.finish_reason == "length"
    assert whole["drafted"].stats.mean_acceptance_length > 3
    assert whole["drafted"].text_ends.tolist()[:10] == [0, 0, 1, 6, 11, 11, 13, 18, 18, 19]


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("stop", CASES, ids=map(repr, CASES))
def test_found_at_the_same_place(generators, whole, name, stop):
    """Whatever comes after, and however the answer is sliced; the statistics are those of the tokens that stay."""
    text, count = CASES[stop]
    if text is None:
        assert ask(generators[name], stop=stop).tokens.tolist() == whole[name].tokens.tolist()
        return
    reference = whole[name]
    for limit in (count, count + 1, LIMIT):
        result = ask(generators[name], limit, stop=stop)
        assert (result.text, len(result.tokens), result.finish_reason) == (text, count, "stop")
        check_statistics(result, reference)
    for rounds in (1, 2, LIMIT):
        pieces = pieces_of(generators[name], rounds, stop=stop)
        assert "".join(piece.text for piece in pieces) == pieces[-1].result.text == text
        for part in ("tokens", "accepted", "text_ends"):
            joined = np.concatenate([getattr(piece, part) for piece in pieces])
            if part == "text_ends":  # what was complete before a stop string took it away
                joined = np.minimum(joined, len(text))
            np.testing.assert_array_equal(joined, getattr(result, part))
        check_statistics(pieces[-1].result, reference)


def check_statistics(result, whole) -> None:
    """Of an answer cut short: the rounds that gave its tokens, each with the tokens that stay."""
    kept = len(result.tokens)
    assert result.tokens.tolist() == whole.tokens[:kept].tolist()
    assert result.accepted.tolist() == whole.accepted[:kept].tolist()
    assert result.stats.generated_tokens == kept and result.stats.emitted_tokens == kept - 1
    # A round ends where a token is the target's own; the first token is the prompt's.
    assert result.stats.rounds == (~whole.accepted[1 : kept - 1]).sum() + (kept > 1)


@pytest.mark.parametrize("name", ARMS)
def test_pieces_without_stop_strings(generators, whole, name):
    pieces = pieces_of(generators[name], 1)
    assert "".join(piece.text for piece in pieces) == whole[name].text
    assert pieces[-1].result.stats.emitted == whole[name].stats.emitted


@pytest.mark.parametrize("name", ARMS)
def test_half_a_character_at_the_end(generators, name):
    for limit, text in ((1, "\ufffd"), (2, "\ufffd"), (3, "猫"), (9, "猫 once upon a time\ufffd")):
        assert ask(generators[name], limit).text == text
        pieces = pieces_of(generators[name], 1, limit)
        assert "".join(piece.text for piece in pieces) == text
        assert not any("\ufffd" in piece.text for piece in pieces[:-1])


@pytest.mark.parametrize("name", ARMS)
def test_rows_that_stopped_decode_no_further(generators, whole, name):
    """The rounds of a row are counted on the device: at most one slice after its stop string."""
    stops = [("猫",), (), ("<|eot|>", "ñ")]
    batch = generators[name]._batch([PROMPT] * 3, [SamplingParams(stop=stop) for stop in stops], LIMIT)
    state = batch.start()
    while not batch.finished(state):
        state = batch.advance(state, 2)
    results, rounds = batch.results(state), np.asarray(state.rounds)
    assert [result.text for result in results] == ["", whole[name].text, "猫 once upon"]
    assert [len(result.tokens) for result in results] == [3, LIMIT, 6]
    assert rounds[0] <= results[0].stats.rounds + 2 < rounds[1] and rounds[2] <= results[2].stats.rounds + 2
    assert rounds[1] == results[1].stats.rounds == whole[name].stats.rounds
    for result in results:
        check_statistics(result, whole[name])


def test_rounds_told_by_the_tokens_are_those_of_the_device(generators):
    """One round at a time: what each emitted is what the statistics say."""
    batch = generators["drafted"]._batch([PROMPT], SamplingParams(), LIMIT)
    state, counts = batch.start(), [1]
    while not batch.finished(state):
        state = batch.advance(state, 1)
        counts.append(int(state.counts[0]))
    stats = batch.results(state)[0].stats
    assert stats.emitted == tuple(np.bincount(np.diff(counts), minlength=5)[1:])
    assert stats.rounds == int(state.rounds[0]) == len(counts) - 1
