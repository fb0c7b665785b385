"""The dispatch: what computes attention where, who may choose, and what is said about it."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jaxspec.cache import LayerKV
from jaxspec.kernels import attention, plain
from jaxspec.kernels.attention import attend, implementation
from jaxspec.kernels.masks import Mask
from jaxspec.kernels.segments import Segment

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
    with pytest.warns(UserWarning, match="cudnn does not have float32, where it has bfloat16 and float16"):
        attend(*over_cache(128), implementation="cudnn")


def test_what_a_kernel_is_not_for_is_left_to_the_plain_form():
    query, segments = alone(128, 130)
    np.testing.assert_array_equal(attend(query, segments, implementation="pallas"), plain.attend(query, segments))


CHIP = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)])
@pytest.mark.parametrize("mesh_is_set", [True, False])
def test_on_a_mesh_each_device_has_rows_and_heads_of_its_own(sizes, mesh_is_set):
    """Without the mesh being set, arrays say where they lie."""
    mesh = AbstractMesh(sizes, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, abstract_device=CHIP)
    query, segments = over_cache(128)
    whole = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), (query, segments))
    if mesh_is_set:
        with jax.sharding.use_abstract_mesh(mesh):
            text = for_tpu(query, segments)
    else:
        text = for_tpu(*arguments)
    if sizes[1] == 4:  # two key heads
        assert "attend_cache" not in text
        return
    (call,) = [line for line in text.splitlines() if "tpu_custom_call" in line]
    assert f"tensor<{2 // sizes[0]}x{2 // sizes[1]}x512x128xf32>" in call  # the cache
