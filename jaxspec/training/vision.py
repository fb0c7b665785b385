"""Pre-training the embedded target's vision tower: what stands where, patch by patch.

LLaVA starts from a tower that CLIP has taught to see; teaching one from scratch through a language model takes far
longer (docs/LOG.md). So ours first learns from the scenes' own truth: from every patch a linear layer reads the colour,
shape, size and value of what its cell or bar holds. The linear layers are thrown away.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspec.checkpoints.names import NameTable, fill, to_tensors
from jaxspec.checkpoints.tensors import SINGLE, read_folder, write_file
from jaxspec.data.scenes import StoredScenes, load_scenes
from jaxspec.demo.processor import IMAGE_SIZE, PATCH_SIZE, processor_at
from jaxspec.demo.scenes import patch_labels, scene_from_json
from jaxspec.layers import linear
from jaxspec.media import open_images
from jaxspec.targets.clip import ClipVisionConfig, ClipVisionTower
from jaxspec.training.recipe import Recipe, Task

NAMES = NameTable()


@dataclasses.dataclass(frozen=True)
class VisionRecipe(Recipe):
    """A CLIP tower on the rendered scenes."""

    hidden_size: int = 192
    intermediate_size: int = 768
    num_layers: int = 4
    num_heads: int = 6
    image_size: int = IMAGE_SIZE
    patch_size: int = PATCH_SIZE
    feature_layer: int = -2
    """The hidden state that LLaVA will read."""
    dataset_size: int = 40000
    dataset_dir: str = "runs/data"

    @property
    def tower(self) -> ClipVisionConfig:
        return ClipVisionConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
        )


class Readout(nnx.Module):
    """A tower and one linear layer per kind of label."""

    def __init__(self, config: ClipVisionConfig, classes: dict[str, int], *, rngs: nnx.Rngs) -> None:
        self.tower = ClipVisionTower(config, rngs=rngs)
        self.heads = nnx.Dict(
            {name: linear(config.hidden_size, count, bias=True, rngs=rngs) for name, count in classes.items()}
        )


def vision_task(recipe: VisionRecipe) -> Task:
    """Scenes with their patch labels, a fresh tower."""
    processor = processor_at(recipe.processor_folder)
    side = recipe.image_size // recipe.patch_size

    def encode(record: dict[str, Any]) -> dict[str, np.ndarray]:
        pixels = processor.image_processor(open_images(record["images"]), return_tensors="np")["pixel_values"][0]
        return {"pixel_values": pixels, **patch_labels(scene_from_json(record["scene"]), side)[0]}

    def scenes(split: str) -> StoredScenes:
        return load_scenes(recipe.dataset_dir, split, train_size=recipe.dataset_size)

    train, held_out = (grain.MapDataset.source(scenes(split)) for split in ("train", "validation"))
    training = train.seed(recipe.seed).shuffle().repeat().map(encode).batch(recipe.rows)
    validation = held_out.map(encode).batch(recipe.rows)
    classes = patch_labels(scene_from_json(scenes("validation")[0]["scene"]), side)[1]
    graph, params = nnx.split(Readout(recipe.tower, classes, rngs=nnx.Rngs(recipe.seed)))

    def loss(params, constants, batch, key):
        model = nnx.merge(graph, params)
        features = model.tower(batch["pixel_values"], (recipe.feature_layer,))[0][:, 1:]  # [n, patches, D]
        total, metrics = 0.0, {}
        for name in classes:
            logits = model.heads[name](features)
            log_probs = jax.nn.log_softmax(logits, axis=-1)
            total -= jnp.take_along_axis(log_probs, batch[name][..., None], axis=-1).mean()
            metrics[name] = (logits.argmax(axis=-1) == batch[name]).mean()
        return total, metrics

    def export(params, folder: Path, about: dict) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "tower.tmp"
        write_file(temporary, to_tensors(nnx.merge(graph, params).tower, NAMES))
        temporary.replace(folder / SINGLE)
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(recipe.tower), indent=2) + "\n")

    return Task(
        params=params,
        constants=None,
        loss=loss,
        batches=lambda start: iter(
            training[start:].to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
        ),
        validation=lambda: (
            batch
            for index in range(min(recipe.eval_batches * recipe.accumulate, len(validation)))
            if (batch := validation[index]) is not None  # which a filtered record would be
        ),
        export=export,
    )


def load_tower(tower: ClipVisionTower, folder: Path) -> ClipVisionTower:
    """The exported tower of a run; raises ValueError where the shapes are not those of `tower`."""
    return fill(tower, read_folder(folder), NAMES, str(folder), jnp.float32)
