"""Drafter folders in and out, in the layout the authors publish: a Llama-style config.json and `model.safetensors`.

Tensor names of EAGLE and ViSpec: `fc`, `layers.0.*`, `embed_tokens` (a copy of the target's, used here only to see that
the drafter belongs to the target) and for ViSpec `imadpt.*`, `img_fc`. Folders written here say more about themselves
under the key `jaxspec` of config.json, which other readers ignore.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import transformers
from safetensors.numpy import save_file

from jaxspec.checkpoints.configs import llama_text_config
from jaxspec.checkpoints.names import NameTable, abstract, fill, to_tensors
from jaxspec.checkpoints.tensors import read_folder, read_json
from jaxspec.drafters.eagle import EagleConfig, EagleHead
from jaxspec.drafters.vispec import ViSpecConfig, ViSpecHead
from jaxspec.speculation.tree import TreeConfig

EMBEDDING = "embed_tokens.weight"
NAMES = NameTable(ignored=(r".*\.rotary_emb\.inv_freq",))
METHODS = {"eagle2": EagleHead, "vispec": ViSpecHead}
PUBLISHED_TREES = {"eagle2": TreeConfig(5, 10, 60), "vispec": TreeConfig(3, 8, 30)}  # arXiv 2406.16858; 2509.15235


def load_drafter_folder(folder: Path, target, dtype=jnp.float32) -> tuple[EagleHead, TreeConfig]:
    """The head of a folder and its tree. Raises FileNotFoundError or ValueError, naming what does not fit."""
    raw = read_drafter_config(folder)
    config = head_config(raw, folder)
    check_fits(config, target, folder)
    tensors = read_folder(folder)
    embedding = tensors.pop(EMBEDDING, None)
    if embedding is not None:
        check_embedding(embedding, target, folder)
    method = method_of(raw)
    head = abstract(lambda rngs: METHODS[method](config, rngs=rngs))
    return fill(head, tensors, NAMES, str(folder), dtype), tree_of(raw, method)


def save_drafter_folder(
    head: EagleHead, tree: TreeConfig, target, folder: Path, dtype, about: dict | None = None
) -> None:
    """Write the published layout in `dtype`; `about` goes under `jaxspec` of config.json. Replaces `folder`."""
    text = head.config.text
    rope = {"rope_type": text.rope.type, "rope_theta": text.rope.theta}
    if text.rope.type != "default":
        rope.update(dataclasses.asdict(text.rope), rope_type=text.rope.type)
        rope.pop("type")
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=text.num_heads,
        num_key_value_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        rms_norm_eps=text.rms_norm_eps,
        rope_parameters=rope,
        max_position_embeddings=text.max_position_embeddings,
        dtype=jnp.dtype(dtype).name,
    ).to_dict()
    vispec = isinstance(head.config, ViSpecConfig)
    config |= {
        "num_q": head.config.num_q if vispec else 0,
        "qkv_bias": head.config.qkv_bias,
        "bias": head.config.fc_bias,
        "depth": tree.depth,
        "top_k": tree.top_k,
        "total_token": tree.total_tokens,
        "jaxspec": {"method": "vispec" if vispec else "eagle2", **(about or {})},
    }
    tensors = to_tensors(head, NAMES, dtype)
    tensors[EMBEDDING] = np.asarray(target.language_model.embed_tokens.embedding[...]).astype(dtype)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def read_drafter_config(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"no config.json in {folder}: not a drafter folder")
    return read_json(path)


def method_of(raw: dict) -> str:
    """`jaxspec.method` where we wrote it; else ViSpec's files are known by their `num_q`."""
    method = raw.get("jaxspec", {}).get("method") or ("vispec" if raw.get("num_q") else "eagle2")
    if method not in METHODS:
        raise ValueError(f"drafter method {method!r} is not known; known: {', '.join(METHODS)}")
    return method


def tree_of(raw: dict, method: str) -> TreeConfig:
    default = PUBLISHED_TREES[method]
    return TreeConfig(
        depth=raw.get("depth", default.depth),
        top_k=raw.get("top_k", default.top_k),
        total_tokens=raw.get("total_token", default.total_tokens),
    )


def head_config(raw: dict, folder: Path) -> EagleConfig:
    layers = raw.get("num_hidden_layers", 1)
    if layers != 1:
        raise ValueError(f"{folder}: a draft head has 1 layer, config.json says {layers}")
    text = llama_text_config(transformers.LlamaConfig.from_dict({**raw, "model_type": "llama"}))
    common = {"text": text, "qkv_bias": raw.get("qkv_bias", False), "fc_bias": raw.get("bias", True)}
    return ViSpecConfig(**common, num_q=raw.get("num_q", 2)) if method_of(raw) == "vispec" else EagleConfig(**common)


def check_fits(config: EagleConfig, target, folder: Path) -> None:
    """Raises ValueError that lists every way in which the drafter cannot serve this target."""
    ours, theirs = config.text, target.config.text
    problems = [
        f"{name} {getattr(ours, name)} (target: {getattr(theirs, name)})"
        for name in ("hidden_size", "vocab_size")
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if problems:
        raise ValueError(f"drafter {folder} was made for another target: {', '.join(problems)}")


def check_embedding(embedding: np.ndarray, target, folder: Path) -> None:
    """Raises ValueError where the drafter's copy of the embedding is not this target's, up to a change of dtype."""
    theirs = np.asarray(target.language_model.embed_tokens.embedding[...], np.float32)
    if embedding.shape != theirs.shape:
        raise ValueError(f"drafter {folder}: {EMBEDDING} is {embedding.shape}, the target's embedding {theirs.shape}")
    sample = np.linspace(0, len(theirs) - 1, min(len(theirs), 256)).astype(int)
    distance = np.abs(embedding[sample].astype(np.float32) - theirs[sample]).max()
    if distance > 0.02 * np.abs(theirs[sample]).max():
        raise ValueError(
            f"drafter {folder} was made for another target: its {EMBEDDING} differs from the target's by {distance:.3g}"
        )
