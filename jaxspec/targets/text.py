"""Text-only targets: Llama, Mistral, Qwen2 / Qwen2.5 and Gemma3 text models behind the same contract."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import transformers
from flax import nnx

from jaxspec.checkpoints.configs import llama_text_config, published_rope, published_text_fields
from jaxspec.checkpoints.names import NameTable
from jaxspec.layers import LanguageModel, TextConfig
from jaxspec.targets.contract import TargetConfig, VisionLanguageModel
from jaxspec.targets.gemma3 import GemmaLanguageModel, GemmaTextConfig
from jaxspec.targets.images import ImageLayout


@dataclasses.dataclass(frozen=True)
class TextTargetConfig(TargetConfig[ImageLayout]):
    text: TextConfig

    @classmethod
    def from_hf(cls, config: transformers.PretrainedConfig) -> "TextTargetConfig":
        """From a transformers config of a causal language model."""
        gemma = config.model_type == "gemma3_text"
        return cls(GemmaTextConfig.from_hf(config) if gemma else llama_text_config(config))

    def lay_out(self, inputs: Mapping[str, Any]) -> list[ImageLayout]:
        return []


def language_model(text: TextConfig, *, rngs: nnx.Rngs) -> LanguageModel[TextConfig]:
    """A fresh text model of whichever kind the config describes."""
    if isinstance(text, GemmaTextConfig):
        return GemmaLanguageModel(text, rngs=rngs)
    return LanguageModel(text, rngs=rngs)


def published_text_config(text: TextConfig, model_type: str) -> transformers.PretrainedConfig:
    """The transformers config of a causal language model: the inverse of `TextTargetConfig.from_hf`."""
    fields = published_text_fields(text) | {"rope_parameters": published_rope(text.rope)}
    if isinstance(text, GemmaTextConfig):
        fields["rope_parameters"] = {
            "full_attention": published_rope(text.rope),
            "sliding_attention": published_rope(text.local_rope),
        }
        kinds = {False: "full_attention", True: "sliding_attention"}
        fields["layer_types"] = [kinds[window is not None] for window in text.windows]
        fields["sliding_window"] = next((window for window in text.windows if window is not None), None)
        fields["query_pre_attn_scalar"] = round(text.query_scale**-2)
    else:
        fields |= {"mlp_bias": text.mlp_bias, "sliding_window": None}
    return transformers.AutoConfig.for_model(model_type, **fields)


class TextModel(VisionLanguageModel):
    config: TextTargetConfig

    def __init__(self, config: TextTargetConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.language_model = language_model(config.text, rngs=rngs)


TEXT_NAMES = NameTable(
    prefixes={"language_model.lm_head.": "lm_head.", "language_model.": "model."},
    ignored=(r".*\.rotary_emb\.inv_freq",),
)
