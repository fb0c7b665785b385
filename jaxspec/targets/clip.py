"""The CLIP vision tower (`CLIPVisionModel` in transformers), as LLaVA uses it."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspec.cache import LayerKV
from jaxspec.kernels.attention import Segment, attend
from jaxspec.kernels.masks import Mask
from jaxspec.layers import ACTIVATIONS, Embed, linear

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size ({self.image_size}) is not a multiple of patch_size ({self.patch_size})")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"vision hidden_act {self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")

    @classmethod
    def from_hf(cls, config: "PretrainedConfig", model_type: str = "clip_vision_model") -> "ClipVisionConfig":
        """From a transformers config of that `model_type`. Raises ValueError for another kind of tower."""
        if config.model_type != model_type:
            raise ValueError(f"vision model_type {config.model_type!r} is not supported; only {model_type}")
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            layer_norm_eps=config.layer_norm_eps,
            hidden_act={"gelu_pytorch_tanh": "gelu_tanh"}.get(config.hidden_act, config.hidden_act),
        )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """Of one entry of the tower: channels, height, width."""
        return 3, self.image_size, self.image_size


class LayerNorm(nnx.LayerNorm):
    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x)


def layer_norm(config: ClipVisionConfig, rngs: nnx.Rngs) -> LayerNorm:
    return LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)


class ClipAttention(nnx.Module):
    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.num_heads, self.head_dim = config.num_heads, config.hidden_size // config.num_heads
        self.q_proj = linear(width, width, bias=True, rngs=rngs)
        self.k_proj = linear(width, width, bias=True, rngs=rngs)
        self.v_proj = linear(width, width, bias=True, rngs=rngs)
        self.out_proj = linear(width, width, bias=True, rngs=rngs, zero=True)

    def __call__(self, x: jax.Array) -> jax.Array:  # [n, T, D]
        split = (*x.shape[:2], self.num_heads, -1)
        query, key, value = (
            proj(x).reshape(split).swapaxes(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # [n, H, T, Dh]
        out = attend(query, [Segment(LayerKV(key, value), Mask())])
        return self.out_proj(out.swapaxes(1, 2).reshape(x.shape))


class ClipMLP(nnx.Module):
    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs) -> None:
        self.activation = config.hidden_act
        self.fc1 = linear(config.hidden_size, config.intermediate_size, bias=True, rngs=rngs)
        self.fc2 = linear(config.intermediate_size, config.hidden_size, bias=True, rngs=rngs, zero=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class ClipLayer(nnx.Module):
    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs) -> None:
        self.layer_norm1 = layer_norm(config, rngs)
        self.self_attn = ClipAttention(config, rngs=rngs)
        self.layer_norm2 = layer_norm(config, rngs)
        self.mlp = ClipMLP(config, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipEmbeddings(nnx.Module):
    """Patches and a class token, with learned positions."""

    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs) -> None:
        width, init = config.hidden_size, nnx.initializers.normal(1.0)  # as large as the patches, or places drown
        self.patch_size, self.image_size = config.patch_size, config.image_size
        self.class_embedding = nnx.Param(init(rngs.params(), (width,)))
        self.patch_embedding = linear(3 * config.patch_size**2, width, bias=False, rngs=rngs)
        self.position_embedding = Embed(config.num_patches + 1, width, embedding_init=init, rngs=rngs)

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        x = self.patch_embedding(patchify(pixel_values, self.patch_size, self.image_size))
        first = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        positions = self.position_embedding.embedding[...].astype(x.dtype)
        return jnp.concatenate([first, x], axis=1) + positions


class ClipEncoder(nnx.Module):
    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([ClipLayer(config, rngs=rngs) for _ in range(config.num_layers)])


class ClipVisionTower(nnx.Module):
    """All layers of the checkpoint are held; a call runs only as many as the asked-for hidden states need."""

    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs) -> None:
        self.embeddings = ClipEmbeddings(config, rngs=rngs)
        self.pre_layrnorm = layer_norm(config, rngs)  # spelt as in the published checkpoints
        self.encoder = ClipEncoder(config, rngs=rngs)
        self.post_layernorm = layer_norm(config, rngs)  # held for the checkpoint; LLaVA's features come before it

    def __call__(self, pixel_values: jax.Array, feature_layers: tuple[int, ...]) -> list[jax.Array]:
        """Hidden states (0 = embeddings, negative from the end, as transformers counts them).

        `pixel_values` `[n, 3, H, W]` with H = W = `image_size`; each state is `[n, 1 + patches, D]`, class token first.
        """
        count = len(self.encoder.layers) + 1
        wanted = [layer % count for layer in feature_layers]
        states = [self.pre_layrnorm(self.embeddings(pixel_values))]
        for index in range(max(wanted)):
            with jax.named_scope(f"clip_layer_{index}"):
                states.append(self.encoder.layers[index](states[-1]))
        return [states[layer] for layer in wanted]


def patchify(pixel_values: jax.Array, patch: int, image_size: int) -> jax.Array:
    """`[n, 3, H, W]` -> `[n, H/p * W/p, 3 * p * p]`, channel-major inside a patch like a convolution kernel. Raises
    ValueError where H and W are not `image_size`."""
    n, channels, height, width = pixel_values.shape
    if (height, width) != (image_size, image_size):
        raise ValueError(
            f"the processor makes images of {height} x {width} pixels, the tower reads {image_size} x {image_size}"
        )
    x = pixel_values.reshape(n, channels, height // patch, patch, width // patch, patch)
    x = x.transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(n, (height // patch) * (width // patch), channels * patch * patch)
