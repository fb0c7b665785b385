"""Videos become the frames, patches and times that Qwen2.5-VL reads; other targets refuse them."""

import base64
import io
import math
import struct

import av
import numpy as np
import pytest
from PIL import Image

from jaxspec import Generator, Video
from jaxspec.prompting import encode_prompt
from jaxspec.targets.processors import VIDEO_SIZE, video_size_of
from jaxspec.video import VideoLimits, as_video, sample_times
from tests.families import family_target


def frames_of(count: int, size=(40, 24)) -> list[Image.Image]:
    """Pictures whose red channel says which one they are."""
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 256, (count, size[1], size[0], 3), np.uint8)
    arrays[..., 0] = 20 * np.arange(count)[:, None, None]
    return [Image.fromarray(array) for array in arrays]


def numbers(video: Video) -> list[int]:
    """Which frames of `frames_of` a video holds; codecs and palettes move colours a little."""
    return [round(float(np.asarray(frame.convert("RGB"))[..., 0].mean()) / 20) for frame in video.frames]


def flat_frames(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (64, 48), (20 * index, 90, 200)) for index in range(count)]


def gif_of(frames: int, size=(1, 1), corner=(0, 0)) -> bytes:
    """A few bytes for each frame of one pixel, on a canvas of that size; the last one lies in the corner."""
    made = [b"GIF89a" + struct.pack("<HH", *size) + b"\x80\x00\x00" + b"\x00\x00\x00\xff\xff\xff"]
    pixel = b"\x00" + b"\x02\x02\x44\x01\x00"  # flags, LZW: clear, 0, end
    for number in range(frames):
        place = corner if number == frames - 1 else (0, 0)
        made.append(b"!\xf9\x04\x00\x0a\x00\x00\x00," + struct.pack("<HHHH", *place, 1, 1) + pixel)
    return b"".join(made) + b";"


def film_of(frames: int, size=(64, 48), kind: str = "mp4") -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", kind) as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for index in range(frames):
            picture = Image.new("RGB", size, (15 * index % 256,) * 3)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return file.getvalue()


def animated(kind: str, frames: int, size=(40, 24)) -> bytes:
    file = io.BytesIO()
    first, *others = frames_of(frames, size)
    first.save(file, kind, save_all=True, append_images=others, duration=250, loop=0)
    return file.getvalue()


@pytest.fixture(scope="module")
def qwen():
    return family_target("qwen2_5_vl")


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_are_sampled_by_time(tmp_path, kind):
    path = tmp_path / "moving"
    first, *others = flat_frames(10)
    durations = [1000, *[250] * 8, 1000]  # 4 seconds: at 2 fps a look every half second
    first.save(path, kind, save_all=True, append_images=others, duration=durations, loop=0)
    video = Video.open(path)
    assert numbers(video) == [0, 0, 1, 3, 5, 7, 9, 9]
    assert video.fps == pytest.approx(2.0)


@pytest.mark.parametrize(("fps", "expected"), [(2.0, [0, 4, 8, 12]), (4.0, list(range(0, 16, 2)))])
def test_video_files_are_sampled_by_time(tmp_path, fps, expected):
    path = tmp_path / "moving.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        shades = [Image.new("RGB", (64, 48), (15 * index,) * 3) for index in range(16)]
        for picture in shades:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    for source in (path, path.read_bytes()):
        video = Video.open(source, fps=fps)
        assert [round(float(np.asarray(frame).mean()) / 15) for frame in video.frames] == expected
        assert video.fps == pytest.approx(fps)


@pytest.mark.parametrize(
    ("frames", "seconds", "fps", "most", "count"),
    [
        (100, 10.0, 2.0, 768, 20),
        (100, 1.0, 2.0, 768, 4),  # at least four
        (3, 1.0, 2.0, 768, 2),  # of those there are, evenly many
        (1, 0.1, 2.0, 768, 1),
        (100, 10.0, 1.5, 768, 14),
        (5000, 1000.0, 2.0, 768, 768),
        (5000, 1000.0, 2.0, 1, 1),
    ],
)
def test_number_of_frames(frames, seconds, fps, most, count):
    times = sample_times(frames, seconds, fps, most)
    assert len(times) == count
    np.testing.assert_allclose(np.diff(times), seconds / count)


def test_unreadable_videos(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        Video.open(tmp_path / "none.mp4")
    path = tmp_path / "bad.mp4"
    for content in (b"", b"not a video", b"\x00\x00\x00\x18ftypmp42" + bytes(40)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"video \(.*bad.mp4\) cannot be read: "):
            Video.open(path)
    with pytest.raises(ValueError, match="max_frames must be at least 1, got 0"):
        Video.open(path, max_frames=0)


def test_playlists_open_no_other_files(tmp_path, monkeypatch):
    """FFmpeg reads files that name others; a video is its own bytes."""
    monkeypatch.chdir(tmp_path)
    with av.open("secret.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for picture in flat_frames(8):
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    playlist = b"ffconcat version 1.0\nfile secret.mp4\n"
    with av.open(io.BytesIO(playlist)) as container:
        assert len(list(container.decode(video=0))) == 8  # what FFmpeg itself does
    with pytest.raises(ValueError, match="video cannot be read"):
        Video.open(playlist)
    url = "data:video/mp4;base64," + base64.b64encode((tmp_path / "secret.mp4").read_bytes()).decode()
    assert numbers(as_video(url)) == numbers(Video.open("secret.mp4"))


SOURCES = {
    "GIF": lambda frames: animated("GIF", frames),
    "WEBP": lambda frames: animated("WEBP", frames),
    "PNG": lambda frames: animated("PNG", frames),
    "TIFF": lambda frames: animated("TIFF", frames),
    "mp4": lambda frames: film_of(frames, (40, 24)),
    "matroska": lambda frames: film_of(frames, (40, 24), "matroska"),  # whose header tells no number of frames
}
FRAME = 40 * 24


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ({"frame_pixels": FRAME - 1}, "it has frames of 40 x 24 pixels; the limit is 959"),
        ({"frames": 11}, "it has more than 11 frames"),
        ({"decoded_pixels": 12 * FRAME - 1}, "it has more than 11519 pixels in all frames together"),
        ({"kept_pixels": 4 * FRAME - 1}, "frames of 40 x 24 pixels would be taken of it; the limit is 3839 pixels"),
    ],
)
def test_a_video_beyond_a_limit_is_refused_in_one_sentence(kind, limit, said):
    content = SOURCES[kind](12)
    assert len(Video.open(content).frames) >= 4
    with pytest.raises(ValueError, match="^video cannot be read: ") as refused:
        Video.open(content, limits=VideoLimits(**limit))
    assert said in str(refused.value)
    with pytest.raises(ValueError, match="^video cannot be read: "):
        as_video(content, VideoLimits(**limit))


@pytest.mark.parametrize("kind", SOURCES)
def test_a_video_at_the_limits_is_read_as_without_them(kind):
    content = SOURCES[kind](12)
    free = Video.open(content)
    limits = VideoLimits(len(free.frames) * FRAME, FRAME, 12, 12 * FRAME)
    held = Video.open(content, limits=limits)
    assert numbers(held) == numbers(free) and held.fps == free.fps


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "mp4", "matroska"])
def test_what_a_header_tells_is_refused_before_a_frame_is_decoded(kind, monkeypatch):
    """Packets of a file are counted without their being decoded."""
    content = SOURCES[kind](12)
    for name in ("duration", "decoded", "animation_frames"):
        monkeypatch.setattr(f"jaxspec.video.{name}", lambda *arguments: pytest.fail("decoded"))
    for limit in ({"frame_pixels": FRAME - 1}, {"frames": 11}, {"decoded_pixels": 12 * FRAME - 1}):
        with pytest.raises(ValueError, match="video cannot be read: it has"):
            Video.open(content, limits=VideoLimits(**limit))


def test_a_gif_that_grows_is_looked_at_frame_by_frame():
    """Its canvas says one pixel, its last frame lies far outside."""
    growing = gif_of(20, corner=(8000, 8000))
    with pytest.raises(ValueError, match="it has frames of 8001 x 8001 pixels; the limit is 36000000"):
        Video.open(growing)
    with pytest.raises(ValueError, match="it has more than 100000 pixels in all frames together"):
        Video.open(gif_of(20, corner=(400, 400)), limits=VideoLimits(decoded_pixels=100_000))
    assert {frame.size for frame in Video.open(gif_of(20)).frames} == {(1, 1)}


def test_a_film_that_grows_is_looked_at_frame_by_frame():
    """MPEG-4 without a container: two films in one, the first of them small."""
    growing = film_of(20, kind="m4v") + film_of(4, (1920, 1080), "m4v")
    assert {frame.size for frame in Video.open(growing, fps=8.0).frames} >= {(64, 48)}
    with pytest.raises(ValueError, match="video cannot be read: "):
        Video.open(growing, fps=8.0, limits=VideoLimits(frame_pixels=100_000))


@pytest.mark.parametrize(("fps", "sentence"), [(0, "positive number, got 0"), (math.nan, "positive number, got nan")])
def test_bad_rates(fps, sentence):
    with pytest.raises(ValueError, match=sentence):
        Video(frames_of(2), fps)


# -- what Qwen2.5-VL reads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
def test_patches_hold_pairs_of_frames(qwen, count):
    """The layout of transformers' video processor (which needs torchvision), written out: patches in blocks of 2 x 2,
    each with its colours, then two frames, rows and columns; an odd last frame is repeated."""
    processor = qwen.processor
    video = Video(frames_of(count, (64, 32)), fps=4.0)
    inputs = processor(text=["<|video_pad|>"], videos=[(video.pictures("video"), 4.0)])
    pairs, side = -(-count // 2), processor.image_processor.patch_size
    np.testing.assert_array_equal(inputs["video_grid_thw"], [[pairs, 32 // side, 64 // side]])
    assert inputs["second_per_grid_ts"].tolist() == [0.5]
    assert (inputs["input_ids"] == qwen.config.video_token_id).sum() == pairs * (32 // side) * (64 // side) // 4
    mean, std = (np.array(getattr(processor.image_processor, name)) for name in ("image_mean", "image_std"))
    pixels = np.stack([(np.asarray(frame) / 255 - mean) / std for frame in video.frames])
    pixels = np.concatenate([pixels, pixels[-1:]])[: 2 * pairs]
    blocks = pixels.reshape(pairs, 2, 32 // side // 2, 2, side, 64 // side // 2, 2, side, 3)
    expected = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(len(inputs["pixel_values_videos"]), -1)
    np.testing.assert_allclose(inputs["pixel_values_videos"], expected, atol=1e-5)


def test_a_video_stands_where_an_image_can(qwen):
    picture, video = frames_of(1, (32, 32))[0], Video(frames_of(5), fps=3.0)
    for images in ([video, picture], [picture, video]):
        encoded = encode_prompt(qwen, "What happens?", images)
        assert [layout.seconds_per_frame for layout in encoded.images] == [
            pytest.approx(2 / 3) if image is video else None for image in images
        ]
    parts = [{"type": "image"}, {"type": "video", "video": frames_of(3)}, {"type": "text", "text": "What happens?"}]
    encoded = encode_prompt(qwen, [{"role": "user", "content": parts}], [picture])
    assert [layout.grid[0] for layout in encoded.images] == [1, 2]
    assert encoded.position_ids.shape == (3, len(encoded.input_ids))


def test_answers_about_videos(qwen):
    generator = Generator(qwen, max_length=512)
    moving = generator.generate("What happens?", [Video(frames_of(5))], max_new_tokens=8)
    slower = generator.generate("What happens?", [Video(frames_of(5), fps=0.5)], max_new_tokens=8)
    assert len(moving.tokens) == 8 and moving.tokens.tolist() != slower.tokens.tolist()


def test_refused_videos(qwen, target):
    with pytest.raises(ValueError, match="this target reads no videos, 1 were given"):
        encode_prompt(target, "What happens?", [Video(frames_of(2))])
    with pytest.raises(ValueError, match="video 1, frame 2 has 8 x 9 pixels, frame 1 40 x 24"):
        encode_prompt(qwen, "What happens?", [Video([*frames_of(1), Image.new("RGB", (8, 9))])])
    with pytest.raises(ValueError, match="video 1, frame 2 has type int"):
        encode_prompt(qwen, "What happens?", [Video([*frames_of(1), 7])])
    with pytest.raises(ValueError, match="a video needs at least one frame, got none"):
        encode_prompt(qwen, [{"role": "user", "content": [{"type": "video", "video": []}]}])
    with pytest.raises(ValueError, match="a video has type int; give"):
        encode_prompt(qwen, [{"role": "user", "content": [{"type": "video", "video": 3}]}])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("video_preprocessor_config.json", '{"min_pixels": 64, "max_pixels": 128}'),
        ("processor_config.json", '{"video_processor": {"size": {"shortest_edge": 64, "longest_edge": 128}}}'),
    ],
)
def test_sizes_of_videos_come_from_the_folder(tmp_path, name, content):
    assert video_size_of(tmp_path) is None and VIDEO_SIZE["longest_edge"] == 602112
    (tmp_path / name).write_text(content)
    assert video_size_of(tmp_path) == {"shortest_edge": 64, "longest_edge": 128}


@pytest.mark.parametrize("frames", [None, 5, "clip.mp4", b"clip", np.zeros((8, 9, 3), np.uint8), iter([])])
def test_frames_that_are_no_list(frames):
    with pytest.raises(ValueError, match="a video's frames must be a list of images, got"):
        Video(frames)


@pytest.mark.parametrize("fps", [None, "2", True, 0, -1, float("nan"), float("inf")])
def test_rates_that_cannot_be(fps):
    for make in (Video, Video.open):
        source = [Image.new("RGB", (8, 8))] if make is Video else b""
        with pytest.raises(ValueError, match="fps of a video must be a"):
            make(source, fps)


@pytest.mark.parametrize("source", [None, 5, [], Image.new("RGB", (8, 8))])
def test_sources_that_are_no_file(source):
    with pytest.raises(ValueError, match="a video is opened from a path or bytes, got"):
        Video.open(source)
    with pytest.raises(ValueError, match="max_frames must be an integer, got '8'"):
        Video.open(b"", max_frames="8")
