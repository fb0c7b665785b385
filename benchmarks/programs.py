"""How many programs a service compiles: random requests of every size, answered by tiny models.

    python benchmarks/programs.py                   # 600 requests to each family, a table as it goes

Qwen2.5-VL and LLaVA-NeXT with up to three pictures of 300 to 2,000 pixels; prompts of 10 to 4,500 tokens, answers of up
to 64 to 1,024. Every request is encoded, read and decoded for one round, alone, with a ViSpec head. Counted is what JAX
traces in `jaxspec.programs.Programs` and, beside it, what XLA compiles at all.
"""

import collections
import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from jaxspec.buckets import coarse_bucket
from jaxspec.drafters.vispec import ViSpecConfig, ViSpecHead
from jaxspec.layers import TextConfig
from jaxspec.programs import Programs
from jaxspec.rope import RopeConfig
from jaxspec.speculation.params import SamplingParams
from jaxspec.speculation.state import Request
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.clip import ClipVisionConfig
from jaxspec.targets.images import ImageLayout
from jaxspec.targets.llava_next import LlavaNext, LlavaNextAdapter, LlavaNextConfig
from jaxspec.targets.prompts import EncodedPrompt
from jaxspec.targets.qwen2_5_vl import Qwen2_5VL, Qwen2_5VLConfig, QwenVisionConfig
from jaxspec.targets.qwen2_5_vl_adapter import Qwen2_5VLAdapter, frame_windows

MAX_LENGTH = 4608
TEXT = TextConfig(100, 32, 32, 1, 2, 2, 16)
TREE = TreeConfig(1, 2, 4)
SIZES = (64, 128, 256, 512, 1024)


def qwen() -> tuple[Qwen2_5VLAdapter, type]:
    vision = QwenVisionConfig(32, 40, 1, 2, 32, 14, 2, 2, 112, (0,), tokens_per_second=2.0)
    text = dataclasses.replace(TEXT, rope=RopeConfig(mrope_section=(4, 2, 2)))
    return Qwen2_5VLAdapter(Qwen2_5VLConfig(text, vision, 90, 91)), Qwen2_5VL


def llava_next() -> tuple[LlavaNextAdapter, type]:
    pinpoints = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    config = LlavaNextConfig(TEXT, ClipVisionConfig(16, 16, 1, 1, 336, 14), 90, grid_pinpoints=pinpoints)
    return LlavaNextAdapter(config), LlavaNext


def qwen_picture(adapter: Qwen2_5VLAdapter, height: int, width: int) -> ImageLayout:
    """As Qwen's processor resizes it: sides of whole merged patches, 4 to 1,280 of them."""
    vision = adapter.config.vision
    side = vision.patch_size * vision.merge_size
    shrink = max(1.0, (height * width / (1280 * side**2)) ** 0.5)
    rows, columns = (max(1, int(length / shrink / side)) for length in (height, width))
    grid = 1, rows * vision.merge_size, columns * vision.merge_size
    patches = np.zeros((grid[1] * grid[2], vision.patch_pixels), np.float32)
    patches[:, 0] = height * 10000 + width  # another picture, another key
    return frame_windows(vision, patches, grid, None)


def llava_picture(adapter: LlavaNextAdapter, height: int, width: int) -> ImageLayout:
    tiles = np.full((1, 5, *adapter.config.vision.pixel_shape), height * 10000 + width, np.float32)
    return adapter.lay_out({"pixel_values": tiles, "image_sizes": np.array([[height, width]])})[0]


FAMILIES = {"qwen2_5_vl": (qwen, qwen_picture), "llava_next": (llava_next, llava_picture)}


@dataclasses.dataclass(frozen=True)
class Count:
    """What to count."""

    families: tuple[Literal["qwen2_5_vl", "llava_next"], ...] = ("qwen2_5_vl", "llava_next")
    fixed_capacity: bool = False
    """One size of cache for all, as in a server; by default each request has the smallest that does."""
    requests: int = 600
    seed: int = 0

    def run(self) -> None:
        compiled = collections.Counter()
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, seconds, **_: compiled.update([event] if event.endswith("backend_compile_duration") else [])
        )
        for family in self.families:
            self.count(family, compiled)

    def count(self, family: str, compiled: collections.Counter) -> None:
        (adapter, kind), picture = FAMILIES[family][0](), FAMILIES[family][1]
        model = kind(adapter.config, rngs=nnx.Rngs(0))
        draft_model = ViSpecHead(ViSpecConfig(TEXT), rngs=nnx.Rngs(1))
        programs = Programs(model, adapter, draft_model, TREE)
        params = programs.params_of(model, draft_model)
        rng, before = np.random.default_rng(self.seed), compiled.total()
        towers, caches = set(), set()
        for number in range(1, self.requests + 1):
            prompt, limit = self.request(rng, adapter, functools.partial(picture, adapter))
            limit = min(limit, MAX_LENGTH - len(prompt.input_ids))
            needed = MAX_LENGTH if self.fixed_capacity else len(prompt.input_ids) + limit
            capacity = min(coarse_bucket(needed), MAX_LENGTH)
            towers |= {str(jax.tree.map(np.shape, adapter.collate([layout]))) for layout in prompt.images}
            caches.add(capacity)
            read = programs.read(params, [prompt], capacity)
            request = Request.of([SamplingParams()], [prompt.input_ids], [limit], (), model.vocab_size)
            state = programs.begin(params, read, request, [prompt], capacity)
            jax.block_until_ready(programs.decode(params, state, jnp.int32(1)))
            if number % 100 == 0:
                kinds = ", ".join(f"{count} {name}" for name, count in collections.Counter(programs.traced).items())
                print(
                    f"{family}: {number} requests, {programs.compilations} programs ({kinds}), "
                    f"{compiled.total() - before} XLA compilations; "
                    f"{len(towers)} tower shapes, {len(caches)} cache sizes",
                    flush=True,
                )

    def request(self, rng: np.random.Generator, adapter, picture) -> tuple[EncodedPrompt, int]:
        """A prompt and the most tokens of its answer."""
        while True:
            parts, images = [np.full(rng.integers(10, 300), 1)], []
            for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
                width = int(rng.integers(300, 2000))
                height = int(width * rng.choice([0.56, 0.75, 1, 1.33, 1.78]) * rng.uniform(0.95, 1.05))
                images.append(picture(height, width))
                parts += [np.full(images[-1].tokens, adapter.image_token_ids[0]), np.full(rng.integers(1, 60), 2)]
            ids = np.concatenate(parts).astype(np.int32)
            if len(ids) < MAX_LENGTH - 64:
                return EncodedPrompt.of(adapter, ids, images), int(rng.choice(SIZES))


if __name__ == "__main__":
    tyro.cli(Count, description=__doc__).run()
