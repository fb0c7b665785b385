"""A loaded drafter knows its target, and loads into whatever dtype that computes in."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxspec
from jaxspec.drafters.checkpoint import save_drafter_folder
from tests.drafting import TREE, linked_head


@pytest.fixture(scope="module")
def folder(target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafters") / "head"
    about = {"target_fingerprint": target.fingerprint()}
    save_drafter_folder(linked_head(target, "vispec"), "vispec", TREE, target.model, folder, "float32", about)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_knows_its_target(target, folder, dtype):
    own = target if dtype == "float32" else jaxspec.load_target(target.path, dtype)
    drafter = jaxspec.load_drafter(folder, own)
    assert drafter.target_fingerprint == own.fingerprint() == target.fingerprint()
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(drafter.model))} == {jnp.dtype(dtype)}
    assert jaxspec.load_drafter("lookup", own).target_fingerprint is None


def test_a_target_without_files(target, folder):
    """Nothing is known of its weights but what the head's copy of the embedding says."""
    built = jaxspec.Target(target.model, target.adapter, target.processor, None, ())
    assert built.fingerprint() is None
    assert jaxspec.load_drafter(folder, built).target_fingerprint is None


def test_of_another_target(target, tmp_path):
    about, folder = {"target_fingerprint": "0123456789abcdef"}, tmp_path / "head"
    save_drafter_folder(linked_head(target, "eagle2"), "eagle2", TREE, target.model, folder, "float32", about)
    with pytest.raises(ValueError, match=f"trained for the target 0123456789abcdef, not for {target.fingerprint()}"):
        jaxspec.load_drafter(folder, target)


def test_files_are_read_once(target, monkeypatch):
    expected = target.fingerprint()
    monkeypatch.setattr("jaxspec.targets.target.read_folder", lambda folder: pytest.fail("read again"))
    assert target.fingerprint() == expected and len(expected) == 16
