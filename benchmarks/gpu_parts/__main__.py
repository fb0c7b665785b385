"""One part, in this process: `python -m benchmarks.gpu_parts NAME --file F --seconds S [--tiny] [--profile]`. It is
`benchmarks/gpu.py` that starts it."""

import argparse
import datetime
import importlib
import importlib.metadata
import os
import sys
from pathlib import Path

from benchmarks.gpu import NO_GPU
from benchmarks.gpu_parts.part import Part

MODULES = {
    "ceilings": "ceilings",
    "llava-7b": "decoding",
    "equality": "equality",
    "embedded": "embedded",
    "training": "training",
    "qwen-7b": "decoding",
    "transformers": "torch_peer",
}
"""The module of each part; its `measure(part)` does the work."""


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("name", choices=MODULES)
    arguments.add_argument("--file", type=Path, required=True)
    arguments.add_argument("--seconds", type=float, required=True)
    arguments.add_argument("--tiny", action="store_true")
    arguments.add_argument("--profile", action="store_true")
    given = arguments.parse_args()
    part = Part(given.name, given.file, given.seconds, given.tiny, given.profile)
    part.about = {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")}
    if given.name != "transformers":  # where JAX would take the card from torch
        on_device(part)
    part.save()
    try:
        importlib.import_module(f"benchmarks.gpu_parts.{MODULES[part.name]}").measure(part)
    except Exception as error:
        part.failed(part.name, error)
    part.about |= memory(part)
    part.save(ended=True)
    # Threads that still compile what nobody waits for any more do not hold the card.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if part.errors else 0)


def on_device(part: Part) -> None:
    """Notes the device, and counts what is compiled. Ends the process where there is no GPU and it is not tiny."""
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu" and not part.tiny:
        sys.exit(NO_GPU)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    part.about |= {"device": device.device_kind, "platform": device.platform, **versions}
    part.about |= {"compilations": 0, "compile_seconds": 0.0}

    def count(event: str, seconds: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            part.about["compilations"] += 1
            part.about["compile_seconds"] += seconds

    jax.monitoring.register_event_duration_secs_listener(count)


def memory(part: Part) -> dict[str, float]:
    if "device" not in part.about:
        return {}
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_gib": stats["peak_bytes_in_use"] / 2**30} if "peak_bytes_in_use" in stats else {}


if __name__ == "__main__":
    main()
