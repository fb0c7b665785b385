"""The recipe of EAGLE heads, which those of ViSpec (vispec.py) and SpecVLM (specvlm.py) extend: one loss with all their
published parts, each with a weight.

Per step the head runs `mtp_steps + 1` times: each further run reads the head's own outputs of the run before, shifted
by one, as it will when drafting (ViSpec 3.4).
"""

import dataclasses
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspec.drafters.eagle import EagleConfig, EagleHead
from jaxspec.drafters.registry import METHODS
from jaxspec.drafters.vocabulary import most_frequent, take_from_target
from jaxspec.layers import TextConfig
from jaxspec.targets.contract import VisionLanguageModel
from jaxspec.targets.target import Target
from jaxspec.training.drafter import DrafterRecipe, Teacher, open_answers, start_from
from jaxspec.training.losses import (
    RANKED,
    by_columns,
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
    """A draft head; defaults are the published loss of EAGLE heads (stage 1 of ViSpec's code)."""

    methods: ClassVar[tuple[str, ...]] = ("eagle2", "eaglevlm")
    """Those that the recipe trains."""
    answer_run: ClassVar[int] = 2  # an entry drafts the token after the next, and both must be the answer's
    method: str = "eagle2"
    tap_layers: tuple[int, ...] = ()
    """Layers of the target whose outputs the head reads beside the final features (ours)."""
    draft_vocab_size: int | None = None
    """The head drafts only so many tokens, those that are most frequent in `answers_dir`, with an LM head of its own
    that starts as the target's (ours). None: all, with the target's."""
    mtp_steps: int = 0
    feature_noise: float = 0.1
    """Uniform noise on the input features has amplitude `feature_noise * 512 / sequence length` (EAGLE: 0.1)."""
    feature_weight: float = 1.0
    soft_cross_entropy_weight: float = 0.1
    probability_l1_weight: float = 0.0
    ranking_weight: float = 0.01
    acceptance_weight: float = 0.0
    """Of the expected share of `mtp_steps + 1` draft tokens in a row that is rejected (ours)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in self.methods:
            known = ", ".join(self.methods)
            raise ValueError(f"method of {type(self).__name__} must be one of {known}, got {self.method!r}")
        if self.draft_vocab_size is not None and self.draft_vocab_size < RANKED:
            raise ValueError(f"draft_vocab_size must be at least {RANKED}, got {self.draft_vocab_size}")

    def head_fields(self, text: TextConfig) -> dict[str, Any]:
        """What every head with the one layer `text` is made of; the bias is as in the published heads for Qwen."""
        sizes = {"tap_layers": self.tap_layers, "draft_vocab_size": self.draft_vocab_size}
        return {"text": text, "qkv_bias": text.qkv_bias, **sizes}

    def head_config(self, text: TextConfig) -> EagleConfig:
        return EagleConfig(**self.head_fields(text), input_norm=self.method == "eaglevlm")

    def trains(self, path: tuple[Any, ...]) -> bool:
        return path[-1] != "ids"  # of the draft vocabulary

    def new_draft_model(self, target: Target) -> EagleHead[EagleConfig]:
        """A head of the target's shape, or that of `init_from` with what it lacks."""
        config = self.head_config(dataclasses.replace(target.config.text.plain(), tie_word_embeddings=False))
        head = cast(EagleHead, METHODS[self.method].module(config, rngs=nnx.Rngs(self.seed)))
        if self.draft_vocab_size is not None:
            said = open_answers(self, target).said()
            ids = most_frequent(said, target.model.vocab_size, self.draft_vocab_size)
            take_from_target(head.draft_head, target.model, ids)
        if self.init_from is not None:
            start_from(head, self.init_from, target)
        return head

    def loss(
        self, draft_model: EagleHead[EagleConfig], model: VisionLanguageModel, teacher: Teacher, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The recipe's loss and, per draft position, how often the head's first choice is the target's."""
        context, answer = teacher
        sequence_key, noise_key = jax.random.split(key)
        sequence = draft_model.inputs_of(context, jnp.roll(context.embeds, -1, axis=1), sequence_key)
        features, lengths = context.features, context.lengths

        def behind(x, shift):  # what stands `shift` positions behind each entry
            index = jnp.minimum(sequence.positions + shift, x.shape[1] - 1)
            return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)

        # Entry i drafts token i + 2 from the feature that stands at i + 1; the token before must be the answer's, too.
        mask = sequence.valid & behind(answer, 1) & behind(answer, 2) & (sequence.positions + 2 < lengths[:, None])
        target_features = behind(features[..., -context.embeds.shape[-1] :], 1)
        ids = draft_model.draft_ids
        weights = {
            "feature": (self.feature_weight, None),
            "soft_ce": (self.soft_cross_entropy_weight, soft_cross_entropy),
            "prob_l1": (self.probability_l1_weight, probability_l1),
            "rank": (self.ranking_weight, ranking),
        }
        weights = {name: parts for name, parts in weights.items() if parts[0]}

        def compare(output, target_features):
            """What the logits of the head's outputs and of the target's features say of each other, by name."""
            logits, target_logits = draft_model.logits(model, output), model.unembed(target_features)
            choice, target_choice = logits.argmax(axis=-1), target_logits.argmax(axis=-1)
            if ids is not None:  # the head learns the target's distribution over the tokens that it drafts
                choice, target_logits = ids[choice], target_logits[..., ids]
            values = {name: part(logits, target_logits) for name, (_, part) in weights.items() if part is not None}
            return values | {"overlap": overlap(logits, target_logits), "agreement": choice == target_choice}

        inputs = sequence.features
        if self.feature_noise:
            amplitude = self.feature_noise * 512 / features.shape[1]
            inputs = inputs + jax.random.uniform(noise_key, inputs.shape, minval=-amplitude, maxval=amplitude)
        total, metrics, overlaps = jnp.zeros(()), {}, []
        for step in range(self.mtp_steps + 1):
            output, _ = draft_model.forward(sequence, inputs)
            values = by_columns(compare, model.vocab_size, output, target_features)
            values["feature"] = smooth_l1(output, target_features)
            overlaps.append(values["overlap"] * mask)
            for name, (weight, _) in weights.items():
                part = masked_mean(values[name], mask)
                total = total + weight * part / (self.mtp_steps + 1)
                metrics[f"{name}_{step + 1}"] = part
            metrics[f"agreement_{step + 1}"] = masked_mean(values["agreement"], mask)
            # Draft position step + 2 reads what the head predicted for the position before.
            inputs = jnp.concatenate([sequence.features[:, :1], output[:, :-1]], axis=1)
        rejected = 1 - masked_mean(expected_share(overlaps), mask)
        metrics["expected_length"] = 1 + (1 - rejected) * len(overlaps)
        return total + self.acceptance_weight * rejected, metrics
