"""Recipe of Medusa heads on a frozen target ("Medusa-1" of arXiv 2401.10774), with the distributions of the target for
labels instead of the tokens of a corpus.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspec.drafters.medusa import MedusaConfig, MedusaHeads
from jaxspec.training.drafter import DrafterRecipe, Teacher, start_from
from jaxspec.training.losses import masked_mean, soft_cross_entropy


@dataclasses.dataclass(frozen=True)
class MedusaRecipe(DrafterRecipe):
    """Heads that share the target's LM head."""

    method: str = "medusa"
    num_heads: int = 5
    head_decay: float = 0.8
    """The loss of head k has the weight `head_decay ** k`."""

    def new_drafter(self, target) -> MedusaHeads:
        """Heads of the target's width, or those of `init_from` and fresh ones where it has fewer."""
        text = target.config.text
        heads = MedusaHeads(MedusaConfig(text.hidden_size, text.vocab_size, self.num_heads), rngs=nnx.Rngs(self.seed))
        heads.check_tree(self.tree)
        if self.init_from is not None:
            start_from(heads, self.init_from, target)
        return heads

    def loss(self, heads: MedusaHeads, target, teacher: Teacher, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The recipe's loss and, per head, how often its first choice is the target's."""
        features, answer = teacher.context.features, teacher.answer
        target_logits = target.unembed(features)  # at position i of token i + 1, which head k foresees at i - k
        target_choice = target_logits.argmax(axis=-1)
        foreseen = jnp.pad(answer[:, 1:], ((0, 0), (0, 1)))  # bool [B, S], whether token i + 1 is the answer's

        def earlier(x, by):  # [B, S, ..], what stands `by` positions before; 0 where there is nothing
            return jnp.pad(x, ((0, 0), (by, 0), *[(0, 0)] * (x.ndim - 2)))[:, : x.shape[1]]

        # A draft begins behind a token of the answer, and every token up to the one foreseen is the answer's.
        total, metrics, mask = 0.0, {}, foreseen
        for number in range(1, self.num_heads + 1):
            mask = mask & earlier(foreseen, number)
            logits = heads.logits(target, earlier(features, number), number)
            part = soft_cross_entropy(logits, target_logits, mask)
            total = total + self.head_decay**number * part
            metrics[f"soft_ce_{number}"] = part
            metrics[f"agreement_{number}"] = masked_mean(logits.argmax(axis=-1) == target_choice, mask)
        return total, metrics
