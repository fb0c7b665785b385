"""Options that commands share, and what they stand for: models, tree, cache of compiled programs."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from jaxspec.checkpoints.hub import EMBEDDED
from jaxspec.checks import whole_number
from jaxspec.demo import EMBEDDED_DRAFTERS
from jaxspec.drafters.drafter import Drafter, load_drafter
from jaxspec.quantization import check_scheme
from jaxspec.sharding import decoding_mesh
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.target import Target, load_target


@dataclasses.dataclass(frozen=True)
class TreeOptions:
    """Draft tree; what is not given stays as the drafter's folder says."""

    depth: Annotated[int | None, tyro.conf.arg(aliases=("--speculative-num-steps",), metavar="INT")] = None
    """Times the frontier is expanded after the first level."""
    tree_top_k: Annotated[int | None, tyro.conf.arg(aliases=("--speculative-eagle-topk",), metavar="INT")] = None
    """Children per expanded node, and nodes per frontier."""
    total_tokens: Annotated[int | None, tyro.conf.arg(aliases=("--speculative-num-draft-tokens",), metavar="INT")] = (
        None
    )
    """Nodes that the target verifies at once, the root included."""
    noise_weight: Annotated[float | None, tyro.conf.arg(metavar="0..1")] = None
    """How much of the target's sampling noise the drafter ranks its candidates by; 0 is drafting without it."""

    def applied(self, tree: TreeConfig) -> TreeConfig:
        """Raises ValueError for a tree that cannot be."""
        return dataclasses.replace(tree, **self.given)

    @property
    def given(self) -> dict[str, Any]:
        """Those fields of `TreeConfig` that are given."""
        fields: dict[str, Any] = {"depth": self.depth, "top_k": self.tree_top_k, "total_tokens": self.total_tokens}
        fields["noise_weight"] = self.noise_weight
        return {name: value for name, value in fields.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class PenaltyOptions:
    """What changes logits before sampling; where an option is not given, what the target's generation_config.json says,
    else off."""

    repetition_penalty: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Divides the positive logits of tokens in prompt and answer and multiplies the negative ones; 1 is off."""
    presence_penalty: Annotated[float | None, tyro.conf.arg(metavar="-2..2")] = None
    """Taken off the logits of tokens in the answer; 0 is off."""
    frequency_penalty: Annotated[float | None, tyro.conf.arg(metavar="-2..2")] = None
    """The same, times how often they are there."""
    min_tokens: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """No end-of-sequence token before so many tokens."""

    @property
    def given(self) -> dict[str, Any]:
        """Those that are given."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Target, precision, compiled programs."""

    target: Annotated[str, tyro.conf.arg(aliases=("--model",), metavar="demo|PATH|REPO")] = EMBEDDED
    """Hugging Face folder or repo id of the target; demo is the embedded model."""
    tensor: Annotated[int, tyro.conf.arg(aliases=("--tensor-parallel-size",), metavar="INT")] = 1
    """Devices that target and drafter are split over, by heads and vocabulary: a divisor of the target's attention
    heads. Further devices stay idle."""
    dtype: str = "float32"
    """Of parameters and computation: float32, bfloat16 or float16."""
    quantize: Annotated[str | None, tyro.conf.arg(aliases=("--quantization",), metavar="int8")] = None
    """int8 keeps the matrices of the target's text model as 8-bit integers, made while they are read: half the memory
    of bfloat16. Speculation changes no answer of that target; the float target's own answers may differ from them."""
    quantize_drafter: Annotated[
        str | None, tyro.conf.arg(aliases=("--speculative-draft-model-quantization",), metavar="int8")
    ] = None
    """int8 keeps the drafter's matrices as 8-bit integers: no answer changes."""
    max_length: Annotated[int | None, tyro.conf.arg(aliases=("--max-model-len",), metavar="INT")] = None
    """Most tokens of prompt and answer together; by default all of the target's positions up to 4096."""
    generation_config: bool = True
    """Where no option says how to sample, the target's generation_config.json does."""
    compilation_cache: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where compiled programs are kept for the next run; the user's cache folder by default, "" for nowhere."""

    def load(self) -> Target:
        """Raises ValueError as `load_target`, and where there are fewer devices than `tensor`."""
        check_scheme(self.quantize_drafter, "quantize_drafter")
        use_compilation_cache(self.compilation_cache)
        mesh = None if whole_number("tensor", self.tensor, 1) == 1 else decoding_mesh(self.tensor)
        return load_target(self.target, dtype=self.dtype, mesh=mesh, quantize=self.quantize)

    @property
    def precision(self) -> str:
        """How the target computes, in words."""
        return self.dtype if self.quantize is None else f"{self.dtype} with {self.quantize} weights"

    @property
    def embedded(self) -> bool:
        """Whether the target is the one that ships with the package."""
        return self.target == EMBEDDED


def load_named_drafter(name: str, target: Target, quantize: str | None = None) -> Drafter:
    """As `load_drafter`; a method of the embedded model is short for demo:METHOD, unless a folder has that name."""
    short = name in EMBEDDED_DRAFTERS and not Path(name).is_dir()
    return load_drafter(f"{EMBEDDED}:{name}" if short else name, target, quantize=quantize)


def use_compilation_cache(folder: str | None) -> None:
    """Keep compiled programs in `folder`; by default where JAX was told to, else in the user's cache folder."""
    if folder is None:
        user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        # JAX gives its configuration these attributes at run time.
        told = jax.config.jax_compilation_cache_dir  # pyrefly: ignore[missing-attribute]
        folder = told or str(user_cache / "jaxspec" / "xla")
    jax.config.update("jax_compilation_cache_dir", folder or None)
