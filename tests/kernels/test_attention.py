"""The dispatch: what computes attention where, who may choose, and what is said about it."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxspec import splitting
from jaxspec.cache import LayerKV
from jaxspec.kernels import attention, plain
from jaxspec.kernels.attention import attend, implementation
from jaxspec.kernels.masks import Mask
from jaxspec.kernels.segments import Scores, Segment
from jaxspec.sharding import AXES

ROWS = jnp.array([300, 7])


def over_cache(head_dim: int, capacity: int = 512, kv_heads: int = 2, dtype=jnp.float32):
    """Three queries of each of two rows, over a cache and over themselves."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal((2, *shape, head_dim)), dtype)  # noqa: E731
    cache = Segment(LayerKV(normal(kv_heads, capacity), normal(kv_heads, capacity)), Mask(ROWS))
    own = Segment(LayerKV(normal(kv_heads, 3), normal(kv_heads, 3)), Mask(causal=True))
    return normal(2 * kv_heads, 3), [cache, own]


def alone(head_dim: int, length: int):
    query, (_, own) = over_cache(head_dim)
    kv = jax.tree.map(lambda x: jnp.repeat(x[:, :, :1], length, axis=2), own.kv)
    return jnp.repeat(query[:, :, :1], length, axis=2), [Segment(kv, Mask(causal=True))]


def for_tpu(query, segments, **options) -> str:
    """What attention is lowered to for a TPU."""
    traced = jax.jit(lambda query, segments: attend(query, segments, **options)).trace(query, segments)
    return traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("of", [over_cache, lambda head_dim: over_cache(head_dim, 256), lambda d: alone(d, 130)])
@pytest.mark.parametrize("head_dim", [8, 128])
def test_a_cpu_runs_the_plain_form_and_nothing_else(of, head_dim):
    arguments = of(head_dim)
    ours, expected = (jax.jit(function).lower(*arguments) for function in (attend, plain.attend))
    assert "custom_call" not in ours.as_text()
    ours, expected = ours.compile(), expected.compile()
    assert ours.cost_analysis() == expected.cost_analysis()
    np.testing.assert_array_equal(ours(*arguments), expected(*arguments))


def test_a_tpu_has_the_kernel_of_each_kind():
    assert "attend_cache" in for_tpu(*over_cache(128))
    assert "splash" in for_tpu(*alone(128, 130))
    for arguments in (over_cache(128, 256), over_cache(8), alone(8, 130), alone(128, 8)):
        assert "tpu_custom_call" not in for_tpu(*arguments)


def test_who_chooses_gets_it_in_programs_compiled_before():
    program, arguments = jax.jit(attend), over_cache(8)
    default = program(*arguments)
    with implementation("xla"):
        joined = program(*arguments)
        with implementation(None):
            np.testing.assert_array_equal(program(*arguments), default)
        np.testing.assert_array_equal(program(*arguments), joined)
        np.testing.assert_array_equal(attend(*arguments, implementation="plain"), plain.attend(*arguments))
    np.testing.assert_array_equal(program(*arguments), default)
    np.testing.assert_allclose(joined, default, atol=1e-5)
    assert not np.array_equal(joined, default)


@pytest.mark.parametrize("choose", [implementation, lambda name: attend(*over_cache(8), implementation=name)])
def test_a_name_that_there_is_not(choose):
    with pytest.raises(ValueError, match="'triton' of attention is not one of plain, pallas, splash, xla, cudnn"):
        choose("triton")


def test_what_a_kernel_lacks_is_said_once():
    attention.say_once.cache_clear()
    query, segments = over_cache(40)
    with pytest.warns(UserWarning, match="pallas does not have heads of 40 numbers, where it has multiples of 128"):
        out = attend(query, segments, implementation="pallas")
    np.testing.assert_array_equal(out, plain.attend(query, segments))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(query, segments, implementation="pallas")
        attend(query, segments)  # nobody asked for it
    half = jax.tree.map(lambda x: x.astype(jnp.float16) if x.dtype == jnp.float32 else x, over_cache(128))
    with pytest.warns(UserWarning, match="pallas does not have queries, keys and values in float16"):
        attend(*half, implementation="pallas")
    with pytest.warns(UserWarning, match="xla does not have soft caps"):
        capped = attend(query, segments, implementation="xla", soft_cap=1.0)
    np.testing.assert_array_equal(capped, plain.attend(query, segments, Scores(soft_cap=1.0)))
    with pytest.warns(UserWarning, match="cudnn does not have float32, where it has bfloat16 and float16"):
        attend(*over_cache(128), implementation="cudnn")


def test_what_a_kernel_is_not_for_is_left_to_the_plain_form():
    query, segments = alone(128, 130)
    np.testing.assert_array_equal(attend(query, segments, implementation="pallas"), plain.attend(query, segments))


CHIP = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1), (1, 1, 2), (2, 1, 2), (1, 2, 2), (1, 1, 4)])
@pytest.mark.parametrize("row_axes", [("data",), ("data", "fsdp")])
def test_on_a_mesh_each_device_has_rows_and_heads_of_its_own(sizes, row_axes):
    """Two rows and two key heads."""
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=CHIP)
    with jax.sharding.use_abstract_mesh(mesh), splitting.ROW_AXES(row_axes):
        text = for_tpu(*over_cache(128))
    (call,) = [line for line in text.splitlines() if "tpu_custom_call" in line]
    data, fsdp, tensor = sizes
    rows, heads = 2 // (data * (fsdp if "fsdp" in row_axes else 1)), 1 if tensor == 2 else 2
    assert f"tensor<{rows}x{heads}x512x128xf32>" in call  # the cache
