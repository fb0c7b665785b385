"""What every implementation of attention must do. Each has a thin class of its own in `test_implementations.py`.

The reference is a loop over rows and heads in float64 that knows masks as bools alone.
"""

from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxspec.cache import LayerKV
from jaxspec.kernels.attention import KERNELS, attend
from jaxspec.kernels.masks import Mask
from jaxspec.kernels.segments import Scores, Segment

EXAMPLES = settings(deadline=None, derandomize=True, max_examples=16, suppress_health_check=list(HealthCheck))


def reference(
    query: jax.Array, segments: list[Segment], scale: float | None = None, soft_cap: float | None = None
) -> np.ndarray:
    """Float64 `[B, H, N, Dh]`."""
    query = np.asarray(query, np.float64)
    batch, heads, length, head_dim = query.shape
    seen = [np.asarray(s.mask.visible(jnp.arange(length), s.kv.keys.shape[2])) for s in segments]
    seen = np.concatenate([np.broadcast_to(x, (batch, length, x.shape[2])) for x in seen], axis=2)
    keys, values = (
        np.concatenate([np.asarray(part, np.float64) for part in parts], axis=2)
        for parts in zip(*(segment.kv for segment in segments), strict=True)
    )
    out = np.zeros(query.shape)
    for row in range(batch):
        for head in range(heads):
            shared = head * keys.shape[1] // heads
            scores = query[row, head] @ keys[row, shared].T * (head_dim**-0.5 if scale is None else scale)
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            scores = np.where(seen[row], scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[row, head] = weights / weights.sum(-1, keepdims=True) @ values[row, shared]
    return out


class Case:
    """Draws of a strategy and of a seed."""

    def __init__(
        self, data: st.DataObject, head_dims: tuple[int, ...], dtype: str, soft_caps: tuple[float | None, ...]
    ) -> None:
        self.draw = data.draw
        self.rng = np.random.default_rng(self.draw(st.integers(0, 2**32 - 1), "seed"))
        self.batch, self.kv_heads = self.draw(st.integers(1, 3), "batch"), self.draw(st.sampled_from([1, 2, 4]))
        self.heads = self.kv_heads * self.draw(st.sampled_from([1, 2, 7]), "groups")
        self.head_dim, self.dtype = self.draw(st.sampled_from(head_dims)), dtype
        self.scale = self.draw(st.sampled_from([None, 0.3 / self.head_dim**0.5]), "scale")
        self.soft_cap = self.draw(st.sampled_from(soft_caps), "soft_cap")

    def query(self, length: int) -> jax.Array:
        return self.normal(self.heads, length)

    def normal(self, heads: int, length: int) -> jax.Array:
        shape = (self.batch, heads, length, self.head_dim)
        return jnp.asarray(self.rng.standard_normal(shape, np.float32), self.dtype)

    def segment(self, length: int, mask: Mask) -> Segment:
        return Segment(LayerKV(self.normal(self.kv_heads, length), self.normal(self.kv_heads, length)), mask)

    def over_cache(self) -> tuple[jax.Array, list[Segment]]:
        """A tree, with drafted levels before it or none, or a prompt, over a cache with a window or none."""
        queries = self.draw(st.sampled_from([1, 5, 8, 30]), "queries")
        capacity = self.draw(st.sampled_from([128, 200, 640]), "capacity")
        filled = st.one_of(st.sampled_from([0, 1, capacity]), st.integers(0, capacity))
        lengths = jnp.array([self.draw(filled, "filled") for _ in range(self.batch)], jnp.int32)
        window = self.draw(st.sampled_from([None, 1, 40, 300]), "window")
        places = None if window is None else lengths[:, None] + jnp.arange(queries)
        segments = [self.segment(capacity, Mask(lengths, places, window=window))]
        drafted = self.draw(st.sampled_from([0, 0, 3, 17]), "drafted")
        if drafted:
            ancestors = jnp.asarray(self.rng.random((self.batch, queries, drafted)) < 0.4)
            segments.append(self.segment(drafted, Mask(ancestors=ancestors)))
        own = {
            "a tree of each row": lambda: Mask(ancestors=self.ancestors(self.batch, queries)),
            "one tree": lambda: Mask(ancestors=self.ancestors(1, queries)[0]),
            "a prompt": lambda: Mask(jnp.full((self.batch,), max(1, queries - 2)), causal=True),
        }
        mask = own[self.draw(st.sampled_from(sorted(own)), "own")]()
        return self.query(queries), [*segments, self.segment(queries, mask)]

    def ancestors(self, rows: int, nodes: int) -> jax.Array:
        """Bool `[rows, nodes, nodes]`, of random trees."""
        out = np.zeros((rows, nodes, nodes), bool)
        for tree in out:
            for node in range(nodes):
                if node:
                    tree[node] = tree[self.rng.integers(node)]
                tree[node, node] = True
        return jnp.asarray(out)

    def alone(self) -> tuple[jax.Array, list[Segment]]:
        """Tokens that attend to themselves."""
        length = self.draw(st.sampled_from([128, 150, 300]), "length")
        filled = [self.draw(st.integers(1, length), "filled") for _ in range(self.batch)]
        lengths = self.draw(st.sampled_from([None, jnp.array(filled, jnp.int32)]))
        mask = Mask(lengths, causal=self.draw(st.booleans(), "causal"))
        return self.query(length), [self.segment(length, mask)]


class AttentionContract:
    """Subclasses name an implementation, what it is for and how near it comes."""

    name: str
    kinds: tuple[str, ...] = ("over_cache", "alone")
    head_dims: tuple[int, ...] = (8, 128)
    soft_caps: tuple[float | None, ...] = (None, 0.8)
    tolerances = {"float32": 1e-5, "bfloat16": 0.02}
    """The largest error there may be, of values that are standard normal."""

    def device(self) -> AbstractContextManager:
        """Where programs run."""
        return nullcontext()

    def run(
        self,
        query: jax.Array,
        segments: list[Segment],
        scale: float | None = None,
        soft_cap: float | None = None,
    ) -> jax.Array:
        kernel, scores = KERNELS[self.name], Scores(scale, soft_cap)
        assert kernel.fits(query, segments) and kernel.lacks(query, segments, scores) is None  # no other one runs
        with self.device():
            return jax.jit(attend, static_argnames=("scale", "implementation", "soft_cap"))(
                query, segments, scale=scale, implementation=self.name, soft_cap=soft_cap
            )

    @EXAMPLES
    @given(data=st.data())
    def test_it_is_the_softmax_of_what_is_seen(self, data):
        dtype = data.draw(st.sampled_from(sorted(self.tolerances)))
        case = Case(data, self.head_dims, dtype, self.soft_caps)
        kind = data.draw(st.sampled_from(self.kinds))
        query, segments = getattr(case, kind)()
        out = self.run(query, segments, case.scale, case.soft_cap)
        assert out.dtype == query.dtype
        expected = reference(query, segments, case.scale, case.soft_cap)
        np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=self.tolerances[dtype], rtol=0)

    def some(self, kind: str) -> tuple[jax.Array, list[Segment]]:
        """Three rows of a kind, of different lengths."""
        rng = np.random.default_rng(0)
        normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
        own, head_dim = (6 if kind == "over_cache" else 130), self.head_dims[-1]
        query, kv = normal(3, 4, own, head_dim), LayerKV(normal(3, 2, own, head_dim), normal(3, 2, own, head_dim))
        if kind == "alone":
            return query, [Segment(kv, Mask(jnp.array([130, 7, 64]), causal=True))]
        cache = LayerKV(normal(3, 2, 384, head_dim), normal(3, 2, 384, head_dim))
        return query, [Segment(cache, Mask(jnp.array([300, 0, 130]))), Segment(kv, Mask(causal=True))]

    def test_gradients_are_those_of_the_plain_form(self):
        for kind in self.kinds:
            query, segments = self.some(kind)

            def loss(query, kvs, run, segments=segments):
                pairs = zip(kvs, segments, strict=True)
                return (run(query, [Segment(kv, segment.mask) for kv, segment in pairs]) ** 2).sum()

            kvs = [segment.kv for segment in segments]
            with self.device():
                ours = jax.grad(loss, (0, 1))(query, kvs, lambda q, s: attend(q, s, implementation=self.name))
            plain = jax.grad(loss, (0, 1))(query, kvs, lambda q, s: attend(q, s, implementation="plain"))
            for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
                np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)

    def test_a_row_gets_the_same_whatever_the_others_have(self):
        for kind in self.kinds:
            query, (first, *rest) = self.some(kind)
            shorter = Segment(first.kv, Mask(first.mask.lengths.at[0].set(5), causal=first.mask.causal))
            one, other = (self.run(query, [each, *rest]) for each in (first, shorter))
            np.testing.assert_array_equal(one[1:], other[1:])
            assert not np.array_equal(one[0], other[0])
