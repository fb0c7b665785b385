"""How a request samples: the fields that callers set, and those of a whole batch as arrays."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.checks import encodable, real_number, shown, whole_number
from jaxspec.speculation.penalties import Penalties

if TYPE_CHECKING:  # it reads files, which importing this module needs no library for
    from jaxspec.targets.generation import GenerationDefaults

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this one decode greedily: logits divided by less would overflow float32. vLLM's limit."""
REPETITION = 1e-5, 1e5
"""Bounds of the repetition penalty, for the same reason."""
MAX_LOGPROBS = 20
"""The most alternatives a token is told with, as OpenAI and vLLM have it."""


class Unset:
    """Marks a number that no caller has given: it stands for the value at which nothing is changed, and gives way to
    what a target's folder says (`SamplingParams.resolved`)."""


class UnsetFloat(float, Unset):
    """Equal to the number it stands for."""


class UnsetInt(int, Unset):
    """Equal to the number it stands for."""


OFF, ONE, NONE = UnsetFloat(0.0), UnsetFloat(1.0), UnsetInt(0)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request chooses its tokens and where it stops.

    A field in whose place the target's generation_config.json may speak (temperature, top_p, top_k, min_p,
    repetition_penalty, presence_penalty, frequency_penalty, min_tokens) is *unset* until it is given, by name or by
    place; `dataclasses.replace` keeps what is unset so. Unset fields equal the values below, which is what they mean
    where the folder says nothing. A `Generator` puts numbers in their place (`resolved`).

    Attributes:
      temperature: 0 is greedy (argmax); values in (0, 1e-5) are taken as 0.
      top_p: keep the most probable tokens that together reach this probability, in (0, 1]; 1 is off.
      top_k: keep the k most probable tokens; 0 is off.
      min_p: drop tokens less probable than min_p times the most probable one, in [0, 1]; 0 is off.
      seed: in [0, 2**32 - 1]. Same seed, prompt and parameters: same tokens, with and without speculation.
      stop: strings that end the answer; a single string is taken as a tuple of one.
      stop_token_ids: token ids that end the answer, beside the model's own end-of-sequence tokens.
      repetition_penalty: divides the positive logits of tokens that prompt or answer hold and multiplies the negative
        ones, as transformers and vLLM do, in [1e-5, 1e5]; 1 is off.
      presence_penalty: taken off the logits of tokens that the answer holds, as OpenAI and vLLM do, in [-2, 2]; 0 is
        off.
      frequency_penalty: the same times how often the answer holds them.
      logit_bias: added to the logits of these token ids, in [-100, 100]; a mapping, kept as a tuple of (id, bias) in
        the order of ids.
      min_tokens: no stop token comes before the answer has so many tokens. Stop strings do.
      logprobs: None, or with how many alternatives (0 to 20) the log-probability of every token is told.

    Raises:
      ValueError: a field is out of its range.
    """

    temperature: float = OFF
    top_p: float = ONE
    top_k: int = NONE
    min_p: float = OFF
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = ONE
    presence_penalty: float = OFF
    frequency_penalty: float = OFF
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    min_tokens: int = NONE
    logprobs: int | None = None

    def __post_init__(self) -> None:
        temperature = real_number("temperature", self.temperature)
        if not 0 <= temperature <= float(np.finfo(np.float32).max):
            raise ValueError(f"temperature must be finite and at least 0, got {temperature!r}")
        top_p = real_number("top_p", self.top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be greater than 0 and at most 1, got {top_p!r}")
        checked = {
            "temperature": 0.0 if temperature < GREEDY_TEMPERATURE else temperature,
            "top_p": top_p,
            "top_k": whole_number("top_k", self.top_k, 0, 2**31 - 1),
            "min_p": _between("min_p", self.min_p, 0, 1),
            "seed": whole_number("seed", self.seed, 0, 2**32 - 1),
            "stop": _stop_strings(self.stop),
            "stop_token_ids": _stop_token_ids(self.stop_token_ids),
            "repetition_penalty": _between("repetition_penalty", self.repetition_penalty, *REPETITION),
            "presence_penalty": _between("presence_penalty", self.presence_penalty, -2, 2),
            "frequency_penalty": _between("frequency_penalty", self.frequency_penalty, -2, 2),
            "logit_bias": _logit_bias(self.logit_bias),
            "min_tokens": whole_number("min_tokens", self.min_tokens, 0, 2**31 - 1),
        }
        if self.logprobs is not None:
            checked["logprobs"] = whole_number("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        for name, value in checked.items():
            if not isinstance(getattr(self, name), Unset):
                object.__setattr__(self, name, value)

    @property
    def penalises(self) -> bool:
        """Whether it changes logits before temperature and filters (`jaxspec.speculation.penalties`)."""
        return any(getattr(self, name) != value for name, value in PENALTIES.items())

    @property
    def penalties(self) -> dict[str, Any]:
        """The fields that do so, with their values."""
        return {name: getattr(self, name) for name in PENALTIES}

    def from_folder(self, defaults: "GenerationDefaults") -> dict[str, float]:
        """What the unset fields take from a folder, by name: those that change something."""
        values = {}
        for name in FOLDER_FIELDS:
            own, said = getattr(self, name), _folder_value(name, defaults)
            if isinstance(own, Unset) and said is not None and said != own:
                values[name] = said
        greedy = 0 <= values.get("temperature", self.temperature) < GREEDY_TEMPERATURE
        return {name: value for name, value in values.items() if not (greedy and name in SAMPLING_ONLY)}

    def resolved(self, defaults: "GenerationDefaults") -> "SamplingParams":
        """The same with a number in every field: where none was given, the folder's.

        An unset temperature is the folder's where it says `do_sample: true` (1 where it names none), else 0. The other
        fields take what the file names, `min_tokens` its `min_new_tokens`; what it does not name is off. (transformers
        would sample with top_k 50 where a file names no top_k, vLLM would not.)

        Raises:
          ValueError: the folder's value is out of range; names its file.
        """
        plain = {name: getattr(self, name) + 0 for name in FOLDER_FIELDS}  # the number alone
        try:
            return dataclasses.replace(self, **plain | self.from_folder(defaults))
        except ValueError as error:
            raise ValueError(f"{defaults.source}: {error}") from None


PENALTIES = {
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": (),
    "min_tokens": 0,
}
"""Fields that change logits, with the values at which they do not."""
SAMPLING_ONLY = "temperature", "top_p", "top_k", "min_p"
"""Fields without effect on a greedy request."""
FOLDER_FIELDS = tuple(field.name for field in dataclasses.fields(SamplingParams) if isinstance(field.default, Unset))
"""Fields that a folder may fill."""


def _folder_value(name: str, defaults: "GenerationDefaults") -> float | None:
    """What a folder says of a field; None where it says nothing."""
    if name == "temperature":
        return (1.0 if defaults.temperature is None else defaults.temperature) if defaults.do_sample else None
    return getattr(defaults, "min_new_tokens" if name == "min_tokens" else name)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchSampling:
    """The numbers of `SamplingParams` for every row of a batch, as arrays: no parameter is shared by the batch."""

    temperature: jax.Array  # f32 [B]
    top_p: jax.Array  # f32 [B]
    top_k: jax.Array  # i32 [B]
    min_p: jax.Array  # f32 [B]
    seed: jax.Array  # u32 [B]
    penalties: Penalties | None = None  # None where no row asks for any: then there is nothing to compute

    @classmethod
    def from_params(cls, params: Sequence[SamplingParams], penalties: Penalties | None = None) -> "BatchSampling":
        """Stacks one `SamplingParams` per row (unset fields as if they were off); `penalties` are those of the same
        rows. A ValueError where there is no row."""
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
            penalties=penalties,
        )

    def of_rows(self, rows: jax.Array) -> "BatchSampling":
        """What the rows bool `[B]` ask for; the others cost what greedy ones do."""
        penalties = self.penalties
        if penalties is not None:
            penalties = dataclasses.replace(penalties, used=penalties.used & rows)
        temperature = jnp.where(rows, self.temperature, 0.0)
        return dataclasses.replace(self, temperature=temperature, penalties=penalties)

    def counted(self, tokens: jax.Array, count: jax.Array) -> "BatchSampling":
        """The same after the first `count` i32 `[B]` of `tokens` i32 `[B, P]` were generated."""
        if self.penalties is None:
            return self
        return dataclasses.replace(self, penalties=self.penalties.counted(tokens, count))


def _between(name: str, value: Any, least: float, most: float) -> float:
    number = real_number(name, value)
    if not least <= number <= most:
        raise ValueError(f"{name} must be between {least:g} and {most:g}, got {number!r}")
    return number


def _logit_bias(given: Any) -> tuple[tuple[int, float], ...]:
    try:
        pairs = [(token, value) for token, value in (given.items() if isinstance(given, Mapping) else given)]
    except (TypeError, ValueError):
        raise ValueError(f"logit_bias must be a mapping of token ids to numbers, got {shown(given)}") from None
    checked = {}
    for token, value in pairs:
        token = whole_number("a token id of logit_bias", token, 0, 2**31 - 1)
        if token in checked:
            raise ValueError(f"logit_bias has token {token} twice")
        checked[token] = _between(f"the logit_bias of token {token}", value, -100, 100)
    return tuple(sorted(checked.items()))


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
