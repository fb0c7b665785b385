"""Kernels compile for TPUs, where libtpu is installed; what the programs hold and call is looked at, nothing runs."""

import pytest

from benchmarks.attention import compiled, kernels_in
from benchmarks.attention_shapes import SHAPES
from benchmarks.tpu import TOPOLOGIES

pytest.importorskip("libtpu", reason="compiles for TPUs: pip install libtpu")
CHOSEN = [name for name in SHAPES if "batch" not in name]


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("name", CHOSEN)
def test_a_real_shape_compiles(name, chip):
    shape = SHAPES[name]
    program = compiled(shape, chip)
    (kernel,) = kernels_in(program)
    assert ("attend_cache" if shape.capacity else "splash") in kernel
    # No copy of the cache, and no scores.
    cache = 2 * shape.batch * shape.kv_heads * shape.head_dim * shape.capacity
    if shape.capacity:
        assert program.memory_analysis().temp_size_in_bytes < cache
