"""Videos: frames in time, given as a list or sampled from an animated picture or a video file."""

import dataclasses
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from jaxspec.checks import real_number, whole_number
from jaxspec.media import ImageLike, data_url_bytes, named, open_image, readable

FPS, MIN_FRAMES, MAX_FRAMES = 2.0, 4, 768
"""Frames taken per second and in all, as Qwen2.5-VL's published processor samples them."""
ONLY_VIDEO = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,h264,hevc,av1,obu,m4v,flv,asf,"
    "ogg,gif,dv,mxf,ivf,nut,yuv4mpegpipe"
}
"""Containers that hold their own frames. FFmpeg also reads playlists, which name other files to be opened."""


@dataclasses.dataclass(frozen=True)
class Video:
    """Frames in order, `fps` of them per second. It can stand wherever an image can, for targets that read videos.

    Raises ValueError where `frames` is no list of them or empty, or `fps` is not a positive number.
    """

    frames: Sequence[ImageLike]
    fps: float = FPS

    def __post_init__(self) -> None:
        frames = self.frames
        if isinstance(frames, str | bytes) or not isinstance(frames, Sequence | np.ndarray):
            raise ValueError(f"a video's frames must be a list of images, got {type(frames).__name__}")
        if isinstance(frames, np.ndarray) and frames.ndim < 4:
            raise ValueError(f"a video's frames must be a list of images, got one array of shape {frames.shape}")
        if not len(frames):
            raise ValueError("a video needs at least one frame, got none")
        check_rate(self.fps)

    @classmethod
    def open(cls, source: str | Path | bytes, fps: float = FPS, max_frames: int = MAX_FRAMES) -> "Video":
        """About `fps` frames per second, evenly spread over an animated GIF, WebP or PNG, or over a video file (which
        needs PyAV: `pip install 'jaxspec-vlm[video]'`).

        An even number of them, at least `MIN_FRAMES` and at most `max_frames` where the source has that many; the
        `fps` of the result is what came of it. Raises ValueError, naming the file, where it cannot be read.
        """
        if not isinstance(source, str | Path | bytes):
            raise ValueError(f"a video is opened from a path or bytes, got {type(source).__name__}")
        name = "video" if isinstance(source, bytes) else named("video", source)
        max_frames = whole_number("max_frames", max_frames, 1)
        check_rate(fps)
        if not isinstance(source, bytes) and not os.path.isfile(source):
            raise ValueError(f"{name} does not exist")
        with readable(name):
            times, total = animation_times(source)
            if times is None:
                frames, seconds = sampled_stream(source, fps, max_frames)
            else:
                wanted = sample_times(len(times), total, fps, max_frames)
                chosen = np.searchsorted(times, wanted, side="right") - 1
                frames, seconds = animation_frames(source, chosen.tolist()), total
        return cls(frames, len(frames) / seconds)

    def pictures(self, name: str) -> list[Image.Image]:
        """The frames as RGB pictures of one size. Raises ValueError, naming the frame."""
        opened = [open_image(frame, f"{name}, frame {number}") for number, frame in enumerate(self.frames, 1)]
        for number, picture in enumerate(opened, 1):
            if picture.size != opened[0].size:
                raise ValueError(
                    f"{name}, frame {number} has {picture.width} x {picture.height} pixels, "
                    f"frame 1 {opened[0].width} x {opened[0].height}"
                )
        return opened


def check_rate(fps: Any) -> None:
    """Raises ValueError for what is no positive number of frames per second."""
    if not 0 < real_number("fps of a video", fps) < math.inf:
        raise ValueError(f"fps of a video must be a positive number, got {fps}")


def as_video(source: Any) -> Video:
    """A `Video`, or what one can be made of: a list of frames, a path, the bytes of a file, a data: URL."""
    if isinstance(source, Video):
        return source
    if isinstance(source, str) and source.startswith("data:"):
        source = data_url_bytes(source, "video")
    if isinstance(source, str | Path | bytes):
        return Video.open(source)
    if isinstance(source, list | tuple):
        return Video(source)
    raise ValueError(
        f"a video has type {type(source).__name__}; give a jaxspec.Video, a list of frames, a path or bytes"
    )


def sample_times(frames: int, seconds: float, fps: float, max_frames: int) -> np.ndarray:
    """When to look at a video of so many frames, in seconds."""
    count = min(max(seconds * fps, MIN_FRAMES), max_frames, frames)
    count = max(int(count) // 2 * 2, 1)  # a temporal patch takes two
    return np.arange(count) * (seconds / count)


def stream_of(source: str | Path | bytes) -> io.BytesIO | str:
    return io.BytesIO(source) if isinstance(source, bytes) else str(source)


def animation_times(source: str | Path | bytes) -> tuple[np.ndarray | None, float]:
    """When each frame of an animated picture begins and when the last one ends, in seconds; None for other files."""
    try:
        with Image.open(stream_of(source)) as image:
            if getattr(image, "n_frames", 1) == 1:
                return np.zeros(1), 1 / FPS
            # Viewers show frames without a duration for a tenth of a second.
            lasts = [duration(frame) or 100 for frame in ImageSequence.Iterator(image)]
    except Image.UnidentifiedImageError:
        return None, 0.0
    return np.cumsum([0, *lasts[:-1]]) / 1000, sum(lasts) / 1000


def duration(frame: Image.Image) -> int:
    """Milliseconds; a WebP file tells them only once the frame is decoded."""
    frame.load()
    return frame.info.get("duration", 0)


def animation_frames(source: str | Path | bytes, chosen: Sequence[int]) -> list[Image.Image]:
    wanted = set(chosen)
    with Image.open(stream_of(source)) as image:
        frames = enumerate(ImageSequence.Iterator(image))
        kept = {index: frame.convert("RGB") for index, frame in frames if index in wanted}
    return [kept[index] for index in chosen]


def sampled_stream(source: str | Path | bytes, fps: float, max_frames: int) -> tuple[list[Image.Image], float]:
    """Frames of a video file, and how long it takes in seconds."""
    try:
        import av
    except ImportError as error:
        raise ValueError("it is no picture, and video files need PyAV (pip install 'jaxspec-vlm[video]')") from error
    with av.open(stream_of(source), options=ONLY_VIDEO) as container:
        if not container.streams.video:
            raise ValueError("it has no pictures")
        rate = container.streams.video[0].average_rate
        total = container.streams.video[0].frames or sum(1 for _ in container.decode(video=0))
    if not total or not rate:
        raise ValueError("it has no frames or no frame rate")
    seconds = total / float(rate)
    chosen = set((sample_times(total, seconds, fps, max_frames) * float(rate) + 1e-6).astype(int).tolist())
    with av.open(stream_of(source), options=ONLY_VIDEO) as container:
        frames = [frame.to_image() for index, frame in enumerate(container.decode(video=0)) if index in chosen]
    return frames, seconds
