"""Where answers end: stop tokens, stop strings, token limits, a full cache; and answers handed out in pieces."""

import string

import numpy as np
import pytest

from jaxspec import Generator, SamplingParams
from tests.drafting import DRAFTERS

ARMS = ["autoregressive", "self", "eagle2"]
SAMPLED = SamplingParams(temperature=1.0, seed=3)


def ask(generator, request, sampling=SAMPLED, max_new_tokens=40):
    return generator.generate(*request, sampling, max_new_tokens)


@pytest.fixture(scope="module")
def request_with_image(requests):
    return requests[1]


@pytest.fixture(scope="module")
def answer(generators, request_with_image):
    """The autoregressive answer that the tests below cut short."""
    result = ask(generators("autoregressive"), request_with_image)
    assert len(result.tokens) == 40
    return result


def first_seen(tokens):
    """Positions whose token has not occurred before: a stop at that token must end the answer there."""
    return [i for i, token in enumerate(tokens.tolist()) if token not in tokens[:i].tolist()]


@pytest.mark.parametrize("name", ["self", "eagle2"])
def test_stop_token_inside_an_accepted_run(generators, request_with_image, answer, name):
    whole = ask(generators(name), request_with_image)
    assert whole.tokens.tolist() == answer.tokens.tolist()
    # The drafter proposed this token and the one after it, so one round accepted beyond the stop.
    inside = [i for i in first_seen(whole.tokens)[1:] if whole.accepted[i : i + 2].all() and i + 2 < len(whole.tokens)]
    assert inside
    for i in inside:
        stop = SamplingParams(temperature=1.0, seed=3, stop_token_ids=(int(whole.tokens[i]),))
        for arm in ("autoregressive", name):
            cut = ask(generators(arm), request_with_image, stop)
            assert cut.tokens.tolist() == answer.tokens[: i + 1].tolist()
            assert cut.finish_reason == "stop"
            assert cut.stats.emitted_tokens == i
        assert cut.accepted.tolist() == whole.accepted[: i + 1].tolist()


@pytest.mark.parametrize("name", ARMS)
def test_stop_at_the_first_token(generators, request_with_image, answer, name):
    stop = SamplingParams(temperature=1.0, seed=3, stop_token_ids=(int(answer.tokens[0]),))
    result = ask(generators(name), request_with_image, stop)
    assert result.tokens.tolist() == answer.tokens[:1].tolist()
    assert (result.finish_reason, result.stats.rounds) == ("stop", 0)


def strings_across_tokens(target, tokens) -> list[tuple[str, int]]:
    """Readable strings that begin in one token and end in the next, with the number of tokens that complete them."""
    decode = lambda n: target.tokenizer.decode(tokens[:n], skip_special_tokens=True).lstrip(" ")  # noqa: E731
    found = []
    for n in range(4, len(tokens) + 1):
        before, middle, after = decode(n - 2), decode(n - 1), decode(n)
        if not (middle.startswith(before) and after.startswith(middle)):
            continue
        first, second = middle[len(before) :], after[len(middle) :]
        text = first[-1:] + second[:1]
        if len(text) == 2 and set(text) <= set(string.ascii_letters + " ") and text not in middle:
            found.append((text, n))
    return found


@pytest.mark.parametrize("name", ARMS)
def test_stop_string_across_tokens(target, generators, request_with_image, answer, name):
    cases = strings_across_tokens(target, answer.tokens)
    assert len(cases) >= 3
    for text, count in cases:
        result = ask(generators(name), request_with_image, SamplingParams(temperature=1.0, seed=3, stop=text))
        assert result.tokens.tolist() == answer.tokens[:count].tolist()
        assert result.text == answer.text[: answer.text.index(text)]
        assert result.finish_reason == "stop"


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("rounds", [1, 3, 100])
def test_stream_never_shows_a_stop_string(target, generators, request_with_image, answer, name, rounds):
    tried = 0
    for text, count in strings_across_tokens(target, answer.tokens):
        # The second string stands further left but is complete only one character later: it must not be waited for.
        seen = target.tokenizer.decode(answer.tokens[:count], skip_special_tokens=True).lstrip(" ")
        if len(seen) == len(answer.text):
            continue  # no later character
        tried += 1
        longer = answer.text[answer.text.index(text) - 1 : len(seen) + 1]
        sampling = SamplingParams(temperature=1.0, seed=3, stop=(text, longer))
        pieces = list(generators(name).stream(*request_with_image, sampling, 40, rounds_per_piece=rounds))
        shown = "".join(piece.text for piece in pieces)
        assert shown == pieces[-1].result.text == answer.text[: answer.text.index(text)]
        assert pieces[-1].result.tokens.tolist() == answer.tokens[:count].tolist()
    assert tried >= 3


@pytest.mark.parametrize("name", ARMS)
def test_stop_string_of_one_row_leaves_the_others_alone(target, generators, requests, name):
    prompts, images = zip(*requests, strict=True)
    plain = [SamplingParams(temperature=1.0, seed=seed) for seed in (21, 22, 23)]
    whole = generators("autoregressive").generate_batch(prompts, images, plain, 30)
    text, count = strings_across_tokens(target, whole[0].tokens)[0]
    stopping = [SamplingParams(temperature=1.0, seed=21, stop=text), *plain[1:]]
    cut = generators(name).generate_batch(prompts, images, stopping, 30)
    assert cut[0].tokens.tolist() == whole[0].tokens[:count].tolist()
    for row in (1, 2):
        assert cut[row].tokens.tolist() == whole[row].tokens.tolist()
        assert cut[row].text == whole[row].text


@pytest.mark.parametrize("name", ARMS)
def test_few_new_tokens(generators, request_with_image, answer, name):
    for count in (1, 2, 3):
        result = ask(generators(name), request_with_image, max_new_tokens=count)
        assert result.tokens.tolist() == answer.tokens[:count].tolist()
        assert result.finish_reason == "length"
        assert result.stats.generated_tokens == count


@pytest.mark.parametrize("name", ARMS)
def test_rows_that_finish_at_very_different_times(generators, requests, name):
    prompts, images = zip(*requests, strict=True)
    sampling = [SamplingParams(temperature=1.0, seed=seed) for seed in (31, 32, 33)]
    whole = generators("autoregressive").generate_batch(prompts, images, sampling, 60)
    for limits in ((1, 60, 2), (60, 1, 30), (2, 3, 60)):
        results = generators(name).generate_batch(prompts, images, sampling, limits)
        for result, expected, limit in zip(results, whole, limits, strict=True):
            assert result.tokens.tolist() == expected.tokens[:limit].tolist()
            assert result.stats.emitted_tokens == len(result.tokens) - 1


@pytest.mark.parametrize("name", ["self", "eagle2", "massv"])
def test_last_position_of_the_cache(target, name):
    """64 rows for prompt and answer, and a chunk of 64: the cache has no row to spare but the draft's own."""
    arms = [Generator(target, drafter, max_length=64) for drafter in (None, DRAFTERS[name](target))]
    for left in (1, 2, 3, 5, 9, 25):
        prompt = "~" * (63 - left)  # one token each, after the first
        baseline, result = (arm.generate(prompt, (), SAMPLED, 1000, raw=True) for arm in arms)
        assert baseline.stats.prompt_tokens == result.stats.prompt_tokens == 64 - left
        assert len(result.tokens) == left
        assert result.tokens.tolist() == baseline.tokens.tolist()
        assert result.finish_reason == baseline.finish_reason == "length"
    assert [arm.programs.traced for arm in arms] == [["no_images", "read_chunk", "begin", "decode"]] * 2


@pytest.mark.parametrize("rounds", [1, 2, 5, 1000])
@pytest.mark.parametrize("name", ARMS)
def test_stream_joins_to_the_whole_answer(generators, request_with_image, answer, name, rounds):
    whole = ask(generators(name), request_with_image)
    pieces = list(generators(name).stream(*request_with_image, SAMPLED, 40, rounds_per_piece=rounds))
    result = pieces[-1].result
    assert all(piece.result is None for piece in pieces[:-1])
    assert "".join(piece.text for piece in pieces) == result.text == answer.text
    tokens, accepted = (np.concatenate([getattr(piece, part) for piece in pieces]) for part in ("tokens", "accepted"))
    assert tokens.tolist() == result.tokens.tolist() == answer.tokens.tolist()
    assert accepted.tolist() == result.accepted.tolist() == whole.accepted.tolist()
    assert result.stats.rounds == whole.stats.rounds
    assert len(pieces) == 1 + -(-whole.stats.rounds // rounds)


@pytest.mark.parametrize("name", ["autoregressive", "self"])
def test_sliced_decoding_equals_whole_decoding(generators, requests, name):
    generator = generators(name)
    prompts, images = zip(*requests, strict=True)
    states = []
    for rounds in (1000, 3):
        batch = generator._prepare(prompts, images, SAMPLED, 40, False)
        state = batch.start()
        while not batch.finished(state):
            state = batch.advance(state, rounds)
        states.append(state)
    for part in ("tokens", "from_draft", "counts", "lengths", "root", "rounds"):
        np.testing.assert_array_equal(getattr(states[0], part), getattr(states[1], part), part)
