"""Folders that hold something else than plain weights in safetensors files, named in one sentence: quantised weights,
adapters, pipelines, draft heads, other file formats.

What a config says of itself comes first. Where it says nothing, names of tensors and of files tell.
"""

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

QUANTISED = (
    (r"qweight|qzeros|g_idx", "GPTQ or AWQ"),
    (r"weight_packed|weight_shape|weight_zero_point|weight_global_scale|input_global_scale", "compressed-tensors"),
    (r"weight_scale_inv|weight_scale(_2)?|input_scale|activation_scale|[qkv]_scale", "fp8 or int8 with scales"),
    (r"(nested_)?(absmax|quant_map)|quant_state\.bitsandbytes__\w+|SCB|weight_format", "bitsandbytes"),
    (r"W_q|weight\._data|weight\._scale|weight\.scale|weight_scales", "HQQ, quanto or EETQ"),
    (r"codebooks|codes|Qidxs\w*|SV|SU", "AQLM or QuIP#"),
    (r"\w+_blocks", "mxfp4"),
)
"""Last parts of the names of tensors that only quantised weights have, and the methods that write them."""

FORMATS = (
    ("*.gguf", "GGUF, llama.cpp's format"),
    ("consolidated*.safetensors", "the authors' own layout"),
    ("*.bin", "PyTorch's format"),
    ("*.pt", "PyTorch's format"),
    ("*.pth", "PyTorch's format"),
    ("*.ckpt", "PyTorch's format"),
    ("*.msgpack", "Flax's format"),
    ("*.h5", "TensorFlow's format"),
    ("*.onnx", "ONNX"),
    ("*.safetensors", "not named as a model's"),
)
NO_WEIGHTS = re.compile(r"training_args\.bin|(optimizer|scheduler|scaler|rng_state).*|tokenizer.*|adapter_.*")
"""Files of these formats that training leaves beside the weights."""

PLAIN = "quantised weights are not supported, use the float16, bfloat16 or float32 ones that they were made from"


def refuse_quantised(config: Mapping[str, Any], source: Path) -> None:
    """Raises ValueError where a config.json says that its weights are quantised, naming the method."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    for part in parts:
        for key in ("quantization_config", "compression_config", "quantization"):
            if (said := part.get(key)) and (method := method_of(said)):
                raise ValueError(f"{source} says that its weights are quantised ({method}); {PLAIN}")


def method_of(said: Any) -> str | None:
    """How a `quantization_config` calls itself; None for one that is switched off."""
    if not isinstance(said, Mapping):
        return str(said)
    switches = {name: said.get(name) for name in ("load_in_8bit", "load_in_4bit") if name in said}
    if switches and not any(switches.values()):
        return None
    method = said.get("quant_method") or said.get("quant_algo") or ("bitsandbytes" if switches else "no method named")
    bits = next((said[name] for name in ("bits", "w_bit", "nbits") if name in said), None)
    bits = bits or next((name[8] for name, on in switches.items() if on), None)
    return f"{method}, {bits} bits" if bits else str(method)


def foreign_tensors(names: Iterable[str], source: str) -> str | None:
    """A sentence for tensors that only quantised weights or an EAGLE-3 head have."""
    names = list(names)
    for pattern, method in QUANTISED:
        found = [name for name in names if re.search(rf"\.(?:{pattern})$", name)]
        if found:
            return f"{source} holds quantised weights ({method}: {counted(found, 1)}); {PLAIN}"
    if marks := eagle3_marks(names):
        return f"{source} holds an EAGLE-3 head ({counted(marks, 2)}), which is not supported"
    return None


def says_eagle3(config: Mapping[str, Any]) -> bool:
    """Whether a config.json calls itself EAGLE-3's, in any of the places where its trainers write that."""
    keys = ("architectures", "model_type", "speculators_model_type", "speculators_config", "speculative_algorithm")
    return bool(re.search(r"eagle[-_ ]?3", json.dumps([config.get(key) for key in keys]), re.IGNORECASE))


def eagle3_marks(names: Iterable[str]) -> list[str]:
    """The names that no head but EAGLE-3's has: its vocabulary maps, and the norms of its layer."""
    return [name for name in names if re.search(r"(^|\.)(d2t|t2d|midlayer\..*|hidden_norm\.weight)$", name)]


def draft_head(names: Iterable[str]) -> str | None:
    """What kind of published draft head has tensors of these names, where it is one."""
    names = set(names)
    if any(re.match(r"(model|language_model)\.", name) for name in names):
        return None
    if "fc.weight" in names and any(name.startswith("layers.0.") for name in names):
        return "an EAGLE head"
    return "Medusa heads" if any(re.fullmatch(r"\d+\.0\.linear\.weight", name) for name in names) else None


def foreign_files(folder: Path) -> str | None:
    """A sentence for a folder that cannot be read: what there is instead of a model in safetensors files, if known."""
    if sentence := adapter(folder):
        return sentence
    pipeline = folder / "model_index.json"
    if pipeline.exists():
        return f"{folder} is a diffusers pipeline ({said_in(pipeline).get('_class_name')}), not a language model"
    if (folder / "model.safetensors").exists() or (folder / "model.safetensors.index.json").exists():
        return None
    shards = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))
    if shards:
        return f"{folder} holds shards ({counted(shards, 2)}) without their model.safetensors.index.json"
    return foreign_weights((path.name for path in folder.glob("*")), str(folder))


def foreign_weights(names: Iterable[str], source: str) -> str | None:
    """A sentence for names of files among which are weights in another format."""
    names = sorted(name for name in names if not NO_WEIGHTS.fullmatch(name))
    for pattern, format_name in FORMATS:
        if found := fnmatch.filter(names, pattern):
            return (
                f"{source} holds its weights as {counted(found, 2)} ({format_name}); only model.safetensors or its "
                "shards are read: save the model again from the library that reads this, as safetensors"
            )
    return None


def foreign_file(path: Path) -> str:
    """A sentence for a file that is given where a folder is wanted, naming its format where that is not ours."""
    formats = [
        name for pattern, name in FORMATS if fnmatch.fnmatch(path.name, pattern) and path.suffix != ".safetensors"
    ]
    said = f" ({formats[0]})" if formats else ""
    return f"{path} is a file{said}; what is read is a folder with config.json and model.safetensors or its shards"


def adapter(folder: Path) -> str | None:
    """A sentence for a folder of a PEFT adapter, which changes another folder's weights."""
    path = folder / "adapter_config.json"
    weights = sorted(folder.glob("adapter_model.*"))
    if not path.exists() and not weights:
        return None
    said = said_in(path)
    kind, base = said.get("peft_type") or "PEFT", said.get("base_model_name_or_path")
    return (
        f"{folder} holds a {'LoRA' if kind == 'LORA' else kind} adapter{f' of {base}' if base else ''}, not a model: "
        "merge it into its base model (peft: merge_and_unload) and load the result"
    )


def said_in(path: Path) -> dict[str, Any]:
    """The JSON object of a file; {} where there is none, for the file's name says enough."""
    try:
        value = json.loads(path.read_text())
    except (ValueError, OSError):
        return {}
    return value if isinstance(value, dict) else {}


def counted(names: list[str], shown: int) -> str:
    """The first few names, and how many there are beside them."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
