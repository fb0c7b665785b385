"""A small LLaVA folder, and a copy of it for each test to break."""

import shutil

import pytest

from tests.folders import write_llava


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("llava") / "original")


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "llava")
