"""Qwen2.5-VL (`Qwen2_5_VLForConditionalGeneration`): images and videos of any size, positions in time, height, width.

The tower attends within windows of the image in most layers and within a whole frame in a few. On the host every frame
is cut into windows; the device works on windows of one size with a mask and, for the full layers, gathers frames out of
them. Number of windows, of frames and longest frame are rounded up, so that any sizes share a few programs.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxspec.buckets import round_up
from jaxspec.cache import LayerKV
from jaxspec.checkpoints.configs import llama_text_config
from jaxspec.checkpoints.names import NameTable
from jaxspec.kernels.attention import BLOCK, LONG, Segment, attend
from jaxspec.kernels.masks import Mask
from jaxspec.layers import GatedMLP, LanguageModel, RMSNorm, TextConfig, apply_rope, linear
from jaxspec.targets.contract import TargetConfig, VisionLanguageModel
from jaxspec.targets.images import ImageLayout, Images, check_pixels, image_runs

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
class QwenLayout(ImageLayout):
    grid: tuple[int, int, int]  # frames, height and width in tokens
    seconds_per_frame: float | None  # None for an image


@dataclasses.dataclass(frozen=True)
class Qwen2_5VLConfig(TargetConfig[QwenLayout]):
    text: TextConfig
    vision: QwenVisionConfig
    image_token_id: int
    video_token_id: int

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        return self.image_token_id, self.video_token_id

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

    @property
    def processor_settings(self) -> dict[str, Any]:
        names = ("patch_size", "temporal_patch_size", "merge_size")
        return {name: getattr(self.vision, name) for name in names}

    def lay_out(self, inputs: Mapping[str, Any]) -> list[QwenLayout]:
        """Of `pixel_values` f32 [P, C] with `image_grid_thw` [n, 3], and of the videos, in the order of the ids."""
        waiting = {
            self.image_token_id: self.layouts_of(inputs, "pixel_values", "image_grid_thw"),
            self.video_token_id: self.layouts_of(inputs, "pixel_values_videos", "video_grid_thw"),
        }
        ids, ordered = np.asarray(inputs["input_ids"]).reshape(-1), []
        for kind, length in image_runs(ids, self.is_image(ids)):
            while length > 0 and waiting[kind]:
                ordered.append(waiting[kind].pop(0))
                length -= ordered[-1].tokens
        return ordered + [layout for rest in waiting.values() for layout in rest]

    def layouts_of(self, inputs: Mapping[str, Any], pixels: str, grids: str) -> list[QwenLayout]:
        """Those of one kind, whose patches and grids the processor gives under these names."""
        layouts, start = [], 0
        seconds = inputs.get("second_per_grid_ts")
        for index, grid in enumerate(np.asarray(inputs.get(grids, np.zeros((0, 3)))).astype(int).tolist()):
            stop = start + grid[0] * grid[1] * grid[2]
            per_frame = None
            if pixels == "pixel_values_videos":
                per_frame = 1.0 if seconds is None else float(np.asarray(seconds)[index])
            patches = check_pixels(np.asarray(inputs[pixels])[start:stop], (self.vision.patch_pixels,), "patches")
            layouts.append(frame_windows(self.vision, patches, grid, per_frame))
            start = stop
        return layouts

    def collate(self, layouts: Sequence[QwenLayout]) -> dict[str, np.ndarray]:
        """Windows of all images, and which of their patches make up each frame."""
        windows = {
            key: np.concatenate([each.pixels[key] for each in layouts]) for key in ("patches", "valid", "places")
        }
        frames, first = [], 0
        for layout in layouts:
            frames += [first + members for members in layout.pixels["frames"]]
            first += layout.pixels["valid"].size
        count = round_up(len(windows["valid"]))
        padded = {
            key: np.concatenate([each, np.zeros((count - len(each), *each.shape[1:]), each.dtype)])
            for key, each in windows.items()
        }
        longest = round_up(max(padded["valid"].shape[1], *map(len, frames)))
        members = np.zeros((round_up(len(frames)), longest), np.int32)
        inside = np.zeros(members.shape, bool)
        back = np.zeros(padded["valid"].size, np.int32)
        for index, frame in enumerate(frames):
            members[index, : len(frame)], inside[index, : len(frame)] = frame, True
            back[frame] = index * longest + np.arange(len(frame))
        return {**padded, "members": members, "inside": inside, "back": back}

    def position_ids(self, input_ids: np.ndarray, layouts: Sequence[QwenLayout]) -> np.ndarray | None:
        """Text counts on in all three axes; an image counts its rows and columns from where it starts, a video also its
        time in seconds times `tokens_per_second`; what follows starts after the largest position of any axis, as the
        model was trained (M-RoPE, arXiv 2409.12191; transformers 4.49, of which 5.24 leaves time out of account)."""
        if not layouts:
            return None
        is_image, rest, parts, at, position = self.is_image(input_ids), list(layouts), [], 0, 0
        while at < len(input_ids):
            if is_image[at]:
                layout = rest.pop(0)
                frames, height, width = layout.grid
                times = np.arange(frames)
                if layout.seconds_per_frame is not None:  # in float32 as in training, then cut
                    seconds = times.astype(np.float32) * np.float32(layout.seconds_per_frame)
                    times = (seconds * np.float32(self.vision.tokens_per_second)).astype(np.int64)
                axes = np.meshgrid(times, np.arange(height), np.arange(width), indexing="ij")
                parts.append(position + np.stack(axes).reshape(3, -1))
                at, position = at + layout.tokens, int(parts[-1].max()) + 1
            else:
                stop = at + int(np.argmax(is_image[at:])) if is_image[at:].any() else len(input_ids)
                parts.append(np.broadcast_to(position + np.arange(stop - at), (3, stop - at)))
                at, position = stop, position + stop - at
        return np.concatenate(parts, axis=1).astype(np.int32)


def frame_windows(
    config: QwenVisionConfig, patches: np.ndarray, grid: Sequence[int], seconds_per_frame: float | None
) -> QwenLayout:
    """One image or video, `patches` `[t * h * w, C]` as the processor orders them, cut into windows."""
    frames, height, width = grid[0], grid[1] // config.merge_size, grid[2] // config.merge_size
    side, unit, merge = config.window_units, config.unit, config.merge_size
    down, across, slots = -(-height // side), -(-width // side), side**2
    # Token (t, y, x) sits in window (t, y // side, x // side), at the next slot there in reading order.
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    window = (t * down + y // side) * across + x // side
    window_width = np.minimum(side, width - x // side * side)
    rows = (window * slots + y % side * window_width + x % side).reshape(-1)  # [tokens]
    count = frames * down * across

    def spread(values: np.ndarray) -> np.ndarray:  # per token, unit patches each -> [windows, slots * unit, ..]
        spread = np.zeros((count * slots, *values.shape[1:]), values.dtype)
        spread[rows] = values
        return spread.reshape(count, slots * unit, *values.shape[2:])

    inner = np.stack(np.meshgrid(np.arange(merge), np.arange(merge), indexing="ij"), axis=-1).reshape(unit, 2)
    places = (np.stack([y, x], axis=-1).reshape(-1, 1, 2) * merge + inner).astype(np.int32)  # [tokens, unit, 2]
    per_frame = rows.reshape(frames, -1, 1) * unit + np.arange(unit)
    return QwenLayout(
        pixels={
            "patches": spread(np.asarray(patches, np.float32).reshape(len(rows), unit, -1)),
            "valid": spread(np.ones((len(rows), unit), bool)),
            "places": spread(places),
            "frames": list(per_frame.reshape(frames, -1)),
        },
        rows=rows,
        table_rows=count * slots,
        grid=(frames, height, width),
        seconds_per_frame=seconds_per_frame,
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
        """Features `[R, unit * D]` of what `Qwen2_5VLConfig.collate` made: the patches of each unit side by side."""
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

    def encode_vision(self, images: Images) -> jax.Array:
        with jax.named_scope("vision_tower"):
            return self.visual(images.pixels, self.dtype)

    def project(self, vision: jax.Array) -> jax.Array:
        return self.visual.merger(vision)


# Published names as in the hub's files; transformers 5 also writes `model.visual.*` and `model.language_model.*`.
QWEN2_5_VL_NAMES = NameTable(
    prefixes={"language_model.lm_head.": "lm_head.", "language_model.": "model."},
    aliases=((r"model\.language_model\.", "model."), (r"model\.visual\.", "visual.")),
    ignored=(r".*\.rotary_emb\.inv_freq", r".*\.rotary_pos_emb\.inv_freq"),
)
