"""Where a checkpoint is: in the package, in a local folder, or in a repository of the Hugging Face hub."""

import os
from pathlib import Path

from huggingface_hub import list_repo_files, snapshot_download

from jaxspec.checkpoints.foreign import foreign_file, foreign_weights
from jaxspec.checks import one_line, reason, shown

EMBEDDED = "demo"
PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja")


def resolve_folder(path_or_repo_id: str | Path) -> Path:
    """A local folder, downloading a hub repository where the argument is a repo id.

    "demo" is the embedded target and "demo:METHOD" its drafter of that method. These names mean the same everywhere,
    since recipes and records are read in other places than they were written in: a folder of your own that is called
    demo is "./demo".

    Raises FileNotFoundError where there is no such folder or repository, or no such embedded drafter; ValueError for
    what is no path, for a file, and for a repository whose weights have another format, naming it.
    """
    if not isinstance(path_or_repo_id, str | Path):
        raise ValueError(f"a folder must be a path or a repo id, got {shown(path_or_repo_id)}")
    name, colon, method = str(path_or_repo_id).partition(":")
    if name == EMBEDDED and isinstance(path_or_repo_id, str):
        from jaxspec import demo  # the only thing below it that knows of the demo

        return demo.drafter_path(method) if colon else demo.target_path()
    path = os.path.expanduser(path_or_repo_id)
    if os.path.isdir(path):  # also of what no system takes for a path, where Path's own would raise
        return Path(path)
    if os.path.isfile(path):
        raise ValueError(foreign_file(Path(path)))
    if os.path.isabs(path) or str(path_or_repo_id).count("/") != 1 or str(path_or_repo_id).startswith("."):
        name = one_line(str(path_or_repo_id), 200)
        raise FileNotFoundError(f"no folder {name} (and it is no hub repo id of the form owner/name)")
    try:
        folder = Path(snapshot_download(str(path_or_repo_id), allow_patterns=list(PATTERNS)))
        # Weights that cannot be read are not downloaded only to be refused.
        names = [] if any(folder.glob("*.safetensors")) else list_repo_files(str(path_or_repo_id))
    except (OSError, ValueError) as error:  # no such repository, no access to it, no network, no repo id at all
        raise FileNotFoundError(
            f"no folder {path_or_repo_id}, and the hub does not give it as a repository: {reason(error)}"
        ) from error
    if there := foreign_weights((name for name in names if "/" not in name), f"repository {path_or_repo_id}"):
        raise ValueError(there)
    return folder
