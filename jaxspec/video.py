"""Videos: frames in time, given as a list or sampled from an animated picture or a video file."""

import dataclasses
import io
import math
import os
from collections.abc import Iterator, Sequence
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
    "ogg,gif,dv,mxf,ivf,nut,yuv4mpegpipe",
}
"""Containers that hold their own frames. FFmpeg also reads playlists, which name other files to be opened."""


@dataclasses.dataclass(frozen=True)
class VideoLimits:
    """What a video may hold. Headers are believed only to refuse: what they leave out is counted on the way, before a
    frame is decoded or kept."""

    kept_pixels: int = 1_000_000_000
    """Of the frames that are taken, together: 3 bytes each."""
    frame_pixels: int = 36_000_000
    """Of one frame, of which decoders hold up to sixteen; 8K has 33 million."""
    frames: int = 200_000
    """Of the source, taken or not; two hours have about as many."""
    decoded_pixels: int = 400_000_000_000
    """Of all frames of the source: a core decodes some hundred million a second."""

    def check(self, size: tuple[int, int], frames: int, pixels: int) -> None:
        """Raises ValueError for a frame of that size, that it makes so many frames, or so many pixels of them."""
        width, height = size
        if width * height > self.frame_pixels:
            raise ValueError(f"it has frames of {width} x {height} pixels; the limit is {self.frame_pixels}")
        if frames > self.frames:
            raise ValueError(f"it has more than {self.frames} frames")
        if pixels > self.decoded_pixels:
            raise ValueError(f"it has more than {self.decoded_pixels} pixels in all frames together")

    @property
    def ffmpeg(self) -> dict[str, str]:
        """About the same for FFmpeg, which looks at the size of a frame before there is memory for it: at what codecs
        make of it, with blocks and borders."""
        return {"max_pixels": str(2 * self.frame_pixels + 1_000_000)}

    def check_kept(self, size: tuple[int, int], count: int) -> None:
        """Raises ValueError for so many frames of that size that would be taken."""
        width, height = size
        if width * height * count > self.kept_pixels:
            taken = f"{count} frames of {width} x {height} pixels would be taken of it"
            raise ValueError(f"{taken}; the limit is {self.kept_pixels} pixels")


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
    def open(
        cls,
        source: str | Path | bytes,
        fps: float = FPS,
        max_frames: int = MAX_FRAMES,
        limits: VideoLimits = VideoLimits(),
    ) -> "Video":
        """About `fps` frames per second, evenly spread over an animated GIF, WebP or PNG, or over a video file (which
        needs PyAV: `pip install 'jaxspec-vlm[video]'`).

        An even number of them, at least `MIN_FRAMES` and at most `max_frames` where the source has that many; the
        `fps` of the result is what came of it. Raises ValueError, naming the file, where it cannot be read or is beyond
        the limits.
        """
        if not isinstance(source, str | Path | bytes):
            raise ValueError(f"a video is opened from a path or bytes, got {type(source).__name__}")
        name = "video" if isinstance(source, bytes) else named("video", source)
        max_frames = whole_number("max_frames", max_frames, 1)
        check_rate(fps)
        if not isinstance(source, bytes) and not os.path.isfile(source):
            raise ValueError(f"{name} does not exist")
        with readable(name):
            times, total = animation_times(source, limits)
            if times is None:
                frames, seconds = sampled_stream(source, fps, max_frames, limits)
            else:
                wanted = sample_times(len(times), total, fps, max_frames)
                chosen = np.searchsorted(times, wanted, side="right") - 1
                frames, seconds = animation_frames(source, chosen.tolist(), limits), total
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


def as_video(source: Any, limits: VideoLimits = VideoLimits()) -> Video:
    """A `Video`, or what one can be made of: a list of frames, a path, the bytes of a file, a data: URL. The limits are
    those of files."""
    if isinstance(source, Video):
        return source
    if isinstance(source, str) and source.startswith("data:"):
        source = data_url_bytes(source, "video")
    if isinstance(source, str | Path | bytes):
        return Video.open(source, limits=limits)
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


def animation_times(source: str | Path | bytes, limits: VideoLimits) -> tuple[np.ndarray | None, float]:
    """When each frame of an animated picture begins and when the last one ends, in seconds; None for other files."""
    try:
        with Image.open(stream_of(source)) as image:
            width, height = image.size
            limits.check(image.size, 1, width * height)
            if not getattr(image, "is_animated", False):
                return np.zeros(1), 1 / FPS
            if image.format not in ("GIF", "TIFF"):  # whose headers do not tell
                frames = getattr(image, "n_frames", 1)
                limits.check(image.size, frames, frames * width * height)
            lasts, pixels = [], 0
            for frame in ImageSequence.Iterator(image):
                pixels += frame.width * frame.height
                limits.check(frame.size, len(lasts) + 1, pixels)
                # Viewers show frames without a duration for a tenth of a second.
                lasts.append(duration(frame) or 100)
    except Image.UnidentifiedImageError:
        return None, 0.0
    return np.cumsum([0, *lasts[:-1]]) / 1000, sum(lasts) / 1000


def duration(frame: Image.Image) -> int:
    """Milliseconds; a WebP file tells them only once the frame is decoded."""
    frame.load()
    return frame.info.get("duration", 0)


def animation_frames(source: str | Path | bytes, chosen: Sequence[int], limits: VideoLimits) -> list[Image.Image]:
    wanted, kept = set(chosen), {}
    with Image.open(stream_of(source)) as image:
        limits.check_kept(image.size, len(wanted))
        for index, frame in enumerate(ImageSequence.Iterator(image)):
            if index in wanted:
                limits.check_kept(frame.size, len(wanted))  # not all frames are as large as the first
                kept[index] = frame.convert("RGB")
    return [kept[index] for index in chosen]


def sampled_stream(
    source: str | Path | bytes, fps: float, max_frames: int, limits: VideoLimits
) -> tuple[list[Image.Image], float]:
    """Frames of a video file, and how long it takes in seconds."""
    try:
        import av
    except ImportError as error:
        raise ValueError("it is no picture, and video files need PyAV (pip install 'jaxspec-vlm[video]')") from error
    with av.open(stream_of(source), options=ONLY_VIDEO | limits.ffmpeg) as container:
        if not container.streams.video:
            raise ValueError("it has no pictures")
        stream = container.streams.video[0]
        rate, total, size = stream.average_rate, stream.frames, (stream.width, stream.height)
        packets = 0
        for packet in container.demux(stream):  # a frame each, or nearly so; none is decoded
            packets += packet.size > 0
            limits.check(size, packets, packets * size[0] * size[1])
    total = total or sum(1 for _ in decoded(source, limits))
    if not total or not rate:
        raise ValueError("it has no frames or no frame rate")
    seconds = total / float(rate)
    chosen = set((sample_times(total, seconds, fps, max_frames) * float(rate) + 1e-6).astype(int).tolist())
    limits.check_kept(size, len(chosen))
    frames = []
    for index, frame in enumerate(decoded(source, limits)):
        if index in chosen:
            limits.check_kept((frame.width, frame.height), len(chosen))
            frames.append(frame.to_image())
        if index >= max(chosen):
            break
    return frames, seconds


def decoded(source: str | Path | bytes, limits: VideoLimits) -> Iterator[Any]:
    """The frames of a video file as PyAV has them."""
    import av

    with av.open(stream_of(source), options=ONLY_VIDEO | limits.ffmpeg) as container:
        stream, pixels = container.streams.video[0], 0
        stream.codec_context.options = limits.ffmpeg
        for number, frame in enumerate(container.decode(stream), 1):
            pixels += frame.width * frame.height
            limits.check((frame.width, frame.height), number, pixels)
            yield frame
