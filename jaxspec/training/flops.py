"""How well a training step uses its machine: the operations its mathematics needs against what the devices could do."""

from typing import Any

import jax

PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
"""Dense bfloat16 operations per second of one device by the beginning of its `device_kind`, from the makers' data
sheets. The longest beginning counts."""


def flops_of(step: jax.stages.Wrapped, *arguments: Any) -> float:
    """Floating-point operations of one call of a jitted function, counted in its program before optimisation, so that
    they are those of the model on every backend. Bodies of loops count once (attention in blocks, logits a few columns
    at a time), custom kernels not at all: where there are any, it is a lower bound. Tracing is shared with the call
    itself."""
    return float((step.lower(*arguments).cost_analysis() or {}).get("flops", 0.0))


def peak_flops(device: jax.Device) -> float | None:
    """Of one device; None where the table does not know it."""
    known = [name for name in PEAK_FLOPS if device.device_kind.startswith(name)]
    return PEAK_FLOPS[max(known, key=len)] if known else None
