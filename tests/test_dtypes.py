"""A target in half precision computes in half precision: embeddings, hidden states, cache, draft states and tower.

The programs of prefill and of a decode round are traced, not compiled, and every intermediate as large as an activation
is looked at. What is float32 all the same is inside norms, attention scores, rope, means, the tree's structure, logits
and what samples from them, by the scopes they stand in or by the vocabulary they range over.
"""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspec import Drafter, Generator, SamplingParams, Target, TreeConfig, load_target
from jaxspec.checkpoints.names import dotted_path
from jaxspec.prompting import encode_prompt
from jaxspec.speculation import loop, prefill
from jaxspec.speculation.state import Request
from jaxspec.targets.chunks import steps_of
from tests.drafting import DRAFTERS, NARROW, TREE, fresh_head
from tests.families import FAMILIES, family_target
from tests.folders import relative_error

BATCH, CAPACITY, NEW = 2, 160, 16
FLOAT32 = re.compile(r"(?<!\w)(norm|rope|attention|mean|tree|logits|choice|penalties)(?!\w)")
"""Scopes that compute in float32 and give back what they were given."""


def in_dtype(module: nnx.Module, dtype) -> nnx.Module:
    """The module with other values in its parameters, as a loader fills it."""
    graph, state = nnx.split(module)
    cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    return nnx.merge(graph, jax.tree.map(cast, state))


def equations(jaxpr, scope: str = "") -> Iterator[tuple[str, Any]]:
    """Every equation of a program and of the programs inside it, with the scopes it stands in."""
    for equation in jaxpr.eqns:
        here = f"{scope}/{equation.source_info.name_stack}"
        yield here, equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner, here)


def wide_intermediates(jaxpr, width: int, vocabularies: tuple[int, ...]) -> list[str]:
    """The float32 (or float64) intermediates of a program that are as large as activations and no exception."""
    found = []
    for scope, equation in equations(jaxpr):
        for variable in equation.outvars:
            shape, dtype = variable.aval.shape, variable.aval.dtype
            if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 4 or np.prod(shape) < BATCH * width:
                continue
            over_vocabulary = shape[0] == BATCH and shape[-1] in vocabularies
            if len(shape) > 1 and not over_vocabulary and not FLOAT32.search(scope):
                found.append(f"{scope} {equation.primitive} {dtype}{list(shape)}")
    return found


def programs(target: Target, drafter: Drafter | None, images: list):
    """The state before the first round, and the programs of encoding, of reading a first and a second chunk, of what
    comes after and of decoding, penalties included."""
    prompts = [encode_prompt(target, "What is that?", images[:count]) for count in (0, len(images))]
    step, *_ = steps_of(target.adapter, prompts, 128, CAPACITY)
    chunk, models = step.chunk, (target.model, drafter.model if drafter else None)
    params = [SamplingParams(temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, presence_penalty=1)] * BATCH
    ids = [each.input_ids for each in prompts]
    request = Request.of(params, ids, [NEW] * BATCH, (), target.model.vocab_size)
    tree = drafter.tree if drafter else TreeConfig.autoregressive()
    traced, features = [], None

    def trace(function, *args):
        program, shapes = jax.make_jaxpr(function, return_shape=True)(models, *args)
        traced.append(program.jaxpr)
        return shapes

    if images:
        pixels = target.adapter.collate(prompts[1].images[:1])
        table = trace(lambda models, pixels: prefill.encode_image(*models, pixels), pixels)
        index = np.zeros(chunk.input_ids.shape, np.int32)
        none = trace(lambda models: prefill.no_images(*models, *index.shape))
        features = trace(lambda models, *args: prefill.place(*args), none, table, index)

    def read(models, before, chunk, features):
        return prefill.read_chunk(*models, before, chunk, features)

    first = trace(read, None, chunk, features)
    second = trace(read, first, chunk, features)
    begin = lambda models, read, request, offset: loop.begin(*models, read, request, offset, CAPACITY, 2)  # noqa: E731
    state = trace(begin, second, request, np.zeros(BATCH, np.int32))
    trace(lambda models, state: loop.decode(*models, state, jnp.int32(4), tree), state)
    return state, traced


def assert_computes_in(dtype, target: Target, drafter: Drafter, images: list) -> None:
    model, head = in_dtype(target.model, dtype), in_dtype(drafter.model, dtype)
    target = Target(model, target.adapter, target.processor, None, ())
    drafter = Drafter(head, drafter.tree, drafter.method, {})
    state, traced = programs(target, drafter, images)
    floats = {leaf.dtype for leaf in jax.tree.leaves((state.cache, state.draft_state)) if leaf.dtype.kind not in "iub"}
    assert floats == {jnp.dtype(dtype)}
    text = target.config.text
    vocabularies = text.vocab_size, NARROW.size
    wide = [each for program in traced for each in wide_intermediates(program, text.hidden_size, vocabularies)]
    assert not wide, "\n".join(wide)


@pytest.mark.parametrize(("name", "dtype"), [*((name, "bfloat16") for name in FAMILIES), ("gemma3", "float16")])
def test_families(name, dtype, pictures):
    target = family_target(name)
    head = Drafter(fresh_head(target, "eagle2", 1), TREE, "eagle2", {})
    assert_computes_in(dtype, target, head, pictures[:1] if target.adapter.image_token_ids else [])


@pytest.mark.parametrize("name", [name for name in DRAFTERS if name not in ("chain", "random", "self", "lookup")])
def test_drafters(name, target, generators, pictures):
    assert_computes_in("bfloat16", target, generators(name).drafter, pictures[:1])


@pytest.mark.parametrize(
    "name", ["embed_tokens.embedding", "language_model.layers.0.mlp.up_proj.kernel", "language_model.norm.scale"]
)
def test_one_float32_parameter_is_seen(name, target):
    """The walk finds what a single parameter of another type does to everything after it."""
    model = in_dtype(target.model, "bfloat16")
    own = [(path, leaf) for path, leaf in nnx.to_flat_state(nnx.state(model)) if dotted_path(path).endswith(name)]
    nnx.update(model, nnx.from_flat_state([(path, leaf.replace(leaf[...].astype(jnp.float32))) for path, leaf in own]))
    text = target.config.text
    _, traced = programs(Target(model, target.adapter, target.processor, None, ()), None, [])
    assert any(wide_intermediates(program, text.hidden_size, (text.vocab_size,)) for program in traced)


def test_speculation_in_bfloat16(target, generators):
    """A folder loaded in bfloat16: near float32, and speculative text parts from autoregressive only at near ties."""
    half = load_target(target.path, "bfloat16")
    ids = np.arange(5, 45)[None]
    assert half.model.embed(jnp.asarray(ids)).dtype == jnp.bfloat16
    ours, exact = half.logits({"input_ids": ids}), target.logits({"input_ids": ids})
    assert ours.dtype == jnp.float32 and 1e-4 < relative_error(ours, exact) < 0.05
    head = generators("eagle2").drafter
    head = Drafter(in_dtype(head.model, "bfloat16"), head.tree, head.method, {})
    plain, drafted = (
        Generator(half, drafter, max_length=128).generate("What is a chart for?", max_new_tokens=24)
        for drafter in (None, head)
    )
    assert drafted.stats.mean_acceptance_length > 1.5
    same = np.cumprod(plain.tokens == drafted.tokens).sum()
    if same < len(plain.tokens):
        prompt = encode_prompt(half, "What is a chart for?", ()).input_ids
        logits = np.asarray(half.logits({"input_ids": np.concatenate([prompt, plain.tokens[:same]])[None]}))[0, -1]
        assert logits.max() - logits[drafted.tokens[same]] < 0.02 * np.abs(logits).max()
