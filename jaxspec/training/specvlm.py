"""The recipe of SpecVLM's heads (arXiv 2509.11815): online-logit distillation.

The teacher's logits and features are those of the step's own pass of the target, so no corpus of them is stored. The
loss is 0.1 * cross-entropy(teacher, student) + SmoothL1(features), without noise and without multi-step runs.
"""

import dataclasses
from typing import ClassVar

from jaxspec.drafters.compressor import CompressorConfig
from jaxspec.drafters.specvlm import SpecVLMConfig
from jaxspec.layers import TextConfig
from jaxspec.training.eagle import EagleRecipe


@dataclasses.dataclass(frozen=True)
class SpecVLMRecipe(EagleRecipe):
    """A head with a visual compressor; defaults are the published loss."""

    methods: ClassVar[tuple[str, ...]] = ("specvlm",)
    method: str = "specvlm"
    compressor: CompressorConfig = CompressorConfig()
    feature_noise: float = 0.0
    ranking_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mtp_steps:
            raise ValueError(
                "mtp_steps must be 0 for SpecVLM, whose image entries keep their features instead of taking the head's "
                f"own outputs, got {self.mtp_steps}"
            )

    @property
    def needs_images(self) -> bool:
        return self.compressor.mode != "text_only"

    def head_config(self, text: TextConfig) -> SpecVLMConfig:
        return SpecVLMConfig(**self.head_fields(text), compressor=self.compressor)
