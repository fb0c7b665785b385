"""Tensors of a Hugging Face folder, read lazily: single file or sharded with an index, any float type; and written.

The safetensors container is read through a memory map, because its numpy front end knows no bfloat16 and its other
front ends load whole tensors onto a device.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxspec.checkpoints.foreign import PLAIN, adapter, counted, foreign_files

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_json(path: Path) -> dict:
    """A JSON object. Raises ValueError, naming the file, if it is anything else."""
    try:
        value = json.loads(path.read_text())
    except ValueError as error:  # also what is no text at all
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Memory-mapped tensors of one safetensors file. Raises ValueError if the file is truncated or no safetensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if head == b"version ":
            raise ValueError(f"{path} is not a safetensors file but a Git LFS pointer to one; fetch it: git lfs pull")
        header_size = int.from_bytes(head, "little")
        if len(head) < 8 or header_size > size - 8:
            raise ValueError(f"{path} is not a complete safetensors file ({size} bytes, header wants {header_size})")
        try:
            header = json.loads(file.read(header_size))
            header.pop("__metadata__", None)
            entries = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a safetensors file: its header is no JSON table of tensors") from error
    start = 8 + header_size
    needed = start + max((last for _, _, _, last in entries.values()), default=0)
    if needed > size:
        raise ValueError(f"{path} is truncated: {size} bytes of {needed}")
    data = np.memmap(path, np.uint8, "r")
    tensors = {}
    for name, (dtype, shape, first, last) in entries.items():
        if dtype not in DTYPES:
            quantised = f"; {PLAIN}" if re.match(r"F[468]_", str(dtype)) else ""
            raise ValueError(f"{path}: tensor {name} has dtype {dtype}; readable: {', '.join(DTYPES)}{quantised}")
        expected = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        if last - first != expected:
            raise ValueError(f"{path}: tensor {name} has {last - first} bytes, {dtype} {shape} takes {expected}")
        tensors[name] = data[start + first : start + last].view(DTYPES[dtype]).reshape(shape)
    return tensors


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors as one safetensors file. Raises OSError where that fails."""
    path.touch()
    mode = path.stat().st_mode  # what other files get; the library's own are for the owner's eyes only
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    path.chmod(mode)


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """Memory-mapped tensors of a folder by published name. Like transformers it takes `model.safetensors` where there
    is one, and an index with its shards only where there is none.

    Raises FileNotFoundError where there is neither, or a shard is missing; ValueError where something else than a
    model's weights is there, naming it.
    """
    index, single = folder / INDEX, folder / SINGLE
    if not (single.exists() or index.exists()):
        if there := foreign_files(folder):
            raise ValueError(there)
        raise FileNotFoundError(f"no {SINGLE} and no {INDEX} in {folder}")
    if any(folder.glob("adapter_model.*")):
        raise ValueError(adapter(folder))
    if single.exists():
        return read_file(single)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index} has no weight_map of names of tensors to names of files")
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not (folder / shard).exists()]:
        raise FileNotFoundError(f"{index} names shards that are not there: {counted(missing, 4)}")
    tensors = {}
    for shard in shards:
        tensors.update(read_file(folder / shard))
    if absent := sorted(set(weight_map) - set(tensors)):
        raise ValueError(f"{index} names tensors that no shard holds: {counted(absent, 4)}")
    return tensors
