"""The target families by `model_type`, and Hugging Face folders in and out of them."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jax.typing import DTypeLike

from jaxspec.checkpoints.configs import check_sizes, one_sentence
from jaxspec.checkpoints.foreign import draft_head, foreign_files, refuse_quantised
from jaxspec.checkpoints.names import NameTable, abstract, fill, to_tensors
from jaxspec.checkpoints.tensors import SINGLE, read_folder, read_json, write_file
from jaxspec.quantization import TARGET_PART
from jaxspec.sharding import check_heads
from jaxspec.targets.adapter import PromptAdapter
from jaxspec.targets.contract import VisionLanguageModel
from jaxspec.targets.gemma3 import Gemma3, Gemma3Adapter, Gemma3Config
from jaxspec.targets.llava import LLAVA_NAMES, Llava, LlavaAdapter, LlavaConfig
from jaxspec.targets.llava_next import LlavaNext, LlavaNextAdapter, LlavaNextConfig
from jaxspec.targets.processors import QwenProcessor, TextProcessor, load_processor
from jaxspec.targets.qwen2_5_vl import QWEN2_5_VL_NAMES, Qwen2_5VL, Qwen2_5VLConfig
from jaxspec.targets.qwen2_5_vl_adapter import Qwen2_5VLAdapter
from jaxspec.targets.text import TEXT_NAMES, TextModel, TextTargetConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family is read, and what the README's table says of it (jaxspec/targets/support.py)."""

    title: str
    architecture: str  # the transformers class that it is tested against
    model: Callable[..., VisionLanguageModel]
    config_from_hf: Callable[[transformers.PretrainedConfig], Any]
    adapter: Callable[[Any], PromptAdapter]  # of the config
    names: NameTable
    load_processor: Callable[[Path], Any] = load_processor
    images: bool = True  # any number per prompt
    video: bool = False
    drafters: str = "all below"  # tested to give the tokens of autoregressive decoding
    tolerance: float = 1e-5  # of float32 logits, largest difference over largest value; the parity tests read it here
    checked: str = "2026-11-27"  # when the parity tests last passed, ISO date


def text_family(title: str, architecture: str) -> Family:
    return Family(
        title,
        architecture,
        TextModel,
        TextTargetConfig.from_hf,
        PromptAdapter,
        TEXT_NAMES,
        TextProcessor.load,
        images=False,
        drafters="EAGLE-2, ViSpec, chain",
    )


FAMILIES = {
    "llava": Family(
        "LLaVA-1.5", "LlavaForConditionalGeneration", Llava, LlavaConfig.from_hf, LlavaAdapter, LLAVA_NAMES
    ),
    "llava_next": Family(
        "LLaVA-NeXT / LLaVA-1.6",
        "LlavaNextForConditionalGeneration",
        LlavaNext,
        LlavaNextConfig.from_hf,
        LlavaNextAdapter,
        LLAVA_NAMES,
    ),
    "qwen2_5_vl": Family(
        "Qwen2.5-VL",
        "Qwen2_5_VLForConditionalGeneration",
        Qwen2_5VL,
        Qwen2_5VLConfig.from_hf,
        Qwen2_5VLAdapter,
        QWEN2_5_VL_NAMES,
        QwenProcessor.load,
        video=True,
    ),
    "gemma3": Family(
        "Gemma3", "Gemma3ForConditionalGeneration", Gemma3, Gemma3Config.from_hf, Gemma3Adapter, LLAVA_NAMES
    ),
    "llama": text_family("Llama", "LlamaForCausalLM"),
    "mistral": text_family("Mistral", "MistralForCausalLM"),
    "qwen2": text_family("Qwen2 / Qwen2.5", "Qwen2ForCausalLM"),
    "qwen3": text_family("Qwen3", "Qwen3ForCausalLM"),
    "gemma3_text": text_family("Gemma3, text only", "Gemma3ForCausalLM"),
}


def family_of(hf_config: transformers.PretrainedConfig) -> Family:
    """Raises ValueError for a model_type without a family."""
    if hf_config.model_type not in FAMILIES:
        raise ValueError(f"model_type {hf_config.model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[hf_config.model_type]


def read_config(folder: Path) -> transformers.PretrainedConfig:
    """The folder's transformers config. Raises FileNotFoundError or ValueError, naming what the folder holds instead of
    a supported model, or the value that cannot be."""
    path = folder / "config.json"
    if not path.exists():
        if there := foreign_files(folder):
            raise ValueError(there)
        raise FileNotFoundError(f"no config.json in {folder}")
    raw = read_json(path)
    if "model_type" not in raw and (pipeline := raw.get("_class_name")):
        raise ValueError(f"{path} describes a part of a diffusers pipeline ({pipeline}), not a language model")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{path}: model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    refuse_quantised(raw, path)
    check_sizes(raw, path)
    with one_sentence(path):
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)


def config_from(folder: Path) -> tuple[Family, Any]:
    """The family of a Hugging Face folder and our config of its model. Raises as `read_config`, and ValueError for what
    the family does not compute."""
    hf_config = read_config(folder)
    family = family_of(hf_config)
    with one_sentence(folder / "config.json"):
        return family, family.config_from_hf(hf_config)


def load_model(
    folder: Path,
    dtype: DTypeLike = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    quantize: str | None = None,
) -> VisionLanguageModel:
    """The model of a Hugging Face folder with parameters in `dtype`, sharded where there is a mesh; with `quantize` the
    matrices of its text model are int8 (jaxspec.quantization). Raises ValueError also where `tensor` divides no heads
    (`check_heads`)."""
    family, config = config_from(folder)
    check_heads(config.text.num_heads, mesh)
    tensors = read_folder(folder)
    if head := draft_head(tensors):
        raise ValueError(f"{folder} holds {head}, a drafter and no target")
    config, tensors = settle_tying(config, tensors, family.names)
    model = abstract(lambda rngs: family.model(config, rngs=rngs))
    return fill(model, tensors, family.names, str(folder), dtype, mesh, quantize, TARGET_PART)


def settle_tying(config: Any, tensors: dict[str, np.ndarray], names: NameTable) -> tuple[Any, dict[str, np.ndarray]]:
    """Config and tensors where a tied config meets a folder that holds a head all the same: as in transformers, the
    head counts if it differs from the embedding."""
    by_name = {names.canonical(name): name for name in tensors}
    head = by_name.get(names.published("language_model.lm_head.kernel"))
    embedding = by_name.get(names.published("language_model.embed_tokens.embedding"))
    if head is None or embedding is None or not config.text.tie_word_embeddings:
        return config, tensors
    if same_values(tensors[head], tensors[embedding]):
        return config, {name: array for name, array in tensors.items() if name != head}
    return dataclasses.replace(config, text=dataclasses.replace(config.text, tie_word_embeddings=False)), tensors


def same_values(a: np.ndarray, b: np.ndarray, rows: int = 4096) -> bool:
    """Whether two arrays of rows are equal, read a few rows at a time."""
    parts = (slice(first, first + rows) for first in range(0, len(a), rows))
    return a.shape == b.shape and all(np.array_equal(a[part], b[part]) for part in parts)


def save_model(
    model: VisionLanguageModel,
    hf_config: transformers.PretrainedConfig,
    processor_folder: Path,
    folder: Path,
    dtype: DTypeLike,
) -> None:
    """A Hugging Face folder: config.json, model.safetensors in `dtype`, the processor's files. Replaces `folder`."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(processor_folder, temporary)
    hf_config.dtype = jnp.dtype(dtype).name
    tied = model.config.text.tie_word_embeddings
    hf_config.tie_word_embeddings = hf_config.get_text_config().tie_word_embeddings = tied
    hf_config.save_pretrained(temporary)
    tensors = to_tensors(model, family_of(hf_config).names, dtype)
    write_file(temporary / SINGLE, tensors)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
