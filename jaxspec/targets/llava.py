"""LLaVA-1.5 (`LlavaForConditionalGeneration`): CLIP tower, two-layer GELU projector, Llama text model."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspec.checkpoints.configs import llama_text_config
from jaxspec.checkpoints.names import NameTable
from jaxspec.layers import LanguageModel, TextConfig, linear
from jaxspec.targets.adapter import PromptAdapter
from jaxspec.targets.clip import ClipVisionConfig, ClipVisionTower
from jaxspec.targets.contract import TargetConfig, VisionLanguageModel
from jaxspec.targets.images import ImageLayout, single_entries

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclasses.dataclass(frozen=True)
class LlavaConfig(TargetConfig):
    text: TextConfig
    vision: ClipVisionConfig
    image_token_id: int
    vision_feature_layers: tuple[int, ...] = (-2,)
    drop_class_token: bool = True
    projector_bias: bool = True

    @property
    def tokens_per_image(self) -> int:
        return self.vision.num_patches + (0 if self.drop_class_token else 1)

    @property
    def vision_width(self) -> int:
        return self.vision.hidden_size * len(self.vision_feature_layers)

    @classmethod
    def from_hf(cls, config: "PretrainedConfig") -> "LlavaConfig":
        """From a transformers `LlavaConfig` (which understands every published spelling of config.json)."""
        vision = ClipVisionConfig.from_hf(config.vision_config)
        if config.projector_hidden_act != "gelu":
            raise ValueError(f"projector_hidden_act {config.projector_hidden_act!r} is not supported; only 'gelu'")
        layers = config.vision_feature_layer
        layers = (layers,) if isinstance(layers, int) else tuple(layers)
        for layer in layers:
            if not -vision.num_layers - 1 <= layer <= vision.num_layers:
                raise ValueError(
                    f"vision_feature_layer {layer} does not exist: the tower has {vision.num_layers} layers"
                )
        return cls(
            # transformers reads the key here and in text_config, and lets either tie.
            text=dataclasses.replace(
                llama_text_config(config.text_config), tie_word_embeddings=config.tie_word_embeddings
            ),
            vision=vision,
            image_token_id=config.image_token_index,
            vision_feature_layers=layers,
            drop_class_token=config.vision_feature_select_strategy == "default",
            projector_bias=config.multimodal_projector_bias,
        )


@dataclasses.dataclass(frozen=True)
class LlavaAdapter(PromptAdapter[ImageLayout]):
    config: LlavaConfig

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        return (self.config.image_token_id,)

    @property
    def processor_settings(self) -> dict[str, Any]:
        return {
            "patch_size": self.config.vision.patch_size,
            "vision_feature_select_strategy": "default" if self.config.drop_class_token else "full",
            "num_additional_image_tokens": 1,  # CLIP's class token
        }

    def lay_out(self, inputs: Mapping[str, Any]) -> list[ImageLayout]:
        """Every image is one entry of the tower and `tokens_per_image` tokens."""
        shape, tokens = self.config.vision.pixel_shape, self.config.tokens_per_image
        return single_entries(inputs.get("pixel_values", ()), shape, tokens)


class Projector(nnx.Module):
    def __init__(self, features_in: int, width: int, *, bias: bool, rngs: nnx.Rngs) -> None:
        self.linear_1 = linear(features_in, width, bias=bias, rngs=rngs)
        self.linear_2 = linear(width, width, bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.gelu(self.linear_1(x), approximate=False))


class Llava(VisionLanguageModel):
    config: LlavaConfig

    def __init__(self, config: LlavaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.vision_tower = ClipVisionTower(config.vision, rngs=rngs)
        self.multi_modal_projector = Projector(
            config.vision_width, config.text.hidden_size, bias=config.projector_bias, rngs=rngs
        )
        self.language_model = LanguageModel(config.text, rngs=rngs)

    def encode_vision(self, pixels: jax.Array) -> jax.Array:
        """Chosen hidden states `[T * M, Dv]` of the entries `[T, 3, H, W]`."""
        with jax.named_scope("vision_tower"):
            states = self.vision_tower(pixels.astype(self.dtype), self.config.vision_feature_layers)
        states = [state[:, 1:] if self.config.drop_class_token else state for state in states]
        return jnp.concatenate(states, axis=-1).reshape(-1, self.config.vision_width)

    def project(self, vision: jax.Array) -> jax.Array:
        return self.multi_modal_projector(vision)


# Published names in the layout of the llava-hf files, also of LLaVA-NeXT; transformers 5 also writes
# `model.language_model.*`.
LLAVA_NAMES = NameTable(
    prefixes={
        "vision_tower.": "vision_tower.vision_model.",
        "language_model.lm_head.": "language_model.lm_head.",
        "language_model.": "language_model.model.",
    },
    aliases=(
        (r"model\.language_model\.", "language_model.model."),
        (r"lm_head\.", "language_model.lm_head."),
        (r"model\.(vision_tower\.|multi_modal_projector\.|image_newline$)", r"\1"),
        (r"vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    ),
    ignored=(r".*\.rotary_emb\.inv_freq", r".*\.embeddings\.position_ids"),
)
