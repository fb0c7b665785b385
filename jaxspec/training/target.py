"""Training a target from scratch: next-token cross-entropy on the assistant's tokens of image conversations."""

import dataclasses
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx

from jaxspec.checkpoints.hub import resolve_folder
from jaxspec.data.conversations import ConversationEncoder
from jaxspec.data.pipeline import Pipeline
from jaxspec.data.records import Records
from jaxspec.data.scenes import load_scenes
from jaxspec.demo.generation import conversation_of
from jaxspec.demo.language import inventory
from jaxspec.demo.processor import IMAGE_SIZE, PATCH_SIZE, processor_at
from jaxspec.demo.scenes import scene_from_json
from jaxspec.targets.llava import Llava, LlavaAdapter, LlavaConfig
from jaxspec.targets.reading import read_prompts
from jaxspec.targets.registry import load_model, save_model
from jaxspec.training.losses import next_token_loss
from jaxspec.training.recipe import Recipe, Task
from jaxspec.training.vision import load_tower


@dataclasses.dataclass(frozen=True)
class TargetRecipe(Recipe):
    """A LLaVA-1.5 of any size on the rendered scenes."""

    hidden_size: int = 256
    intermediate_size: int = 688
    num_layers: int = 12
    num_heads: int = 4
    vision_hidden_size: int = 192
    vision_intermediate_size: int = 768
    vision_layers: int = 4
    vision_heads: int = 6
    image_size: int = IMAGE_SIZE
    patch_size: int = PATCH_SIZE
    dataset_size: int = 40000
    dataset_dir: str = "runs/data"
    inventory_share: float = 0.0
    """Share of the training scenes whose question is to list all places."""
    vision_from: str | None = None
    """A trained vision tower (VisionRecipe)."""
    init_from: str | None = None
    """A trained target of the same widths with fewer layers; the added layers start as the identity."""
    save_dtype: str = "float16"

    def hf_config(self, tokenizer: transformers.PreTrainedTokenizerBase) -> transformers.LlavaConfig:
        vision = transformers.CLIPVisionConfig(
            hidden_size=self.vision_hidden_size,
            intermediate_size=self.vision_intermediate_size,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=self.vision_heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
            projection_dim=self.vision_hidden_size,
        )
        text = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return transformers.LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=cast(int, tokenizer.convert_tokens_to_ids("<image>")),
            image_seq_length=(self.image_size // self.patch_size) ** 2,
            architectures=["LlavaForConditionalGeneration"],
        )


class SingleQuestions:
    """Scenes with one question each: the first of the record (later answers could be copied from earlier ones,
    unseen), or for a share of the scenes the list of all places, which teaches to look."""

    def __init__(self, source: Records[dict[str, Any]], inventory_share: float) -> None:
        self.source, self.inventory_share = source, inventory_share

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        record = self.source[index]
        rng = np.random.default_rng(record["index"])
        if rng.random() < self.inventory_share:
            return {**record, "conversations": conversation_of([inventory(scene_from_json(record["scene"]), rng)])}
        return {**record, "conversations": record["conversations"][:2]}


def target_task(recipe: TargetRecipe) -> Task:
    """Scenes, processor and a fresh (or grown) LLaVA."""
    processor = processor_at(recipe.processor_folder)
    hf_config = recipe.hf_config(processor.tokenizer)
    config = LlavaConfig.from_hf(hf_config)
    model = Llava(config, rngs=nnx.Rngs(recipe.seed))
    if recipe.vision_from is not None:
        model.vision_tower = load_tower(model.vision_tower, resolve_folder(recipe.vision_from))
    if recipe.init_from is not None:
        model = grow(model, cast(Llava, load_model(resolve_folder(recipe.init_from))))  # which looks whether it is
    graph, params = nnx.split(model)
    encoder = ConversationEncoder(processor, LlavaAdapter(config))

    def pipeline(split: str, shuffle: bool) -> Pipeline:
        return Pipeline(
            SingleQuestions(
                load_scenes(recipe.dataset_dir, split, train_size=recipe.dataset_size),
                recipe.inventory_share,
            ),
            encoder,
            sequence_length=recipe.sequence_length,
            batch_size=recipe.rows,
            seed=recipe.seed,
            shuffle=shuffle,
            length_buckets=recipe.length_buckets,
        )

    training, validation = pipeline("train", True), pipeline("validation", False)
    for each in (training, validation):
        each.check()

    def loss(params, constants, batch, key):
        model = nnx.merge(graph, params)
        features = read_prompts(model, batch["prompts"]).features
        return next_token_loss(model.language_model, features, batch["prompts"].input_ids, batch["loss_mask"])

    return Task(
        params=params,
        constants=None,
        loss=loss,
        batches=training.batches,
        validation=lambda: (validation[index] for index in range(recipe.eval_batches * recipe.accumulate)),
        shortfall=training.shortfall,
        export=lambda params, folder, about: save_model(
            nnx.merge(graph, params), hf_config, recipe.processor_folder, folder, recipe.save_dtype
        ),
    )


def grow(model: Llava, shallow: Llava) -> Llava:
    """A deeper model that computes exactly what the trained `shallow` one does.

    Trained layers are spread evenly; a layer in between copies the one before it with its two output projections set
    to zero, so it starts as the identity and learns from there (progressive stacking; Gong et al., ICML 2019, with
    the zero outputs of Chen et al., Net2Net).
    """
    deep, few = len(model.language_model.layers), len(shallow.language_model.layers)
    if deep % few:
        raise ValueError(f"num_layers ({deep}) is not a multiple of the {few} layers of init_from")
    layers = []
    for index in range(deep):
        layer = nnx.clone(shallow.language_model.layers[index * few // deep])
        if index % (deep // few):
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.kernel[...] = jnp.zeros_like(projection.kernel[...])
        layers.append(layer)
    text = dataclasses.replace(shallow.config.text, num_layers=deep)
    grown = nnx.clone(shallow)
    grown.language_model.layers = nnx.List(layers)
    grown.config = dataclasses.replace(shallow.config, text=text)
    grown.language_model.config = text
    if grown.config != model.config:
        raise ValueError(f"init_from has another shape: {grown.config} instead of {model.config}")
    return grown
