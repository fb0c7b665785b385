"""Draws docs/page.png: the web page of the embedded model, in a headless Chromium, after a comparison.

python docs/page.py [FILE] [--width 1280] [--dark]
"""

import dataclasses
import socket
import sys
import threading
from pathlib import Path
from shutil import which

import tyro
import uvicorn
from fastapi import FastAPI
from PIL import Image
from playwright.sync_api import sync_playwright

import jaxspec
from jaxspec import demo
from jaxspec.serving.engine import Engine
from jaxspec.serving.page import mount_page


@dataclasses.dataclass(frozen=True)
class Options:
    """Draw the web page."""

    file: tyro.conf.Positional[Path] = Path(__file__).with_suffix(".png")
    width: int = 1280
    dark: bool = False


def main(options: Options) -> None:
    target = jaxspec.load_target(demo.target_path())
    drafter = jaxspec.load_drafter(demo.drafter_path("vispec"), target)
    with Engine(target, drafter) as engine, socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(mount_page(FastAPI(), engine), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            draw(f"http://127.0.0.1:{listening.getsockname()[1]}", options)
        finally:
            server.should_exit = True
            thread.join()


def draw(address: str, options: Options) -> None:
    path = which("chromium") or which("chromium-browser") or which("google-chrome")
    if path is None:
        sys.exit("there is no Chromium on PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": options.width, "height": 780}, color_scheme="dark" if options.dark else "light"
        )
        page.goto(address)
        page.set_input_files("#picture input[type=file]", demo.picture_path())
        page.locator("#picture img").wait_for()
        for _ in range(2):  # the second time everything has been compiled
            page.click("#compare")
            page.locator("#compare:disabled").wait_for()
            page.locator("#compare:enabled").wait_for(timeout=300_000)
        page.locator(".verdict").wait_for()
        page.mouse.move(0, 0)
        page.screenshot(path=options.file, full_page=True)
        browser.close()
    # 256 colours are enough for it, in a third of the bytes.
    Image.open(options.file).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(options.file, optimize=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
