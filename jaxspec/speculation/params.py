"""How a request samples: the fields that callers set, and those of a whole batch as arrays."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.checks import encodable, real_number, shown, whole_number

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this one decode greedily: logits divided by less would overflow float32. vLLM's limit."""


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
        temperature = real_number("temperature", self.temperature)
        if not 0 <= temperature <= float(np.finfo(np.float32).max):
            raise ValueError(f"temperature must be finite and at least 0, got {temperature!r}")
        top_p = real_number("top_p", self.top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be greater than 0 and at most 1, got {top_p!r}")
        min_p = real_number("min_p", self.min_p)
        if not 0 <= min_p <= 1:
            raise ValueError(f"min_p must be between 0 and 1, got {min_p!r}")
        checked = {
            "temperature": 0.0 if temperature < GREEDY_TEMPERATURE else temperature,
            "top_p": top_p,
            "top_k": whole_number("top_k", self.top_k, 0, 2**31 - 1),
            "min_p": min_p,
            "seed": whole_number("seed", self.seed, 0, 2**32 - 1),
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


def _stop_strings(stop) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else _sequence("stop", stop)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop must hold non-empty strings, got {shown(string)}")
        encodable(string, "a stop string")
    return strings


def _stop_token_ids(ids) -> tuple[int, ...]:
    return tuple(whole_number("stop_token_ids", token, 0, 2**31 - 1) for token in _sequence("stop_token_ids", ids))


def _sequence(name: str, value) -> tuple:
    try:
        return tuple(value)
    except TypeError:
        raise ValueError(f"{name} must be a sequence, got {shown(value)}") from None
