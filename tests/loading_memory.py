"""Run by test_loading.py in a process of its own: how much host memory it takes to load the folder argv[1] onto a mesh.

CPU devices lie in the same memory as the host, so a thread samples the process's anonymous memory (the memory map of
the files is none) together with the bytes of all JAX arrays: what goes beyond them is the host's. Prints JSON.
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
    """The largest excess of anonymous memory over the arrays until `stop`."""

    def __init__(self):
        super().__init__()
        self.peak, self.samples, self.stopped = 0, 0, threading.Event()

    def run(self):
        while not self.stopped.is_set():
            used = anonymous()  # before the arrays: one that is made in between lowers the excess, never raises it
            self.peak, self.samples = max(self.peak, used - in_arrays()), self.samples + 1
            time.sleep(0.0005)


if __name__ == "__main__":
    small, folder = map(Path, sys.argv[1:])
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    warm = load_model(small, mesh=mesh)  # what the first load imports and starts is no matter here
    sys.setswitchinterval(0.0005)
    before, sampler = anonymous() - in_arrays(), Sampler()
    sampler.start()
    model = load_model(folder, mesh=mesh)
    sampler.stopped.set()
    sampler.join()
    leaves = [leaf[...] for leaf in parameter_paths(model).values()]
    print(
        json.dumps(
            {
                "surplus": sampler.peak - before,
                "samples": sampler.samples,
                "largest_shard": max(leaf.addressable_shards[0].data.nbytes for leaf in leaves),
                "largest_tensor": max(leaf.nbytes for leaf in leaves),
                "model": sum(leaf.nbytes for leaf in leaves),
            }
        )
    )
