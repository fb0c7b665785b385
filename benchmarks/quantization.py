"""What int8 weights and a draft vocabulary cost in answers and in acceptance, and the error of logits at 7B's shapes.

    python -m benchmarks.quantization answers     # the embedded target, int8: answers and logits against its float self
    python -m benchmarks.quantization drafters    # acceptance of the embedded drafters, int8 or with a draft vocabulary
    python -m benchmarks.quantization shapes      # random layers as wide as a 7B model's, 4 GB of memory

Each prints a table and writes it to a JSON file of its name under `--output`. Nothing is timed: a machine gives the
same numbers every time. Minutes each on two cores.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console

from benchmarks.published import LLAVA_7B, QWEN_7B_TEXT
from jaxspec import Drafter, Generator, SamplingParams, Target, demo, load_drafter, load_target
from jaxspec.benchmark.identity import replay
from jaxspec.benchmark.quality import score_answers
from jaxspec.cli.output import ProgressLines
from jaxspec.drafters.eagle import EagleHead
from jaxspec.drafters.vocabulary import covered, most_frequent
from jaxspec.generator import Result
from jaxspec.kernels.masks import Mask
from jaxspec.layers import LanguageModel, TextConfig
from jaxspec.metrics import pooled
from jaxspec.prompting import encode_prompt
from jaxspec.quantization import TARGET_PART, quantized

SHAPES = {"llava-7b": LLAVA_7B.text, "qwen-7b": QWEN_7B_TEXT.text}
LIMIT, BATCH, NODES = 160, 8, 8


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What to measure."""

    part: Annotated[Literal["answers", "drafters", "shapes"], tyro.conf.Positional]
    output: Path = Path("runs/quantization")
    questions: int = 40
    """About test scenes."""
    scored: int = 100
    """Scenes whose descriptions are scored; 0 is off."""
    bfloat16: bool = False
    """Also compare the target in bfloat16, which a CPU computes slowly."""
    drafters: tuple[str, ...] = ("eagle2", "eaglevlm", "specvlm", "vispec", "massv", "medusa")
    answers: int = 256
    """About training scenes, of which a draft vocabulary is made."""
    sampled_share: float = 0.5
    """Of these answers, drawn at temperature 1; the others are greedy."""
    draft_vocab_sizes: tuple[int, ...] = (320, 192, 96)
    layers: int = 2
    """Of the random models."""
    vocab_size: int = 8192
    """Of the random models."""
    tokens: int = 64
    """Of a random prompt."""
    seed: int = 0

    def write(self) -> None:
        rows = []
        for row in getattr(self, f"measured_{self.part}")():
            if not rows:
                print(line(row.keys()), line(["---"] * len(row)), sep="\n")
            print(line(map(shown, row.values())), flush=True)
            rows.append(row)
        device = jax.devices()[0].device_kind
        about = {"jax": jax.__version__, "device": device, **dataclasses.asdict(self), "rows": rows}
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / f"{self.part}.json").write_text(json.dumps(about, indent=2, default=str) + "\n")

    # -- the embedded target ------------------------------------------------------------------------------------------

    def measured_answers(self) -> Iterator[dict[str, Any]]:
        """A row for each way of quantising the target. Logits are compared along the float target's greedy answers."""
        target = load_target("demo")
        examples = demo.examples("test", self.questions, self.seed)
        prompts = [encode_prompt(target, each.question, (each.image,)) for each in examples]
        answers = said(target, prompts)
        exact = [replay(target, *each, NODES)[: len(each[1])] for each in zip(prompts, answers, strict=True)]
        for name, other in self.variants(target).items():
            theirs = said(other, prompts)
            ours = [replay(other, *each, NODES)[: len(each[1])] for each in zip(prompts, answers, strict=True)]
            yield {
                "target": name,
                "equal answers": f"{sum(map(np.array_equal, answers, theirs))}/{len(answers)}",
                "equal tokens": np.mean(np.concatenate([same(a, b) for a, b in zip(answers, theirs, strict=True)])),
                **logit_errors(np.concatenate(exact), np.concatenate(ours)),
                **({"F1 of objects": self.score(other)} if self.scored else {}),
            }

    def variants(self, target: Target) -> dict[str, Target]:
        """The float target, int8 as `load_target` makes it, and what else could be int8."""
        layers, whole = quantized(target.model, TARGET_PART), quantized(target.model)
        layers.language_model.lm_head = target.model.language_model.lm_head
        made = {"int8": load_target("demo", quantize="int8")}
        for name, model in (("int8, LM head float", layers), ("int8, vision tower and projector too", whole)):
            made[name] = Target(model, target.adapter, target.processor, None, target.stop_token_ids)
        return made | ({"bfloat16": load_target("demo", "bfloat16")} if self.bfloat16 else {}) | {"float32": target}

    def score(self, target: Target) -> float:
        progress = partial(ProgressLines, Console(quiet=True))
        entry, *_ = score_answers(target, {}, self.scored, self.seed, LIMIT, progress)
        return entry["scenes"]["all"]["main"]["f1"]

    # -- the embedded drafters ----------------------------------------------------------------------------------------

    def measured_drafters(self) -> Iterator[dict[str, Any]]:
        """A row for each drafter and way of making it smaller: tokens a round, over the float and the int8 target."""
        target, small = load_target("demo"), load_target("demo", quantize="int8")
        train, fast = self.prompts(target, "train", self.answers), load_drafter("demo:vispec", target)
        greedy, sampled = (said(target, train, fast, temperature) for temperature in (0.0, 1.0))
        first = round((1 - self.sampled_share) * self.answers)
        answers = greedy[:first] + sampled[first:]
        vocabularies = [most_frequent(answers, target.model.vocab_size, size) for size in self.draft_vocab_sizes]
        prompts = self.prompts(target, "test", self.questions)
        for method in self.drafters:
            drafter = load_drafter(f"demo:{method}", target)
            arms = {"as it is": drafter, "int8": load_drafter(f"demo:{method}", target, quantize="int8")}
            if isinstance(drafter.model, EagleHead):
                for ids in vocabularies:
                    said_of_it = f"{covered(greedy, ids):.2%} and {covered(sampled, ids):.2%} of what is said"
                    name = f"{len(ids)} tokens, {said_of_it}"
                    arms[name] = dataclasses.replace(drafter, model=drafter.model.narrowed(target.model, ids))
            for name, arm in arms.items():
                row: dict[str, Any] = {"drafter": method, "weights": name}
                for where, each in (("float", target), ("int8", small)):
                    generator = Generator(each, arm)
                    for temperature in (0.0, 1.0):
                        row[f"{where} target, T = {temperature:g}"] = accepted(generator, prompts, temperature)
                yield row

    def prompts(self, target: Target, split: str, count: int) -> list:
        examples = demo.examples(split, count, self.seed)
        return [encode_prompt(target, each.question, (each.image,)) for each in examples]

    # -- 7B shapes ----------------------------------------------------------------------------------------------------

    def measured_shapes(self) -> Iterator[dict[str, Any]]:
        """A row for each shape and precision, against float32."""
        for name, text in SHAPES.items():
            text = dataclasses.replace(text, num_layers=self.layers, vocab_size=self.vocab_size)
            model = random_model(text, self.seed)
            ids = np.random.default_rng(self.seed).integers(0, self.vocab_size, (1, self.tokens))
            exact = np.asarray(logits_of(model, ids))
            for precision, change in CHANGES.items():
                ours = np.asarray(logits_of(change(model), ids))
                yield {
                    "shape": name,
                    "layers": self.layers,
                    "precision": precision,
                    **logit_errors(exact[0], ours[0]),
                }


def in_bfloat16(model: LanguageModel) -> LanguageModel:
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state))


def head_only(model: LanguageModel) -> LanguageModel:
    """Only the LM head as int8."""
    return quantized(model, "lm_head")


CHANGES: dict[str, Callable[[LanguageModel], LanguageModel]] = {
    "bfloat16": in_bfloat16,
    "int8": quantized,
    "int8, LM head alone": head_only,
}


def random_model(text: TextConfig, seed: int) -> LanguageModel:
    """Normal weights at fan-in scale, embeddings near 1."""
    graph, state = nnx.split(nnx.eval_shape(lambda: LanguageModel(text, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if len(leaf.shape) < 2:
            return jnp.full(leaf.shape, float("scale" in jax.tree_util.keystr(path)))
        values = rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(values if "embed" in jax.tree_util.keystr(path) else values / leaf.shape[0] ** 0.5)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


@jax.jit
def logits_of(model: LanguageModel, ids: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return model.unembed(model(model.embed(ids), positions, Mask(causal=True))[0])


def logit_errors(exact: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """Of logits `[n, V]` of the same positions: how often the best token is the same, the root of the mean squared
    error over the logits' own spread, and the largest error over the largest logit."""
    exact, ours = (logits - logits.mean(axis=-1, keepdims=True) for logits in (exact, ours))
    difference = ours - exact
    return {
        "same best token": float(np.mean(exact.argmax(axis=-1) == ours.argmax(axis=-1))),
        "RMS error / spread": float(np.sqrt(np.mean(difference**2) / np.mean(exact**2))),
        "largest error / largest logit": float(np.abs(difference).max() / np.abs(exact).max()),
    }


def said(
    target: Target, prompts: Sequence, drafter: Drafter | None = None, temperature: float = 0.0
) -> list[np.ndarray]:
    """The target's answers."""
    return [each.tokens for each in results_of(Generator(target, drafter), prompts, temperature)]


def accepted(generator: Generator, prompts: Sequence, temperature: float) -> float:
    """Tokens a round, the bonus included."""
    return pooled([each.stats for each in results_of(generator, prompts, temperature)]).mean_acceptance_length


def results_of(generator: Generator, prompts: Sequence, temperature: float) -> Iterator[Result]:
    """In batches, each prompt with a seed of its own."""
    for first in range(0, len(prompts), BATCH):
        batch = prompts[first : first + BATCH]
        sampling = [SamplingParams(temperature=temperature, seed=first + row) for row in range(len(batch))]
        yield from generator.generate_encoded(batch, sampling, LIMIT)


def same(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """bool `[n]`, which tokens of an answer the other has at the same place with all before them equal."""
    common = np.zeros(max(len(ours), len(theirs)), bool)
    shared = min(len(ours), len(theirs))
    common[:shared] = np.cumprod(ours[:shared] == theirs[:shared])
    return common


def line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    tyro.cli(Quantization, description=__doc__).write()
