"""Published models without their weights: the sizes in their config.json, for programs that are compiled or timed only.

model = abstract_model(Llava, config, "bfloat16")     # shapes in place of values, an nnx module all the same
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspec.checkpoints.names import abstract
from jaxspec.drafters.eagle import EagleConfig
from jaxspec.drafters.massv import MassvConfig
from jaxspec.drafters.registry import METHODS
from jaxspec.drafters.vispec import ViSpecConfig
from jaxspec.layers import LayerKind, TextConfig
from jaxspec.rope import RopeConfig
from jaxspec.targets.adapter import PromptAdapter
from jaxspec.targets.clip import ClipVisionConfig
from jaxspec.targets.gemma3 import Gemma3, Gemma3Adapter, Gemma3Config
from jaxspec.targets.images import ImageLayout
from jaxspec.targets.llava import Llava, LlavaAdapter, LlavaConfig
from jaxspec.targets.prompts import EncodedPrompt
from jaxspec.targets.qwen2_5_vl import Qwen2_5VL, Qwen2_5VLConfig, QwenVisionConfig
from jaxspec.targets.qwen2_5_vl_adapter import Qwen2_5VLAdapter, frame_windows


def gemma_text(sizes: TextConfig, window: int, every: int = 6, factor: float = 1.0) -> TextConfig:
    """Gemma3's layers: of every six the last sees everything, the others `window` tokens with a rope of their own."""
    full, local = RopeConfig(1e6, *(("linear", factor) if factor != 1 else ())), RopeConfig(1e4)
    kinds = tuple(
        LayerKind(full) if (index + 1) % every == 0 else LayerKind(local, window) for index in range(sizes.num_layers)
    )
    return dataclasses.replace(
        sizes,
        rms_norm_eps=1e-6,
        rope=full,
        layer_kinds=kinds,
        tie_word_embeddings=True,
        qk_norm=True,
        post_norms=True,
        norms_from_one=True,
        activation="gelu_tanh",
        query_scale=256**-0.5,
        embedding_scale=sizes.hidden_size**0.5,
    )


LLAVA_7B = LlavaConfig(  # llava-hf/llava-1.5-7b-hf
    TextConfig(32064, 4096, 11008, 32, 32, 32, 128), ClipVisionConfig(1024, 4096, 24, 16, 336, 14), 32000
)
QWEN_7B = Qwen2_5VLConfig(  # Qwen/Qwen2.5-VL-7B-Instruct
    TextConfig(
        *(152064, 3584, 18944, 28, 28, 4, 128, 1e-6),
        rope=RopeConfig(1e6, mrope_section=(16, 24, 24)),
        qkv_bias=True,
        max_position_embeddings=128000,
    ),
    QwenVisionConfig(1280, 3420, 32, 16, 3584, 14, 2, 2, 112, (7, 15, 23, 31), tokens_per_second=2.0),
    image_token_id=151655,
    video_token_id=151656,
)
GEMMA_12B = Gemma3Config(  # google/gemma-3-12b-it
    gemma_text(TextConfig(262208, 3840, 15360, 48, 16, 8, 256, max_position_embeddings=131072), 1024, factor=8.0),
    ClipVisionConfig(1152, 4304, 27, 16, 896, 14, 1e-6, "gelu_tanh"),
    image_token_id=262144,
    tokens_per_image=256,
)
QWEN_7B_TEXT = LlavaConfig(  # its text model behind LLaVA's tower
    dataclasses.replace(QWEN_7B.text, rope=RopeConfig(1e6)), LLAVA_7B.vision, QWEN_7B.image_token_id
)
TOY = LlavaConfig(TextConfig(320, 64, 128, 2, 4, 2, 16), ClipVisionConfig(32, 64, 2, 2, 28, 14), 319)
"""No published size: to rehearse with."""
GEMMA_1B = gemma_text(TextConfig(262144, 1152, 6912, 26, 4, 1, 256, max_position_embeddings=32768), 512)


def qwen_picture(adapter: Qwen2_5VLAdapter) -> ImageLayout:
    """A picture of 672 x 672 pixels: 576 tokens."""
    vision, grid = adapter.config.vision, (1, 48, 48)
    return frame_windows(vision, np.zeros((48 * 48, vision.patch_pixels), np.float32), grid, None)


def square_picture(adapter: LlavaAdapter | Gemma3Adapter) -> ImageLayout:
    """A picture of the tower's own size."""
    return adapter.lay_out({"pixel_values": np.zeros((1, *adapter.config.vision.pixel_shape), np.float32)})[0]


@dataclasses.dataclass(frozen=True)
class Published:
    """A target's family, sizes and adapter."""

    family: Callable[..., Any]
    config: Any
    adapter: Callable[[Any], PromptAdapter]
    picture: Callable[[Any], ImageLayout]

    def with_layers(self, layers: int | None) -> "Published":
        """With the first `layers` of the text model; None for all."""
        text = self.config.text
        if layers is None or layers >= text.num_layers:
            return self
        text = dataclasses.replace(text, num_layers=layers, layer_kinds=text.layer_kinds[:layers])
        return dataclasses.replace(self, config=dataclasses.replace(self.config, text=text))

    def prompt(self, before: int = 32, after: int = 80) -> EncodedPrompt:
        """A prompt of one picture between so many tokens of text."""
        adapter = self.adapter(self.config)
        picture, mark = self.picture(adapter), self.config.image_token_id
        ids = np.concatenate([np.full(before, 5), np.full(picture.tokens, mark), np.full(after, 5)])
        return EncodedPrompt.of(adapter, ids, [picture])


TARGETS = {
    "llava-1.5-7b": Published(Llava, LLAVA_7B, LlavaAdapter, square_picture),
    "qwen2.5-vl-7b": Published(Qwen2_5VL, QWEN_7B, Qwen2_5VLAdapter, qwen_picture),
    "gemma3-12b": Published(Gemma3, GEMMA_12B, Gemma3Adapter, square_picture),
}


def vispec_config(target: Any, share: int = 1, own_head: bool = False) -> ViSpecConfig:
    """ViSpec's head of a target; with `share` it drafts that part of the vocabulary, with an LM head of its own, which
    with `own_head` it has for all tokens, too."""
    text = dataclasses.replace(target.text.plain(), tie_word_embeddings=False)
    drafted = text.vocab_size // share if share > 1 or own_head else None
    return ViSpecConfig(text, qkv_bias=text.qkv_bias, draft_vocab_size=drafted)


def eagle_config(target: Any) -> EagleConfig:
    """EAGLE-2's head of a target."""
    text = dataclasses.replace(target.text.plain(), tie_word_embeddings=False)
    return EagleConfig(text, qkv_bias=text.qkv_bias)


HEADS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "eagle2": ("eagle2", eagle_config),
    "vispec": ("vispec", vispec_config),
    "vispec-eighth": ("vispec", partial(vispec_config, share=8)),
}
"""Name -> method, and its config for that of a target."""


def massv_config(target: Any) -> MassvConfig:
    """Gemma3-1B with a projector for what the target's tower sees."""
    return MassvConfig(GEMMA_1B, "gemma3_text", target.vision_width)


def abstract_model(family: Callable[..., Any], config: Any, dtype: str = "bfloat16") -> Any:
    """The module `family(config, rngs=)` with shapes in place of values, floating-point ones in `dtype`."""
    graph, state = nnx.split(abstract(lambda rngs: family(config, rngs=rngs)))

    def cast(leaf: Any) -> jax.ShapeDtypeStruct:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype) if floating else leaf.dtype)

    return nnx.merge(graph, jax.tree.map(cast, state))


def abstract_draft_model(method: str, config: Any, dtype: str = "bfloat16") -> Any:
    """The same of a drafter's module."""
    return abstract_model(METHODS[method].module, config, dtype)
