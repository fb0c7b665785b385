"""Models shared by the whole session: what is compiled for one test serves the next."""

import functools
from collections.abc import Callable

import jax
import numpy as np
import pytest

from jaxspec import Generator, Target
from tests.drafting import DRAFTERS, linked_target


@pytest.fixture(scope="session")
def target(tmp_path_factory) -> Target:
    return linked_target(tmp_path_factory.mktemp("linked"))


@pytest.fixture(scope="session")
def generators(target) -> Callable[[str], Generator]:
    """The generator of a drafter in `tests.drafting.DRAFTERS`, or of "autoregressive"; one per name and session."""

    @functools.cache
    def generator(name: str) -> Generator:
        drafter = None if name == "autoregressive" else DRAFTERS[name](target)
        return Generator(target, drafter, max_length=512)

    return generator


@pytest.fixture(scope="session")
def pictures() -> list[np.ndarray]:
    """Three small random photographs, uint8 [H, W, 3]."""
    rng = np.random.default_rng(7)
    return [rng.integers(0, 256, shape, np.uint8) for shape in ((40, 60, 3), (130, 90, 3), (16, 16, 3))]


@pytest.fixture(scope="session")
def requests(pictures) -> list[tuple[str, list[np.ndarray]]]:
    """Prompts with no image, one and two, of different lengths."""
    return [
        ("What is a chart for?", []),
        ("How many shapes are there?", pictures[:1]),
        ("Compare the two.", pictures[1:]),
    ]


@pytest.fixture(scope="module")
def quick_compilation():
    """Programs compile in a fraction of the time and run slower; their arithmetic is the same but for the order of
    additions."""
    plain, jit = jax.config.read("jax_disable_most_optimizations"), jax.jit
    jax.config.update("jax_disable_most_optimizations", True)
    jax.jit = functools.partial(jit, compiler_options={"xla_cpu_use_fusion_emitters": False})
    yield
    jax.jit = jit
    jax.config.update("jax_disable_most_optimizations", plain)
