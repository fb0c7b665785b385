"""Hugging Face config objects -> ours and back, for the parts that families share."""

import contextlib
import dataclasses
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from jaxspec.checks import reason
from jaxspec.layers import LayerKind, TextConfig
from jaxspec.rope import RopeConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen2_5_vl_text", "qwen3")
"""Text models near Llama; the Qwen2 ones have biases at query, key and value, Qwen3 has norms there."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, as transformers names them."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, as transformers names them."""

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "image_size", "patch_size", "temporal_patch_size", "depth"),
    *("num_heads", "out_hidden_size", "spatial_merge_size", "window_size", "mm_tokens_per_image", "num_q"),
    *("medusa_num_heads", "medusa_num_layers", "draft_vocab_size", "vision_width", "total_token"),
)
"""Keys of config.json that count something, in whichever part they stand."""
LARGEST = 2**31 - 1
MAY_BE_ZERO = ("num_q", "vision_width", "depth")  # `depth` is also a tree's


def check_sizes(raw: Mapping[str, Any], source: Path) -> None:
    """Raises ValueError where a size in a config.json, or in one of its parts, is no positive integer."""
    for key, part in raw.items():
        if key.endswith("_config") and isinstance(part, Mapping):
            parts = {f"{key}.{name}": value for name, value in part.items()}
        else:
            parts = {key: part}
        for name, value in parts.items():
            own = name.rpartition(".")[2]
            if own not in SIZES or value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{source}: {name} must be an integer, got {value!r}")
            if value < (least := 0 if own in MAY_BE_ZERO else 1):
                raise ValueError(f"{source}: {name} must be at least {least}, got {value}")
            if value > LARGEST:
                raise ValueError(f"{source}: {name} must be at most {LARGEST}, got {value}")
    for key in ("text_config", "vision_config"):
        if not isinstance(raw.get(key) or {}, Mapping):
            raise ValueError(f"{source}: {key} must be a JSON object, got {raw[key]!r}")


@contextlib.contextmanager
def one_sentence(source: Path) -> Generator[None]:
    """Whatever is raised while the config.json `source` is understood becomes one ValueError that names it: configs
    with wrong types and missing keys fail in many ways, inside transformers, too."""
    try:
        yield
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        text = reason(error)
        raise ValueError(text if str(source) in text else f"{source}: {text}") from error


def llama_text_config(config: "PretrainedConfig") -> TextConfig:
    """A transformers config of a Llama-like text model as ours. Raises ValueError for what the decoder layer does not
    compute."""
    if config.model_type not in TEXT_MODELS:
        raise ValueError(f"text model_type {config.model_type!r} is not supported here; only {', '.join(TEXT_MODELS)}")
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        raise ValueError(f"sliding_window {config.sliding_window} is not supported; only null")
    if config.hidden_act != "silu":
        raise ValueError(f"text hidden_act {config.hidden_act!r} is not supported; only silu")
    return TextConfig(
        **common_text_fields(config),
        rope=rope_config(config.rope_parameters),
        qkv_bias=config.model_type.startswith("qwen2"),
        qk_norm=config.model_type == "qwen3",
        mlp_bias=getattr(config, "mlp_bias", False),
    )


def gemma_text_config(config: "PretrainedConfig") -> TextConfig:
    """A transformers `Gemma3TextConfig` as ours. Raises ValueError for what is not computed here."""
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if getattr(config, name):
            raise ValueError(f"{name} {getattr(config, name)!r} is not supported in Gemma3")
    if config.hidden_activation != "gelu_pytorch_tanh":
        raise ValueError(f"hidden_activation {config.hidden_activation!r} is not supported; only gelu_pytorch_tanh")
    full, local = (rope_config(config.rope_parameters[name]) for name in (FULL, SLIDING))
    return TextConfig(
        **common_text_fields(config),
        rope=full,
        layer_kinds=tuple(
            LayerKind(local, config.sliding_window) if kind == SLIDING else LayerKind(full)
            for kind in config.layer_types
        ),
        qk_norm=True,
        post_norms=True,
        norms_from_one=True,
        activation="gelu_tanh",
        query_scale=config.query_pre_attn_scalar**-0.5,
        embedding_scale=config.hidden_size**0.5,
    )


def common_text_fields(config: "PretrainedConfig") -> dict[str, Any]:
    """The fields of `TextConfig` that every text model's config gives."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": getattr(config, "tie_word_embeddings", False),
        "attention_bias": getattr(config, "attention_bias", False),
        "max_position_embeddings": config.max_position_embeddings,
    }


def rope_config(parameters: dict[str, Any]) -> RopeConfig:
    """`rope_parameters` of a transformers 5 config (older spellings are converted by transformers on reading)."""
    # Beside `rope_type` there may still be the `type` of older files.
    known = {field.name for field in dataclasses.fields(RopeConfig)} - {"theta", "type"}
    values = {key: value for key, value in parameters.items() if key in known and value is not None}
    values["mrope_section"] = tuple(values.get("mrope_section", ()))
    return RopeConfig(theta=parameters["rope_theta"], type=parameters.get("rope_type", "default"), **values)


def published_text_fields(text: TextConfig) -> dict[str, Any]:
    """The inverse of `common_text_fields`, for the constructor of a transformers config."""
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "rms_norm_eps": text.rms_norm_eps,
        "tie_word_embeddings": text.tie_word_embeddings,
        "attention_bias": text.attention_bias,
        "max_position_embeddings": text.max_position_embeddings,
    }


def published_rope(rope: RopeConfig) -> dict[str, Any]:
    """The inverse of `rope_config`, for text models."""
    parameters = {"rope_type": rope.type, "rope_theta": rope.theta}
    if rope.type != "default":
        named = dataclasses.asdict(rope)
        parameters |= {key: value for key, value in named.items() if key not in ("type", "theta", "mrope_section")}
    return parameters
