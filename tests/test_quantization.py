"""Int8 weights: what they are, that products with them are those of the model they stand for, and that speculation over
them is as lossless as over floats."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxspec
from jaxspec import Drafter, Generator, SamplingParams, TreeConfig, load_target
from jaxspec.checkpoints.names import abstract, parameter_paths, to_tensors
from jaxspec.drafters.checkpoint import load_drafter_folder, save_drafter_folder
from jaxspec.layers import Embed, Linear
from jaxspec.programs import Programs
from jaxspec.quantization import TARGET_PART, is_quantized, matrices, quantized, to_int8
from jaxspec.targets.llava import LLAVA_NAMES
from jaxspec.targets.registry import load_model
from tests.broken_folders import error_of
from tests.drafting import DRAFTERS, TREE, linked_head
from tests.families import FAMILIES, family_target
from tests.quantizing import as_int8, dequantized, relative_error, tied_target

ROOT = Path(__file__).parent.parent


def test_the_nearest_integers_and_the_largest_weight():
    weights = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32) * np.array([1e-6, 1.0, 0.0, 30.0, 1e4])
    integers, scale = map(np.asarray, to_int8(jnp.asarray(weights, jnp.float32), 0))
    assert integers.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (1, 5)
    np.testing.assert_allclose(scale[0, [0, 1, 3, 4]], np.abs(weights).max(axis=0)[[0, 1, 3, 4]] / 127, rtol=1e-6)
    assert (np.abs(integers).max(axis=0) == [127, 127, 0, 127, 127]).all()
    assert (np.abs(integers * scale - weights) <= 0.5001 * scale).all()
    again, rows = map(np.asarray, to_int8(jnp.asarray(weights.T, jnp.float32), 1))
    np.testing.assert_array_equal(again.T, integers)
    np.testing.assert_array_equal(rows.T, scale)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_and_a_table(dtype):
    """Outputs are those of the float layer with the same weights, in the type of the activations."""
    rng = np.random.default_rng(1)
    tolerance = 1e-6 if dtype == "float32" else 0.02
    for x in (rng.normal(size=(3, 4, 16)), rng.normal(size=16)):
        x = jnp.asarray(x, dtype)
        for bias in (False, True):
            layer = Linear(16, 9, use_bias=bias, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0))
            small = quantized(layer)
            assert small.kernel.dtype == jnp.int8 and layer.kernel.dtype == jnp.float32
            if bias:
                small.bias = nnx.Param(small.bias[...].astype(dtype))
            ours, theirs = small(x), dequantized(small)(x.astype(jnp.float32))
            assert ours.dtype == dtype and ours.shape == theirs.shape
            assert relative_error(ours.astype(jnp.float32), theirs) < tolerance
        head = quantized(Embed(9, 16, unembeds=True, rngs=nnx.Rngs(0)))
        ours, theirs = head.logits(x), dequantized(head).logits(x.astype(jnp.float32))
        assert ours.dtype == jnp.float32 and relative_error(ours, theirs) < tolerance
    ids = jnp.array([[2, 8], [0, 2]])
    np.testing.assert_allclose(head(ids), dequantized(head)(ids), rtol=1e-6)
    plain = Embed(9, 16, rngs=nnx.Rngs(0))
    assert not list(matrices(plain)) and not is_quantized(quantized(plain))


@pytest.mark.parametrize("on_mesh", [False, True], ids=["device", "mesh"])
def test_a_folder_read_as_int8(target, on_mesh):
    """The text model's matrices, whose float values are nowhere afterwards; all else as it was."""
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor")) if on_mesh else None
    small = load_target(target.path, mesh=mesh, quantize="int8")
    assert small.quantize == "int8" and target.quantize is None and small.fingerprint() == target.fingerprint()
    ours, theirs, expected = (parameter_paths(each.model) for each in (small, target, as_int8(target)))
    assert ours.keys() == expected.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf[...], expected[path][...], err_msg=path)
    in_text = {path for path in theirs if path.startswith("language_model.layers.") and path.endswith(".kernel")}
    assert len(in_text) == 14
    assert {path for path, leaf in ours.items() if leaf.dtype == jnp.int8} == in_text | {
        "language_model.lm_head.kernel"
    }
    floats = [path for path in theirs if ours[path].dtype != jnp.int8]
    assert "language_model.embed_tokens.embedding" in floats and any("vision_tower" in path for path in floats)
    for path in floats:
        np.testing.assert_array_equal(ours[path][...], theirs[path][...], err_msg=path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scales_are_of_the_files_values(target, dtype):
    """They do not depend on the type that the rest is computed in."""
    path = "language_model.layers.1.mlp.up_proj."
    small, exact = (
        parameter_paths(load_model(target.path, jnp.dtype(each), quantize="int8")) for each in (dtype, "float32")
    )
    for name in ("kernel", "kernel_scale"):
        np.testing.assert_array_equal(small[path + name][...], exact[path + name][...])
    assert small[path + "kernel_scale"].dtype == jnp.float32
    assert small["language_model.norm.scale"].dtype == small["language_model.embed_tokens.embedding"].dtype == dtype


@pytest.mark.parametrize("name", ["tied", *FAMILIES])
def test_every_family_computes_what_its_integers_stand_for(name):
    target = tied_target() if name == "tied" else family_target(name)
    small = as_int8(target)
    inputs = {"input_ids": np.arange(5, 45).reshape(2, 20)}
    logits, float_logits = small.logits(inputs), target.logits(inputs)
    multiplied = jaxspec.Target(dequantized(small.model), target.adapter, target.processor, None, ())
    assert relative_error(logits, multiplied.logits(inputs)) < 1e-5
    assert 1e-4 < relative_error(logits, float_logits) < 0.1
    assert small.model.dtype == jnp.float32 == small.model.embedding.dtype
    assert relative_error(small.model.embedding, target.model.embedding) < (0.01 if name == "tied" else 1e-9)
    table = parameter_paths(small.model)["language_model.embed_tokens.embedding"]
    assert (table.dtype == jnp.int8) == (name == "tied")


def test_a_tied_table_in_half_precision():
    """Embeddings keep the type that the model computes in."""
    graph, state = nnx.split(tied_target().model)
    half = nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state))
    small = quantized(half, TARGET_PART)
    assert small.dtype == small.embed(jnp.arange(3)[None]).dtype == small.embedding.dtype == jnp.bfloat16
    assert (
        relative_error(small.embed(jnp.arange(9)).astype(jnp.float32), half.embed(jnp.arange(9)).astype(jnp.float32))
        < 0.02
    )


@pytest.fixture(scope="module")
def small(target):
    return as_int8(target)


SAMPLING = [SamplingParams(), SamplingParams(temperature=1.0, seed=12), SamplingParams(0.7, top_p=0.9, seed=13)]


@pytest.fixture(scope="module")
def answers(small, requests):
    """Results of the three requests, greedy, sampled and filtered, drafted for over the int8 target."""

    def run(drafter: Drafter | None):
        prompts, images = zip(*requests, strict=True)
        generator = Generator(small, drafter, max_length=512)
        return generator.generate_batch(list(prompts), list(images), SAMPLING, [32, 24, 29])

    return run


@pytest.fixture(scope="module")
def expected(answers):
    return [each.tokens.tolist() for each in answers(None)]


FLOAT = ("vispec", "self")
"""Drafters that are also shown as they are, made for the float target as published ones are."""


@pytest.mark.parametrize(
    ("name", "quantize"),
    [
        *((name, None) for name in FLOAT),
        *((name, "int8") for name in DRAFTERS if name not in ("random", "self", "lookup")),
    ],
)
def test_speculative_equals_autoregressive_over_int8(answers, expected, target, name, quantize):
    drafter = DRAFTERS[name](target)
    if quantize:
        drafter = dataclasses.replace(drafter, model=quantized(drafter.model), quantize=quantize)
    results = answers(drafter)
    assert [each.tokens.tolist() for each in results] == expected
    assert sum(int(each.accepted.sum()) for each in results) > 4


def test_an_int8_drafter_from_its_folder(target, tmp_path):
    """All its matrices, embeddings of a text model that are its head included; over float and int8 targets."""
    folder = tmp_path / "head"
    for name, method in (("narrow", "eagle2"), ("specvlm", "specvlm"), ("vispec", "vispec"), ("medusa", "medusa")):
        drafter = DRAFTERS[name](target)
        save_drafter_folder(drafter.model, method, TREE, target.model, folder, "float32")
        loaded = jaxspec.load_drafter(folder, target, quantize="int8")
        assert loaded.quantize == "int8" and jaxspec.load_drafter(folder, target).quantize is None
        kinds = {path: leaf.dtype for path, leaf in parameter_paths(loaded.model).items()}
        assert all(kind == jnp.int8 for path, kind in kinds.items() if path.endswith("kernel")), kinds
        assert sum(kind == jnp.int8 for kind in kinds.values()) == sum(path.endswith("kernel_scale") for path in kinds)
        expected = parameter_paths(quantized(load_drafter_folder(folder, target.model)[0]))
        for path, leaf in parameter_paths(loaded.model).items():
            np.testing.assert_array_equal(leaf[...], expected[path][...], err_msg=path)
    assert jaxspec.load_drafter("lookup", target, quantize="int8").model is not None  # nothing there to quantise


def test_abstract_models_have_the_same_structure(target):
    """What is compiled without weights."""
    made = abstract(lambda rngs: type(target.model)(target.config, rngs=rngs))
    ours, theirs = (nnx.split(quantized(model, TARGET_PART)) for model in (made, target.model))
    assert ours[0] == theirs[0]
    shapes = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(each[1])] for each in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="there XLA's CPU compiler drops the barrier too early")
def test_no_float_copy_of_the_weights_in_the_loop(target):
    """The program of the rounds needs room for one matrix as floats, not for all of them, which it would if it made
    them before its loop."""
    text = dataclasses.replace(target.config.text, hidden_size=512, intermediate_size=1024, num_layers=4, head_dim=128)
    config = dataclasses.replace(target.config, text=text)
    model = quantized(abstract(lambda rngs: type(target.model)(config, rngs=rngs)), TARGET_PART)
    programs = Programs(model, target.adapter, None, TreeConfig.autoregressive())
    params = programs.params_of(model, None)
    state = jax.eval_shape(lambda params: programs.idle(params, 1, 64), params)
    memory = programs._decode.lower(params, state, 8, programs.tree).compile().memory_analysis()
    floats = [4 * leaf.size for leaf in jax.tree.leaves(params) if leaf.dtype == jnp.int8]
    assert max(floats) <= memory.temp_size_in_bytes < max(floats) + sum(floats) / 4
    assert memory.argument_size_in_bytes > sum(floats) / 4


def test_what_is_refused(target, small, tmp_path):
    sentence = "quantize must be one of int8, or None, got 'int4'"
    assert error_of(lambda: load_target(target.path, quantize="int4")) == sentence
    assert error_of(lambda: jaxspec.load_drafter("lookup", target, quantize="int4")) == sentence
    assert error_of(lambda: load_target(target.path, quantize=8)).endswith("got 8")
    again = "the model is quantised already; quantise the one with float weights that it was made from"
    assert error_of(lambda: quantized(small.model)) == again == error_of(lambda: as_int8(small))
    unsaved = "a quantised model cannot be saved; save the one with float weights that it was made from"
    assert error_of(lambda: to_tensors(small.model, LLAVA_NAMES)) == unsaved
    head = quantized(linked_head(target, "eagle2"))
    assert (
        error_of(lambda: save_drafter_folder(head, "eagle2", TREE, target.model, tmp_path / "head", "float32"))
        == unsaved
    )
    assert not (tmp_path / "head").exists()
    folder = tmp_path / "gptq"
    folder.mkdir()
    config = json.loads((target.path / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    assert "its weights are quantised (gptq, 4 bits)" in error_of(lambda: load_target(folder, quantize="int8"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    command = [sys.executable, ROOT / "tests" / "sharded_int8.py", tmp_path_factory.mktemp("sharded")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_eight_devices_say_what_one_says(sharded):
    assert sharded["equal"] and sharded["error"] < 1e-5
    assert sharded["sharded"] == sharded["single"]
    for plain, drafted in (sharded["single"], sharded["sharded"]):
        assert plain == drafted and all(len(each) > 4 for each in plain)


@pytest.mark.parametrize(
    ("name", "spec", "scales"),
    [
        ("self_attn.q_proj", ["fsdp", "tensor"], [None, "tensor"]),
        ("self_attn.o_proj", ["tensor", "fsdp"], [None, "fsdp"]),
        ("mlp.gate_proj", ["fsdp", "tensor"], [None, "tensor"]),
        ("mlp.down_proj", ["tensor", "fsdp"], [None, "fsdp"]),
    ],
)
def test_scales_lie_along_the_outputs_of_their_kernel(sharded, name, spec, scales):
    path = f"language_model.layers.1.{name}.kernel"
    (kind, _, found), (scale_kind, shape, scale_found) = (sharded["layout"][each] for each in (path, path + "_scale"))
    assert (kind, found) == ("int8", spec)
    assert (scale_kind, shape[0], scale_found) == ("float32", 1, scales)
