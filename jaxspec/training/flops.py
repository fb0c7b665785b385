"""The operations that the mathematics of a training step needs."""

from typing import Any

import jax


def flops_of(step: jax.stages.Wrapped, *arguments: Any) -> float:
    """Floating-point operations of one call of a jitted function, counted in its program before optimisation, so that
    they are those of the model on every backend. Bodies of loops count once (attention in blocks, logits a few columns
    at a time), custom kernels not at all: where there are any, it is a lower bound. Tracing is shared with the call
    itself."""
    return float((step.lower(*arguments).cost_analysis() or {}).get("flops", 0.0))
