"""Whether weights are finite, in the file and in the type they are read in; cheap enough to ask of every one."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {2: np.int16, 4: np.int32, 8: np.int64}


def cast(array: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """A copy in `dtype`, silent about what overflows: `is_finite` finds it."""
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype)


def is_finite(array: np.ndarray) -> bool:
    """Whether a floating-point array holds neither an infinity nor a NaN; integers always do not.

    Their bits, read as integers, are the largest that there are: two maxima without a temporary array. `np.isfinite`
    takes 20 times as long for bfloat16, more than reading the file does.
    """
    if not jnp.issubdtype(array.dtype, jnp.floating) or not array.size:
        return True
    positive, negative = np.array([np.inf, -np.inf], array.dtype)
    signed, unsigned = (views[array.dtype.itemsize] for views in (SIGNED, UNSIGNED))
    return bool(
        array.view(signed).max() < positive.view(signed) and array.view(unsigned).max() < negative.view(unsigned)
    )


def why_not_finite(array: np.ndarray, dtype: DTypeLike) -> str:
    """What is wrong with an array of a file that is not finite in `dtype`."""
    largest, rows = 0.0, max(1, 2**20 // max(1, array[:1].size)) if array.ndim else 1
    for start in range(0, len(array) if array.ndim else 1, rows):
        part = np.asarray(array[start : start + rows] if array.ndim else array)
        if not is_finite(part):
            return "NaN" if np.isnan(part).any() else "infinite"
        largest = max(largest, float(np.abs(part.astype(np.float64)).max()))
    return f"up to {largest:.3g}, the largest {jnp.dtype(dtype).name} is {float(jnp.finfo(dtype).max):.5g}"
