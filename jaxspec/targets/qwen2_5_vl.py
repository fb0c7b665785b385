"""Qwen2.5-VL (`Qwen2_5_VLForConditionalGeneration`): images and videos of any size, positions in time, height, width.

The tower attends within windows of the image in most layers and within a whole frame in a few. The host cuts every
frame into windows (qwen2_5_vl_adapter.py). The device works on windows of one size with a mask and, for the full
layers, gathers frames out of them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxspec.cache import LayerKV
from jaxspec.checkpoints.configs import llama_text_config
from jaxspec.checkpoints.names import NameTable
from jaxspec.kernels.attention import Segment, attend
from jaxspec.kernels.masks import Mask
from jaxspec.kernels.plain import BLOCK, LONG
from jaxspec.layers import GatedMLP, LanguageModel, RMSNorm, TextConfig, linear
from jaxspec.rope import apply_rope
from jaxspec.targets.contract import TargetConfig, VisionLanguageModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PAIRS = 2**22
"""Pairs of patches that one head of the tower scores at once: a video's frames take turns."""


@dataclasses.dataclass(frozen=True)
class QwenVisionConfig:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    out_hidden_size: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    window_size: int
    full_attention_layers: tuple[int, ...]
    rope_theta: float = 10000.0
    tokens_per_second: float = 4.0

    @property
    def window_units(self) -> int:
        """Side of a window in merged patches."""
        return self.window_size // self.merge_size // self.patch_size

    @property
    def unit(self) -> int:
        """Patches that become one token."""
        return self.merge_size**2

    @property
    def patch_pixels(self) -> int:
        """Numbers in a patch, of all colours and frames."""
        return 3 * self.temporal_patch_size * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class Qwen2_5VLConfig(TargetConfig):
    text: TextConfig
    vision: QwenVisionConfig
    image_token_id: int
    video_token_id: int

    @property
    def vision_width(self) -> int:
        return self.vision.unit * self.vision.hidden_size

    @classmethod
    def from_hf(cls, config: "PretrainedConfig") -> "Qwen2_5VLConfig":
        """From a transformers `Qwen2_5_VLConfig`."""
        vision = config.vision_config
        if vision.hidden_act != "silu":
            raise ValueError(f"vision hidden_act {vision.hidden_act!r} is not supported; only silu")
        text = llama_text_config(config.text_config)
        if sum(text.rope.mrope_section) * 2 != text.head_dim:
            raise ValueError(f"mrope_section {text.rope.mrope_section} does not add up to half of {text.head_dim}")
        return cls(
            text=dataclasses.replace(text, tie_word_embeddings=config.tie_word_embeddings),
            vision=QwenVisionConfig(
                hidden_size=vision.hidden_size,
                intermediate_size=vision.intermediate_size,
                num_layers=vision.depth,
                num_heads=vision.num_heads,
                out_hidden_size=vision.out_hidden_size,
                patch_size=vision.patch_size,
                temporal_patch_size=vision.temporal_patch_size,
                merge_size=vision.spatial_merge_size,
                window_size=vision.window_size,
                full_attention_layers=tuple(vision.fullatt_block_indexes),
                rope_theta=vision.rope_parameters["rope_theta"],
                tokens_per_second=vision.tokens_per_second,
            ),
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
        )


def groups_at_once(groups: int, length: int) -> int:
    """How many of the groups of `length` tokens attend at once: a divisor of their number."""
    limit = max(1, PAIRS // (length * (length if length < LONG else BLOCK)))
    return max(size for size in range(1, min(limit, groups) + 1) if groups % size == 0)


def in_groups(
    function: Callable[[tuple[jax.Array, ...]], jax.Array], arrays: tuple[jax.Array, ...], size: int
) -> jax.Array:
    """`function` of the arrays `[G, ..]`, of `size` of their first axis at a time."""
    if size == len(arrays[0]):
        return function(arrays)
    out = jax.lax.map(function, tuple(array.reshape(-1, size, *array.shape[1:]) for array in arrays))
    return out.reshape(-1, *out.shape[2:])


class QwenVisionAttention(nnx.Module):
    def __init__(self, config: QwenVisionConfig, *, rngs: nnx.Rngs) -> None:
        self.num_heads = config.num_heads
        self.qkv = linear(config.hidden_size, 3 * config.hidden_size, bias=True, rngs=rngs)
        self.proj = linear(config.hidden_size, config.hidden_size, bias=True, rngs=rngs, zero=True)

    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], lengths: jax.Array) -> jax.Array:
        """Of `x` `[G, L, D]`, attending within each of the G groups to its first `lengths` i32 `[G]` patches."""
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1)
        query, key = (apply_rope(qkv[:, :, part], rope, jnp.float32) for part in (0, 1))
        parts = [part.swapaxes(1, 2) for part in (query, key, qkv[:, :, 2])]  # [G, H, L, Dh] each

        def attended(group):
            query, key, value, lengths = group
            return attend(query, [Segment(LayerKV(key, value), Mask(lengths))])

        out = in_groups(attended, (*parts, lengths), groups_at_once(*x.shape[:2])).swapaxes(1, 2)
        return self.proj(out.reshape(x.shape))


class QwenVisionBlock(nnx.Module):
    def __init__(self, config: QwenVisionConfig, *, rngs: nnx.Rngs) -> None:
        self.norm1 = RMSNorm(config.hidden_size, 1e-6, rngs=rngs)
        self.norm2 = RMSNorm(config.hidden_size, 1e-6, rngs=rngs)
        self.attn = QwenVisionAttention(config, rngs=rngs)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], lengths: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x), rope, lengths)
        return x + self.mlp(self.norm2(x))


class QwenPatchEmbed(nnx.Module):
    def __init__(self, config: QwenVisionConfig, *, rngs: nnx.Rngs) -> None:
        self.proj = linear(config.patch_pixels, config.hidden_size, bias=False, rngs=rngs)

    def __call__(self, patches: jax.Array) -> jax.Array:
        return self.proj(patches)


class QwenMerger(nnx.Module):
    def __init__(self, config: QwenVisionConfig, *, rngs: nnx.Rngs) -> None:
        width = config.hidden_size * config.unit
        self.ln_q = RMSNorm(config.hidden_size, 1e-6, rngs=rngs)
        self.mlp = nnx.Dict({
            "0": linear(width, width, bias=True, rngs=rngs),
            "2": linear(width, config.out_hidden_size, bias=True, rngs=rngs),
        })  # fmt: skip

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[R, unit * D]` -> `[R, out]`."""
        x = self.ln_q(x.reshape(-1, self.ln_q.scale.shape[0])).reshape(x.shape)
        return self.mlp["2"](jax.nn.gelu(self.mlp["0"](x), approximate=False))


class QwenVisionTower(nnx.Module):
    def __init__(self, config: QwenVisionConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.patch_embed = QwenPatchEmbed(config, rngs=rngs)
        self.blocks = nnx.List([QwenVisionBlock(config, rngs=rngs) for _ in range(config.num_layers)])
        self.merger = QwenMerger(config, rngs=rngs)

    def __call__(self, pixels: Mapping[str, jax.Array], dtype: DTypeLike) -> jax.Array:
        """Features `[R, unit * D]` of what `Qwen2_5VLAdapter.collate` made: the patches of each unit side by side."""
        x = self.patch_embed(pixels["patches"].astype(dtype))  # [W, L, D]
        rope = self.rope(pixels["places"])
        members, shape = pixels["members"], x.shape
        # Patches come first in windows and frames, padding behind them.
        in_window, in_frame = (pixels[name].sum(axis=1) for name in ("valid", "inside"))
        with jax.named_scope("rope"):
            cos, sin = (table.reshape(-1, table.shape[-1])[members] for table in rope)
        for index, block in enumerate(self.blocks):
            with jax.named_scope(f"vision_layer_{index}"):
                if index in self.config.full_attention_layers:
                    frames = block(x.reshape(-1, shape[-1])[members], (cos, sin), in_frame)  # [F, Lf, D]
                    x = frames.reshape(-1, shape[-1])[pixels["back"]].reshape(shape)
                else:
                    x = block(x, rope, in_window)
        return x.reshape(-1, self.config.unit * shape[-1])

    @jax.named_scope("rope")
    def rope(self, places: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cosine and sine f32 `[W, L, Dh / 2]`: half of the frequencies turn with the row, half with the column."""
        half = self.config.hidden_size // self.config.num_heads // 2
        inverse = 1.0 / self.config.rope_theta ** (jnp.arange(0, half, 2, dtype=jnp.float32) / half)
        angles = (places[..., None].astype(jnp.float32) * inverse).reshape(*places.shape[:2], -1)
        return jnp.cos(angles), jnp.sin(angles)


class Qwen2_5VL(VisionLanguageModel):
    config: Qwen2_5VLConfig

    def __init__(self, config: Qwen2_5VLConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.visual = QwenVisionTower(config.vision, rngs=rngs)
        self.language_model = LanguageModel(config.text, rngs=rngs)

    def encode_vision(self, pixels: Mapping[str, jax.Array]) -> jax.Array:
        with jax.named_scope("vision_tower"):
            return self.visual(pixels, self.dtype)

    def project(self, vision: jax.Array) -> jax.Array:
        return self.visual.merger(vision)


# Published names as in the hub's files; transformers 5 also writes `model.visual.*` and `model.language_model.*`.
QWEN2_5_VL_NAMES = NameTable(
    prefixes={"language_model.lm_head.": "lm_head.", "language_model.": "model."},
    aliases=((r"model\.language_model\.", "model."), (r"model\.visual\.", "visual.")),
    ignored=(r".*\.rotary_emb\.inv_freq", r".*\.rotary_pos_emb\.inv_freq"),
)
