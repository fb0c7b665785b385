"""Logits that are not finite end their row with a sentence, at the same place with and without a draft; other rows go
on, and a draft token that was not accepted does no harm."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxspec import Generator, SamplingParams
from tests.scripted import byte_fallback_tokenizer, byte_tokens, prompt_of, scripted_drafter, scripted_target

ARMS = ("autoregressive", "drafted")
SAMPLED = SamplingParams(temperature=0.7, top_p=0.9, top_k=5, seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_fallback_tokenizer("▁x")


@pytest.fixture(scope="module")
def scripts(tokenizer) -> tuple[list[int], list[int]]:
    """A sound answer, and one whose fifth token breaks the target: each begins after a token of its own."""
    return [1, *byte_tokens(tokenizer, "abcdefgh")], [2, *byte_tokens(tokenizer, "ABCDXEFG")]


@pytest.fixture(scope="module")
def arms(tokenizer, scripts) -> dict[str, Generator]:
    sound, broken = scripts
    bad = broken[5]
    target = scripted_target(tokenizer, sound, broken, broken=(bad,))
    target.stop_token_ids = ()
    chain = {now: then for script in scripts for now, then in zip(script, script[1:], strict=False)}
    # The token that breaks the target is drafted beside every token of the sound answer, and never accepted there.
    drafter = scripted_drafter(len(tokenizer), chain, dict.fromkeys(sound, bad))
    return {name: Generator(target, drafter if name == "drafted" else None, max_length=64) for name in ARMS}


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
def test_one_row_fails_and_the_others_go_on(arms, scripts, name, sampling):
    sound, broken = scripts
    if sampling.temperature:  # logits of 0 and 1 leave a choice: what is said is not the script, but the same
        sampling = dataclasses.replace(sampling, top_k=1)
    prompts = [prompt_of(3, sound[0]), prompt_of(broken[0]), prompt_of(sound[0])]
    results = arms[name].generate_encoded(prompts, sampling, 16)
    for row in (0, 2):
        assert results[row].tokens.tolist() == [*sound[1:], *sound[-1:] * 8]
        assert (results[row].finish_reason, results[row].error) == ("length", None)
        assert results[row].checked() is results[row]
    failed = results[1]
    assert failed.tokens.tolist() == broken[1:6] and failed.text == "ABCDX"
    assert failed.finish_reason == "error" and failed.stats.emitted_tokens == 4
    assert failed.error.startswith("prompt 1: the logits of the token at position 6 are not finite")
    assert "after 5 generated tokens" in failed.error
    with pytest.raises(FloatingPointError, match="prompt 1: the logits of the token at position 6"):
        failed.checked()


@pytest.mark.parametrize("name", ARMS)
def test_a_prompt_that_breaks_the_target(arms, scripts, name):
    bad = scripts[1][5]
    results = arms[name].generate_encoded([prompt_of(bad), prompt_of(1), prompt_of(1)], SamplingParams(), 4)
    assert len(results[0].tokens) == 0 and results[0].text == "" and results[0].finish_reason == "error"
    assert "at position 1 are not finite (NaN or infinity), after 0 generated tokens" in results[0].error
    assert results[1].tokens.tolist() == scripts[0][1:5]


@pytest.mark.parametrize("name", ARMS)
def test_stop_before_the_failure(arms, scripts, name):
    """What ends an answer at or before its last sound token ends it well."""
    prompt, said = prompt_of(2), scripts[1][1:6]
    for sampling in (SamplingParams(stop="DX"), SamplingParams(stop_token_ids=(said[-1],))):
        result = arms[name].generate_encoded([prompt], sampling, 16)[0]
        assert (result.finish_reason, result.tokens.tolist(), result.error) == ("stop", said, None)
    result = arms[name].generate_encoded([prompt], SamplingParams(), 5)[0]
    assert (result.finish_reason, result.tokens.tolist()) == ("length", said)


@pytest.mark.parametrize("name", ARMS)
def test_a_single_request_raises(arms, name):
    generator = arms[name]
    prompt = "</s>"  # the token that the broken answer begins after
    with pytest.raises(FloatingPointError, match="prompt 0: the logits of the token at position .* not finite"):
        generator.generate(prompt, raw=True, max_new_tokens=16)
    shown = []
    with pytest.raises(FloatingPointError, match="after 5 generated tokens"):
        for piece in generator.stream(prompt, raw=True, max_new_tokens=16, rounds_per_piece=1):
            shown.append(piece)
            assert piece.result is None
    assert "".join(piece.text for piece in shown) == "ABCDX"
    assert sum(len(piece.tokens) for piece in shown) == 5


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_broken_drafter_changes_no_token(generators, requests, temperature):
    """NaN in a draft head: what it drafts is arbitrary, the answer stays the target's."""
    sampling = SamplingParams(temperature=temperature, seed=2)
    drafter = generators("eagle2").drafter
    drafter = dataclasses.replace(drafter, model=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), drafter.model))
    broken = generators("eagle2").with_drafter(drafter)
    answers = [each.generate(*requests[0], sampling, 12) for each in (generators("autoregressive"), broken)]
    assert answers[0].tokens.tolist() == answers[1].tokens.tolist()
    assert answers[1].stats.mean_acceptance_length < 2
