"""Tensors of any floating type arrive in the chosen one, and a mesh's shards pass through the host one at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxspec.checkpoints.names import parameter_paths, to_ours
from jaxspec.checkpoints.tensors import INDEX, SINGLE, read_file, read_folder
from jaxspec.targets.llava import LLAVA_NAMES
from jaxspec.targets.registry import load_model
from tests.folders import llava_config, write_llava

ROOT = Path(__file__).parent.parent.parent
DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)


def split_file(folder: Path, parts: int) -> Path:
    """The folder with its tensors in several files and an index."""
    tensors, weight_map = read_file(folder / SINGLE), {}
    for part in range(parts):
        name = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        own = dict(list(tensors.items())[part::parts])
        save_file(own, folder / name)
        weight_map |= dict.fromkeys(own, name)
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder in which every tensor has another type than its neighbours."""
    folder = write_llava(tmp_path_factory.mktemp("mixed") / "llava")
    tensors = {name: np.array(tensor) for name, tensor in read_file(folder / SINGLE).items()}
    types = {name: DTYPES[index % 3] for index, name in enumerate(tensors)}
    save_file({name: tensor.astype(types[name]) for name, tensor in tensors.items()}, folder / SINGLE)
    return folder


@pytest.mark.parametrize("on_mesh", [False, True], ids=["device", "mesh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_any_type_in_the_chosen_one_out(mixed, dtype, on_mesh):
    tensors = read_folder(mixed)
    assert {tensor.dtype for tensor in tensors.values()} == set(map(np.dtype, DTYPES))
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor")) if on_mesh else None
    for path, leaf in parameter_paths(load_model(mixed, jnp.dtype(dtype), mesh)).items():
        expected = to_ours(path, tensors[LLAVA_NAMES.published(path)]).astype(dtype)
        assert leaf.dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(leaf[...]), expected, err_msg=path)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """(a small folder, one with matrices of up to 66 MB)."""
    folder = tmp_path_factory.mktemp("large")
    text = {"vocab_size": 16000, "hidden_size": 1024, "intermediate_size": 2816}
    text |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    return write_llava(folder / "small"), split_file(write_llava(folder / "llava", llava_config(text=text)), parts=3)


def memory_of_loading(*arguments) -> dict:
    command = [sys.executable, ROOT / "tests" / "loading_memory.py", *arguments]
    # Freed memory goes back to the system at once.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_host_holds_about_one_shard(large):
    found = memory_of_loading(*large)
    assert found["samples"] > 30 and found["model"] > 200e6
    shard = found["largest_shard"]
    assert found["largest_tensor"] == 4 * shard and found["model"] > 14 * shard
    # The shard on the host and its copy on the way to a device. With `make_array_from_callback` it is 16 shards.
    assert 0.5 * shard < found["surplus"] < 3 * shard, found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_int8_is_made_matrix_by_matrix(large):
    """Of the float model there is one matrix at a time, on the devices as on the host."""
    found = memory_of_loading(*large, "int8")
    copies = 2  # the axis `data` of the mesh
    matrix = found["largest_tensor"]
    assert found["samples"] > 30 and matrix == 4 * 16000 * 1024 and found["model"] < 125e6
    assert found["in_arrays"] < copies * (found["model"] + 1.1 * matrix) < copies * 200e6
    # Beside the arrays each device has room for its shard once more, while that becomes int8.
    assert found["surplus"] < copies * 1.3 * matrix, found
