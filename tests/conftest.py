"""How the suite runs, and models shared by the whole session: what is compiled for one test serves the next.

Nearly all the time goes into compiling. So programs compile quickly and run slower, in the same arithmetic but for the
order of additions; and what one process has compiled no other compiles again, subprocesses included. Environment
variables say so, which JAX reads when it is imported.
"""

import functools
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

CACHE = "JAX_COMPILATION_CACHE_DIR"
OWN_CACHE = None if CACHE in os.environ else tempfile.mkdtemp(prefix="jaxspec-tests-")  # workers have it from the first
QUICK = ["--xla_cpu_parallel_codegen_split_count=1", "--xla_cpu_multi_thread_eigen=false"]  # a worker has one core
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    QUICK.append("--xla_cpu_use_fusion_emitters=false")  # later ones have nothing else, and refuse what they don't know
if OWN_CACHE is not None:
    os.environ[CACHE] = OWN_CACHE
os.environ |= {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.02",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "OMP_NUM_THREADS": "1",  # torch's threads would only wait for one another
    "XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK]).strip(),
}

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from xdist.remote import Producer  # noqa: E402
from xdist.scheduler import LoadScopeScheduling  # noqa: E402

from jaxspec import Generator, Target  # noqa: E402
from tests.drafting import DRAFTERS, linked_target  # noqa: E402
from tests.pairwise import pairwise  # noqa: E402

SPLIT = (
    *(f"tests/speculation/test_{name}.py" for name in ("rows", "prefill", "equality", "families")),
    "tests/test_sharded_decoding.py",
)
"""Modules whose tests may run apart, by the value of their first parameter."""
MOST_MAPS = 20_000
tests_run = 0
FIRST = (
    *("tests/training/test_runs.py", "tests/training/test_devices.py", "tests/cli/test_bench.py", *SPLIT),
    *("tests/test_notebook.py", "tests/serving/test_page.py", "tests/benchmark/test_gpu.py"),
    *("tests/demo/test_weights.py", "tests/test_readme.py", "tests/test_sharding.py", "tests/drafters/test_eagle.py"),
    *("tests/drafters/test_massv.py", "tests/targets/test_llava_parity.py", "tests/speculation/test_edges.py"),
)
"""The modules that take longest: a worker that began one last would work alone at the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="every combination of values, where else every pair of them occurs"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "combinations(name=values, ..): one test for each of them with --full, else for every pair of values"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for mark in metafunc.definition.iter_markers("combinations"):
        values = [list(each) for each in mark.kwargs.values()]
        chosen = itertools.product(*values) if metafunc.config.getoption("full") else pairwise(*values)
        metafunc.parametrize(list(mark.kwargs), list(chosen))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {module: place for place, module in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(FIRST)))


class Groups(LoadScopeScheduling):
    """Tests of a module share its fixtures, so they run on one worker; those of `SPLIT` with the same drafter or family
    do. (xdist's own groups are marks that it puts into the names of tests, which pytest 9 no longer lets it change.)"""

    def _split_scope(self, nodeid: str) -> str:
        module, _, test = nodeid.partition("::")
        value = test.partition("[")[2].rstrip("]").partition("-")[0] if module in SPLIT else ""
        return f"{module}[{value}]"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Groups:
    return Groups(config, log)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Compiled programs are dropped before a process has more pieces of memory than Linux allows (65,530 by default; a
    program takes dozens). Those that are needed again come from the cache on disk."""
    global tests_run
    tests_run += 1
    maps = Path("/proc/self/maps")
    if tests_run % 8 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


def pytest_unconfigure() -> None:
    if OWN_CACHE is not None:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)


@pytest.fixture
def optimized() -> Iterator[None]:
    """For models large enough that programs take longer to run than to compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


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
