"""jaxspec: lossless speculative decoding for vision-language models, in JAX."""

from importlib.metadata import PackageNotFoundError, version

from jaxspec.drafters.drafter import Drafter, load_drafter
from jaxspec.generator import Generator, Piece, Result
from jaxspec.speculation.sampling import SamplingParams
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.target import Target, load_target

try:
    __version__ = version("jaxspec")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "Drafter",
    "Generator",
    "Piece",
    "Result",
    "SamplingParams",
    "Target",
    "TreeConfig",
    "load_drafter",
    "load_target",
]
