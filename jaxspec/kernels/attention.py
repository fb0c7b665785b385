"""Attention of N new tokens over each other and over cached segments, and the one rule of what computes it.

One function serves prefill and training (a causal segment of their own), autoregressive decoding (N = 1), tree
verification (ancestors) and drafting (cache plus the levels drafted so far). New keys and values are not written to the
cache first: a verified tree commits only its accepted path, so a cache never holds rejected tokens.

Nothing needs to be chosen: a program lowered for a TPU has the kernels there are for it, every other one the plain
form. docs/KERNELS.md lists what there is; `implementation` chooses for a measurement or a test.
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax

from jaxspec.cache import LayerKV
from jaxspec.kernels import cached, library, plain
from jaxspec.kernels.masks import Mask
from jaxspec.kernels.segments import Keys, Scores, Segment
from jaxspec.kernels.split import by_heads

Attend = Callable[[jax.Array, Sequence[Segment], Scores], jax.Array]


def anything(query: jax.Array, segments: Sequence[Segment]) -> bool:
    """Fits always."""
    return True


def nothing(query: jax.Array, segments: Sequence[Segment], how: Scores = Scores()) -> None:
    """Lacks nothing."""


class Kernel(NamedTuple):
    """Something that computes attention where it can."""

    run: Attend
    fits: Callable[[jax.Array, Sequence[Segment]], bool] = anything
    """Whether the masks are of the kind that it is for."""
    lacks: Callable[[jax.Array, Sequence[Segment], Scores], str | None] = nothing
    """Which size, dtype or kind of score it does not have, as a clause."""


KERNELS: Mapping[str, Kernel] = {
    "plain": Kernel(plain.attend),
    "pallas": Kernel(cached.attend, cached.fits, cached.lacks),
    "splash": Kernel(library.splash, library.splash_fits, cached.lacks),
    "xla": Kernel(library.joined, lacks=library.joined_lacks),
    "cudnn": Kernel(functools.partial(library.joined, backend="cudnn"), lacks=library.cudnn_lacks),
}
"""What there is, by name; `plain` is what the others must equal, and what runs where another does not fit."""
CHOICE = jax.make_user_context(None)  # part of what jit keeps programs by


def implementation(name: str | None) -> AbstractContextManager[Any]:
    """Within the block, attention is computed by the kernel of that name in `KERNELS` wherever it fits, on whatever
    device; None leaves the choice to the rule. Programs compiled before are not used, so nothing has to be cleared.

    Raises ValueError for another name.
    """
    return CHOICE(None if name is None else known(name))


def known(name: str) -> str:
    """The name, if it is one. Raises ValueError."""
    if name not in KERNELS:
        raise ValueError(f"implementation {name!r} of attention is not one of {', '.join(KERNELS)}")
    return name


@jax.named_scope("attention")
@by_heads
def attend(
    query: jax.Array,
    segments: Sequence[Segment],
    scale: float | None = None,
    implementation: str | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Softmax attention over the union of the segments, with grouped query heads, softmax in float32.

    Args:
      query: `[B, H, N, Dh]`, H a multiple of Hkv.
      segments: of which the first may be a cache.
      scale: what scores are multiplied by, `Dh**-0.5` if not given.
      implementation: a name in `KERNELS`, or None for that of the block `implementation` or for what suits the device.
      soft_cap: what scores stay below, `soft_cap * tanh(score / soft_cap)` (as Gemma2's are).

    Returns `[B, H, N, Dh]` in the query's dtype. A query that sees nothing returns some finite average (of padding).
    Raises ValueError for an implementation that there is not.
    """
    name, how = CHOICE.value if implementation is None else known(implementation), Scores(scale, soft_cap)
    if name is not None:
        return chosen(name, query, segments, how, loud=True)(query, segments, how)
    kernel = plain.attend
    # A kernel of a few hundred positions would not earn its start.
    if Keys(segments[0].kv, segments[:1]).is_roomy_cache:
        kernel = chosen("pallas", query, segments, how, loud=jax.default_backend() == "tpu")
    elif len(segments) == 1:
        kernel = chosen("splash", query, segments, how, loud=False)
    if kernel is plain.attend:
        return plain.attend(query, segments, how)
    return jax.lax.platform_dependent(
        query,
        list(segments),
        tpu=lambda query, segments: kernel(query, segments, how),
        default=lambda query, segments: plain.attend(query, segments, how),
    )


def chosen(name: str, query: jax.Array, segments: Sequence[Segment], how: Scores, *, loud: bool) -> Attend:
    """The kernel of that name where it can be used, else the plain form; `loud` ones say once what they lack."""
    kernel = KERNELS[name]
    if not kernel.fits(query, segments):
        return plain.attend
    lacks = kernel.lacks(query, segments, how)
    if lacks is not None:
        if loud:
            say_once(f"attention falls back to the plain form: {name} does not have {lacks}")
        return plain.attend
    return kernel.run if name == "plain" else differentiable(kernel.run)


@functools.cache
def say_once(sentence: str) -> None:
    """Warns, but of one thing once."""
    warnings.warn(sentence, stacklevel=2)


def differentiable(run: Attend) -> Attend:
    """With the gradient of the plain form, for a kernel that has none or a worse one."""

    def with_gradient(query: jax.Array, segments: Sequence[Segment], scores: Scores) -> jax.Array:
        masks = [segment.mask for segment in segments]

        def of(function: Attend, query: jax.Array, kvs: Sequence[LayerKV], masks: Sequence[Mask]) -> jax.Array:
            return function(query, [Segment(*pair) for pair in zip(kvs, masks, strict=True)], scores)

        forward = jax.custom_vjp(functools.partial(of, run))

        def keep(query: jax.Array, kvs: Sequence[LayerKV], masks: Sequence[Mask]) -> tuple[jax.Array, tuple]:
            return of(run, query, kvs, masks), (query, kvs, masks)

        def back(kept: tuple, by_output: jax.Array) -> tuple:
            query, kvs, masks = kept
            _, pull = jax.vjp(lambda query, kvs: of(plain.attend, query, kvs, masks), query, kvs)
            return (*pull(by_output), None)

        forward.defvjp(keep, back)
        return forward(query, [segment.kv for segment in segments], masks)

    return with_gradient
