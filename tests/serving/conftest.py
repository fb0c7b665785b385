"""One engine of the embedded model for all of these tests, and servers around it."""

from collections.abc import Iterator

import pytest

import jaxspec
from jaxspec.serving.engine import Engine
from jaxspec.serving.requests import EngineSettings


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    target = jaxspec.load_target("demo")
    drafter = jaxspec.load_drafter("demo:vispec", target)
    with Engine(target, drafter, settings=EngineSettings(max_length=512, max_num_seqs=2, warm_up=False)) as engine:
        yield engine
