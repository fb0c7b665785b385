"""What a target family must offer: embed a prompt with its images, run tokens over a cache, turn features to logits.

Drafters, speculation and training use this and nothing else of a target.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspec.cache import Cache, LayerKV
from jaxspec.kernels.masks import Mask
from jaxspec.layers import LanguageModel, TextConfig
from jaxspec.targets.images import ImageLayout, Images, place, stack_entries

Layout = TypeVar("Layout", bound=ImageLayout)


@dataclasses.dataclass(frozen=True)
class TargetConfig(Generic[Layout]):
    """What a family's config says about prompts, on the host. Subclasses are frozen dataclasses."""

    text: TextConfig

    if TYPE_CHECKING:  # a property would become the default of the field that a subclass has in its place

        @property
        def video_token_id(self) -> int | None:
            """That of the ids which stands for videos, where the family reads them."""

    else:
        video_token_id = None

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        """Ids that stand for image features; the first is the mark of an image. None in a family that reads only
        text."""
        return ()

    @property
    def shared_rows(self) -> int:
        """Rows at the beginning of the table of features that belong to no image."""
        return 0

    @property
    def vision_width(self) -> int:
        """Width of what `encode_vision` gives; 0 in a family that reads only text."""
        return 0

    @property
    def processor_settings(self) -> dict[str, Any]:
        """What the folder's processor (or the image processor in it) must be set to, so that it writes as many image
        tokens as there are features: attributes by the names that its files give them."""
        return {}

    def lay_out(self, inputs: Mapping[str, Any]) -> list[Layout]:
        """The images of a processor's outputs, in reading order. Raises ValueError for pixels of a shape that the tower
        does not read."""
        raise NotImplementedError(f"{type(self).__name__} must implement lay_out")

    def collate(self, layouts: Sequence[Layout]) -> Any:
        """The pixels of several images as the tower reads them."""
        return stack_entries(layouts)

    def is_image(self, input_ids: np.ndarray) -> np.ndarray:
        """Where image features stand: bool, in the shape of the ids."""
        return np.isin(input_ids, self.image_token_ids)

    def place(self, layouts: Sequence[Layout], input_ids: np.ndarray) -> Images[np.ndarray] | None:
        """The images at the image tokens of ids `[B, S]`."""
        return place(layouts, self.is_image(input_ids), self.collate, self.shared_rows) if layouts else None

    def position_ids(self, input_ids: np.ndarray, layouts: Sequence[Layout]) -> np.ndarray | None:
        """Positions i32 `[3, S]` of one prompt where they are not 0, 1, 2, ..; the token after it stands at their
        largest plus 1."""
        return None


class VisionLanguageModel(nnx.Module):
    """Base of the target families. Subclasses set `language_model` and `config` (a `TargetConfig`), and implement
    `encode_vision` and `project`."""

    language_model: LanguageModel
    images_see_themselves: ClassVar[bool] = False
    """Whether the tokens of an image see each other in both directions while a prompt is read."""

    if TYPE_CHECKING:  # an attribute of the subclasses, each of its own kind

        @property
        def config(self) -> TargetConfig: ...

    @property
    def dtype(self) -> jnp.dtype:
        return self.language_model.embed_tokens.embedding.dtype

    def encode_vision(self, images: Images) -> jax.Array:
        """What the tower sees, `[R, Dv]` in the model's dtype: a row for each row of the table, as the projector reads
        them; zeros in shared rows."""
        raise NotImplementedError(f"{type(self).__name__} must implement encode_vision")

    def project(self, vision: jax.Array) -> jax.Array:
        """The table of image features `[R, D]`, in the text model's width."""
        raise NotImplementedError(f"{type(self).__name__} must implement project")

    def embed(self, input_ids: jax.Array, images: Images | None = None, vision: jax.Array | None = None) -> jax.Array:
        """Token embeddings `[B, S, D]` of ids `[B, S]`, image features in place of the image tokens; `vision` is
        `encode_vision(images)` where that is there already."""
        embeds = self.language_model.embed(input_ids)
        if images is None:
            return embeds
        with jax.named_scope("projector"):
            table = self.project(self.encode_vision(images) if vision is None else vision)  # [R, D]
        return jnp.where((images.ids >= 0)[..., None], table[images.rows], embeds)

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
        as no cut goes through an image of a family with `images_see_themselves`.

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
        mask = Mask(count, groups=image_ids if self.images_see_themselves else None, causal=True)
        return self.forward(embeds, places if position_ids is None else position_ids, mask, cache, tap_layers)

    def unembed(self, features: jax.Array) -> jax.Array:
        """Logits f32 `[..., V]` of features as `forward` gives them, tapped layers or not."""
        return self.language_model.unembed(features)
