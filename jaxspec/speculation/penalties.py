"""Penalties, biases and a least length: what changes the target's logits before temperature and filters.

In this order, each on what the one before it left:

    bias         logit + bias[token]                                             (OpenAI's `logit_bias`)
    repetition   logit / r where it is positive, else logit * r, for every token of prompt and answer (transformers)
    frequency    logit - f * (how often the answer has the token so far)         (OpenAI, vLLM)
    presence     logit - p, for every token of the answer                        (OpenAI, vLLM)
    min_tokens   -inf for stop tokens, as long as the answer has fewer tokens

A tree has as many contexts as nodes, yet no node needs counts of its own: its context is the row's, `Penalties.counts`,
and the few tokens on its path, so the row's penalties are right everywhere but at these, and there they are set anew.
The root is the last token of the answer, so the row's counts hold it; a node at depth d adds d tokens.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.speculation.vocabulary import values_at, with_values


class Asked(Protocol):
    """What a request says of them: the fields of `SamplingParams` (params.py)."""

    @property
    def penalises(self) -> bool: ...

    @property
    def repetition_penalty(self) -> float: ...

    @property
    def presence_penalty(self) -> float: ...

    @property
    def frequency_penalty(self) -> float: ...

    @property
    def min_tokens(self) -> int: ...

    @property
    def logit_bias(self) -> Mapping[int, float] | tuple[tuple[int, float], ...]: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Penalties:
    """What the rows of a batch ask for and what they have said. A row that asks for nothing keeps its logits bit by
    bit."""

    used: jax.Array  # bool [B], rows that ask for any of it
    repetition: jax.Array  # f32 [B]
    presence: jax.Array  # f32 [B]
    frequency: jax.Array  # f32 [B]
    min_tokens: jax.Array  # i32 [B]
    generated: jax.Array  # i32 [B], tokens of the answer that are counted, the root included
    bias: jax.Array  # f32 [B, V]
    stops: jax.Array  # bool [B, V], the row's stop tokens
    prompt_seen: jax.Array  # bool [B, V], tokens of the prompt, image tokens included
    counts: jax.Array  # i32 [B, V], how often each token was generated

    @classmethod
    def from_params(
        cls,
        params: Sequence[Asked],
        prompts: Sequence[np.ndarray],
        stop_token_ids: Sequence[Sequence[int]],
        vocab_size: int,
    ) -> "Penalties":
        """The state before the first token: one entry per row of the parameters, the prompt's tokens i32 `[S]` and the
        stop tokens, the target's own among them. Tokens outside the vocabulary (an image token without an
        embedding) cannot be generated and count for nothing.

        Raises ValueError where `min_tokens` leaves no token to choose.
        """
        shape = len(params), vocab_size
        bias, stops, seen = np.zeros(shape, np.float32), np.zeros(shape, bool), np.zeros(shape, bool)
        for row, (each, prompt, ends) in enumerate(zip(params, prompts, stop_token_ids, strict=True)):
            for token, value in dict(each.logit_bias).items():
                bias[row, token] = value
            for marks, tokens in ((stops, ends), (seen, prompt)):
                ids = np.asarray(tokens, np.int64)
                marks[row, ids[(ids >= 0) & (ids < vocab_size)]] = True
            if each.min_tokens and stops[row].all():
                raise ValueError(f"min_tokens leaves no token to choose: all {vocab_size} are stop tokens")

        def column(name: str, dtype: type) -> jax.Array:
            return jnp.asarray(np.array([getattr(each, name) for each in params], dtype))

        return cls(
            used=jnp.asarray(np.array([each.penalises for each in params])),
            repetition=column("repetition_penalty", np.float32),
            presence=column("presence_penalty", np.float32),
            frequency=column("frequency_penalty", np.float32),
            min_tokens=column("min_tokens", np.int32),
            generated=jnp.zeros(len(params), jnp.int32),
            bias=jnp.asarray(bias),
            stops=jnp.asarray(stops),
            prompt_seen=jnp.asarray(seen),
            counts=jnp.zeros(shape, jnp.int32),
        )

    def counted(self, tokens: jax.Array, count: jax.Array) -> "Penalties":
        """The state after the first `count` i32 `[B]` of `tokens` i32 `[B, P]` were generated, too."""
        real = (jnp.arange(tokens.shape[1]) < count[:, None]).astype(jnp.int32)
        rows = jnp.arange(tokens.shape[0])[:, None]
        return dataclasses.replace(
            self, counts=self.counts.at[rows, tokens].add(real), generated=self.generated + count
        )

    def among(self, vocabulary: jax.Array) -> "Penalties":
        """The same for logits of the tokens `vocabulary` i32 `[Vd]` alone."""
        part = {name: getattr(self, name)[:, vocabulary] for name in ("bias", "stops", "prompt_seen", "counts")}
        return dataclasses.replace(self, **part)


@jax.named_scope("penalties")
def penalised(
    logits: jax.Array, penalties: Penalties, depths: jax.Array | int, path: jax.Array | None = None
) -> jax.Array:
    """Logits f32 `[B, N, V]` as temperature and filters shall see them.

    Args:
      logits: [B, N, V], any float dtype.
      penalties: of B rows.
      depths: i32 [B, N] (or one for all), how many tokens each node's context has beyond those that are counted.
      path: i32 [B, N, P], these tokens in any order, -1 where there are fewer than P. Without it they are not seen,
        which is what drafts make do with; `min_tokens` always holds.

    Returns:
      f32 [B, N, V]. Stop tokens that come too early are -inf. Where no row asks for anything it costs nothing.
    """
    logits = logits.astype(jnp.float32)

    def changed(logits: jax.Array) -> jax.Array:
        return _penalised(logits, penalties, depths, path)

    return jax.lax.cond(jnp.any(penalties.used), changed, lambda logits: logits, logits)


def _penalised(logits: jax.Array, penalties: Penalties, depths: jax.Array | int, path: jax.Array | None) -> jax.Array:
    early = (penalties.generated[:, None] + depths < penalties.min_tokens[:, None])[..., None]  # [B, N or 1, 1]
    whole = _apply(
        penalties,
        logits,
        penalties.bias[:, None],
        (penalties.prompt_seen | (penalties.counts > 0))[:, None],
        penalties.counts[:, None],
        penalties.stops[:, None] & early,
    )
    if path is None or not path.shape[-1]:
        return whole
    batch = jnp.arange(path.shape[0])[:, None, None]
    tokens = jnp.maximum(path, 0)
    on_path = jnp.sum(path[..., None] == path[..., None, :], axis=-1, dtype=jnp.int32)  # [B, N, P]
    anew = _apply(
        penalties,
        values_at(logits, tokens),
        penalties.bias[batch, tokens],
        jnp.ones(path.shape, bool),
        penalties.counts[batch, tokens] + on_path,
        penalties.stops[batch, tokens] & early,
    )
    return with_values(whole, jnp.where(path >= 0, path, logits.shape[-1]), anew)


def _apply(
    penalties: Penalties, logits: jax.Array, bias: jax.Array, seen: jax.Array, counts: jax.Array, banned: jax.Array
) -> jax.Array:
    """The definitions, for logits f32 `[B, N, K]` of any K tokens and what is known of these."""

    def of_row(values: jax.Array) -> jax.Array:
        return values[:, None, None]

    repetition = of_row(penalties.repetition)
    biased = logits + bias
    scores = jnp.where(seen, jnp.where(biased < 0, biased * repetition, biased / repetition), biased)
    scores = scores - of_row(penalties.frequency) * counts
    scores = scores - of_row(penalties.presence) * (counts > 0)
    return jnp.where(of_row(penalties.used), jnp.where(banned, -jnp.inf, scores), logits)
