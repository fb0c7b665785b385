"""Qwen2.5-VL on the host: images and videos cut into windows, positions in time, height and width.

What the tower (jaxspec/targets/qwen2_5_vl.py) wants of any size lands in a few shapes here: the number of windows, the
number of frames and the longest frame are rounded up.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxspec.buckets import round_up
from jaxspec.targets.adapter import PromptAdapter
from jaxspec.targets.images import ImageLayout, check_pixels, image_runs
from jaxspec.targets.qwen2_5_vl import Qwen2_5VLConfig, QwenVisionConfig


@dataclasses.dataclass(frozen=True)
class QwenLayout(ImageLayout):
    grid: tuple[int, int, int]  # frames, height and width in tokens
    seconds_per_frame: float | None  # None for an image


@dataclasses.dataclass(frozen=True)
class Qwen2_5VLAdapter(PromptAdapter[QwenLayout]):
    config: Qwen2_5VLConfig

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        return self.config.image_token_id, self.config.video_token_id

    @property
    def video_token_id(self) -> int:
        return self.config.video_token_id

    @property
    def processor_settings(self) -> dict[str, Any]:
        names = ("patch_size", "temporal_patch_size", "merge_size")
        return {name: getattr(self.config.vision, name) for name in names}

    def lay_out(self, inputs: Mapping[str, Any]) -> list[QwenLayout]:
        """Of `pixel_values` f32 [P, C] with `image_grid_thw` [n, 3], and of the videos, in the order of the ids."""
        waiting = {
            self.config.image_token_id: self.layouts_of(inputs, "pixel_values", "image_grid_thw"),
            self.config.video_token_id: self.layouts_of(inputs, "pixel_values_videos", "video_grid_thw"),
        }
        ids, ordered = np.asarray(inputs["input_ids"]).reshape(-1), []
        for kind, length in image_runs(ids, self.is_image(ids)):
            while length > 0 and waiting[kind]:
                ordered.append(waiting[kind].pop(0))
                length -= ordered[-1].tokens
        return ordered + [layout for rest in waiting.values() for layout in rest]

    def layouts_of(self, inputs: Mapping[str, Any], pixels: str, grids: str) -> list[QwenLayout]:
        """Those of one kind, whose patches and grids the processor gives under these names."""
        vision, layouts, start = self.config.vision, [], 0
        seconds = inputs.get("second_per_grid_ts")
        for index, grid in enumerate(np.asarray(inputs.get(grids, np.zeros((0, 3)))).astype(int).tolist()):
            stop = start + grid[0] * grid[1] * grid[2]
            per_frame = None
            if pixels == "pixel_values_videos":
                per_frame = 1.0 if seconds is None else float(np.asarray(seconds)[index])
            patches = check_pixels(np.asarray(inputs[pixels])[start:stop], (vision.patch_pixels,), "patches")
            layouts.append(frame_windows(vision, patches, grid, per_frame))
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
                    times = (seconds * np.float32(self.config.vision.tokens_per_second)).astype(np.int64)
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
    index = (window * slots + y % side * window_width + x % side).reshape(-1)  # [tokens]
    count = frames * down * across

    def spread(values: np.ndarray) -> np.ndarray:  # per token, unit patches each -> [windows, slots * unit, ..]
        spread = np.zeros((count * slots, *values.shape[1:]), values.dtype)
        spread[index] = values
        return spread.reshape(count, slots * unit, *values.shape[2:])

    inner = np.stack(np.meshgrid(np.arange(merge), np.arange(merge), indexing="ij"), axis=-1).reshape(unit, 2)
    places = (np.stack([y, x], axis=-1).reshape(-1, 1, 2) * merge + inner).astype(np.int32)  # [tokens, unit, 2]
    per_frame = index.reshape(frames, -1, 1) * unit + np.arange(unit)
    return QwenLayout(
        pixels={
            "patches": spread(np.asarray(patches, np.float32).reshape(len(index), unit, -1)),
            "valid": spread(np.ones((len(index), unit), bool)),
            "places": spread(places),
            "frames": list(per_frame.reshape(frames, -1)),
        },
        index=index,
        table_size=count * slots,
        grid=(frames, height, width),
        seconds_per_frame=seconds_per_frame,
    )
