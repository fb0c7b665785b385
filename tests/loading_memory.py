"""Run by test_loading.py in a process of its own: how much host memory it takes to load the folder argv[1] onto a mesh.

CPU devices lie in the same memory as the host, so a thread samples the process's anonymous memory (the memory map of
the files is none) together with the bytes of all JAX arrays: what goes beyond them is the host's. Prints JSON. With
"int8" behind the folder the matrices are quantised.
"""

import json
import re
import sys
import threading
import time
from pathlib import Path

import jax
from jax.sharding import AxisType

from jaxspec.checkpoints.names import parameter_paths
from jaxspec.targets.registry import load_model

jax.config.update("jax_num_cpu_devices", 8)


def anonymous() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def in_arrays() -> int:
    """Bytes of all JAX arrays, those that share memory counted once."""
    buffers = {}
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            buffers[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return sum(buffers.values())


class Sampler(threading.Thread):
    """The largest excess of anonymous memory over the arrays until `stop`, and the most bytes in arrays."""

    def __init__(self):
        super().__init__()
        self.peak, self.arrays, self.samples, self.stopped = 0, 0, 0, threading.Event()

    def run(self):
        while not self.stopped.is_set():
            used = anonymous()  # before the arrays: one that is made in between lowers the excess, never raises it
            arrays = in_arrays()
            self.peak, self.arrays = max(self.peak, used - arrays), max(self.arrays, arrays)
            self.samples += 1
            time.sleep(0.0005)


if __name__ == "__main__":
    small, folder = map(Path, sys.argv[1:3])
    quantize = dict(zip(["quantize"], sys.argv[3:], strict=False))
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    warm = load_model(small, mesh=mesh, **quantize)  # what the first load imports and starts is no matter here
    sys.setswitchinterval(0.0005)
    before, sampler = anonymous() - in_arrays(), Sampler()
    sampler.start()
    model = load_model(folder, mesh=mesh, **quantize)
    sampler.stopped.set()
    sampler.join()
    leaves = [leaf[...] for leaf in parameter_paths(model).values()]
    print(
        json.dumps(
            {
                "surplus": sampler.peak - before,
                "in_arrays": sampler.arrays,
                "samples": sampler.samples,
                "largest_shard": max(leaf.addressable_shards[0].data.nbytes for leaf in leaves),
                "largest_tensor": max(leaf.nbytes for leaf in leaves),
                "model": sum(leaf.nbytes for leaf in leaves),
            }
        )
    )
