"""The contract of drafter states: every leaf leads with the batch, and shapes depend on capacity and batch alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import SamplingParams
from jaxspec.speculation import loop, prefill
from jaxspec.speculation.state import Request
from jaxspec.targets.chunks import Chunk
from tests.drafting import DRAFTERS


def shape_of(target, draft_model, batch: int, capacity: int, length: int, images: int):
    """The drafter's state after a prompt of that many tokens with so many images, by the paths of its leaves."""
    image_ids = jnp.full((batch, length), -1).at[:, 1 : 1 + 2 * images].set(jnp.repeat(jnp.arange(images), 2))
    chunk = Chunk(jnp.zeros((batch, length), jnp.int32), jnp.full((batch,), length, jnp.int32), image_ids)
    ids = [np.zeros(length, np.int32)] * batch
    request = Request.of([SamplingParams()] * batch, ids, [1] * batch, (), target.model.vocab_size)

    def run(models):
        read = prefill.read_chunk(*models, None, chunk, prefill.no_images(*models, batch, length))
        state = loop.begin(*models, read, request, jnp.zeros(batch, jnp.int32), capacity, images)
        return state.draft_state

    state = jax.eval_shape(run, (target.model, draft_model))
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


@pytest.mark.parametrize("name", DRAFTERS)
def test_shapes_depend_on_capacity_and_batch_alone(name, target, generators):
    draft_model = generators(name).drafter.model
    shapes = [
        shape_of(target, draft_model, 3, 128, *prompt) for prompt in ((60, 0), (60, 1), (60, 2), (96, 3), (17, 4))
    ]
    assert shapes[0]
    assert all(each == shapes[0] for each in shapes)
    assert all(shape[0] == 3 for shape in shapes[0].values())
    more, wider = shape_of(target, draft_model, 5, 128, 60, 1), shape_of(target, draft_model, 3, 160, 60, 1)
    for path, shape in shapes[0].items():
        assert more[path] == (5, *shape[1:])
        assert np.prod(wider[path]) in (np.prod(shape), np.prod(shape) * 160 // 128)
