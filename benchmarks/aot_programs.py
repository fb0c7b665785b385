"""The programs of published models over shapes in place of weights: what `aot_tpu.py` compiles.

Parameters, caches and states lie on the chips as the loaders and `jaxspec.programs.Programs` leave them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from benchmarks.published import Published, abstract_draft_model, abstract_model
from jaxspec.cache import LayerKV
from jaxspec.programs import CHUNK, Programs
from jaxspec.quantization import TARGET_PART, quantized
from jaxspec.sharding import AXES, ROWS, decoding_mesh, head_dims_of, parameter_shardings
from jaxspec.speculation.params import SamplingParams
from jaxspec.speculation.prefill import no_images, nothing_read
from jaxspec.speculation.state import Request
from jaxspec.speculation.tree import TreeConfig
from jaxspec.splitting import BATCH, TENSOR, shares, using
from jaxspec.targets.chunks import Chunk
from jaxspec.targets.prompts import stack_prompts
from jaxspec.training import ViSpecRecipe
from jaxspec.training.drafter import loss_of
from jaxspec.training.loop import Constants, make_step
from jaxspec.training.member import initial_state
from jaxspec.training.recipe import Task


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is compiled of a target; without a drafter it is autoregressive decoding."""

    target: str
    method: str | None = None
    head: Callable[[Any], Any] | None = None  # the drafter's config, of the target's
    tree: TreeConfig = TreeConfig.autoregressive()
    quantize: bool = False  # the drafter's matrices are int8
    quantize_target: bool = False  # those of the target's text model are


class Decoding:
    """The programs of one arm on some chips, lowered over shapes: of `batch` rows for each group of chips."""

    def __init__(self, target: Published, arm: Arm, devices: list[Any], batch: int, capacity: int) -> None:
        self.target, self.capacity = target, capacity
        tensor = tensor_of(target.config.text.num_heads, len(devices))
        self.batch = batch * (len(devices) // tensor)
        self.mesh = None if len(devices) == 1 else decoding_mesh(tensor, len(devices) // tensor, devices)
        self.alone = SingleDeviceSharding(devices[0])
        model = abstract_model(target.family, target.config)
        self.model = self.placed(quantized(model, TARGET_PART) if arm.quantize_target else model)
        self.draft_model = None
        if arm.method is not None and arm.head is not None:
            draft_model = abstract_draft_model(arm.method, arm.head(target.config))
            self.draft_model = self.placed(quantized(draft_model) if arm.quantize else draft_model)
        self.adapter = target.adapter(target.config)
        self.programs = Programs(self.model, self.adapter, self.draft_model, arm.tree)
        self.params = self.programs.params_of(self.model, self.draft_model)

    def placed(self, model: Any) -> Any:
        """A model as its loader places it."""
        graph, params = nnx.split(model)
        head_dims = head_dims_of(model)
        return nnx.merge(graph, placed_parameters(params, self.mesh, self.alone, head_dims))

    def lying(self, leaf: Any, *axes: str) -> jax.ShapeDtypeStruct:
        """The shape of an array that is split as `splitting.constrained` splits it."""
        sharding: Any = self.alone
        if self.mesh is not None:
            with using(self.mesh):
                spec = [shares(axis, size) for axis, size in zip(axes, np.shape(leaf), strict=False)]
            sharding = NamedSharding(self.mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)

    def here(self, tree: Any) -> Any:
        """Shapes of arrays that every chip has whole, as those that come from the host."""
        return jax.tree.map(self.lying, tree)

    def kept(self, tree: Any) -> Any:
        """Shapes of arrays as the programs leave them (`state.placed`)."""

        def one(leaf: Any) -> Any:
            if isinstance(leaf, LayerKV):
                return LayerKV(*(self.lying(each, BATCH, TENSOR) for each in leaf))
            return self.lying(leaf, BATCH)

        return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, LayerKV))

    def shapes(self, function: Callable[..., Any], *args: Any) -> Any:
        """Of what a function of models makes on these chips, as the programs leave it."""
        with using(self.mesh):
            return self.kept(jax.eval_shape(lambda: function(self.model, self.draft_model, *args)))

    def chunk(self, length: int) -> Chunk[Any]:
        ids = jax.ShapeDtypeStruct((self.batch, length), jnp.int32)
        positions = None
        if self.target.prompt().position_ids is not None:
            positions = jax.ShapeDtypeStruct((3, self.batch, length), jnp.int32)
        return self.here(Chunk(ids, jax.ShapeDtypeStruct((self.batch,), jnp.int32), ids, positions))

    def read(self) -> Any:
        """Prompts that have been read, as the chips hold them."""
        return self.shapes(nothing_read, self.batch, self.capacity)

    def begun(self) -> Any:
        """The state between rounds, as the chips hold it."""
        ids = [np.zeros(4, np.int32)] * self.batch
        asked = Request.of([SamplingParams()] * self.batch, ids, [64] * self.batch, (2,), self.model.vocab_size)
        request = self.here(jax.tree.map(np.asarray, asked))
        offsets = self.here(jax.ShapeDtypeStruct((self.batch,), jnp.int32))
        begin = partial(self.programs._begin, capacity=self.capacity, max_images=4)
        return self.kept(jax.eval_shape(begin, self.params, self.read(), request, offsets))

    def decode(self) -> Any:
        rounds = self.here(jax.ShapeDtypeStruct((), jnp.int32))
        return self.programs._decode.lower(self.params, self.begun(), rounds, self.programs.tree)

    def prefill(self) -> Any:
        """One chunk of a prompt behind others."""
        images = self.shapes(no_images, self.batch, CHUNK)
        return self.programs._read.lower(self.params, self.read(), self.chunk(CHUNK), images)

    def resident(self, program: str) -> float:
        """Bytes of one chip that weights and state take."""
        state = self.begun() if program == "decode" else self.read()
        return sum(local_bytes(leaf) for leaf in jax.tree.leaves((self.params, state)))


def tensor_of(heads: int, chips: int) -> int:
    """The most chips of a group that divide the heads; the groups stand along `data`."""
    return max(size for size in range(1, chips + 1) if chips % size == 0 and heads % size == 0)


def placed_parameters(tree: Any, mesh: Mesh | None, alone: Any, head_dims: Mapping[str, int] | None = None) -> Any:
    """Shapes of parameters, or of what an optimizer keeps of them, as `place_parameters` puts them; all on the chip
    `alone` without a mesh."""
    if mesh is None:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=alone), tree)
    shardings = parameter_shardings(tree, mesh, head_dims)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Of one chip's part."""
    assert leaf.sharding is not None
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * jnp.dtype(leaf.dtype).itemsize


def training_step(target: Published, arm: Arm, devices: list[Any], rows: int, length: int) -> Any:
    """One step of ViSpec's second stage as `train.py` makes it: the target frozen in bfloat16, the head in float32,
    both split over all chips."""
    batch_size = rows * len(devices)
    mesh = None
    if len(devices) > 1:
        shape = (1, len(devices), 1)
        mesh = Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    alone = SingleDeviceSharding(devices[0])
    recipe = ViSpecRecipe(name="aot", target_dtype="bfloat16", batch_size=batch_size, sequence_length=length)
    assert arm.method is not None
    model = abstract_model(target.family, target.config)
    text = dataclasses.replace(target.config.text.plain(), tie_word_embeddings=False)
    draft_model = abstract_draft_model(arm.method, recipe.head_config(text), "float32")
    graph, params, rest = nnx.split(draft_model, lambda path, _: recipe.trains(path), ...)
    model_graph, model_params = nnx.split(model)

    def placed(tree: Any) -> Any:
        return placed_parameters(tree, mesh, alone)

    params, rest, model_params = placed(params), placed(rest), placed(model_params)

    loss = loss_of(recipe, graph, model_graph)
    task = Task(params, (rest, model_params), loss, batches=None, validation=None, export=None)  # type: ignore[arg-type]
    state = placed(jax.eval_shape(partial(initial_state, recipe), params))
    constants = Constants([task])
    step = make_step([recipe], [task], constants, mesh, jax.tree.map(lambda leaf: leaf.sharding, [state]))
    prompts = [target.prompt(after=64)] * batch_size
    stacked = stack_prompts(target.adapter(target.config), prompts, length)
    batch = {"prompts": stacked, "loss_mask": np.zeros((batch_size, length), bool)}

    def split(leaf: Any) -> jax.ShapeDtypeStruct:
        if mesh is None:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=alone)
        spec = PartitionSpec() if leaf.ndim == 0 or leaf.shape[0] % len(devices) else PartitionSpec(ROWS)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return step.lower([state], constants.arrays, jax.tree.map(split, batch))
