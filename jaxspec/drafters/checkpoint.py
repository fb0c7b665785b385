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
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxspec.checkpoints.configs import check_sizes, one_sentence
from jaxspec.checkpoints.finite import is_finite
from jaxspec.checkpoints.foreign import foreign_files, refuse_quantised
from jaxspec.checkpoints.names import abstract, fill, match, to_tensors
from jaxspec.checkpoints.tensors import SINGLE, read_folder, read_json, write_file
from jaxspec.drafters.contract import DraftModel, Method
from jaxspec.drafters.registry import METHODS, method_of
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.contract import VisionLanguageModel
from jaxspec.targets.registry import settle_tying

EMBEDDING = "embed_tokens.weight"
TREE_KEYS = {"depth": "depth", "top_k": "top_k", "total_token": "total_tokens"}  # as in published files
NOISE = "noise_weight"  # ours


def load_drafter_folder(
    folder: Path,
    model: VisionLanguageModel | None,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    quantize: str | None = None,
) -> tuple[DraftModel, TreeConfig]:
    """The draft model of a folder, on a mesh where there is one, and its tree; with `quantize` its matrices are int8
    (jaxspec.quantization). Raises FileNotFoundError or ValueError, naming what does not fit.

    Without the target's `model` (None) only the folder itself is checked.
    """
    raw, tensors, name = read_drafter_folder(folder)
    method = METHODS[name]
    sizes = {}
    if model is not None:
        sizes = {"hidden_size": model.config.text.hidden_size, "vocab_size": model.vocab_size}
    with one_sentence(folder):
        config = method.read_config(sizes | raw)
        tree = tree_of(raw, method)
    config = method.complete_config(config, tensors)
    if model is not None and (problems := method.misfits(config, model.config)):
        raise ValueError(f"drafter {folder} was made for another target: {', '.join(problems)}")
    embedding = tensors.pop(EMBEDDING, None) if method.copies_embedding else None
    if model is not None and embedding is not None:
        check_embedding(embedding, model, folder)
    config, tensors = settle_tying(config, tensors, method.names)
    draft_model = abstract(lambda rngs: method.module(config, rngs=rngs))
    return fill(draft_model, tensors, method.names, str(folder), dtype, mesh, quantize=quantize), tree


def save_drafter_folder(
    draft_model: DraftModel,
    name: str,
    tree: TreeConfig,
    model: VisionLanguageModel | None,
    folder: Path,
    dtype: DTypeLike,
    about: dict | None = None,
    embedding: np.ndarray | None = None,
) -> None:
    """Write a draft model of the method `name`; `about` goes under `jaxspec` of config.json. Replaces `folder`.

    `embedding` is written where the method's files hold a copy of the target's: that of its `model`, unless given.
    Raises OSError where the files cannot be written; `folder` is then as it was.
    """
    method = METHODS[name]
    noise = {} if tree.noise_weight == 1 else {NOISE: tree.noise_weight}
    config = method.write_config(draft_model.config) | {
        "dtype": jnp.dtype(dtype).name,
        **{theirs: getattr(tree, ours) for theirs, ours in TREE_KEYS.items()},
        **noise,
        "jaxspec": {"method": name, **(about or {})},
    }
    tensors = to_tensors(draft_model, method.names, dtype)
    if method.copies_embedding:
        if embedding is None:
            if model is None:
                raise ValueError(f"the files of a {name} drafter hold the target's embedding: give one or the target")
            embedding = np.asarray(model.embedding)
        tensors[EMBEDDING] = embedding.astype(dtype)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_file(temporary / SINGLE, tensors)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)  # half a drafter would only fill the disk
        raise
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def is_drafter_folder(folder: Path) -> bool:
    """Whether a folder holds a complete drafter of a known method; no values are read."""
    try:
        raw, tensors, name = read_drafter_folder(folder)
        method = METHODS[name]
        config = method.complete_config(method.read_config(raw), tensors)
        if method.copies_embedding:
            tensors.pop(EMBEDDING, None)
        match(abstract(lambda rngs: method.module(config, rngs=rngs)), tensors, method.names, str(folder))
    except (ValueError, OSError):
        return False
    return True


def read_drafter_folder(folder: Path) -> tuple[dict, dict[str, np.ndarray], str]:
    """config.json, the tensors (no values are read yet) and the name of the method. Raises FileNotFoundError, or
    ValueError that names what the folder holds instead of a known drafter."""
    path = folder / "config.json"
    if not path.exists():
        if there := foreign_files(folder):
            raise ValueError(there)
        raise FileNotFoundError(f"no config.json in {folder}: not a drafter folder")
    raw = read_json(path)
    refuse_quantised(raw, path)
    check_sizes(raw, path)
    if not isinstance(raw.get("jaxspec", {}), dict):
        raise ValueError(f"{path}: jaxspec must be a JSON object, got {raw['jaxspec']!r}")
    tensors = read_folder(folder)
    with one_sentence(folder):
        return raw, tensors, method_of(raw, tensors)


def tree_of(raw: dict, method: Method) -> TreeConfig:
    """The tree that config.json names, or the published one: a language model's config may have a `top_k` of its own
    (for sampling), but no whole tree."""
    if not TREE_KEYS.keys() <= raw.keys():
        return method.tree
    return TreeConfig(**{ours: raw[theirs] for theirs, ours in TREE_KEYS.items()}, noise_weight=raw.get(NOISE, 1.0))


def check_embedding(embedding: np.ndarray, model: VisionLanguageModel, folder: Path) -> None:
    """Raises ValueError where the drafter's copy of the embedding is not this target's, up to a change of dtype."""
    if not is_finite(embedding):
        raise ValueError(f"drafter {folder} holds weights that are not finite: {EMBEDDING}")
    theirs = np.asarray(model.embedding, np.float32)
    if embedding.shape != theirs.shape:
        raise ValueError(f"drafter {folder}: {EMBEDDING} is {embedding.shape}, the target's embedding {theirs.shape}")
    sample = np.linspace(0, len(theirs) - 1, min(len(theirs), 256)).astype(int)
    distance = np.abs(embedding[sample].astype(np.float32) - theirs[sample]).max()
    if distance > 0.02 * np.abs(theirs[sample]).max():
        raise ValueError(
            f"drafter {folder} was made for another target: its {EMBEDDING} differs from the target's by {distance:.3g}"
        )
