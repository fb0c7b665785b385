"""Greedy decoding over the caches, ours and transformers', of one batch of processor outputs."""

import numpy as np
import torch

from jaxspec import Generator, SamplingParams, Target
from jaxspec.generator import Batch
from jaxspec.targets.prompts import prompts_of

COUNT = 32


def check_greedy(
    target: Target,
    model,
    inputs: dict,
    sampling: SamplingParams = SamplingParams(),
    asked: dict | None = None,
    **kinds: np.ndarray,
) -> None:
    """`COUNT` greedy tokens of `target` are those of transformers' `model`, which is asked in its own words for what
    `sampling` says; log-probabilities, where it asks for some, are the model's, too.

    `inputs` are padded on the left; `kinds` `[B, S]` is what `generate` of the family wants to know of the tokens.
    """
    expected, margin, logprobs = transformers_tokens(model, inputs, asked or {}, **kinds)
    ours, told = greedy_tokens(target, inputs, sampling)
    for row in range(len(ours)):
        differ = np.flatnonzero(ours[row] != expected[row])
        assert not len(differ), f"row {row} differs at {differ[0]}, where the margin is {margin[row, differ[0]]:.1e}"
        if told[row] is not None:
            own, k = logprobs[row], sampling.logprobs
            np.testing.assert_allclose(told[row].token_logprobs, own[np.arange(COUNT), ours[row]], atol=1e-4)
            np.testing.assert_array_equal(told[row].top_ids, np.argsort(-own, axis=-1, kind="stable")[:, :k])
            np.testing.assert_allclose(told[row].top_logprobs, -np.sort(-own, axis=-1)[:, :k], atol=1e-4)
    assert len(np.unique(ours)) >= COUNT // 4, "texts that repeat one token show little"


def greedy_tokens(target: Target, inputs: dict, sampling: SamplingParams) -> tuple[np.ndarray, list]:
    """I32 `[B, COUNT]` of the generator's decode loop, from the arrays of a processor, without the processor; and the
    log-probabilities of each row, or None."""
    prompts = prompts_of(target.adapter, inputs)
    batch = Batch(Generator(target), prompts, [sampling] * len(prompts), [COUNT] * len(prompts))
    state = batch.advance(batch.start(), COUNT)
    assert batch.finished(state)
    told = [batch.logprobs(state, row, slice(COUNT)) for row in range(len(prompts))]
    return np.asarray(state.tokens)[:, :COUNT], told


def transformers_tokens(model, inputs: dict, asked: dict, **kinds: np.ndarray) -> tuple[np.ndarray, ...]:
    """Tokens `[B, COUNT]` of `generate`; how far each was ahead of the second, relative to the largest logit; and the
    log-probabilities `[B, COUNT, V]` before anything that is `asked` for changes them."""
    assert inputs["attention_mask"][:, -1].all(), "generate needs padding on the left"
    model.generation_config.eos_token_id = None
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in {**inputs, **kinds}.items()}
    output = model.generate(
        **tensors,
        do_sample=False,
        max_new_tokens=COUNT,
        pad_token_id=0,
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
        **asked,
    )
    logits, scores = torch.stack(output.logits, dim=1), torch.stack(output.scores, dim=1)  # [B, COUNT, V]
    first, second = scores.topk(2).values.unbind(-1)
    tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
    return tokens.numpy(), ((first - second) / logits.abs().max()).numpy(), logits.log_softmax(-1).numpy()
