"""Gemma3 (`Gemma3ForConditionalGeneration`): SigLIP tower, average-pooled projector, local and global text layers.

Local layers see the last `sliding_window` tokens and have a rope of their own; every image's tokens see each other in
both directions while the prompt is read. Caches keep all rows, the window is a mask: a verified tree is committed as in
any other family.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspec.checkpoints.configs import common_text_fields, rope_config
from jaxspec.kernels.attention import LayerKV, Segment
from jaxspec.layers import (
    Embed,
    GatedMLP,
    LanguageModel,
    RopeConfig,
    SelfAttention,
    TextConfig,
    Uncommitted,
    apply_rope,
    linear,
    rope_tables,
)
from jaxspec.targets.clip import ClipEncoder, ClipVisionConfig, layer_norm, patchify
from jaxspec.targets.contract import TargetConfig, VisionLanguageModel
from jaxspec.targets.images import ImageLayout, Images, check_pixels

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclasses.dataclass(frozen=True)
class GemmaTextConfig(TextConfig):
    query_scale: float = 1.0
    """Factor of the attention scores."""
    local_rope: RopeConfig = RopeConfig()
    windows: tuple[int | None, ...] = ()
    """How far back each layer sees, itself included; None for all the way."""

    @classmethod
    def from_hf(cls, config: "PretrainedConfig") -> "GemmaTextConfig":
        """From a transformers `Gemma3TextConfig`. Raises ValueError for what is not computed here."""
        for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
            if getattr(config, name):
                raise ValueError(f"{name} {getattr(config, name)!r} is not supported in Gemma3")
        if config.hidden_activation != "gelu_pytorch_tanh":
            raise ValueError(f"hidden_activation {config.hidden_activation!r} is not supported; only gelu_pytorch_tanh")
        return cls(
            **common_text_fields(config),
            rope=rope_config(config.rope_parameters["full_attention"]),
            query_scale=config.query_pre_attn_scalar**-0.5,
            local_rope=rope_config(config.rope_parameters["sliding_attention"]),
            windows=tuple(
                config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types
            ),
        )


@dataclasses.dataclass(frozen=True)
class Gemma3Config(TargetConfig[ImageLayout]):
    text: GemmaTextConfig
    vision: ClipVisionConfig
    image_token_id: int
    tokens_per_image: int

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        return (self.image_token_id,)

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
            GemmaTextConfig.from_hf(config.text_config), tie_word_embeddings=config.tie_word_embeddings
        )
        return cls(text, vision, config.image_token_id, config.mm_tokens_per_image)

    @property
    def reads_images_whole(self) -> bool:
        return True

    @property
    def processor_settings(self) -> dict[str, Any]:
        return {"image_seq_length": self.tokens_per_image}

    def lay_out(self, inputs: Mapping[str, Any]) -> list[ImageLayout]:
        """Every image (and every crop, which the processor makes an image of its own) is one entry of the tower."""
        tokens = self.tokens_per_image
        images = [
            check_pixels(np.asarray(image, np.float32), self.vision.pixel_shape, "images")
            for image in inputs.get("pixel_values", ())
        ]
        return [ImageLayout(image[None], np.arange(tokens), tokens) for image in images]


class GemmaNorm(nnx.Module):
    """RMS norm whose weight counts from 1, multiplied in float32."""

    def __init__(self, features: int, epsilon: float, *, rngs: nnx.Rngs) -> None:
        del rngs
        self.scale = nnx.Param(jnp.zeros((features,)))
        self.epsilon = epsilon

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class GemmaAttention(SelfAttention):
    def __init__(self, config: GemmaTextConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, qkv_bias=config.attention_bias, output_bias=config.attention_bias, rngs=rngs)
        self.q_norm = GemmaNorm(config.head_dim, config.rms_norm_eps, rngs=rngs)
        self.k_norm = GemmaNorm(config.head_dim, config.rms_norm_eps, rngs=rngs)
        self.query_factor = config.query_scale * config.head_dim**0.5  # `attend` divides by the root of head_dim

    def heads(self, x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        query, key, value = (
            proj(x).reshape(*x.shape[:2], -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return apply_rope(self.q_norm(query), rope) * self.query_factor, apply_rope(self.k_norm(key), rope), value


class GemmaLayer(nnx.Module):
    """Norms before and after attention and MLP."""

    def __init__(self, config: GemmaTextConfig, *, rngs: nnx.Rngs) -> None:
        def norm():
            return GemmaNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs)

        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()
        self.self_attn = GemmaAttention(config, rngs=rngs)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False, activation="gelu_tanh", rngs=rngs)

    def __call__(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array], mask: jax.Array, past: Sequence[Segment]
    ) -> tuple[jax.Array, LayerKV]:
        attended, kv = self.self_attn(self.input_layernorm(x), rope, mask, past)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), kv


class GemmaLanguageModel(LanguageModel[GemmaTextConfig]):
    layer: ClassVar[Callable[..., Any]] = GemmaLayer
    norm_type: ClassVar[Callable[..., Any]] = GemmaNorm

    def embed(self, input_ids: jax.Array) -> jax.Array:
        embeds = self.embed_tokens(input_ids)
        return embeds * jnp.asarray(self.config.hidden_size**0.5, embeds.dtype)

    def __call__(
        self,
        embeds: jax.Array,
        position_ids: jax.Array,
        mask: jax.Array,
        cache: Sequence[LayerKV] | None = None,
        cache_mask: jax.Array | None = None,
        uncommitted: Uncommitted | None = None,
        tap_layers: Sequence[int] = (),
    ) -> tuple[jax.Array, tuple[LayerKV, ...]]:
        config = self.config
        ropes = {
            local: rope_tables(config.local_rope if local else config.rope, config.head_dim, position_ids)
            for local in (False, True)
        }
        back = position_ids[:, :, None] - position_ids[:, None, :]  # [B, N, N]
        states, new_kv = [embeds], []
        for index, (layer, window) in enumerate(zip(self.layers, config.windows, strict=True)):
            with jax.named_scope(f"layer_{index}"):
                seen, past = mask, []
                if window is not None:
                    seen = mask & (back < window)
                if cache is not None:
                    assert cache_mask is not None  # it comes with the cache
                    past_mask = cache_mask
                    if window is not None:  # row j of a cache holds position j
                        rows = jnp.arange(cache[index].keys.shape[2])
                        past_mask = cache_mask & (position_ids[:, :, None] - rows < window)
                    past.append(Segment(cache[index], past_mask))
                if uncommitted is not None:
                    recent = uncommitted.mask
                    if window is not None:
                        recent &= position_ids[:, :, None] - uncommitted.position_ids[:, None, :] < window
                    past.append(Segment(uncommitted.kv[index], recent))
                x, kv = layer(states[-1], ropes[window is not None], seen, past)
            states.append(x)
            new_kv.append(kv)
        return self.features(states, tap_layers), tuple(new_kv)


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
        self.mm_soft_emb_norm = GemmaNorm(vision.hidden_size, vision.layer_norm_eps, rngs=rngs)

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
        self.language_model = GemmaLanguageModel(config.text, rngs=rngs)

    def encode_vision(self, pixels: jax.Array) -> jax.Array:
        with jax.named_scope("vision_tower"):
            return self.multi_modal_projector.pool(self.vision_tower(pixels.astype(self.dtype)))

    def project(self, vision: jax.Array) -> jax.Array:
        return self.multi_modal_projector(vision)

    def prompt_mask(self, valid: jax.Array, images: Images | None) -> jax.Array:
        causal = super().prompt_mask(valid, images)
        if images is None:
            return causal
        ids = images.ids
        return causal | ((ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, None, :])
