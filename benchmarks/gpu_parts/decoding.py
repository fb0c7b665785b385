"""Rounds at 7B shapes: trees of all sizes, one row and eight, with every kernel; the step against what memory allows;
prefill with an image; where the time of a step and of a round goes."""

import dataclasses
import statistics
from collections.abc import Sequence
from functools import partial

import jax
from flax import nnx

from benchmarks.gpu_parts.kernels import usable
from benchmarks.gpu_parts.part import Part, side_by_side, taking_turns, timed
from benchmarks.gpu_parts.profiling import summary_of
from benchmarks.gpu_parts.runner import Runner, draft_bytes, nbytes, step_bytes
from benchmarks.published import LLAVA_7B, QWEN_7B_TEXT, TOY
from benchmarks.random_models import random_head, random_module
from jaxspec.devices import peaks_of
from jaxspec.drafters.registry import METHODS
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.llava import Llava

RUNS = 5
MODELS = {"llava-7b": LLAVA_7B, "qwen-7b": QWEN_7B_TEXT}
PUBLISHED = TreeConfig(3, 8, 30)
STEP = None, TreeConfig.autoregressive()
BEST = "vispec", PUBLISHED
OTHERS = (*(("vispec", TreeConfig(3, 8, nodes)) for nodes in (8, 16, 60)), ("eagle2", METHODS["eagle2"].tree))
EIGHTH = "vispec-eighth", PUBLISHED
FIRST_GUESS = 20.0
"""Seconds that a group takes, before one has been seen."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Arms that are compiled together and timed in turns with an autoregressive step."""

    arms: Sequence[tuple[str | None, TreeConfig]]
    """Head and tree."""
    batch: int
    kernel: str
    capacity: int

    @property
    def name(self) -> str:
        arms = ", ".join(arm_name(*arm) for arm in self.arms)
        return f"batch {self.batch}, {self.kernel}, capacity {self.capacity}: {arms}"


def arm_name(head: str | None, tree: TreeConfig) -> str:
    return f"{head} {tree.depth}/{tree.top_k}/{tree.total_tokens}" if head else "autoregressive"


def groups(capacity: int, eighth_first: bool, kernels: Sequence[str]) -> list[Group]:
    """The most telling ones first: the published tree with each kernel, all that the first kernel does, the others'."""
    small, large = (EIGHTH, BEST) if eighth_first else (BEST,), OTHERS if eighth_first else (*OTHERS, EIGHTH)
    rest = (
        ((BEST, OTHERS[2]), 8, capacity),
        (large, 1, capacity),
        ((*OTHERS[:2], OTHERS[3]), 8, capacity),
        ((BEST,), 8, 2 * capacity),
    )
    made = [Group(small, 1, kernel, capacity) for kernel in kernels]
    for some in (kernels[:1], kernels[1:]):
        made += [Group(arms, batch, kernel, room) for arms, batch, room in rest for kernel in some]
    return made


def measure(part: Part) -> None:
    Decoding(part).run()


class Decoding:
    def __init__(self, part: Part) -> None:
        self.part, self.shape, self.config = part, part.name, TOY if part.tiny else MODELS[part.name]
        self.dtype = "float32" if part.tiny else "bfloat16"
        self.capacity, self.rounds = (128, 4) if part.tiny else (1024, 48)
        self.model = random_module(partial(Llava, self.config), self.dtype)
        self.heads: dict[str, nnx.Module] = {}
        self.runners: dict[tuple, Runner] = {}

    def run(self) -> None:
        part, dearest = self.part, 0.0 if self.part.tiny else FIRST_GUESS
        qwen, kernels = self.shape == "qwen-7b", usable(part, self.dtype)
        chosen = groups(self.capacity, qwen, kernels)
        worked: set[str] = {kernels[0]}
        broken: set[str] = set()
        for number, group in enumerate(chosen[: 1 if qwen else len(kernels) + 1] if part.tiny else chosen):
            if group.kernel in broken:
                part.left_out.append(f"{group.name}: {group.kernel} failed before")
                continue
            before, errors = part.passed, len(part.errors)
            if part.trying(group.name, dearest if number else 0.0, partial(self.time, group)):
                worked.add(group.kernel)
            elif len(part.errors) > errors and group.kernel not in worked:
                broken.add(group.kernel)
            if number == 0:
                part.trying("prefill", 2, partial(self.prefill, group))
                if part.profile:
                    part.trying("profile", 10, partial(self.profile, group))
            else:
                dearest = max(dearest, 1.2 * (part.passed - before))

    def runner(self, group: Group, head: str | None, tree: TreeConfig) -> Runner:
        key = head, tree, group.batch, group.kernel, group.capacity
        if key not in self.runners:
            if head is not None and head not in self.heads:
                self.heads[head] = random_head(head, self.config, self.dtype)
            draft_model = self.heads[head] if head else None
            self.runners[key] = Runner(
                self.model, draft_model, tree, group.batch, capacity=group.capacity, kernel=group.kernel
            )
        return self.runners[key]

    def time(self, group: Group) -> None:
        arms = [STEP, *group.arms]
        runners = [self.runner(group, *arm) for arm in arms]
        compiled = side_by_side(Runner.warm, runners)
        times = taking_turns([partial(runner.timed, self.rounds) for runner in runners], 2 if self.part.tiny else RUNS)
        step = statistics.median(seconds for _, seconds in times[0])
        needed, peaks = step_bytes(runners[0], self.rounds), peaks_of(jax.devices()[0])
        for arm, runner, made, first in zip(arms, runners, times, compiled, strict=True):
            seconds = statistics.median(each for _, each in made)
            self.part.add(
                "round",
                shape=self.shape,
                batch=group.batch,
                kernel=group.kernel,
                capacity=group.capacity,
                arm=arm_name(*arm),
                nodes=runner.tree.total_tokens,
                round_ms=1e3 * seconds,
                efficiency=step / seconds,
                ceiling_by_bytes=needed / (needed + draft_bytes(runner)),
                step_bytes=needed,
                memory_bound_share=needed / peaks.bandwidth / step if peaks and runner.draft_model is None else None,
                prefill_ms=1e3 * statistics.median(each for each, _ in made),
                first_run_seconds=first,
                all_round_ms=[1e3 * each for _, each in made],
            )

    def prefill(self, group: Group) -> None:
        """Image, prompt and first token, each waited for."""
        for arm in (STEP, BEST):
            runner = self.runner(group, *arm)
            programs, params, image = runner.programs, runner.params, runner.prompts[0].images[0]
            tables = {image.key: programs.encode(params, image)}

            def read(runner: Runner = runner, tables: dict = tables):
                return runner.programs.read(runner.params, runner.prompts, runner.capacity, tables)

            whole = read()

            def begin(runner: Runner = runner, whole=whole):
                return runner.programs.begin(runner.params, whole, runner.request, runner.prompts, runner.capacity)

            stages = {"encode": partial(programs.encode, params, image), "read": read, "begin": begin}
            seconds = {
                name: statistics.median(timed(lambda stage=stage: jax.block_until_ready(stage()), RUNS))
                for name, stage in stages.items()
            }
            tokens = len(runner.prompts[0].input_ids)
            flops = 2 * tokens * sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self.model.language_model.layers)))
            self.part.add(
                "prefill",
                shape=self.shape,
                arm=arm_name(*arm),
                tokens=tokens,
                **{f"{name}_ms": 1e3 * each for name, each in seconds.items()},
                read_teraflops=flops / seconds["read"] / 1e12,
                target_gigabytes=nbytes(self.model) / 1e9,
                drafter_gigabytes=nbytes(runner.draft_model) / 1e9,
            )

    def profile(self, group: Group) -> None:
        rounds = 2 if self.part.tiny else 8
        for arm in (STEP, BEST):
            runner = self.runner(group, *arm)
            state = jax.block_until_ready(runner.begin())
            compiled = runner.compiled_text(state)
            text = summary_of(partial(runner.decode, state, rounds), rounds, compiled)
            self.part.notes[f"{self.shape}, batch 1, {arm_name(*arm)}"] = text
            self.part.save()
