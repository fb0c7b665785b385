"""The recipe of ViSpec's heads (arXiv 2509.15235): stage 2, on images and long answers of the target's own.

Stage 1 is an EAGLE head (`EagleRecipe`) on text, from which this one starts (`init_from`).
"""

import dataclasses
from typing import ClassVar

from jaxspec.drafters.vispec import ViSpecConfig
from jaxspec.layers import TextConfig
from jaxspec.training.eagle import EagleRecipe


@dataclasses.dataclass(frozen=True)
class ViSpecRecipe(EagleRecipe):
    """A head with a vision adaptor; defaults are the published loss: 10 * L1 of the distributions + 0.1 * ranking of
    the top 10, averaged over two runs."""

    methods: ClassVar[tuple[str, ...]] = ("vispec",)
    method: str = "vispec"
    num_q: int = 2
    global_feature: bool = True
    mtp_steps: int = 1
    feature_noise: float = 0.0
    feature_weight: float = 0.0
    soft_cross_entropy_weight: float = 0.0
    probability_l1_weight: float = 10.0
    ranking_weight: float = 0.1

    @property
    def needs_images(self) -> bool:
        return True

    def head_config(self, text: TextConfig) -> ViSpecConfig:
        return ViSpecConfig(**self.head_fields(text), num_q=self.num_q, global_feature=self.global_feature)
