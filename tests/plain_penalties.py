"""Penalties by their definitions, one context at a time, in NumPy."""

import numpy as np


def penalised_logits(logits, params, prompt, answer, stops) -> np.ndarray:
    """Logits f32 [V] after the tokens `prompt` and `answer`: the bias, transformers' repetition penalty, the frequency
    and presence penalties of vLLM, and no stop token before `min_tokens`."""
    scores = np.array(logits, np.float32)
    for token, bias in params.logit_bias:
        scores[token] += np.float32(bias)
    penalty = np.float32(params.repetition_penalty)
    for token in {int(token) for token in (*prompt, *answer) if token < len(scores)}:
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    counts = np.bincount(np.asarray(answer, int), minlength=len(scores)).astype(np.float32)
    scores = scores - np.float32(params.frequency_penalty) * counts
    scores = scores - np.float32(params.presence_penalty) * (counts > 0)
    if len(answer) < params.min_tokens:
        scores[list(stops)] = -np.inf
    return scores
