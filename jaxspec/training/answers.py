"""Self-distillation: the target answers the questions of the training scenes itself."""

import dataclasses
import json
from pathlib import Path

from rich.console import Console

import jaxspec
from jaxspec.data.answers import Answer, SelfDistilled, build_answers, generate_parts
from jaxspec.data.scenes import load_scenes
from jaxspec.prompting import encode_prompt
from jaxspec.training.recipe import write_text


@dataclasses.dataclass(frozen=True)
class AnswersRecipe:
    """A self-distilled set. Even records are answered greedily, odd ones sampled with their index as seed, so that
    drafters see the text of both ways of decoding."""

    name: str
    run_dir: str = "runs"
    target: str = "runs/demo_target/export"
    dataset_dir: str = "runs/data"
    dataset_size: int = 40000
    count: int = 8000
    batch_size: int = 32
    part_size: int = 256
    temperature: float = 1.0
    max_new_tokens: int = 160

    @property
    def folder(self) -> Path:
        return Path(self.run_dir) / self.name


def generate_answers(recipe: AnswersRecipe) -> None:
    """Generate or resume, then build the ArrayRecord data set in the run's folder."""
    if not 1 <= recipe.count <= recipe.dataset_size:
        raise ValueError(f"count must lie in 1..dataset_size ({recipe.dataset_size}), got {recipe.count}")
    console = Console()
    folder = recipe.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "recipe.json", json.dumps(dataclasses.asdict(recipe), indent=2))
    target = jaxspec.load_target(recipe.target)
    generator = jaxspec.Generator(target, max_length=1024)
    scenes = load_scenes(recipe.dataset_dir, "train", train_size=recipe.dataset_size)

    def answer_batch(indices: list[int]) -> list[Answer]:
        records = [scenes[index] for index in indices]
        questions = [record["conversations"][0]["value"].removeprefix("<image>\n") for record in records]
        images = [record["images"] for record in records]
        sampling = [
            jaxspec.SamplingParams(temperature=recipe.temperature if index % 2 else 0.0, seed=index)
            for index in indices
        ]
        results = generator.generate_batch(questions, images, sampling, recipe.max_new_tokens)
        prompts = [encode_prompt(target, *pair).input_ids for pair in zip(questions, images, strict=True)]
        return [
            Answer(index, prompt.tolist(), result.tokens.tolist(), params.temperature, params.seed)
            for index, prompt, result, params in zip(indices, prompts, results, sampling, strict=True)
        ]

    def answer(indices: range) -> list[Answer]:
        batches = [list(indices[i : i + recipe.batch_size]) for i in range(0, len(indices), recipe.batch_size)]
        return [one for batch in batches for one in answer_batch(batch)]

    parts = generate_parts(
        folder / "parts",
        recipe.count,
        recipe.part_size,
        answer,
        lambda done: console.print(f"{recipe.name}: {done} of {recipe.count} answers", highlight=False),
    )
    if not (folder / SelfDistilled.name).exists():
        build_answers(folder, parts)
