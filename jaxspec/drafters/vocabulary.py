"""A head's own part of the vocabulary: its most frequent tokens, with an LM head of their own.

The LM head is a large part of a draft step (a vocabulary of 152k at width 3,584 weighs more than a decoder layer), yet
nearly all that a target says is made of few tokens. FR-Spec (arXiv 2502.14856) drafts from the target's columns of
those, EAGLE-3 (arXiv 2503.01840) lets them learn; here they start as the target's and may learn. What is left out is
never drafted: answers stay the same, they are only foreseen less often.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspec.quantization import product
from jaxspec.splitting import by_vocabulary
from jaxspec.targets.contract import VisionLanguageModel

BLOCK = 256
"""Features, of the identity, that are put through the target's LM head at once."""


class DraftHead(nnx.Module):
    """Logits of `size` tokens from features of `width`. The kernel may be int8 (jaxspec.quantization)."""

    kernel_scale: nnx.Param | None = None  # f32 [1, size]

    def __init__(self, width: int, size: int, *, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (width, size)))
        self.ids = nnx.Param(jnp.arange(size, dtype=jnp.int32))  # which token of the target each one is

    def __call__(self, features: jax.Array) -> jax.Array:
        """Logits f32 `[.., size]` of features `[.., width]`."""
        return by_vocabulary(product(features, self.kernel[...], self.kernel_scale))


def most_frequent(answers: Iterable[np.ndarray], vocab_size: int, size: int) -> np.ndarray:
    """The `size` tokens that occur most often in `answers` (i32 `[n]` each), in order of their ids; of equals the first
    ones.

    Raises ValueError where that is more than the vocabulary.
    """
    if size > vocab_size:
        raise ValueError(f"draft_vocab_size ({size}) is larger than the target's vocabulary ({vocab_size})")
    counts = np.zeros(vocab_size, np.int64)
    for tokens in answers:
        counts += np.bincount(tokens, minlength=vocab_size)
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


def covered(answers: Iterable[np.ndarray], ids: np.ndarray) -> float:
    """The share of the tokens in `answers` that are among `ids`."""
    found = [np.isin(tokens, ids) for tokens in answers]
    return float(np.concatenate(found).mean()) if found else float("nan")


def take_from_target(head: DraftHead, model: VisionLanguageModel, ids: np.ndarray) -> None:
    """Make the head the columns `ids` of the LM head of a target's model."""
    width = head.kernel.shape[0]
    parts = [model.unembed(jnp.eye(min(BLOCK, width - at), width, k=at))[:, ids] for at in range(0, width, BLOCK)]
    head.kernel[...] = jnp.concatenate(parts).astype(head.kernel.dtype)
    head.ids[...] = jnp.asarray(ids)
