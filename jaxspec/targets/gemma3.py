"""Gemma3 (`Gemma3ForConditionalGeneration`): SigLIP tower, average-pooled projector, local and global text layers.

Local layers see the last `sliding_window` tokens and have a rope of their own; every image's tokens see each other in
both directions while the prompt is read. Caches keep all positions, the window is a mask: a verified tree is committed
as in any other family.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from jaxspec.checkpoints.configs import gemma_text_config
from jaxspec.layers import Embed, LanguageModel, RMSNorm, TextConfig, linear
from jaxspec.targets.adapter import PromptAdapter
from jaxspec.targets.clip import ClipEncoder, ClipVisionConfig, layer_norm, patchify
from jaxspec.targets.contract import TargetConfig, VisionLanguageModel
from jaxspec.targets.images import ImageLayout, single_entries

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclasses.dataclass(frozen=True)
class Gemma3Config(TargetConfig):
    text: TextConfig
    vision: ClipVisionConfig
    image_token_id: int
    tokens_per_image: int

    @property
    def vision_width(self) -> int:
        return self.vision.hidden_size

    @classmethod
    def from_hf(cls, config: "PretrainedConfig") -> "Gemma3Config":
        """From a transformers `Gemma3Config`."""
        vision = ClipVisionConfig.from_hf(config.vision_config, "siglip_vision_model")
        side, pooled = vision.image_size // vision.patch_size, round(config.mm_tokens_per_image**0.5)
        if pooled**2 != config.mm_tokens_per_image or side % pooled:
            raise ValueError(
                f"mm_tokens_per_image {config.mm_tokens_per_image} does not divide {side} x {side} patches"
            )
        text = dataclasses.replace(
            gemma_text_config(config.text_config), tie_word_embeddings=config.tie_word_embeddings
        )
        return cls(text, vision, config.image_token_id, config.mm_tokens_per_image)

    @property
    def reads_images_whole(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class Gemma3Adapter(PromptAdapter[ImageLayout]):
    config: Gemma3Config

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        return (self.config.image_token_id,)

    @property
    def processor_settings(self) -> dict[str, Any]:
        return {"image_seq_length": self.config.tokens_per_image}

    def lay_out(self, inputs: Mapping[str, Any]) -> list[ImageLayout]:
        """Every image (and every crop, which the processor makes an image of its own) is one entry of the tower."""
        shape, tokens = self.config.vision.pixel_shape, self.config.tokens_per_image
        return single_entries(inputs.get("pixel_values", ()), shape, tokens)


class SiglipEmbeddings(nnx.Module):
    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.patch_size, self.image_size = config.patch_size, config.image_size
        self.patch_embedding = linear(3 * config.patch_size**2, width, bias=True, rngs=rngs)
        self.position_embedding = Embed(config.num_patches, width, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = self.patch_embedding(patchify(pixels, self.patch_size, self.image_size))
        return x + self.position_embedding.embedding[...].astype(x.dtype)


class SiglipVisionTower(nnx.Module):
    """`SiglipVisionModel` without its pooling head."""

    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs) -> None:
        self.embeddings = SiglipEmbeddings(config, rngs=rngs)
        self.encoder = ClipEncoder(config, rngs=rngs)
        self.post_layernorm = layer_norm(config, rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """`[T, patches, D]` of images `[T, 3, H, W]`."""
        x = self.embeddings(pixels)
        for index, layer in enumerate(self.encoder.layers):
            with jax.named_scope(f"siglip_layer_{index}"):
                x = layer(x)
        return self.post_layernorm(x)


class GemmaProjector(nnx.Module):
    def __init__(self, config: Gemma3Config, *, rngs: nnx.Rngs) -> None:
        vision, width = config.vision, config.text.hidden_size
        self.side, self.pooled = vision.image_size // vision.patch_size, round(config.tokens_per_image**0.5)
        init = nnx.initializers.lecun_normal()
        self.mm_input_projection_weight = nnx.Param(init(rngs.params(), (vision.hidden_size, width)))
        self.mm_soft_emb_norm = RMSNorm(vision.hidden_size, vision.layer_norm_eps, from_one=True, rngs=rngs)

    def pool(self, x: jax.Array) -> jax.Array:
        """`[T, patches, Dv]` -> `[T * M, Dv]`, M averages of square blocks of patches."""
        block = self.side // self.pooled
        x = x.reshape(x.shape[0], self.pooled, block, self.pooled, block, x.shape[-1])
        with jax.named_scope("mean"):
            x = x.mean(axis=(2, 4))
        return x.reshape(-1, x.shape[-1])

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[R, Dv]` -> `[R, D]`."""
        return self.mm_soft_emb_norm(x) @ self.mm_input_projection_weight[...]


class Gemma3(VisionLanguageModel):
    config: Gemma3Config

    def __init__(self, config: Gemma3Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.vision_tower = SiglipVisionTower(config.vision, rngs=rngs)
        self.multi_modal_projector = GemmaProjector(config, rngs=rngs)
        self.language_model = LanguageModel(config.text, rngs=rngs)

    def encode_vision(self, pixels: jax.Array) -> jax.Array:
        with jax.named_scope("vision_tower"):
            return self.multi_modal_projector.pool(self.vision_tower(pixels.astype(self.dtype)))

    def project(self, vision: jax.Array) -> jax.Array:
        return self.multi_modal_projector(vision)
