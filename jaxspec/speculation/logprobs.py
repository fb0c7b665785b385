"""Log-probabilities of what was generated: of the model's own logits, before penalties, temperature and filters (vLLM's
`raw_logprobs`)."""

import dataclasses
from typing import Generic

import jax
import jax.numpy as jnp

from jaxspec.speculation.filters import largest
from jaxspec.speculation.params import MAX_LOGPROBS
from jaxspec.targets.images import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logprobs(Generic[Array]):
    """Of n tokens, natural logarithms in float32. On the device they lead with a batch axis and hold as many
    alternatives as any row may ask for."""

    token_logprobs: Array  # f32 [n], of the tokens themselves
    top_ids: Array  # i32 [n, k], the most probable tokens, the best first
    top_logprobs: Array  # f32 [n, k], theirs


def no_logprobs(batch: int, length: int, vocab_size: int) -> Logprobs[jax.Array]:
    """Room for those of `length` tokens a row."""
    shape = batch, length, min(MAX_LOGPROBS, vocab_size)
    return Logprobs(jnp.zeros(shape[:2]), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))


@jax.named_scope("logprobs")
def logprobs_of(logits: jax.Array, tokens: jax.Array) -> Logprobs[jax.Array]:
    """Those of tokens i32 `[B, P]`, chosen from logits `[B, P, V]`."""
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)  # [B, P, 1]
    values, ids = largest(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    return Logprobs((chosen - total)[..., 0], ids.astype(jnp.int32), values - total)
