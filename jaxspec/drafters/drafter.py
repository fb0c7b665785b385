"""A loaded drafter: its module, its tree, and what its folder says about itself."""

import dataclasses
from pathlib import Path

from flax import nnx
from jax.sharding import Mesh

from jaxspec.checkpoints.hub import resolve_folder
from jaxspec.drafters.checkpoint import load_drafter_folder, read_drafter_folder
from jaxspec.drafters.contract import DraftModel
from jaxspec.drafters.registry import METHODS
from jaxspec.quantization import check_scheme
from jaxspec.sharding import checked_mesh
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.target import Target


@dataclasses.dataclass(frozen=True)
class Drafter:
    """Made by `load_drafter`."""

    model: DraftModel
    tree: TreeConfig
    method: str
    about: dict
    """The `jaxspec` entry of config.json: how the drafter was trained, what it accepted; {} if published elsewhere."""
    target_fingerprint: str | None = None
    """`Target.fingerprint()` of the target that it was loaded for; None where any target will do, or nobody knows."""
    quantize: str | None = None
    """How its matrices are quantised."""


def load_drafter(
    path_or_repo_id: str | Path, target: Target, mesh: Mesh | None = None, quantize: str | None = None
) -> Drafter:
    """A drafter for a loaded target, from a folder or from the hub; parameters in the target's dtype, on `mesh`, by
    default the target's: split like its own. A method without parameters ("lookup") is loaded by its name, unless a
    folder has that name.

    `quantize="int8"` makes all its matrices int8 while they are read (docs/QUANTIZATION.md): drafts may be accepted
    less often, answers cannot change. Where the drafter uses the target's embedding and LM head, these are as the
    target's are.

    Raises FileNotFoundError, or ValueError where it was made for another target, its tensors do not fit or are not
    finite, the folder holds something else (EAGLE-3, an adapter, other formats), by name, or `mesh` is of other devices
    than the target's.
    """
    if not isinstance(target, Target):
        raise ValueError(f"target must be a Target, from load_target; got {type(target).__name__}")
    check_scheme(quantize)
    mesh, theirs = checked_mesh(mesh), target.mesh
    if mesh is not None and set(mesh.devices.flat) != (set() if theirs is None else set(theirs.devices.flat)):
        raise ValueError("a drafter's mesh must be of the devices that its target lies on")
    method = METHODS.get(str(path_or_repo_id))
    if method and method.without_folder is not None and not Path(path_or_repo_id).is_dir():
        model = method.module(method.without_folder, rngs=nnx.Rngs(0))
        return Drafter(model, method.tree, str(path_or_repo_id), {})
    folder = resolve_folder(path_or_repo_id)
    raw, _, name = read_drafter_folder(folder)
    about, own = raw.get("jaxspec", {}), target.fingerprint()
    recorded = about.get("target_fingerprint")
    if recorded is not None and own is not None and recorded != own:
        raise ValueError(f"drafter {folder} was trained for the target {recorded}, not for {own}")
    METHODS[name].check_folder(folder, target.tokenizer)
    model, tree = load_drafter_folder(folder, target.model, target.model.dtype, mesh or theirs, quantize)
    return Drafter(model, tree, name, about, own, quantize)
