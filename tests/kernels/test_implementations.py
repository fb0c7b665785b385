"""Every implementation of attention keeps the contract. Kernels for TPUs are interpreted, and races looked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from benchmarks.attention_shapes import SHAPES
from jaxspec.kernels.attention import KERNELS
from jaxspec.kernels.cached import Plan, Work
from jaxspec.kernels.masks import Mask
from jaxspec.kernels.segments import Scores, Segment
from tests.kernels.contract import AttentionContract, reference


class TestPlain(AttentionContract):
    name = "plain"


class TestPallas(AttentionContract):
    name, kinds, head_dims = "pallas", ("over_cache",), (128, 256)

    def device(self):
        return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True))

    @pytest.fixture(autouse=True)
    def no_races(self, capfd):
        yield
        jax.effects_barrier()
        assert "RACE DETECTED" not in capfd.readouterr().out

    def test_what_is_not_filled_or_before_every_window_is_not_read(self):
        query, (cache, own) = self.some("over_cache")
        lengths = jnp.array([256, 0, 128])
        places = lengths[:, None] + jnp.arange(query.shape[2])
        for window, start in ((None, 0), (100, 128)):
            mask = Mask(lengths, None if window is None else places, window=window)
            filled = (jnp.arange(384) < lengths[:, None])[:, None, :, None]
            read = filled & ((jnp.arange(384) >= start)[:, None] | (lengths != 256)[:, None, None, None])
            # A block that a row must begin with is read even where none of it is filled, and so must hold numbers.
            read = read | ((jnp.arange(384) < 128)[:, None] & (lengths == 0)[:, None, None, None])
            poisoned = jax.tree.map(lambda x, read=read: jnp.where(read, x, jnp.nan), cache.kv)
            ours = self.run(query, [Segment(poisoned, mask), own])
            np.testing.assert_allclose(ours, reference(query, [Segment(cache.kv, mask), own]), atol=1e-5)


class TestSplash(AttentionContract):
    name, kinds, head_dims = "splash", ("alone",), (128,)

    def device(self):
        return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams())


class TestXla(AttentionContract):
    """In float32: JAX's bfloat16 asks for a product that CPUs do not have."""

    name, soft_caps = "xla", (None,)
    tolerances = {"float32": 1e-5}


def test_every_implementation_has_a_class():
    tested = {each.name for each in AttentionContract.__subclasses__()}
    assert set(KERNELS) - tested == {"cudnn"}  # runs on GPUs only: benchmarks/gpu.py compares it there


def test_the_list_of_work_is_every_filled_block_once():
    rng = np.random.default_rng(0)
    for _ in range(200):
        batch, size, capacity = rng.integers(1, 6), int(rng.choice([2, 4])), int(rng.integers(1, 30))
        lengths = rng.integers(0, capacity + 1, batch)
        lowest = rng.integers(-20, capacity + 20, (batch, 3))
        work = Work.of(jnp.asarray(lengths), jnp.asarray(lowest), capacity, size)
        expected = []
        for row, (length, low) in enumerate(zip(lengths, lowest.min(axis=1), strict=True)):
            last = max(length - 1, 0) // size
            first = min(max(low, 0) // size, last)
            expected += [(row, block) for block in range(first, last + 1)]
        count = int(work.count)
        assert list(zip(work.rows.tolist(), work.blocks.tolist(), strict=True))[:count] == expected


@pytest.mark.parametrize("name", SHAPES)
def test_real_shapes_have_a_plan_that_fits_a_core(name):
    shape = SHAPES[name]
    query, segments = jax.eval_shape(shape.arguments)
    if not shape.capacity:
        assert KERNELS["splash"].fits(query, segments) and KERNELS["splash"].lacks(query, segments, Scores()) is None
        return
    assert KERNELS["pallas"].fits(query, segments) and KERNELS["pallas"].lacks(query, segments, Scores()) is None
    rows = shape.queries * shape.heads // shape.kv_heads
    plan = Plan.of(shape.kv_heads, rows, shape.capacity, shape.queries + shape.drafted, shape.head_dim, 2)
    assert plan.bytes(shape.head_dim, shape.queries + shape.drafted, 2) <= 16 << 20
    assert shape.kv_heads % plan.heads == 0 and shape.kv_heads > plan.heads
