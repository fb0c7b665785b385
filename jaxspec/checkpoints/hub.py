"""Where a checkpoint is: a local folder, or a repository of the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import snapshot_download

PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja")


def resolve_folder(path_or_repo_id: str | Path) -> Path:
    """A local folder, downloading a hub repository where the argument is a repo id."""
    path = Path(path_or_repo_id).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or str(path_or_repo_id).count("/") != 1 or str(path_or_repo_id).startswith("."):
        raise FileNotFoundError(f"no folder {path_or_repo_id} (and it is no hub repo id of the form owner/name)")
    return Path(snapshot_download(str(path_or_repo_id), allow_patterns=list(PATTERNS)))
