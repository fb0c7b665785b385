"""Text-only targets: Llama, Mistral, Qwen2 / Qwen2.5, Qwen3 and Gemma3 text models behind the same contract."""

import dataclasses

import transformers
from flax import nnx

from jaxspec.checkpoints.configs import (
    FULL,
    SLIDING,
    gemma_text_config,
    llama_text_config,
    published_rope,
    published_text_fields,
)
from jaxspec.checkpoints.names import NameTable
from jaxspec.layers import LanguageModel, TextConfig
from jaxspec.targets.contract import TargetConfig, VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class TextTargetConfig(TargetConfig):
    text: TextConfig

    @classmethod
    def from_hf(cls, config: transformers.PretrainedConfig) -> "TextTargetConfig":
        """From a transformers config of a causal language model."""
        gemma = config.model_type == "gemma3_text"
        return cls(gemma_text_config(config) if gemma else llama_text_config(config))


def published_text_config(text: TextConfig, model_type: str) -> transformers.PretrainedConfig:
    """The transformers config of a causal language model: the inverse of `TextTargetConfig.from_hf`."""
    fields = published_text_fields(text) | {"rope_parameters": published_rope(text.rope)}
    if model_type == "gemma3_text":
        assert text.query_scale is not None  # every Gemma3 says it
        local = next((kind for kind in text.kinds if kind.window is not None), text.kinds[0])
        fields["rope_parameters"] = {FULL: published_rope(text.rope), SLIDING: published_rope(local.rope)}
        fields["layer_types"] = [FULL if kind.window is None else SLIDING for kind in text.kinds]
        fields["sliding_window"] = local.window
        fields["query_pre_attn_scalar"] = round(text.query_scale**-2)
    else:
        fields |= {"mlp_bias": text.mlp_bias, "sliding_window": None}
    return transformers.AutoConfig.for_model(model_type, **fields)


class TextModel(VisionLanguageModel):
    config: TextTargetConfig

    def __init__(self, config: TextTargetConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.language_model = LanguageModel(config.text, rngs=rngs)


TEXT_NAMES = NameTable(
    prefixes={"language_model.lm_head.": "lm_head.", "language_model.": "model."},
    ignored=(r".*\.rotary_emb\.inv_freq",),
)
