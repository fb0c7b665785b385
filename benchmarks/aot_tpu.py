"""Compiles the programs of published models for TPUs, without a TPU, and says what they take: compile-only numbers.

    pip install libtpu    # Python 3.12, jax 0.12; no TPU is looked for
    python -m benchmarks.aot_tpu --output docs/results/aot_tpu.json            # everything: hours of two cores
    python -m benchmarks.aot_tpu --arms llava-1.5-7b/vispec --layers 4 --output runs/aot.json      # a first look

Each arm is a target with a drafter and a tree, or autoregressive decoding; its programs are those of
`jaxspec.programs.Programs`: one round and one chunk of a prompt. A row says GiB a chip against what the compiler has to
give, the bytes that a round moves in main memory (benchmarks/hlo.py) and its FLOPs, the collectives of a round, copies
of weights or cache in the loop and before it, and compile seconds. `ceiling` is bytes of the autoregressive step over
bytes of the round on the same chips: what efficiency can reach where bytes are all that counts. Nothing here ran.
"""

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from benchmarks import hlo
from benchmarks.published import TARGETS, Published, abstract_draft_model, abstract_model, massv_config, vispec_config
from jaxspec.cache import LayerKV
from jaxspec.programs import CHUNK, Programs
from jaxspec.quantization import quantized
from jaxspec.sharding import AXES, ROWS, decoding_mesh, head_dims_of, parameter_sharding
from jaxspec.speculation.params import SamplingParams
from jaxspec.speculation.prefill import no_images, nothing_read, taps_of
from jaxspec.speculation.state import Request
from jaxspec.speculation.tree import TreeConfig
from jaxspec.splitting import BATCH, TENSOR, shares, using
from jaxspec.targets.chunks import Chunk
from jaxspec.targets.prompts import stack_prompts
from jaxspec.training import ViSpecRecipe
from jaxspec.training.drafter import teach
from jaxspec.training.loop import Constants, make_step
from jaxspec.training.member import initial_state
from jaxspec.training.recipe import Task

TOPOLOGIES = {
    "v5e": {1: "v5e:2x2", 4: "v5e:2x2", 8: "v5e:2x4"},
    "v5p": {1: "v5p:2x2x1", 4: "v5p:2x2x1", 8: "v5p:2x2x2"},
    "v6e": {1: "v6e:2x2", 4: "v6e:2x2", 8: "v6e:2x4"},
}
"""Kind -> chips -> the topology whose first chips are compiled for."""
LIMITS = {"v5e": 15.75, "v5p": 95.73, "v6e": 31.24}
"""GiB a chip that the compiler has to give: what it says where a program asks for more."""
LEAST = 2**20
"""Bytes from which a copy is told."""
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is compiled of a target; without a drafter it is autoregressive decoding."""

    target: str
    method: str | None = None
    head: Callable[[Any], Any] | None = None  # the drafter's config, of the target's
    tree: TreeConfig = TreeConfig.autoregressive()
    quantize: bool = False  # the drafter's matrices are int8


VISPEC = TreeConfig(3, 8, 30)
EIGHTH = partial(vispec_config, share=8)
OWN_HEAD = partial(vispec_config, own_head=True)
ARMS = {
    "llava-1.5-7b/autoregressive": Arm("llava-1.5-7b"),
    "llava-1.5-7b/vispec": Arm("llava-1.5-7b", "vispec", vispec_config, VISPEC),
    "llava-1.5-7b/vispec-eighth": Arm("llava-1.5-7b", "vispec", EIGHTH, VISPEC),
    "llava-1.5-7b/vispec-int8": Arm("llava-1.5-7b", "vispec", OWN_HEAD, VISPEC, quantize=True),
    "llava-1.5-7b/vispec-eighth-int8": Arm("llava-1.5-7b", "vispec", EIGHTH, VISPEC, quantize=True),
    "qwen2.5-vl-7b/autoregressive": Arm("qwen2.5-vl-7b"),
    "qwen2.5-vl-7b/vispec": Arm("qwen2.5-vl-7b", "vispec", vispec_config, VISPEC),
    "qwen2.5-vl-7b/vispec-eighth": Arm("qwen2.5-vl-7b", "vispec", EIGHTH, VISPEC),
    "qwen2.5-vl-7b/vispec-int8": Arm("qwen2.5-vl-7b", "vispec", OWN_HEAD, VISPEC, quantize=True),
    "qwen2.5-vl-7b/vispec-eighth-int8": Arm("qwen2.5-vl-7b", "vispec", EIGHTH, VISPEC, quantize=True),
    "gemma3-12b/autoregressive": Arm("gemma3-12b"),
    "gemma3-12b/massv": Arm("gemma3-12b", "massv", massv_config, TreeConfig.chain(5)),
    "llava-1.5-7b/training": Arm("llava-1.5-7b", "vispec", vispec_config, VISPEC),
}
"""The arms with an eighth of the vocabulary have the target's most frequent tokens in mind (drafters/vocabulary.py);
those in int8 have an int8 head and an int8 LM head of their own, of all tokens where no eighth is said."""


@dataclasses.dataclass(frozen=True)
class Compile:
    """What to compile."""

    output: Path = Path("runs/aot_tpu.json")
    arms: tuple[str, ...] = tuple(ARMS)
    kinds: tuple[Literal["v5e", "v5p", "v6e"], ...] = ("v5e", "v5p", "v6e")
    chips: tuple[Literal[1, 4, 8], ...] = (1, 4, 8)
    """All of one group along `tensor` where that divides the heads, else in groups along `data`; in training along
    `fsdp`."""
    programs: tuple[Literal["decode", "prefill"], ...] = ("decode", "prefill")
    batch: int = 1
    capacity: int = 2048
    """Positions of the caches."""
    rows: int = 2
    """Of a training batch, on each chip."""
    length: int = 2048
    """Tokens of a training row."""
    filled: int = 704
    """Positions of the caches that hold something, of which attention's kernel reads no others: by default those of a
    prompt with a picture of 576 tokens and a few tokens of answer."""
    layers: int | None = None
    """The first so many layers of the target's text model, to look at a program quickly; default all."""
    hlo: Path | None = None
    """A folder for the compiled programs' text."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.arms) - set(ARMS)):
            raise ValueError(f"arms {', '.join(unknown)} are not known; known are {', '.join(ARMS)}")

    def write(self) -> None:
        """Compile, print and keep row after row: what is done when time runs out is in the file. Rows of other programs
        that are in it stay, so that several commands fill one table."""
        rows = json.loads(self.output.read_text())["rows"] if self.output.exists() else []
        for kind in self.kinds:
            for chips in self.chips:
                devices = topology(TOPOLOGIES[kind][chips])[:chips]
                for row in self.compiled(kind, devices):
                    rows = merged(rows, row)
                    print(sentence(next(each for each in rows if key_of(each) == key_of(row))), flush=True)
                    write_json(self.output, {"compile_only": True, "rows": rows})

    def compiled(self, kind: str, devices: list[Any]) -> Iterator[dict[str, Any]]:
        """A row for every program of every arm."""
        versions = {"jax": jax.__version__, "libtpu": version("libtpu")}
        for name in self.arms:
            arm, target = ARMS[name], TARGETS[ARMS[name].target].with_layers(self.layers)
            about = {"arm": name, "kind": kind, "chips": len(devices), "layers": self.layers} | versions
            if name.endswith("training"):
                about |= {"program": "step", "batch": self.rows * len(devices), "positions": self.length}
                yield about | self.told(about, partial(training_step, target, arm, devices, self.rows, self.length))
                continue
            decoding = Decoding(target, arm, devices, self.batch, self.capacity)
            about |= {"batch": decoding.batch, "positions": self.capacity}
            for program in self.programs:
                told = about | {"program": program}
                filled = min(1.0, self.filled / self.capacity)
                yield told | self.told(told, getattr(decoding, program), decoding.resident(program), filled)

    def told(
        self, about: dict[str, Any], lower: Callable[[], Any], resident: float = 0.0, filled: float = 1.0
    ) -> dict[str, Any]:
        """What the compiler makes of one program, or why it makes nothing; `resident` bytes of a chip are taken by what
        is loaded, whether the program reads it or not; of caches the part `filled` holds something."""
        lowered, started = lower(), time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            asked = refusal(str(error))
            if asked is None:
                raise
            return {"fits": False, "gib": asked[0], "limit_gib": asked[1]}
        seconds, text = time.perf_counter() - started, compiled.as_text()
        if self.hlo is not None:
            name = "_".join(str(about[key]) for key in ("arm", "program", "kind", "chips")).replace("/", "_")
            self.hlo.mkdir(parents=True, exist_ok=True)
            (self.hlo / f"{name}.txt").write_text(text)
        memory, limit = compiled.memory_analysis(), LIMITS[about["kind"]]
        arguments = max(memory.argument_size_in_bytes, resident)
        outputs = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
        gib = (arguments + outputs + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes) / GIB
        return {
            "fits": gib <= limit, "gib": round(gib, 2), "limit_gib": limit,
            "temporary_gib": round(memory.temp_size_in_bytes / GIB, 2),
            "compile_seconds": round(seconds, 1), **read_program(text, about["program"], self.capacity, filled),
            "flops": flops(compiled),
        }  # fmt: skip


def refusal(error: str) -> tuple[float, float] | None:
    """(GiB asked for, GiB there are) of a compiler's error; None for an error about something else."""
    said = (r"Used ([\d.]+)G of ([\d.]+)G hbm", r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)")
    found = next(filter(None, (re.search(pattern, error) for pattern in said)), None)
    return None if found is None else (float(found.group(1)), float(found.group(2)))


def read_program(text: str, program: str, capacity: int, filled: float) -> dict[str, Any]:
    """What its text tells: of the loop of a decoding program, of all of another one. Attention's kernel reads caches of
    `capacity` positions as far as they are filled: `bytes` is with all of them, `bytes_filled` with that part."""
    parsed = hlo.parse(text)
    body = parsed.loop() if program == "decode" else parsed.entry
    loop = [each for each in parsed.copies(body, LEAST)] if program == "decode" else []
    entry = parsed.copies(parsed.entry, LEAST)

    def listed(copies: list[hlo.Moved], computation: str) -> dict[str, Any]:
        named: dict[str, float] = {}
        for each in copies:
            source = parsed.origin(computation, each.instruction)
            origin = re.sub(r"\d+", "*", source.label or source.name)
            named[origin] = named.get(origin, 0) + each.bytes
        largest = sorted(named.items(), key=lambda item: -item[1])[:6]
        held = [each.bytes for each in copies if parsed.is_held(computation, each.instruction)]
        return {
            **{"count": len(copies), "bytes": sum(each.bytes for each in copies), "of": dict(largest)},
            **{"held_count": len(held), "held_bytes": sum(held)},  # of weights and caches
        }

    moved, caches = parsed.moved_by(body), parsed.read_by_kernels(body, capacity)
    return {
        "bytes": moved,
        "bytes_filled": moved - (1 - filled) * caches,
        "kernels": parsed.kernels(body),
        "collectives": {
            kind: {"count": count, "bytes": size} for kind, (count, size) in parsed.collectives(body).items()
        },
        "copies_in_loop": listed(loop, body),
        "copies_at_entry": listed(entry, parsed.entry),
        "instructions": len(parsed.computations[body]),
    }


def flops(compiled: Any) -> float | None:
    """As XLA counts them, of one chip, a loop's body once."""
    costs = compiled.cost_analysis()
    costs = costs[0] if isinstance(costs, list | tuple) else costs
    return costs.get("flops")


def key_of(row: dict[str, Any]) -> tuple:
    """What a row is about: of two with the same key the later one counts."""
    return tuple(row.get(name) for name in ("arm", "program", "kind", "chips", "batch", "positions", "layers"))


def merged(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with another one, in the place of that with its key if there is one, and with ceilings."""
    places = {key_of(each): each for each in rows} | {key_of(row): row}
    return [with_ceiling(each, list(places.values())) for each in places.values()]


def with_ceiling(row: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """With `ceiling` and `ceiling_filled` where the autoregressive step of the same target, of as many layers, on the
    same chips is among the others."""
    if row["program"] != "decode" or "bytes" not in row:
        return row
    wanted = key_of(row | {"arm": row["arm"].split("/")[0] + "/autoregressive"})
    steps = [each for each in [*others, row] if key_of(each) == wanted and "bytes" in each]
    if not steps:
        return row
    names = {"ceiling": "bytes", "ceiling_filled": "bytes_filled"}
    return row | {name: round(steps[0][own] / row[own], 4) for name, own in names.items()}


def sentence(row: dict[str, Any]) -> str:
    """A row for a reader."""
    name = f"{row['arm']} {row['program']}, {row['chips']} x {row['kind']}, batch {row['batch']}"
    if row.get("layers") is not None:
        name += f", {row['layers']} layers"
    if "bytes" not in row:
        return f"{name}: does not fit, {row['gib']} of {row['limit_gib']} GiB (compile-only)"
    loop, entry = row["copies_in_loop"], row["copies_at_entry"]
    found = ", ".join(
        f"{each['count']} {kind} {each['bytes'] / 1e6:.1f} MB" for kind, each in row["collectives"].items()
    )
    takes = f"{row['gib']} of {row['limit_gib']} GiB{'' if row['fits'] else ' (does not fit)'}"
    moves = f"{row['bytes'] / 1e9:.2f} GB ({row['bytes_filled'] / 1e9:.2f} as filled)"
    ceiling = f", ceiling {row['ceiling']:.3f} ({row['ceiling_filled']:.3f})" if "ceiling" in row else ""
    kernels = ", ".join(f"{count} {kernel}" for kernel, count in row["kernels"].items()) or "no kernels"
    copies = ", ".join(
        f"{where} {each['held_count']} ({each['held_bytes'] / 1e6:.0f} MB)"
        for where, each in (("in the loop", loop), ("at entry", entry))
    )
    return (
        f"{name}: {takes}, {moves}, {(row['flops'] or 0) / 1e12:.2f} TFLOP{ceiling}; {kernels}; copies of weights and "
        f"caches {copies}; {found or 'no collectives'}; {row['compile_seconds']} s (compile-only)"
    )


def write_json(path: Path, about: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(about, indent=1, default=str) + "\n")
    temporary.replace(path)


def topology(name: str) -> list[Any]:
    """The devices of a TPU topology that is not there. Raises RuntimeError without libtpu."""
    # Read by libtpu when it is loaded, which happens here: it would ask the metadata server of a cloud machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    return list(np.array(topologies.get_topology_desc(platform="tpu", topology_name=name).devices).reshape(-1))


class Decoding:
    """The programs of one arm on some chips, lowered over shapes: of `batch` rows for each group of chips."""

    def __init__(self, target: Published, arm: Arm, devices: list[Any], batch: int, capacity: int) -> None:
        self.target, self.capacity = target, capacity
        tensor = tensor_of(target.config.text.num_heads, len(devices))
        self.batch = batch * (len(devices) // tensor)
        self.mesh = None if len(devices) == 1 else decoding_mesh(tensor, len(devices) // tensor, devices)
        self.alone = SingleDeviceSharding(devices[0])
        self.model = self.placed(abstract_model(target.family, target.config))
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
    """Shapes of parameters, or of what an optimizer keeps of them, as `place_parameters` puts them."""

    def one(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        names = [str(getattr(key, "key", getattr(key, "idx", ""))) for key in path]
        dotted = ".".join(name for name in names if name not in ("", "value"))
        sharding = alone if mesh is None else parameter_sharding(mesh, dotted, leaf.shape, head_dims)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(one, tree)


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

    def loss(params: Any, constants: Any, batch: Any, key: jax.Array) -> Any:
        rest, model_params = constants
        model, draft_model = nnx.merge(model_graph, model_params), nnx.merge(graph, params, rest)
        return recipe.loss(draft_model, model, teach(model, batch, key, taps_of(draft_model)), key)

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


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing runs; without a TPU that is looked for
    tyro.cli(Compile, description=__doc__).write()
