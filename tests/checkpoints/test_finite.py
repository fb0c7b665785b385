"""Weights that are not finite are named when they are read: of the file itself, or in the type that is asked for."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxspec.checkpoints.finite import cast, is_finite
from jaxspec.checkpoints.tensors import INDEX, SINGLE
from jaxspec.drafters.checkpoint import load_drafter_folder
from jaxspec.targets.registry import load_model
from tests.broken_folders import REFERENCE, assert_names, edit_tensors, error_of
from tests.folders import write_llava

QUERY = "language_model.model.layers.0.self_attn.q_proj.weight"
NORM = "language_model.model.norm.weight"
BIAS = "multi_modal_projector.linear_1.bias"


@pytest.fixture
def folder(tmp_path):
    return write_llava(tmp_path / "llava")


def spoil(folder, **values):
    """The folder with the last value of each named tensor changed."""

    def edit(tensors):
        for name, value in values.items():
            tensors[name] = tensors[name].copy()
            tensors[name].flat[-1] = value

    edit_tensors(folder, edit)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from([np.float64, np.float32, np.float16, ml_dtypes.bfloat16]),
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 6e4, -6e4, 1e-8, np.inf, -np.inf, np.nan, -np.nan]), max_size=12),
    st.booleans(),
)
def test_as_numpy_says(dtype, values, transposed):
    array = np.array(values, np.float64).astype(dtype).reshape(-1, 2 if len(values) % 2 == 0 else 1)
    array = array.T if transposed else array
    assert is_finite(array) == bool(np.isfinite(array.astype(np.float64)).all())


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_the_largest_values_are_finite(dtype):
    largest = ml_dtypes.finfo(dtype).max
    assert is_finite(np.array([largest, -largest, 0], dtype)) and is_finite(np.array(largest, dtype))
    assert is_finite(np.arange(5) - 2) and is_finite(np.zeros((0, 3), dtype))
    assert not is_finite(cast(np.array([1e39]), dtype))


@pytest.mark.parametrize("on_mesh", [False, True], ids=["device", "mesh"])
def test_values_that_are_none(folder, on_mesh):
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor")) if on_mesh else None
    spoil(folder, **{QUERY: np.nan, NORM: -np.inf})
    message = error_of(lambda: load_model(folder, jnp.float32, mesh))
    assert_names(message, folder, "not finite in float32", f"{QUERY} (NaN)", f"{NORM} (infinite)")
    assert "\n" not in message


@pytest.mark.parametrize("on_mesh", [False, True], ids=["device", "mesh"])
def test_a_cast_that_overflows(folder, on_mesh):
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor")) if on_mesh else None
    spoil(folder, **{QUERY: -7e4, BIAS: 65504.0})
    load_model(folder, jnp.float32, mesh)
    load_model(folder, jnp.bfloat16, mesh)
    message = error_of(lambda: load_model(folder, jnp.float16, mesh))
    assert_names(message, folder, f"not finite in float16: {QUERY} (up to 7e+04, the largest float16 is 65504)")
    assert BIAS not in message


def test_many_are_counted(folder):
    tensors = load_file(folder / SINGLE)
    save_file({name: np.full_like(tensor, np.nan) for name, tensor in tensors.items()}, folder / SINGLE)
    message = error_of(lambda: load_model(folder))
    assert_names(message, folder, f"and {len(tensors) - 5} more")
    assert len(message) < 700 and "\n" not in message


def test_in_shards(folder):
    spoil(folder, **{NORM: np.nan})
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    for number in (0, 1):
        save_file(dict(list(tensors.items())[number::2]), folder / f"shard-{number}.safetensors")
    weight_map = {name: f"shard-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert_names(error_of(lambda: load_model(folder)), folder, f"{NORM} (NaN)")


@pytest.mark.parametrize("method", ["eagle2", "vispec"])
@pytest.mark.parametrize("name", ["fc.weight", "embed_tokens.weight", "layers.0.mlp.down_proj.weight"])
def test_drafters(tmp_path, method, name):
    folder = shutil.copytree(REFERENCE / method, tmp_path / "drafter")
    spoil(folder, **{name: np.nan})

    class Model:  # what a loader looks at
        embedding, vocab_size = load_file(REFERENCE / method / SINGLE)["embed_tokens.weight"], 199

        class config:
            class text:
                hidden_size, vocab_size, num_layers = 64, 199, 2

    assert_names(error_of(lambda: load_drafter_folder(folder, Model)), folder, "not finite", name)
