"""Coupled sampling: the token at a position is a deterministic function of (logits, seed, position).

Autoregressive sampling draws a token from softmax(logits). Here the same draw is written as an argmax,

    token[t] = argmax(warp(logits[t]) + gumbel_noise(seed, t))          (Gumbel-max; exact for every temperature > 0)
    token[t] = argmax(logits[t])                                        (temperature 0)

so that the randomness of a request is fixed before any model runs. Speculative decoding then is lossless as an
equality and not as a statistic: a draft token is right iff it is the token this rule gives for the target's logits, and
neither the drafter, nor the tree, nor the rest of the batch can change what a request receives. A drafter may look at
the same noise, for the tokens that are emitted are the target's own.

Source: Daliri, Musco, Suresh, "Coupling without communication and drafter-invariant speculative decoding"
(arXiv 2408.07978).

Filters run in the order and with the meaning of transformers' logits warpers: temperature, top-k, top-p, min-p, each on
what the one before it left. Each filter keeps the tokens at or above some threshold, so a row needs three thresholds
and no sort. They are found by bisection over the bits of float32: 32 masked reductions, exact, O(1) extra memory.
"""

import dataclasses
import math
import numbers
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this one decode greedily: logits divided by less would overflow float32. vLLM's limit."""

_SIGN_BIT = np.uint32(0x80000000)
_KEY_OF_MINUS_INFINITY = np.uint32(0x007FFFFF)
_KEY_OF_INFINITY = np.uint32(0xFF800000)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request chooses its tokens and where it stops.

    Attributes:
      temperature: 0 is greedy (argmax); values in (0, 1e-5) are taken as 0.
      top_p: keep the most probable tokens that together reach this probability, in (0, 1]; 1 is off.
      top_k: keep the k most probable tokens; 0 is off.
      min_p: drop tokens less probable than min_p times the most probable one, in [0, 1]; 0 is off.
      seed: in [0, 2**32 - 1]. Same seed, prompt and parameters: same tokens, with and without speculation.
      stop: strings that end the answer; a single string is taken as a tuple of one.
      stop_token_ids: token ids that end the answer, beside the model's own end-of-sequence tokens.

    Raises:
      ValueError: a field is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        temperature = _number("temperature", self.temperature)
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be finite and at least 0, got {temperature!r}")
        top_p = _number("top_p", self.top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be greater than 0 and at most 1, got {top_p!r}")
        min_p = _number("min_p", self.min_p)
        if not 0 <= min_p <= 1:
            raise ValueError(f"min_p must be between 0 and 1, got {min_p!r}")
        checked = {
            "temperature": 0.0 if temperature < GREEDY_TEMPERATURE else temperature,
            "top_p": top_p,
            "top_k": _integer("top_k", self.top_k, 2**31 - 1),
            "min_p": min_p,
            "seed": _integer("seed", self.seed, 2**32 - 1),
            "stop": _stop_strings(self.stop),
            "stop_token_ids": _stop_token_ids(self.stop_token_ids),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchSampling:
    """The numbers of `SamplingParams` for every row of a batch, as arrays: no parameter is shared by the batch."""

    temperature: jax.Array  # f32 [B]
    top_p: jax.Array  # f32 [B]
    top_k: jax.Array  # i32 [B]
    min_p: jax.Array  # f32 [B]
    seed: jax.Array  # u32 [B]

    @classmethod
    def from_params(cls, params: Sequence[SamplingParams]) -> "BatchSampling":
        """Stacks one `SamplingParams` per row; a ValueError where there is no row."""
        if not params:
            raise ValueError("BatchSampling.from_params needs at least one SamplingParams, got an empty list")

        def column(name, dtype):
            return jnp.asarray(np.array([getattr(row, name) for row in params], dtype))

        return cls(
            temperature=column("temperature", np.float32),
            top_p=column("top_p", np.float32),
            top_k=column("top_k", np.int32),
            min_p=column("min_p", np.float32),
            seed=column("seed", np.uint32),
        )


def gumbel_noise(seed: jax.Array, positions: jax.Array, vocab_size: int) -> jax.Array:
    """The standard Gumbel noise of every (seed, position); a function of nothing else.

    A row's noise does not change with the batch around it, with the positions asked for together, with the mesh, or
    with the default PRNG of the process (the generator is always threefry, keyed by `fold_in(key(seed), position)`).

    It is not `jax.random.gumbel`, whose float32 noise ends at 15.9 because it draws 23 bits: with 150k tokens, those
    less probable than 1e-7 can hold a visible share of the probability, and could not be drawn. All 32 bits of the
    same draw move the end to 22.9 at the same cost (`mode="high"` of `jax.random.gumbel` costs three times as much).

    Args:
      seed: u32 [B].
      positions: i32 [B, T], absolute positions of the tokens that the noise chooses.
      vocab_size: V.

    Returns:
      f32 [B, T, V].
    """

    def one_position(key, position):
        bits = jax.random.bits(jax.random.fold_in(key, position), (vocab_size,), jnp.uint32)
        # Upper tail mass: small values, where float32 is dense, become the large noise that decides an argmax.
        tail = bits.astype(jnp.float32) * 2.0**-32 + 2.0**-33
        return -jnp.log(-jnp.log1p(-jnp.minimum(tail, 1 - 2.0**-24)))

    def one_row(row_seed, row_positions):
        key = jax.random.key(row_seed, impl="threefry2x32")
        return jax.vmap(one_position, in_axes=(None, 0))(key, row_positions)

    return jax.vmap(one_row)(seed, positions)


def warp(logits: jax.Array, sampling: BatchSampling) -> jax.Array:
    """Temperature and filters: softmax of the result is the distribution that the row samples from.

    Equal to transformers' TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper in this order,
    but for ties: where several tokens share the value at which top-p cuts, transformers keeps as many of them as the
    mass needs, in an order its sort leaves open; here a token stays iff the tokens strictly more probable than it hold
    less than top_p, so equal tokens stay or go together. Top-k keeps all ties of the k-th value, there as here.

    The search for a threshold runs only if a sampled row of the batch uses that filter. (Under `jax.vmap` it always
    would: batch with the leading axis instead.)

    Args:
      logits: [B, N, V], any float dtype, no NaN, at least one finite value for each of the B x N.
      sampling: of B rows.

    Returns:
      f32 [B, N, V]. Removed tokens are -inf. Rows with temperature 0 come back as they were, for their argmax survives
      every filter.
    """
    logits = logits.astype(jnp.float32)
    any_sampled = jnp.any(sampling.temperature > 0)
    return jax.lax.cond(any_sampled, _warp_sampled, lambda logits, _: logits, logits, sampling)


def choose(warped_logits: jax.Array, noise: jax.Array, sampling: BatchSampling) -> jax.Array:
    """The tokens: argmax of the logits where the temperature is 0, argmax of logits plus noise elsewhere.

    Args:
      warped_logits: f32 [B, N, V], from `warp`.
      noise: f32 [B, N, V] (or broadcastable to it), from `gumbel_noise`, of the positions of the tokens to choose.
      sampling: of B rows.

    Returns:
      i32 [B, N]; the lowest token id where several are maximal.
    """
    sampled = (sampling.temperature > 0)[:, None, None]  # [B, 1, 1]
    scores = jnp.where(sampled, warped_logits + noise, warped_logits)  # [B, N, V]
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def _warp_sampled(logits: jax.Array, sampling: BatchSampling) -> jax.Array:
    sampled = sampling.temperature > 0  # [B]
    scaled = logits / jnp.where(sampled, sampling.temperature, 1.0)[:, None, None]  # [B, N, V]
    threshold = jnp.full(logits.shape[:2], -jnp.inf)  # [B, N]
    threshold = _tighten(_top_k_threshold, sampled & (sampling.top_k > 0), scaled, threshold, sampling.top_k)
    threshold = _tighten(_top_p_threshold, sampled & (sampling.top_p < 1), scaled, threshold, sampling.top_p)
    threshold = _tighten(_min_p_threshold, sampled & (sampling.min_p > 0), scaled, threshold, sampling.min_p)
    return jnp.where(scaled >= threshold[..., None], scaled, -jnp.inf)


def _tighten(find: Callable, rows: jax.Array, scaled: jax.Array, threshold: jax.Array, parameter: jax.Array):
    """Raises `threshold` to that of one filter in the rows that use it; costs nothing where none does."""

    def search(scaled, threshold, rows, parameter):
        found = find(scaled, threshold, parameter[:, None])  # [B, N]
        return jnp.where(rows[:, None], jnp.maximum(threshold, found), threshold)

    def keep(scaled, threshold, rows, parameter):
        return threshold

    return jax.lax.cond(jnp.any(rows), search, keep, scaled, threshold, rows, parameter)


def _top_k_threshold(scaled, threshold, top_k):
    """The k-th largest value; -inf where V < k. Top-k is the first filter, so `threshold` has nothing to say."""

    def at_least_k(value):  # [B, N] -> bool [B, N]
        return jnp.sum(scaled >= value[..., None], axis=-1, dtype=jnp.int32) >= top_k

    return _largest_value(at_least_k, scaled.shape[:-1])


def _top_p_threshold(scaled, threshold, top_p):
    """The largest value v such that the tokens >= v hold top_p of the mass of those >= `threshold`."""
    largest = jnp.max(scaled, axis=-1, keepdims=True)  # [B, N, 1]
    weights = jnp.where(scaled >= threshold[..., None], jnp.exp(scaled - largest), 0.0)  # [B, N, V]
    # A product that underflows must still ask for more than nothing, or no token would stay.
    target = jnp.maximum(top_p * jnp.sum(weights, axis=-1), jnp.finfo(jnp.float32).tiny)  # [B, N]

    def mass_reached(value):  # [B, N] -> bool [B, N]
        return jnp.sum(jnp.where(scaled >= value[..., None], weights, 0.0), axis=-1) >= target

    return _largest_value(mass_reached, scaled.shape[:-1])


def _min_p_threshold(scaled, threshold, min_p):
    """probability >= min_p * (largest probability), as a bound on the logits; `threshold` cancels in the ratio."""
    return jnp.max(scaled, axis=-1) + jnp.log(min_p)


def _largest_value(holds: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """The largest float32 for which a monotone predicate holds, for each element of `shape`; -inf if for none.

    `holds` maps f32 `shape` to bool `shape` and, once false, stays false for larger values. The search fixes one bit
    of the value's key after the other, from the highest; keys are uint32 in the order of the floats they stand for.
    """

    def fix_bit(i, key):
        candidate = key | (_SIGN_BIT >> i.astype(jnp.uint32))
        return jnp.where(holds(_value_of_key(candidate)), candidate, key)

    return _value_of_key(jax.lax.fori_loop(0, 32, fix_bit, jnp.zeros(shape, jnp.uint32)))


def _value_of_key(key: jax.Array) -> jax.Array:
    """Inverse of the order-preserving map float32 -> uint32; keys beyond the infinities (NaNs) become infinities."""
    key = jnp.clip(key, _KEY_OF_MINUS_INFINITY, _KEY_OF_INFINITY)
    bits = jnp.where(key >= _SIGN_BIT, key ^ _SIGN_BIT, ~key)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _number(name: str, value) -> float:
    if not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def _integer(name: str, value, largest: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None
    if not 0 <= number <= largest:
        raise ValueError(f"{name} must be between 0 and {largest}, got {number}")
    return number


def _stop_strings(stop) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else _sequence("stop", stop)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop must hold non-empty strings, got {string!r}")
    return strings


def _stop_token_ids(ids) -> tuple[int, ...]:
    return tuple(_integer("stop_token_ids", token, 2**31 - 1) for token in _sequence("stop_token_ids", ids))


def _sequence(name: str, value) -> tuple:
    try:
        return tuple(value)
    except TypeError:
        raise ValueError(f"{name} must be a sequence, got {value!r}") from None
