"""Drafter folders in and out, in the layout the authors publish: config.json and `model.safetensors`.

Tensor names of EAGLE and ViSpec: `fc`, `layers.0.*`, `embed_tokens` (a copy of the target's, used here only to see that
the drafter belongs to the target) and for ViSpec `imadpt.*`, `img_fc`. Of Medusa: `{k}.0.linear` for head k = 0, 1, ..
and `{k}.1` where it has an LM head of its own. The folder of a small text model, as published, is a drafter as well
(massv.py). Folders written here say more about themselves under the key `jaxspec` of config.json, which other readers
ignore.
"""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from jaxspec.checkpoints.names import abstract, fill, to_tensors
from jaxspec.checkpoints.tensors import read_folder, read_json
from jaxspec.drafters.contract import Method
from jaxspec.drafters.registry import METHODS, method_of
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.registry import settle_tying

EMBEDDING = "embed_tokens.weight"
TREE_KEYS = {"depth": "depth", "top_k": "top_k", "total_token": "total_tokens"}  # as in published files


def load_drafter_folder(folder: Path, target, dtype=jnp.float32) -> tuple[nnx.Module, TreeConfig]:
    """The drafter of a folder and its tree. Raises FileNotFoundError or ValueError, naming what does not fit."""
    raw = read_drafter_config(folder)
    text, tensors = target.config.text, read_folder(folder)
    method = METHODS[method_of(raw, tensors)]
    try:
        config = method.read_config({"hidden_size": text.hidden_size, "vocab_size": text.vocab_size} | raw)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    config = method.complete_config(config, tensors)
    if problems := method.misfits(config, target.config):
        raise ValueError(f"drafter {folder} was made for another target: {', '.join(problems)}")
    if method.copies_embedding and EMBEDDING in tensors:
        check_embedding(tensors.pop(EMBEDDING), target, folder)
    config, tensors = settle_tying(config, tensors, method.names)
    drafter = abstract(lambda rngs: method.module(config, rngs=rngs))
    return fill(drafter, tensors, method.names, str(folder), dtype), tree_of(raw, method)


def save_drafter_folder(
    drafter: nnx.Module, name: str, tree: TreeConfig, target, folder: Path, dtype, about: dict | None = None
) -> None:
    """Write a drafter of the method `name`; `about` goes under `jaxspec` of config.json. Replaces `folder`."""
    method = METHODS[name]
    config = method.write_config(drafter.config) | {
        "dtype": jnp.dtype(dtype).name,
        **{theirs: getattr(tree, ours) for theirs, ours in TREE_KEYS.items()},
        "jaxspec": {"method": name, **(about or {})},
    }
    tensors = to_tensors(drafter, method.names, dtype)
    if method.copies_embedding:
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


def tree_of(raw: dict, method: Method) -> TreeConfig:
    """The tree that config.json names, or the published one: a language model's config may have a `top_k` of its own
    (for sampling), but no whole tree."""
    if not TREE_KEYS.keys() <= raw.keys():
        return method.tree
    return TreeConfig(**{ours: raw[theirs] for theirs, ours in TREE_KEYS.items()})


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
