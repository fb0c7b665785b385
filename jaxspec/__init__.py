"""jaxspec: lossless speculative decoding for vision-language models, in JAX."""

import os
from importlib.metadata import PackageNotFoundError, version

# jaxspec takes processors and configs from transformers, never a model: its advice to install PyTorch is not for users.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# ruff: noqa: E402
from jaxspec.drafters.drafter import Drafter, load_drafter
from jaxspec.generator import Generator, Piece, Result
from jaxspec.speculation.sampling import SamplingParams
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.target import Target, load_target
from jaxspec.video import Video

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
    "Video",
    "load_drafter",
    "load_target",
]
