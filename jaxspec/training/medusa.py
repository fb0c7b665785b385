"""Recipe of Medusa heads on a frozen target ("Medusa-1" of arXiv 2401.10774), with the distributions of the target for
labels instead of the tokens of a corpus.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspec.drafters.medusa import MedusaConfig, MedusaHeads
from jaxspec.targets.contract import VisionLanguageModel
from jaxspec.targets.target import Target
from jaxspec.training.drafter import DrafterRecipe, Teacher, start_from
from jaxspec.training.losses import by_columns, masked_mean, soft_cross_entropy


@dataclasses.dataclass(frozen=True)
class MedusaRecipe(DrafterRecipe):
    """Heads that share the target's LM head."""

    answer_run: ClassVar[int] = 2  # a draft begins behind a token of the answer
    method: str = "medusa"
    num_heads: int = 5
    head_decay: float = 0.8
    """The loss of head k has the weight `head_decay ** k`."""

    def new_draft_model(self, target: Target) -> MedusaHeads:
        """Heads of the target's width, or those of `init_from` and fresh ones where it has fewer."""
        sizes = target.config.text.hidden_size, target.model.vocab_size
        heads = MedusaHeads(MedusaConfig(*sizes, self.num_heads), rngs=nnx.Rngs(self.seed))
        heads.check_tree(self.tree)
        if self.init_from is not None:
            start_from(heads, self.init_from, target)
        return heads

    def loss(
        self, draft_model: MedusaHeads, model: VisionLanguageModel, teacher: Teacher, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The recipe's loss and, per head, how often its first choice is the target's."""
        # The target's features at position i say what token i + 1 is, which head k foresees at i - k.
        features, answer = teacher.context.features, teacher.answer
        foreseen = jnp.pad(answer[:, 1:], ((0, 0), (0, 1)))  # bool [B, S], whether token i + 1 is the answer's

        def earlier(x, by):  # [B, S, ..], what stands `by` positions before; 0 where there is nothing
            return jnp.pad(x, ((0, 0), (by, 0), *[(0, 0)] * (x.ndim - 2)))[:, : x.shape[1]]

        def compare(number):
            def values(before, features):
                logits, target_logits = draft_model.logits(model, before, number), model.unembed(features)
                agreement = logits.argmax(axis=-1) == target_logits.argmax(axis=-1)
                return {"soft_ce": soft_cross_entropy(logits, target_logits), "agreement": agreement}

            return by_columns(values, model.vocab_size, earlier(features, number), features)

        # A draft begins behind a token of the answer, and every token up to the one foreseen is the answer's.
        total, metrics, mask = jnp.zeros(()), {}, foreseen
        for number in range(1, self.num_heads + 1):
            mask = mask & earlier(foreseen, number)
            means = {name: masked_mean(values, mask) for name, values in compare(number).items()}
            total = total + self.head_decay**number * means["soft_ce"]
            metrics |= {f"{name}_{number}": mean for name, mean in means.items()}
        return total, metrics
