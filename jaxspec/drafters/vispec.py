"""ViSpec (arXiv 2509.15235): an EAGLE head that sees each image as a few vectors and one global feature.

A vision adaptor (section 3.2) turns the M embeddings of an image into `num_q` vectors. All but the last replace the
image's tokens in the head's sequence, at the positions of its last tokens and without passing `fc`; the last one is the
image's global feature, which every later text entry carries beside its target feature through `img_fc` (section 3.3).

The adaptor serves alone, too:

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxspec.drafters.vispec import VisionAdaptor
    >>> adaptor = VisionAdaptor(width=64, num_heads=4, num_queries=3, rngs=nnx.Rngs(0))
    >>> adaptor(jnp.ones((2, 576, 64))).shape  # the embeddings of one image each
    (2, 1, 3, 64)
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspec.drafters.contract import DrafterContext, Method
from jaxspec.drafters.eagle import (
    EagleConfig,
    EagleHead,
    eagle_misfits,
    read_eagle_fields,
    write_eagle_config,
)
from jaxspec.drafters.sequence import HeadInputs, entry_order, fewest_image_entries, image_spans, take_entries
from jaxspec.layers import linear
from jaxspec.speculation.tree import TreeConfig


@dataclasses.dataclass(frozen=True)
class ViSpecConfig(EagleConfig):
    num_q: int = 2
    global_feature: bool = True
    """False: all `num_q` vectors replace the image's tokens and nothing stands beside the features (an ablation)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_q < 1:
            raise ValueError(f"num_q must be at least 1 (the global feature), got {self.num_q}")

    @property
    def replaced(self) -> int:
        """Vectors that take the place of an image's tokens."""
        return self.num_q - self.global_feature


class VisionAdaptor(nnx.Module):
    """Learned queries attend once to the embeddings of one image: no norm, no MLP, no positions.

    `num_heads` heads share the `width` of the embeddings; raises ValueError where they cannot.
    """

    def __init__(self, width: int, num_heads: int, num_queries: int, *, qkv_bias: bool = False, rngs: nnx.Rngs) -> None:
        if width % num_heads:
            raise ValueError(f"width ({width}) must be a multiple of num_heads ({num_heads})")
        self.head_dim = width // num_heads
        self.q = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (num_queries, num_heads, self.head_dim)))
        self.k_proj = linear(width, width, bias=qkv_bias, rngs=rngs)
        self.v_proj = linear(width, width, bias=qkv_bias, rngs=rngs)
        self.o_proj = linear(width, width, bias=False, rngs=rngs)

    def __call__(self, embeds: jax.Array, masks: jax.Array | None = None) -> jax.Array:
        """`[B, n, num_queries, D]` for the n images that `masks` bool `[B, n, S]` pick out of `embeds` `[B, S, D]`; by
        default all are of one image. An image without embeddings has vectors that mean nothing."""
        _, heads, head_dim = self.q.shape
        if masks is None:
            masks = jnp.ones((embeds.shape[0], 1, embeds.shape[1]), bool)
        split = (*embeds.shape[:2], heads, head_dim)
        keys, values = self.k_proj(embeds).reshape(split), self.v_proj(embeds).reshape(split)
        queries = self.q[...].astype(keys.dtype) * head_dim**-0.5
        with jax.named_scope("attention"):
            scores = jnp.einsum("qhd,bshd->bhqs", queries, keys, preferred_element_type=jnp.float32)
            scores = jnp.where(masks[:, :, None, None], scores[:, None], -jnp.inf)  # [B, n, H, q, S]
            absent = ~masks.any(axis=-1)[:, :, None, None, None]
            weights = jax.nn.softmax(jnp.where(absent, 0.0, scores), axis=-1).astype(values.dtype)
        mixed = jnp.einsum("bnhqs,bshd->bnqhd", weights, values)
        return self.o_proj(mixed.reshape(*mixed.shape[:3], heads * head_dim))


class ViSpecHead(EagleHead[ViSpecConfig]):
    def __init__(self, config: ViSpecConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs=rngs)
        width = config.text.hidden_size
        self.imadpt = VisionAdaptor(width, config.text.num_heads, config.num_q, qkv_bias=config.qkv_bias, rngs=rngs)
        if not config.global_feature:
            return
        self.img_fc = linear(2 * width, width, bias=True, rngs=rngs)
        # [I | 0]: training starts from the head without a global feature.
        self.img_fc.kernel[...] = jnp.eye(2 * width, width)

    def combine(self, embeds: jax.Array, features: jax.Array, global_features: jax.Array | None) -> jax.Array:
        if self.config.global_feature:
            assert global_features is not None
            features = self.img_fc(jnp.concatenate([features, global_features], axis=-1))
        return super().combine(embeds, features, global_features)

    def final_global_feature(self, inputs: HeadInputs, last: jax.Array) -> jax.Array | None:
        if not self.config.global_feature:
            return None
        assert inputs.global_features is not None
        return jnp.take_along_axis(inputs.global_features, last[:, None, None], axis=1)[:, 0]

    def inputs_of(self, context: DrafterContext, next_embeds: jax.Array, key: jax.Array | None = None) -> HeadInputs:
        batch, length, width = next_embeds.shape
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
        valid = positions < context.lengths[:, None]
        features = self.observe(context.features)
        if context.max_images == 0:
            nothing = jnp.zeros_like(next_embeds)
            return HeadInputs(next_embeds, features, positions, valid, nothing)

        image_ids, masks, last = image_spans(context)
        vectors = self.imadpt(next_embeds, masks)  # [B, n, num_q, D]

        # The global feature of the latest image that ended before the entry.
        ended = (last[:, None] < positions[..., None]) & (last >= 0)[:, None]  # [B, S, n]
        latest = ended.sum(axis=-1) - 1  # [B, S]
        global_features = take_entries(vectors[:, :, -1], jnp.maximum(latest, 0))
        global_features = jnp.where((latest >= 0)[..., None], global_features, 0)

        # An image keeps its last num_q - 1 entries, filled with the adaptor's vectors in order.
        replaced = self.config.replaced
        is_image = image_ids >= 0
        this_image = jnp.maximum(image_ids, 0)
        from_end = jnp.take_along_axis(last, this_image, axis=1) - positions  # 0 for an image's last entry
        is_direct = is_image & (from_end < replaced)
        flat = vectors[:, :, :replaced].reshape(batch, -1, width)  # [B, n * replaced, D]
        vector = this_image * replaced + jnp.clip(replaced - 1 - from_end, 0, max(replaced - 1, 0))
        direct = take_entries(flat, vector) if replaced else jnp.zeros_like(next_embeds)

        # Dropped entries leave: what stays moves up, in order, with its original position.
        kept = valid & (~is_image | is_direct)
        size = min(length, length - fewest_image_entries(context) + context.max_images * replaced)
        order = entry_order(positions, kept, size)
        return HeadInputs(
            embeds=take_entries(next_embeds, order),
            features=take_entries(features, order),
            positions=jnp.take_along_axis(positions, order, axis=1),
            valid=jnp.take_along_axis(kept, order, axis=1),
            global_features=take_entries(global_features, order),
            direct=take_entries(direct, order),
            is_direct=jnp.take_along_axis(is_direct, order, axis=1),
        )


def write_vispec_config(config: ViSpecConfig) -> dict:
    ours = {} if config.global_feature else {"global_feature": False}
    return write_eagle_config(config) | {"num_q": config.num_q} | ours


VISPEC = Method(
    title="ViSpec",
    module=ViSpecHead,
    read_config=lambda raw: ViSpecConfig(
        **read_eagle_fields(raw), num_q=raw.get("num_q", 2), global_feature=raw.get("global_feature", True)
    ),
    write_config=write_vispec_config,
    tree=TreeConfig(3, 8, 30),  # arXiv 2509.15235
    misfits=eagle_misfits,
    copies_embedding=True,
)
