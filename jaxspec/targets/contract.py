"""What a target family must offer: embed a prompt with its images, run tokens over a cache, turn features to logits.

Drafters, speculation and training use this and nothing else of a target.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspec.kernels.attention import LayerKV
from jaxspec.layers import LanguageModel, causal_mask


class VisionLanguageModel(nnx.Module):
    """Base of the target families. Subclasses set `config` (with `text`, `image_token_id`, `tokens_per_image`),
    `language_model`, and implement `encode_images`."""

    language_model: LanguageModel

    def encode_images(self, pixel_values: jax.Array) -> jax.Array:
        """Image features `[n, M, D]` in the text model's width."""
        raise NotImplementedError(f"{type(self).__name__} must implement encode_images")

    def embed(self, input_ids: jax.Array, pixel_values: jax.Array | None = None) -> jax.Array:
        """Token embeddings `[B, S, D]` of ids `[B, S]`, image features in place of the image tokens.

        `pixel_values` `[n, 3, H, W]` are the images of all rows in reading order; n may exceed the images in use.
        """
        embeds = self.language_model.embed_tokens(input_ids)
        if pixel_values is None:
            return embeds
        is_image = input_ids == self.config.image_token_id  # [B, S]
        images = self.encode_images(pixel_values.astype(embeds.dtype))  # [n, M, D]
        flat = images.reshape(-1, images.shape[-1])
        order = jnp.cumsum(is_image.reshape(-1)).reshape(is_image.shape) - 1  # n-th image token <- n-th feature
        return jnp.where(is_image[..., None], flat[jnp.clip(order, 0, flat.shape[0] - 1)], embeds)

    def image_ids(self, input_ids: jax.Array) -> jax.Array:
        """Which image of its row each token of `[B, S]` belongs to, -1 for text."""
        is_image = input_ids == self.config.image_token_id
        return jnp.where(is_image, (jnp.cumsum(is_image, axis=1) - 1) // self.config.tokens_per_image, -1)

    def forward(
        self,
        embeds: jax.Array,
        position_ids: jax.Array,
        mask: jax.Array,
        cache: tuple[LayerKV, ...] | None = None,
        cache_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[LayerKV, ...]]:
        """Features `[B, N, D]` (after the final norm) of new tokens, and their keys and values per layer."""
        return self.language_model(embeds, position_ids, mask, cache, cache_mask)

    def prefill(self, embeds: jax.Array, lengths: jax.Array) -> tuple[jax.Array, tuple[LayerKV, ...]]:
        """A right-padded prompt `[B, S, D]` with `lengths` i32 `[B]`; as `forward`, causal."""
        positions = jnp.broadcast_to(jnp.arange(embeds.shape[1]), embeds.shape[:2])
        return self.forward(embeds, positions, causal_mask(positions < lengths[:, None]))

    def unembed(self, features: jax.Array) -> jax.Array:
        """Logits f32 `[..., V]`."""
        return self.language_model.unembed(features)
