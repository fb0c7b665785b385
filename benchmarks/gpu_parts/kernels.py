"""With which kernels of attention a device is measured: all that suit it, but for those that fail there."""

import json

import jax

from benchmarks.gpu_parts.part import Part

ON = {"cpu": ("plain", "xla"), "gpu": ("plain", "xla", "cudnn"), "tpu": ("plain", "pallas")}
"""Names in `jaxspec.kernels.attention.KERNELS`, what decides the tokens first, what may bring the device down last."""


def suiting(dtype: str, platform: str | None = None) -> tuple[str, ...]:
    """Those that a platform, by default the one at hand, has for that dtype. Others would fall back to the plain form
    and be timed under a wrong name."""
    platform = platform or jax.default_backend()
    lacking = {("cpu", "bfloat16"): "xla", ("gpu", "float32"): "cudnn"}.get((platform, dtype))
    return tuple(name for name in ON.get(platform, ("plain",)) if name != lacking)


def usable(part: Part, dtype: str) -> tuple[str, ...]:
    """The same without those that failed in the part `ceilings`, or of which it came to tell nothing; they are noted as
    left out. All of them where it did not come to attention."""
    names, file = suiting(dtype), part.file.with_name("ceilings.json")
    told = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = [row for row in told if row["measure"] == "attention"]
    failed = {row["kernel"] for row in rows if row.get("failed")}
    works = {row["kernel"] for row in rows} - failed if rows else set(names)
    for name in names[1:]:
        if name not in works:
            why = "it failed there" if name in failed else "nothing is told of it there"
            part.left_out.append(f"attention by {name}, {dtype}: see the part ceilings, {why}")
    return tuple(name for name in names if name == "plain" or name in works)
