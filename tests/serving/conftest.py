"""One engine of the embedded model for all of these tests, and servers around it."""

from collections.abc import Iterator

import pytest

import jaxspec
from jaxspec import Generator, Result
from jaxspec.serving.engine import Engine
from jaxspec.serving.http.app import make_app
from jaxspec.serving.requests import EngineSettings
from tests.serving.asking import answers
from tests.serving.listening import Listening


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    target = jaxspec.load_target("demo")
    drafter = jaxspec.load_drafter("demo:vispec", target)
    with Engine(target, drafter, settings=EngineSettings(max_length=512, max_num_seqs=2)) as engine:
        yield engine


@pytest.fixture(scope="session")
def url(engine) -> Iterator[str]:
    """Where a server of the engine listens, without a key."""
    with Listening(make_app(engine)) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def expected(engine) -> dict[str, Result]:
    """What the library answers without any server, by the name of the case."""
    return answers(Generator(engine.target, engine.drafter, max_length=engine.max_length))
