"""SpecVLM (arXiv 2509.11815): EagleVLM's head that sees each image through an elastic visual compressor.

The entries of an image are replaced by the few that the compressor (compressor.py) makes of them, which pass `fc` like
any other; the target keeps all its tokens. In mode "select" a gate reads the target's feature of the last prompt token
and picks how images are compressed, request by request.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspec.drafters.compressor import CompressorConfig, VisualCompressor
from jaxspec.drafters.contract import DrafterContext, Method
from jaxspec.drafters.eagle import (
    EagleConfig,
    EagleHead,
    eagle_misfits,
    read_eagle_fields,
    write_eagle_config,
)
from jaxspec.drafters.sequence import HeadInputs, entry_order, fewest_image_entries, image_spans, take_entries
from jaxspec.speculation.tree import TreeConfig


@dataclasses.dataclass(frozen=True)
class SpecVLMConfig(EagleConfig):
    input_norm: bool = True
    compressor: CompressorConfig = CompressorConfig()


class SpecVLMHead(EagleHead[SpecVLMConfig]):
    def __init__(self, config: SpecVLMConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs=rngs)
        text = config.text
        self.compressor = VisualCompressor(
            text.hidden_size, text.num_heads, config.compressor, qkv_bias=config.qkv_bias, rngs=rngs
        )

    def inputs_of(self, context: DrafterContext, next_embeds: jax.Array, key: jax.Array | None = None) -> HeadInputs:
        inputs = super().inputs_of(context, next_embeds)
        if context.max_images == 0:
            return inputs
        spans = image_spans(context)
        question = take_entries(inputs.features, context.prompt_lengths[:, None] - 1)[:, 0]  # [B, D]
        groups = self.compressor(spans, inputs.embeds, inputs.features, context.seeds, question, key)

        def joined(text, image):
            return jnp.concatenate([text, image], axis=1)

        # Images of a few tokens could become more entries than they had, which a prompt has no room for.
        room = (spans.ids >= 0).sum(axis=1, keepdims=True)
        kept = groups.valid & (jnp.cumsum(groups.valid, axis=1) <= room)
        positions = joined(inputs.positions, groups.positions)
        valid = joined(inputs.valid & (spans.ids < 0), kept)
        length = next_embeds.shape[1]
        bound = self.config.compressor.most_entries(length, fewest_image_entries(context), context.max_images)
        order = entry_order(positions, valid, min(bound, length))
        return HeadInputs(
            embeds=take_entries(joined(inputs.embeds, groups.embeds), order),
            features=take_entries(joined(inputs.features, groups.features), order),
            positions=jnp.take_along_axis(positions, order, axis=1),
            valid=jnp.take_along_axis(valid, order, axis=1),
        )


def read_specvlm_config(raw: dict) -> SpecVLMConfig:
    compressor = raw.get("compressor", {})
    known = [field.name for field in dataclasses.fields(CompressorConfig)]
    if unknown := [name for name in compressor if name not in known]:
        raise ValueError(f"compressor has no {', '.join(unknown)}; it has {', '.join(known)}")
    return SpecVLMConfig(**read_eagle_fields(raw), compressor=CompressorConfig(**compressor))


SPECVLM = Method(
    title="SpecVLM",
    module=SpecVLMHead,
    read_config=read_specvlm_config,
    write_config=lambda config: write_eagle_config(config) | {"compressor": dataclasses.asdict(config.compressor)},
    tree=TreeConfig(7, 10, 60),  # arXiv 2509.11815
    misfits=eagle_misfits,
    copies_embedding=True,
)
