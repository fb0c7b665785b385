"""Tensors of a Hugging Face folder, read lazily: single file or sharded with an index, any float type.

The safetensors container is read through a memory map, because its numpy front end knows no bfloat16 and its other
front ends load whole tensors onto a device.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

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


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Memory-mapped tensors of one safetensors file. Raises ValueError if the file is truncated or no safetensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        header_size = int.from_bytes(head, "little")
        if len(head) < 8 or header_size > size - 8:
            raise ValueError(f"{path} is not a complete safetensors file ({size} bytes, header wants {header_size})")
        try:
            header = json.loads(file.read(header_size))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a safetensors file: its header is not JSON") from error
    header.pop("__metadata__", None)
    start = 8 + header_size
    needed = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if needed > size:
        raise ValueError(f"{path} is truncated: {size} bytes of {needed}")
    data = np.memmap(path, np.uint8, "r")
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: tensor {name} has dtype {entry['dtype']}; readable: {', '.join(DTYPES)}")
        first, last = entry["data_offsets"]
        tensors[name] = data[start + first : start + last].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """Memory-mapped tensors of a folder by published name.

    Raises FileNotFoundError where there is neither `model.safetensors` nor its index, or a shard is missing.
    """
    index = folder / INDEX
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
        missing = [shard for shard in shards if not (folder / shard).exists()]
        if missing:
            raise FileNotFoundError(f"{index} names shards that are not there: {', '.join(missing)}")
        tensors = {}
        for shard in shards:
            tensors.update(read_file(folder / shard))
        absent = sorted(set(weight_map) - set(tensors))
        if absent:
            raise ValueError(f"{index} names tensors that no shard holds: {', '.join(absent)}")
        return tensors
    if not (folder / SINGLE).exists():
        raise FileNotFoundError(f"no {SINGLE} and no {INDEX} in {folder}")
    return read_file(folder / SINGLE)
