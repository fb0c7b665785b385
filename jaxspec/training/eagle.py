"""Recipes of EAGLE-like heads (EAGLE-2, EagleVLM, ViSpec), with the losses of their published recipes.

Per step the head runs `mtp_steps + 1` times: each further run reads the head's own outputs of the run before, shifted
by one, as it will when drafting (ViSpec 3.4).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspec.drafters.eagle import EagleConfig, EagleHead
from jaxspec.drafters.registry import METHODS
from jaxspec.drafters.vispec import ViSpecConfig
from jaxspec.layers import TextConfig
from jaxspec.training.drafter import DrafterRecipe, Teacher, start_from
from jaxspec.training.losses import (
    expected_share,
    masked_mean,
    overlap,
    probability_l1,
    ranking,
    smooth_l1,
    soft_cross_entropy,
)


@dataclasses.dataclass(frozen=True)
class EagleRecipe(DrafterRecipe):
    """A draft head."""

    methods: ClassVar[tuple[str, ...]] = ("eagle2", "eaglevlm", "vispec")
    """Those that the recipe trains."""
    method: str = "vispec"
    num_q: int = 2
    global_feature: bool = True
    tap_layers: tuple[int, ...] = ()
    """Layers of the target whose outputs the head reads beside the final features (ours)."""
    mtp_steps: int = 1
    feature_noise: float = 0.0
    """Uniform noise on the input features has amplitude `feature_noise * 512 / sequence length` (EAGLE: 0.1)."""
    feature_weight: float = 0.0
    soft_cross_entropy_weight: float = 0.0
    probability_l1_weight: float = 10.0
    ranking_weight: float = 0.1
    acceptance_weight: float = 0.0
    """Of the expected share of `mtp_steps + 1` draft tokens in a row that is rejected (ours)."""

    def __post_init__(self):
        super().__post_init__()
        if self.method not in self.methods:
            known = ", ".join(self.methods)
            raise ValueError(f"method of {type(self).__name__} must be one of {known}, got {self.method!r}")

    def head_config(self, text: TextConfig) -> EagleConfig:
        """Of a head whose one layer is `text`."""
        # The bias is as in the published heads for Qwen.
        common = {"text": text, "qkv_bias": text.qkv_bias, "tap_layers": self.tap_layers}
        if self.method == "vispec":
            return ViSpecConfig(**common, num_q=self.num_q, global_feature=self.global_feature)
        return EagleConfig(**common, input_norm=self.method == "eaglevlm")

    @property
    def needs_images(self) -> bool:
        return self.method == "vispec"

    def new_drafter(self, target) -> EagleHead:
        """A head of the target's shape, or that of `init_from` with what it lacks."""
        config = self.head_config(dataclasses.replace(target.config.text, num_layers=1, tie_word_embeddings=False))
        head = METHODS[self.method].module(config, rngs=nnx.Rngs(self.seed))
        if self.init_from is not None:
            start_from(head, self.init_from, target)
        return head

    def loss(self, head: EagleHead, target, teacher: Teacher, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The recipe's loss and, per draft position, how often the head's first choice is the target's."""
        context, answer = teacher
        rows_key, noise_key = jax.random.split(key)
        rows = head.rows_of(context, jnp.roll(context.embeds, -1, axis=1), rows_key)
        features, lengths = context.features, context.lengths

        def at_rows(x, shift):  # what stands `shift` positions after each row
            index = jnp.minimum(rows.positions + shift, x.shape[1] - 1)
            return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)

        # Row i drafts token i + 2 from the feature that stands at i + 1; the token before must be the answer's, too.
        mask = rows.valid & at_rows(answer, 1) & at_rows(answer, 2) & (rows.positions + 2 < lengths[:, None])
        target_features = at_rows(features[..., -context.embeds.shape[-1] :], 1)
        target_logits = target.unembed(target_features)
        target_choice = target_logits.argmax(axis=-1)

        inputs = rows.features
        if self.feature_noise:
            amplitude = self.feature_noise * 512 / features.shape[1]
            inputs = inputs + jax.random.uniform(noise_key, inputs.shape, minval=-amplitude, maxval=amplitude)
        total, metrics, overlaps = 0.0, {}, []
        for step in range(self.mtp_steps + 1):
            output, _ = head.forward(rows, inputs)
            logits = target.unembed(output)
            parts = {
                "feature": (self.feature_weight, lambda: smooth_l1(output, target_features, mask)),  # noqa: B023
                "soft_ce": (self.soft_cross_entropy_weight, lambda: soft_cross_entropy(logits, target_logits, mask)),  # noqa: B023
                "prob_l1": (self.probability_l1_weight, lambda: probability_l1(logits, target_logits, mask)),  # noqa: B023
                "rank": (self.ranking_weight, lambda: ranking(logits, target_logits, mask)),  # noqa: B023
            }
            overlaps.append(overlap(logits, target_logits) * mask)
            for name, (weight, value) in parts.items():
                if weight:
                    part = value()
                    total = total + weight * part / (self.mtp_steps + 1)
                    metrics[f"{name}_{step + 1}"] = part
            metrics[f"agreement_{step + 1}"] = masked_mean(logits.argmax(axis=-1) == target_choice, mask)
            # Draft position step + 2 reads what the head predicted for the position before.
            inputs = jnp.concatenate([rows.features[:, :1], output[:, :-1]], axis=1)
        rejected = 1 - masked_mean(expected_share(overlaps), mask)
        metrics["expected_length"] = 1 + (1 - rejected) * len(overlaps)
        return total + self.acceptance_weight * rejected, metrics
