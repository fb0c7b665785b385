"""LLaVA-NeXT / LLaVA-1.6 (`LlavaNextForConditionalGeneration`): LLaVA that looks at an image as a whole and in tiles.

An image of any size is resized to the whole view and to the best of a few grids of tiles; each is one entry of the CLIP
tower. The tokens of an image are the whole view, then the rows of the grid without what padding made, each closed by a
learned newline (LLaVA-NeXT's "spatial unpad"). Which feature of the tower's table stands where is arithmetic on sizes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers.image_processing_utils import select_best_resolution

from jaxspec.targets.images import ImageLayout, check_pixels
from jaxspec.targets.llava import Llava, LlavaAdapter, LlavaConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NEWLINE = -1
"""The newline is the table's one shared feature."""


@dataclasses.dataclass(frozen=True)
class LlavaNextConfig(LlavaConfig):
    grid_pinpoints: tuple[tuple[int, int], ...] = ()
    """Sizes (height, width) in pixels that a grid of tiles may have."""

    @classmethod
    def from_hf(cls, config: "PretrainedConfig") -> "LlavaNextConfig":
        """From a transformers `LlavaNextConfig`."""
        if config.vision_feature_select_strategy != "default":
            raise ValueError(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} is not supported in "
                "LLaVA-NeXT: a tile with a class token has no grid"
            )
        base = LlavaConfig.from_hf(config)
        fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
        return cls(**fields, grid_pinpoints=tuple(map(tuple, config.image_grid_pinpoints)))


@dataclasses.dataclass(frozen=True)
class LlavaNextAdapter(LlavaAdapter):
    config: LlavaNextConfig

    @property
    def shared_features(self) -> int:
        return 1

    def lay_out(self, inputs: Mapping[str, Any]) -> list[ImageLayout]:
        """Of `pixel_values` f32 [n, tiles, 3, H, W], padded, and `image_sizes` [n, 2]."""
        config, vision, layouts = self.config, self.config.vision, []
        for tiles, size in zip(inputs.get("pixel_values", ()), inputs.get("image_sizes", ()), strict=True):
            grid = tile_grid(size, config.grid_pinpoints, vision.image_size)
            entries = np.asarray(tiles[: 1 + grid[0] * grid[1]], np.float32)
            check_pixels(entries, vision.pixel_shape, "tiles")
            index = image_index(size, grid, vision.image_size // vision.patch_size)
            layouts.append(ImageLayout(entries, index, len(entries) * config.tokens_per_image))
        return layouts


def tile_grid(size: Sequence[int], pinpoints: Sequence[tuple[int, int]], tile: int) -> tuple[int, int]:
    """Rows and columns of tiles for an image of `size` (height, width)."""
    height, width = select_best_resolution(tuple(map(int, size)), list(pinpoints))
    return height // tile, width // tile


def image_index(size: Sequence[int], grid: tuple[int, int], side: int) -> np.ndarray:
    """Which feature each token has of one image whose entries are the whole view and `grid` tiles, of `side` x `side`
    patches each."""
    down, across = grid
    # Patch (y, x) of the grid lies in tile (y // side, x // side); tiles follow the whole view in reading order.
    y, x = np.meshgrid(np.arange(down * side), np.arange(across * side), indexing="ij")
    tile = 1 + (y // side) * across + x // side
    index = tile * side**2 + (y % side) * side + x % side  # [down * side, across * side]
    index = unpad(index, size)
    index = np.concatenate([index, np.full((len(index), 1), NEWLINE)], axis=1)
    return np.concatenate([np.arange(side**2), index.reshape(-1)])


def unpad(grid: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """The part of a grid `[h, w]` that an image of `size` (height, width) fills when it is fitted into the middle."""
    height, width = map(int, size)
    rows, columns = grid.shape
    # Rounded as in transformers: there the sizes pass through floats.
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return grid[padding : rows - padding]
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return grid[:, padding : columns - padding]


class LlavaNext(Llava):
    def __init__(self, config: LlavaNextConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs=rngs)
        width = config.text.hidden_size
        self.image_newline = nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (width,)))

    def encode_vision(self, pixels: jax.Array) -> jax.Array:
        """`[1 + T * M, Dv]` of the entries `[T, 3, H, W]`; the first feature is the newline's, which no tower sees."""
        return jnp.pad(super().encode_vision(pixels), ((1, 0), (0, 0)))

    def project(self, vision: jax.Array) -> jax.Array:
        features = super().project(vision[1:])
        return jnp.concatenate([self.image_newline[...].astype(features.dtype)[None], features])
