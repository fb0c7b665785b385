"""Medusa (arXiv 2401.10774): heads that each look at one feature of the target and predict one token further ahead.

Head k at the feature of position i predicts token i + 1 + k ("Medusa heads"); the target itself has already chosen
token i + 1, the root. No head knows what the others say, so the probability of a path is the product of its tokens' and
the tree is the Cartesian product of the heads' best tokens ("Tree attention"). The authors prune it once for all texts,
here every tree keeps its own best nodes.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspec.checkpoints.names import NameTable
from jaxspec.drafters.contract import DrafterContext, Method, size_misfits
from jaxspec.layers import linear
from jaxspec.speculation.params import BatchSampling
from jaxspec.speculation.sampling import Noise
from jaxspec.speculation.tree import Tree, TreeConfig, grow_tree
from jaxspec.splitting import by_vocabulary
from jaxspec.targets.contract import VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class MedusaConfig:
    """Heads for a target of these sizes. With `own_lm_heads` each has an LM head of its own, as in published files;
    else all use the target's."""

    hidden_size: int
    vocab_size: int
    num_heads: int = 5
    own_lm_heads: bool = False

    def __post_init__(self) -> None:
        if self.num_heads < 1:
            raise ValueError(f"medusa_num_heads must be at least 1, got {self.num_heads}")


class ResidualBlock(nnx.Module):
    """`x + SiLU(linear(x))`, at first the identity: a fresh head says what the target's LM head says."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.linear = linear(width, width, bias=True, rngs=rngs, zero=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jax.nn.silu(self.linear(x))


class MedusaHeads(nnx.Module):
    """A `jaxspec.drafters.contract.DraftModel` whose state is the feature `[B, D]` of the position before the root."""

    def __init__(self, config: MedusaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width = config.hidden_size

        def head() -> nnx.List:  # nested as published
            layers: list[nnx.Module] = [ResidualBlock(width, rngs=rngs)]
            if config.own_lm_heads:
                layers.append(linear(width, config.vocab_size, bias=False, rngs=rngs))
            return nnx.List(layers)

        self.heads = nnx.List([head() for _ in range(config.num_heads)])

    def logits(self, model: VisionLanguageModel, features: jax.Array, number: int) -> jax.Array:
        """What head `number` (1, 2, ..) makes of features `[.., D]`: logits f32 `[.., V]`."""
        block, *own = self.heads[number - 1]
        hidden = block(features)
        if own:
            return by_vocabulary(own[0].logits(hidden))
        return model.unembed(hidden)

    def check_tree(self, tree: TreeConfig) -> None:
        """Raises ValueError for a tree deeper than there are heads."""
        if tree.max_depth > self.config.num_heads:
            raise ValueError(
                f"the tree drafts {tree.max_depth} tokens ahead, but there are only {self.config.num_heads} Medusa "
                f"heads: depth may be at most {self.config.num_heads - 1}, got {tree.depth}"
            )

    def prefill(self, model: VisionLanguageModel, context: DrafterContext, capacity: int) -> jax.Array:
        return context.features[jnp.arange(context.lengths.shape[0]), context.lengths - 1]

    def propose(
        self,
        model: VisionLanguageModel,
        config: TreeConfig,
        state: jax.Array,
        root: jax.Array,
        noise: Noise,
        sampling: BatchSampling,
    ) -> Tree:
        def expand(carry, tokens, parent, level):
            return carry, self.logits(model, state, level + 2)[:, None]  # whatever the parent is

        first = self.logits(model, state, 1)
        return grow_tree(config, root, first, noise, sampling, expand, None)

    def advance(
        self, model: VisionLanguageModel, state: jax.Array, tokens: jax.Array, features: jax.Array, count: jax.Array
    ) -> jax.Array:
        last = jnp.take_along_axis(features, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
        return jnp.where((count > 0)[:, None], last, state)


def read_medusa_config(raw: dict) -> MedusaConfig:
    layers = raw.get("medusa_num_layers", 1)
    if layers != 1:
        raise ValueError(
            f"a Medusa head of 1 residual block is implemented, config.json says medusa_num_layers {layers}"
        )
    return MedusaConfig(raw["hidden_size"], raw["vocab_size"], raw.get("medusa_num_heads", 5))


def write_medusa_config(config: MedusaConfig) -> dict:
    return {
        "medusa_num_heads": config.num_heads,
        "medusa_num_layers": 1,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
    }


def with_own_lm_heads(config: MedusaConfig, tensors: Mapping[str, np.ndarray]) -> MedusaConfig:
    """Only the tensors tell whether heads have LM heads of their own."""
    return dataclasses.replace(config, own_lm_heads="0.1.weight" in tensors)


MEDUSA = Method(
    title="Medusa",
    module=MedusaHeads,
    read_config=read_medusa_config,
    write_config=write_medusa_config,
    complete_config=with_own_lm_heads,
    tree=TreeConfig(4, 10, 64),  # 64 nodes, 10 tokens a head: as in the published code, for 5 heads
    misfits=size_misfits,
    names=NameTable(prefixes={"heads.": ""}),
)
