"""Log-probabilities of what was generated: of the model's own logits, before penalties, temperature and filters (vLLM's
`raw_logprobs`)."""

import dataclasses
from collections.abc import Callable
from typing import Generic

import jax
import jax.numpy as jnp

from jaxspec.speculation.params import MAX_LOGPROBS
from jaxspec.speculation.vocabulary import largest_tokens, values_at
from jaxspec.targets.images import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logprobs(Generic[Array]):
    """Of n tokens, natural logarithms in float32. On the device they lead with a batch axis and hold as many
    alternatives as any row may ask for."""

    token_logprobs: Array  # f32 [n], of the tokens themselves
    top_ids: Array  # i32 [n, k], the most probable tokens, the best first
    top_logprobs: Array  # f32 [n, k], theirs

    def with_room(self, length: int) -> "Logprobs[jax.Array]":
        """Those of `[B, P]` tokens, with room for more of them: `[B, length]`."""

        def longer(own: jax.Array) -> jax.Array:
            return jnp.zeros((own.shape[0], length, *own.shape[2:]), own.dtype).at[:, : own.shape[1]].set(own)

        return jax.tree.map(longer, self)


@jax.named_scope("logprobs")
def logprobs_of(logits: jax.Array, tokens: jax.Array) -> Logprobs[jax.Array]:
    """Those of tokens i32 `[B, P]`, chosen from logits `[B, P, V]`."""
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)  # [B, P, 1]
    values, ids = largest_tokens(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    chosen = values_at(logits, tokens[..., None])
    return Logprobs((chosen - total)[..., 0], ids.astype(jnp.int32), values - total)


def logprobs_if(asked: jax.Array, logits: Callable[[], jax.Array], tokens: jax.Array) -> Logprobs[jax.Array]:
    """Those of tokens i32 `[B, P]`, chosen from `logits()` `[B, P, V]`, if somebody asks (bool `[]`), else zeros."""

    def told() -> Logprobs[jax.Array]:
        return logprobs_of(logits(), tokens)

    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(told))
    return jax.lax.cond(asked, told, lambda: nothing)
