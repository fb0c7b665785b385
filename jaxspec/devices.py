"""What devices can do at most, from the makers' data sheets."""

from typing import NamedTuple

import jax


class Peaks(NamedTuple):
    """Of one device."""

    flops: float
    """Dense bfloat16 operations per second (float16 where a device has no bfloat16)."""
    bandwidth: float
    """Bytes per second of its memory."""


PEAKS = {
    "NVIDIA A100": Peaks(312e12, 2.0e12),
    "NVIDIA A100-SXM4-40GB": Peaks(312e12, 1.56e12),
    "NVIDIA H100": Peaks(989e12, 3.35e12),
    "NVIDIA H100 PCIe": Peaks(756e12, 2.0e12),
    "NVIDIA H200": Peaks(989e12, 4.8e12),
    "NVIDIA L4": Peaks(121e12, 3.0e11),
    "NVIDIA L40": Peaks(181e12, 8.6e11),
    "NVIDIA L40S": Peaks(362e12, 8.6e11),
    "Tesla T4": Peaks(65e12, 3.2e11),
    "TPU v4": Peaks(275e12, 1.2e12),
    "TPU v5 lite": Peaks(197e12, 8.2e11),
    "TPU v5e": Peaks(197e12, 8.2e11),
    "TPU v5": Peaks(459e12, 2.77e12),
    "TPU v5p": Peaks(459e12, 2.77e12),
    "TPU v6 lite": Peaks(918e12, 1.64e12),
    "TPU v6e": Peaks(918e12, 1.64e12),
}
"""By the beginning of a `device_kind`. The longest beginning counts."""


def peaks_of(device: jax.Device) -> Peaks | None:
    """None where the table does not know it."""
    known = [name for name in PEAKS if device.device_kind.startswith(name)]
    return PEAKS[max(known, key=len)] if known else None
