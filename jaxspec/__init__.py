"""jaxspec: lossless speculative decoding for vision-language models, in JAX.

Everything named here, and any module of the package, is imported when it is first asked for: `import jaxspec` and the
import of a single module load no more than they need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxspec.distribution import installed_version, warn_of_namesakes
from jaxspec.quiet import without_torch_advice

if TYPE_CHECKING:
    from jaxspec import demo
    from jaxspec.drafters.drafter import Drafter, load_drafter
    from jaxspec.generator import Generator, Piece, Result
    from jaxspec.speculation.params import SamplingParams
    from jaxspec.speculation.tree import TreeConfig
    from jaxspec.targets.target import Target, load_target
    from jaxspec.video import Video

__version__: str = installed_version()

__all__ = [
    "Drafter",
    "Generator",
    "Piece",
    "Result",
    "SamplingParams",
    "Target",
    "TreeConfig",
    "Video",
    "demo",
    "load_drafter",
    "load_target",
]

_HOMES = {
    "Drafter": "drafters.drafter",
    "Generator": "generator",
    "Piece": "generator",
    "Result": "generator",
    "SamplingParams": "speculation.params",
    "Target": "targets.target",
    "TreeConfig": "speculation.tree",
    "Video": "video",
    "load_drafter": "drafters.drafter",
    "load_target": "targets.target",
}
"""The module of each name above."""

without_torch_advice()
warn_of_namesakes()


def __getattr__(name: str) -> Any:
    if home := _HOMES.get(name):
        value = getattr(import_module(f"{__name__}.{home}"), name)
        globals()[name] = value
        return value
    module = f"{__name__}.{name}"
    if not name.startswith("_"):
        try:
            return import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:  # the module is there, something that it needs is not
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
