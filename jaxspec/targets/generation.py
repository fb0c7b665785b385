"""What a Hugging Face folder says about generating: its end tokens, and how answers are sampled unless a request says
otherwise (`generation_config.json`; where there is none, config.json, as in transformers)."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxspec.checkpoints.tensors import read_json

FILE = "generation_config.json"
NEUTRAL = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "top_h": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "diversity_penalty": 0.0,
    "penalty_alpha": 0.0,
    "guidance_scale": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "token_healing": False,
    "bad_words_ids": [],
    "force_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "stop_strings": None,
    "constraints": None,
    "watermarking_config": None,
    "dola_layers": None,
}
"""Settings that change what is generated, with the values (beside null) at which they change nothing in transformers.
The limits `max_length` and `max_new_tokens` are not among them: every request has its own."""


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """A folder's defaults for what a request leaves unset (`SamplingParams.resolved`); None where it says nothing."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_new_tokens: int | None = None
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further settings of transformers' `GenerationConfig`, as they stand in the file: none is applied."""
    source: Path | None = None
    """The file that says so."""

    @classmethod
    def read(cls, folder: Path) -> "GenerationDefaults":
        """Raises ValueError, naming file and key, for a value of the wrong type."""
        source, *rest = [part for part in places(folder) if part[0].name == FILE] or list(places(folder))
        merged = {}
        for path, said in (source, *rest):  # the first that says something counts
            own = {key: value for key, value in said.items() if key in NEUTRAL and value is not None}
            if path.name != FILE:  # older versions of transformers wrote all of their defaults into config.json
                own = {key: value for key, value in own.items() if value != NEUTRAL[key]}
            merged = own | merged
        values = {key: checked(source[0], key, value) for key, value in merged.items()}
        own = {field.name for field in dataclasses.fields(cls)}
        others = {key: values.pop(key) for key in list(values) if key not in own}
        return cls(**values, others=others, source=source[0])

    def not_applied(self) -> dict[str, Any]:
        """The settings for which there is no sampling parameter, where they differ from the values at which nothing
        changes."""
        return {name: value for name, value in self.others.items() if value is not None and value != NEUTRAL[name]}

    def warning(self) -> str | None:
        """One sentence that names what is not applied; None where there is nothing."""
        asked = [f"{name} {shortened(value)}" for name, value in self.not_applied().items()]
        return f"{self.source} asks for {', '.join(asked)}, which is not applied" if asked else None


def places(folder: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """(file, what it says) of every place where transformers looks for generation settings, the first that counts
    first."""
    if (folder / FILE).exists():
        yield folder / FILE, read_json(folder / FILE)
    path = folder / "config.json"
    raw = read_json(path)
    yield path, raw
    for key in ("text_config", "llm_config"):
        if isinstance(raw.get(key), Mapping):
            yield path, raw[key]


def stop_tokens(folder: Path, hf_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """End-of-sequence ids: those of generation_config.json, else of the top level of config.json, else of its text
    config. Where no file names any: what transformers takes for this model_type, and the tokenizer's.

    Raises ValueError, naming the file, where they are no integers.
    """
    for path, said in places(folder):
        if ids := token_ids(said.get("eos_token_id"), path):
            return ids
    path = folder / "config.json"
    usual = token_ids(getattr(hf_config.get_text_config(), "eos_token_id", None), path)
    return tuple(dict.fromkeys((*usual, *token_ids(tokenizer.eos_token_id, path))))


def token_ids(value: Any, source: Path) -> tuple[int, ...]:
    """One id or a list of them, each once. Negative ones, which mean that there is none, are left out."""
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    for each in ids:
        if isinstance(each, bool) or not isinstance(each, int):
            raise ValueError(f"{source}: eos_token_id must be an integer or a list of integers, got {value!r}")
    return tuple(dict.fromkeys(each for each in ids if each >= 0))


def checked(source: Path, name: str, value: Any) -> Any:
    """The value of a setting, as the type of its neutral value says. Raises ValueError for another type."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match NEUTRAL[name]:
        case bool():
            fits, kind = isinstance(value, bool), "true or false"
        case float():
            fits, kind = number and math.isfinite(value), "a number"
        case int():
            fits = number and float(value).is_integer()
            kind, value = "an integer", int(value) if fits else value
        case list():
            fits, kind = isinstance(value, list), "a list"
        case _:
            return value
    if not fits:
        raise ValueError(f"{source}: {name} must be {kind}, got {value!r}")
    return value


def shortened(value: Any, length: int = 40) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= length else text[:length] + ".."
