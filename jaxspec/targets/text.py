"""Text-only targets: Llama, Mistral, Qwen2 / Qwen2.5 and Gemma3 text models behind the same contract."""

import dataclasses

from flax import nnx

from jaxspec.checkpoints.configs import llama_text_config
from jaxspec.checkpoints.names import NameTable
from jaxspec.layers import LanguageModel, TextConfig
from jaxspec.targets.contract import TargetConfig, VisionLanguageModel
from jaxspec.targets.gemma3 import GemmaLanguageModel, GemmaTextConfig
from jaxspec.targets.images import ImageLayout


@dataclasses.dataclass(frozen=True)
class TextTargetConfig(TargetConfig):
    text: TextConfig

    @classmethod
    def from_hf(cls, config) -> "TextTargetConfig":
        """From a transformers config of a causal language model."""
        gemma = config.model_type == "gemma3_text"
        return cls(GemmaTextConfig.from_hf(config) if gemma else llama_text_config(config))

    def lay_out(self, inputs) -> list[ImageLayout]:
        return []


class TextModel(VisionLanguageModel):
    def __init__(self, config: TextTargetConfig, *, rngs: nnx.Rngs):
        self.config = config
        gemma = isinstance(config.text, GemmaTextConfig)
        self.language_model = (GemmaLanguageModel if gemma else LanguageModel)(config.text, rngs=rngs)


TEXT_NAMES = NameTable(
    prefixes={"language_model.lm_head.": "lm_head.", "language_model.": "model."},
    ignored=(r".*\.rotary_emb\.inv_freq",),
)
