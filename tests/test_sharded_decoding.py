"""Decoding on a mesh answers what one device answers autoregressively, and sends no logits from device to device."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxspec.sharding import check_heads, decoding_mesh
from jaxspec.targets.target import load_target
from tests.drafting import DRAFTERS, linked_target

ROOT = Path(__file__).parent.parent
KEY_HEADS, KINDS = 2, ("0", "1", "top-p 0.9", "mixed")
MESHES = {"8x1x1": (8, 1, 1), "2x2x2": (2, 2, 2), "1x1x4": (1, 1, 4), "2x1x4": (2, 1, 4)}
"""data x fsdp x tensor. The target has 4 heads and 2 key heads: with tensor 4 there are more devices than key heads."""
EVERYWHERE = ("autoregressive", "eagle2")
"""These on every mesh; of the others each on one, and on all of them with --full."""


def names_on(mesh: str, full: bool) -> list[str]:
    place = list(MESHES).index(mesh)
    others = [name for name in DRAFTERS if name not in EVERYWHERE]
    return [*EVERYWHERE, *(others if full else others[place :: len(MESHES)])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mesh" in metafunc.fixturenames:
        full = metafunc.config.getoption("full")
        if "name" in metafunc.fixturenames:
            metafunc.parametrize(("mesh", "name"), [(mesh, name) for mesh in MESHES for name in names_on(mesh, full)])
        else:
            metafunc.parametrize("mesh", MESHES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("decoding")
    linked_target(folder)
    return folder / "target"


@pytest.fixture(scope="module")
def report(folder, request):
    """What a mesh's process has found."""
    found: dict[str, dict] = {}

    def of(mesh: str) -> dict:
        if mesh not in found:
            names = names_on(mesh, request.config.getoption("full"))
            command = [sys.executable, "-m", "tests.sharded_decoding", mesh, str(folder), *names]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, cwd=ROOT)
            assert done.returncode == 0, done.stderr[-4000:]
            found[mesh] = json.loads(done.stdout.splitlines()[-1])
        return found[mesh]

    return of


def test_answers_are_those_of_one_device_without_a_drafter(report, mesh, name):
    found = report(mesh)
    for kind in KINDS:
        assert found["drafters"][name]["answers"][kind] == found["expected"][kind], kind
        assert len({tuple(row) for row in found["expected"][kind]}) > 2
    assert found["drafters"][name]["the same again"]


def test_no_logits_move(report, mesh, name):
    """Neither `[B, N, V]` nor `[B, 1, V]` is gathered, whole or in parts; where `fsdp` splits the sums of the LM head,
    they are added."""
    found = report(mesh)
    vocabulary, (_, fsdp, tensor) = found["vocabulary"], MESHES[mesh]
    moved = found["drafters"][name]["moved"]
    assert any(each.startswith("all-reduce") for each in moved)
    widths = {vocabulary, vocabulary // tensor, 480, 480 // tensor}  # 480: the drafter "narrow"
    for each in moved:
        sizes = [int(size) for shape in re.findall(r"\[([\d,]*)\]", each) for size in shape.split(",") if size]
        assert not widths & set(sizes) or (fsdp > 1 and each.startswith("all-reduce")), each


def test_heads_decide_how_a_cache_is_split(report, mesh, name):
    """With fewer key heads than devices each has a copy of the one it reads, and of no other."""
    data, _, tensor = MESHES[mesh]
    shape, shard = report(mesh)["drafters"][name]["cache"]
    assert shape[1] == max(KEY_HEADS, tensor)
    assert shard == [shape[0] // data, shape[1] // tensor, *shape[2:]]


def test_a_mesh_that_cannot_be(folder):
    with pytest.raises(ValueError, match="tensor is 64, but there is 1 device$"):
        decoding_mesh(64)
    with pytest.raises(ValueError, match=r"data \(2\) x tensor \(3\) is 6, but 1 devices are given"):
        decoding_mesh(3, 2, jax.devices()[:1])
    with pytest.raises(ValueError, match="tensor must be at least 1, got 0"):
        decoding_mesh(0)
    with pytest.raises(ValueError, match="mesh has the axis 'model'; known: data, fsdp, tensor"):
        load_target(folder, mesh=jax.make_mesh((1,), ("model",)))
    three = jax.sharding.AbstractMesh((1, 3), ("data", "tensor"))
    with pytest.raises(ValueError, match="tensor is 3, which does not divide the 4 attention heads .* one of 1, 2, 4$"):
        check_heads(4, three)
