"""What a target family must offer: embed a prompt with its images, run tokens over a cache, turn features to logits.

Drafters, speculation and training use this and nothing else of a target.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspec.cache import Cache, LayerKV
from jaxspec.kernels.masks import Mask
from jaxspec.layers import LanguageModel, TextConfig
from jaxspec.targets.images import Images


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """The dimensions of a family's model, as its folder gives them. Subclasses are frozen dataclasses."""

    text: TextConfig

    @property
    def vision_width(self) -> int:
        """Width of what `encode_vision` gives; 0 in a family that reads only text."""
        return 0

    @property
    def reads_images_whole(self) -> bool:
        """Whether the tokens of an image see each other in both directions, so that no chunk of a prompt may end within
        an image."""
        return False


class VisionLanguageModel(nnx.Module):
    """Base of the target families. Subclasses set `language_model` and `config` (a `TargetConfig`), and implement
    `encode_vision` and `project`."""

    language_model: LanguageModel

    if TYPE_CHECKING:  # an attribute of the subclasses, each of its own kind

        @property
        def config(self) -> TargetConfig: ...

    @property
    def dtype(self) -> jnp.dtype:
        return self.language_model.dtype

    @property
    def vocab_size(self) -> int:
        """V, tokens that have an embedding and a logit."""
        return self.config.text.vocab_size

    @property
    def embedding(self) -> jax.Array:
        """The table of token embeddings `[V, D]` in the model's dtype, as it is stored: `embed` may scale it."""
        return self.language_model.embed_tokens.table.astype(self.dtype)

    def encode_vision(self, pixels: Any) -> jax.Array:
        """What the tower sees in `pixels`, as `PromptAdapter.collate` makes them: `[R, Dv]` in the model's dtype, one
        for each feature of the table, as the projector reads them; zeros for shared ones."""
        raise NotImplementedError(f"{type(self).__name__} must implement encode_vision")

    def project(self, vision: jax.Array) -> jax.Array:
        """The table of image features `[R, D]`, in the text model's width."""
        raise NotImplementedError(f"{type(self).__name__} must implement project")

    def embed(self, input_ids: jax.Array, images: Images | None = None, vision: jax.Array | None = None) -> jax.Array:
        """Token embeddings `[B, S, D]` of ids `[B, S]`, image features in place of the image tokens; `vision` is
        `encode_vision(images.pixels)` where that is there already."""
        if images is None:
            return self.language_model.embed(input_ids)
        with jax.named_scope("projector"):
            table = self.project(self.encode_vision(images.pixels) if vision is None else vision)  # [R, D]
        return self.splice(input_ids, table[images.index], images.ids)

    def splice(self, input_ids: jax.Array, features: jax.Array | None, image_ids: jax.Array) -> jax.Array:
        """Token embeddings `[B, S, D]` of ids `[B, S]` with image features `[B, S, D]` (None: there are none) where
        `image_ids` i32 `[B, S]` name an image."""
        embeds = self.language_model.embed(input_ids)
        return embeds if features is None else jnp.where((image_ids >= 0)[..., None], features, embeds)

    def forward(
        self,
        embeds: jax.Array,
        position_ids: jax.Array,
        mask: Mask,
        cache: Cache | None = None,
        tap_layers: Sequence[int] = (),
    ) -> tuple[jax.Array, tuple[LayerKV, ...]]:
        """Features `[B, N, (T + 1) * D]` of new tokens over a cache, and their keys and values per layer; `mask` says
        who sees whom among them. The last D features are those after the final norm; before them come the hidden states
        of the T `tap_layers` (0: the embeddings, i: the output of the i-th layer)."""
        return self.language_model(embeds, position_ids, mask, cache, tap_layers=tap_layers)

    def prefill(
        self,
        embeds: jax.Array,
        count: jax.Array,
        image_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        tap_layers: Sequence[int] = (),
        cache: Cache | None = None,
    ) -> tuple[jax.Array, tuple[LayerKV, ...]]:
        """Reads the next C tokens of prompts, whole prompts where there is no cache.

        Chunks read one after the other, each appended to the cache before the next, give what one pass gives, as long
        as no cut goes through an image of a family that `reads_images_whole`.

        Args:
          embeds: `[B, C, D]`.
          count: i32 `[B]`, how many of them are real.
          image_ids: i32 `[B, C]`, which image a token belongs to, -1 for text; None where there are no images.
          position_ids: i32 `[3, B, C]` where the family has positions of its own.
          tap_layers: as of `forward`.
          cache: the beginnings of the prompts, read before.

        Returns as `forward`.
        """
        places = jnp.broadcast_to(jnp.arange(embeds.shape[1]), embeds.shape[:2])
        if cache is not None:
            places = places + cache.lengths[:, None]
        mask = Mask(count, groups=image_ids if self.config.reads_images_whole else None, causal=True)
        return self.forward(embeds, places if position_ids is None else position_ids, mask, cache, tap_layers)

    def unembed(self, features: jax.Array) -> jax.Array:
        """Logits f32 `[..., V]` of features as `forward` gives them, tapped layers or not."""
        return self.language_model.unembed(features)
