"""What of Gradio's server the page's visitors may use: no more than the page needs.

Gradio also serves files of the machine, downloads what requests name by URL, keeps statistics and edits apps. Mounted
in another app it even copies any readable file to where it serves files from, if a request names its path as an input.
"""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

API = "/gradio_api"
PATHS = {
    *("/", "/config", "/login", "/login/", "/logout", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"),
    *(f"{API}/{name}" for name in ("queue/join", "queue/data", "run/predict", "upload", "upload_progress", "cancel")),
}
HEARTBEAT = f"{API}/heartbeat/"
"""The beginning of the path of a request that a tab of the page keeps open as long as it is."""
FOLDERS = "/assets/", "/static/", HEARTBEAT
FILE = f"{API}/file="


class Gate:
    """Lets the requests through that the page sends, and answers all others with 404."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI app, mounted where `app` would be."""
        if scope["type"] == "http" and needed(scope["path"].removeprefix(scope.get("root_path", "")) or "/"):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await PlainTextResponse("not found", 404)(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})


def needed(path: str) -> bool:
    """Whether the page sends requests to this path."""
    if path.startswith(FILE):
        return uploaded(path.removeprefix(FILE))
    return path in PATHS or path.startswith(FOLDERS)


def uploaded(path: Any) -> bool:
    """Whether it is the path of a file among the uploads."""
    if not isinstance(path, str) or "\0" in path:
        return False
    return Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve())


def uploads_only(value: Any) -> bool:
    """Whether all files in what a browser sent, at any depth, are uploaded ones."""
    if isinstance(value, dict):
        outside = value.get("path") is not None and not uploaded(value["path"])
        return not outside and all(map(uploads_only, value.values()))
    return not isinstance(value, list) or all(map(uploads_only, value))


class Page(gr.Blocks):
    """Blocks whose inputs can be uploaded files and nothing else."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **options: Any) -> list[Any]:
        """As Gradio's. Raises gradio.Error for the path of another file, or a URL."""
        if not uploads_only(inputs):
            raise gr.Error("the page takes uploaded pictures only")
        return await super().preprocess_data(block_fn, inputs, *rest, **options)
