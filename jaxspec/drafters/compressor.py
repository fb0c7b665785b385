"""SpecVLM's elastic visual compressor (arXiv 2509.11815): few entries in place of an image's many.

Each primitive turns the entries of every image into groups, one entry each: pruning keeps a random subset, pooling
averages runs of consecutive ones, convolution mixes them, a resampler asks the whole image a few learned questions, and
text only leaves nothing. A mode says which of them a head has and how they work together. Groups never cross images.

The source leaves open, ours: runs go along the token sequence (the published ratios are not squares); the target's
features are reduced as the embeddings are, but with a convolution of their own, and beside a resampler's vectors stands
the image's mean feature; a group has the position of the last entry it stands for.

It serves alone, too. Here of two images, with five tokens and two, in a sequence of eight:

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxspec.drafters.compressor import CompressorConfig, ImageSpans, VisualCompressor
    >>> compressor = VisualCompressor(64, 4, CompressorConfig("pooling", pooling_ratio=3), rngs=nnx.Rngs(0))
    >>> spans = ImageSpans.of(jnp.array([[-1, 0, 0, 0, 0, 0, 1, 1]]), images=2)
    >>> groups = compressor(spans, embeds=jnp.ones((1, 8, 64)), features=jnp.ones((1, 8, 64)))
    >>> groups.positions[groups.valid].tolist()
    [3, 5, 7]
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspec.drafters.sequence import ImageSpans, entry_order, take_entries
from jaxspec.drafters.vispec import VisionAdaptor
from jaxspec.layers import Linear, linear

PRIMITIVES = ("pruning", "pooling", "convolution", "resampler", "text_only")
MODES: dict[str, tuple[str, ...]] = {
    "select": PRIMITIVES,
    "weighted": ("pruning", "pooling", "convolution"),
    "concat": ("pruning", "pooling", "convolution", "resampler"),
    **{name: (name,) for name in PRIMITIVES},
}
RATIOS = ("pruning_ratio", "pooling_ratio", "convolution_ratio", "shared_ratio")
MAX_CONVOLUTION_RATIO = 5  # each kernel has ratio * D * D parameters
PRUNING_LOTS = 2**32 - 1  # what is folded into a request's seed; sampling noise folds in positions, which are smaller


@dataclasses.dataclass(frozen=True)
class CompressorConfig:
    """Ratios are image tokens per group. Defaults are published but for the gate's, which are ours.

    Raises ValueError for a mode that is not known and for sizes that cannot be.
    """

    mode: str = "select"
    """select: a gate picks one primitive per request; weighted: a gate's weights mix pruning, pooling and convolution;
    concat: all but text_only, side by side; or one primitive by its name."""
    pruning_ratio: int = 20
    pooling_ratio: int = 20
    convolution_ratio: int = 3
    shared_ratio: int = 3
    """Of the three that mode weighted mixes, in place of their own."""
    num_queries: int = 2
    """Vectors that the resampler makes of an image."""
    gate_hidden_size: int = 256
    gate_temperature: float = 1.0
    """Of the Gumbel-softmax in training: the lower, the closer the gradient is to the hard choice's."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"compressor mode {self.mode!r} is not known; known: {', '.join(MODES)}")
        for name in (*RATIOS, "num_queries", "gate_hidden_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for name in ("convolution_ratio", "shared_ratio"):
            if getattr(self, name) > MAX_CONVOLUTION_RATIO:
                raise ValueError(
                    f"{name} must be at most {MAX_CONVOLUTION_RATIO}, for a convolution's parameters grow with it, "
                    f"got {getattr(self, name)}"
                )
        if not self.gate_temperature > 0:
            raise ValueError(f"gate_temperature must be above 0, got {self.gate_temperature}")

    @property
    def primitives(self) -> tuple[str, ...]:
        return MODES[self.mode]

    @property
    def has_gate(self) -> bool:
        return self.mode in ("select", "weighted")

    def ratio(self, primitive: str) -> int:
        """Of pruning, pooling or convolution in this mode."""
        return self.shared_ratio if self.mode == "weighted" else getattr(self, f"{primitive}_ratio")

    def most_groups(self, entries: int, images: int) -> int:
        """A bound of the groups that so many entries of so many images become."""
        fixed = {"resampler": images * self.num_queries, "text_only": 0}
        bounds = [
            fixed[name] if name in fixed else most_runs(entries, images, self.ratio(name)) for name in self.primitives
        ]
        return sum(bounds) if self.mode == "concat" else max(bounds)

    def most_entries(self, length: int, fewest: int, images: int) -> int:
        """A bound of text entries and groups together in prompts of `length` entries, at least `fewest` of them
        images'."""
        # An entry more of an image is one less of text: but for rounding up, the sum is a line, and an end decides.
        return max(length - entries + self.most_groups(entries, images) for entries in (fewest, length))


class Groups(NamedTuple):
    """G entries that stand for the images of a prompt, those of an image together and in order."""

    embeds: jax.Array  # [B, G, D]
    features: jax.Array  # [B, G, D]
    positions: jax.Array  # i32 [B, G], the last entry that the group stands for
    valid: jax.Array  # bool [B, G]


class VisualCompressor(nnx.Module):
    """The primitives of a mode, with the parameters they need and no others, for embeddings and features of `width`;
    `num_heads` and `qkv_bias` are the resampler's."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        config: CompressorConfig = CompressorConfig(),
        *,
        qkv_bias: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        if "convolution" in config.primitives:
            self.convolution = Convolution(width, config.ratio("convolution"), rngs=rngs)
        if "resampler" in config.primitives:
            self.resampler = VisionAdaptor(width, num_heads, config.num_queries, qkv_bias=qkv_bias, rngs=rngs)
        if config.has_gate:
            self.gate = Gate(width, config.gate_hidden_size, len(config.primitives), rngs=rngs)

    def __call__(
        self,
        spans: ImageSpans,
        embeds: jax.Array,
        features: jax.Array,
        seeds: jax.Array | None = None,
        question: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Groups:
        """The groups that stand for the images of prompts.

        Args:
          spans: the entries of their images.
          embeds, features: `[B, S, D]`, of all entries.
          seeds: u32 `[B]`, of pruning's random subset; 0 by default.
          question: `[B, D]`, what the gate reads; needed by the modes that have one.
          key: in training, of the gate's Gumbel noise; None for its best choice.

        Raises ValueError where a gate is given no question.
        """
        if seeds is None:
            seeds = jnp.zeros(spans.ids.shape[:1], jnp.uint32)
        groups = [self.groups_of(name, spans, embeds, features, seeds) for name in self.config.primitives]
        if not self.config.has_gate:
            return Groups(*(jnp.concatenate(parts, axis=1) for parts in zip(*groups, strict=True)))
        if question is None:
            raise ValueError(f"compressor mode {self.config.mode!r} needs a question [B, D], which its gate reads")
        if self.config.mode == "select":
            return select(groups, self.gate(question), self.config.gate_temperature, key)
        return weigh(groups, jax.nn.softmax(self.gate(question), axis=-1))

    def groups_of(
        self, primitive: str, spans: ImageSpans, embeds: jax.Array, features: jax.Array, seeds: jax.Array
    ) -> Groups:
        """Those that one primitive makes of the images."""
        match primitive:
            case "pruning":
                kept, valid = random_entries(spans, self.config.ratio(primitive), seeds)
                return Groups(take_entries(embeds, kept), take_entries(features, kept), kept, valid)
            case "pooling":
                runs = runs_of(spans, self.config.ratio(primitive))
                return Groups(mean(runs, embeds), mean(runs, features), runs.last, runs.valid)
            case "convolution":
                runs = runs_of(spans, self.config.ratio(primitive))
                return Groups(*self.convolution(runs, embeds, features), runs.last, runs.valid)
            case "resampler":
                queries = self.config.num_queries
                vectors = self.resampler(embeds, spans.masks)  # [B, n, q, D]
                last = jnp.repeat(spans.last, queries, axis=1)  # [B, n * q]
                return Groups(
                    vectors.reshape(vectors.shape[0], -1, vectors.shape[-1]),
                    jnp.repeat(image_means(spans, features), queries, axis=1),
                    last,
                    last >= 0,
                )
            case _:  # text only
                return Groups(embeds[:, :0], features[:, :0], spans.ids[:, :0], spans.ids[:, :0] >= 0)


class Convolution(nnx.Module):
    """Kernel and stride are `ratio` entries; one for the embeddings, one for the features. It starts as the average."""

    def __init__(self, width: int, ratio: int, *, rngs: nnx.Rngs) -> None:
        def average(key, shape, dtype):
            del key
            return jnp.tile(jnp.eye(width, dtype=dtype), (ratio, 1)) / ratio

        self.embeds = Linear(ratio * width, width, kernel_init=average, rngs=rngs)
        self.features = Linear(ratio * width, width, kernel_init=average, rngs=rngs)

    def __call__(self, runs: "Runs", embeds: jax.Array, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both `[B, G, D]`; a run that is short is filled with zeros."""
        flat = (*runs.valid.shape, -1)
        return self.embeds(gather(runs, embeds).reshape(flat)), self.features(gather(runs, features).reshape(flat))


class Gate(nnx.Module):
    """What a question asks for: logits over the primitives, all equal before training."""

    def __init__(self, width: int, hidden_size: int, choices: int, *, rngs: nnx.Rngs) -> None:
        self.hidden = linear(width, hidden_size, bias=True, rngs=rngs)
        self.output = linear(hidden_size, choices, bias=True, rngs=rngs, zero=True)

    def __call__(self, question: jax.Array) -> jax.Array:
        """f32 `[B, choices]` of `[B, D]`."""
        return self.output(jax.nn.silu(self.hidden(question))).astype(jnp.float32)


# -- groups of entries -----------------------------------------------------------------------------------------------


class Runs(NamedTuple):
    """Runs of up to `ratio` consecutive entries of one image, in order; the last run of an image may be shorter."""

    members: jax.Array  # i32 [B, G, ratio]
    present: jax.Array  # bool [B, G, ratio], False for members too many
    last: jax.Array  # i32 [B, G], -1 where there is no run
    valid: jax.Array  # bool [B, G]


def most_runs(entries: int, images: int, ratio: int) -> int:
    """A bound of the sum of ceil(M / ratio) over images with M entries each, `entries` together."""
    return -(-entries // ratio) + images


def sizes_of(spans: ImageSpans, ratio: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each image, i32 `[B, n]`: its entries, how many image entries come before it, its groups of `ratio`."""
    sizes = spans.masks.sum(axis=-1)
    return sizes, jnp.cumsum(sizes, axis=1) - sizes, -(-sizes // ratio)


def runs_of(spans: ImageSpans, ratio: int) -> Runs:
    length, images = spans.ids.shape[1], spans.masks.shape[1]
    sizes, before, count = sizes_of(spans, ratio)
    ends = jnp.cumsum(count, axis=1)  # [B, n], in groups
    number = jnp.arange(min(length, most_runs(length, images, ratio)))  # [G]
    valid = number < ends[:, -1:]
    image = jnp.minimum((number[:, None] >= ends[:, None]).sum(axis=-1), images - 1)  # [B, G]

    def of_image(x):  # [B, n] -> [B, G]
        return jnp.take_along_axis(x, image, axis=1)

    inside = (number - of_image(ends - count))[..., None] * ratio + jnp.arange(ratio)  # counted within the image
    present = valid[..., None] & (inside < of_image(sizes)[..., None])
    image_entries = entry_order(jnp.broadcast_to(jnp.arange(length), spans.ids.shape), spans.ids >= 0, length)
    place = jnp.where(present, of_image(before)[..., None] + inside, 0)  # among all image entries
    members = jnp.take_along_axis(image_entries, place.reshape(len(place), -1), axis=1).reshape(place.shape)
    return Runs(members, present, jnp.max(jnp.where(present, members, -1), axis=-1), valid)


def gather(runs: Runs, x: jax.Array) -> jax.Array:
    """`[B, G, ratio, D]` of entries `[B, S, D]`, 0 for members that are not there."""
    taken = take_entries(x, runs.members.reshape(len(x), -1)).reshape(*runs.members.shape, -1)
    return jnp.where(runs.present[..., None], taken, 0)


@jax.named_scope("mean")
def image_means(spans: ImageSpans, x: jax.Array) -> jax.Array:
    """`[B, n, D]`: the mean of each image's entries, of all `[B, S, D]`; 0 for absent images."""
    size = jnp.maximum(spans.masks.sum(axis=-1, keepdims=True), 1)
    total = jnp.einsum("bns,bsd->bnd", spans.masks.astype(x.dtype), x, preferred_element_type=jnp.float32)
    return (total / size).astype(x.dtype)


@jax.named_scope("mean")
def mean(runs: Runs, x: jax.Array) -> jax.Array:
    """`[B, G, D]` of entries `[B, S, D]`."""
    count = jnp.maximum(runs.present.sum(axis=-1, keepdims=True), 1)
    return (gather(runs, x).sum(axis=2, dtype=jnp.float32) / count).astype(x.dtype)


def random_entries(spans: ImageSpans, ratio: int, seeds: jax.Array) -> tuple[jax.Array, jax.Array]:
    """ceil(M / ratio) of the M entries of each image, in order: i32 and bool `[B, G]`. All subsets are equally likely;
    a request's depends on its seed and its prompt, not on the batch around it."""
    length, images = spans.ids.shape[1], spans.masks.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length), spans.ids.shape)

    def lots_of(seed):  # drawn one by one, so that padding changes nothing
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), PRUNING_LOTS)
        return jax.vmap(lambda entry: jax.random.bits(jax.random.fold_in(key, entry)))(jnp.arange(length))

    _, before, count = sizes_of(spans, ratio)
    text_last = jnp.where(spans.ids >= 0, spans.ids, images)
    shuffled = jnp.lexsort((jax.vmap(lots_of)(seeds), text_last))  # [B, S], image after image
    place = jnp.argsort(shuffled, axis=1)  # of each entry among the shuffled
    image = jnp.maximum(spans.ids, 0)
    allowed = jnp.take_along_axis(before + count, image, axis=1)
    kept = (spans.ids >= 0) & (place < allowed)
    entries = entry_order(positions, kept, min(length, most_runs(length, images, ratio)))
    return entries, jnp.take_along_axis(kept, entries, axis=1)


# -- primitives together ---------------------------------------------------------------------------------------------


def select(groups: list[Groups], logits: jax.Array, temperature: float, key: jax.Array | None) -> Groups:
    """Each request's groups of the one primitive that `logits` f32 `[B, K]` prefer.

    In training the choice is drawn with Gumbel noise, and what was chosen is multiplied by 1 with the gradient of its
    Gumbel-softmax probability (straight-through, arXiv 1611.01144). A request without image entries teaches the gate
    nothing: neither one without images, nor one for which text_only was drawn.
    """
    scores = logits if key is None else logits + jax.random.gumbel(key, logits.shape)
    choice = scores.argmax(axis=-1)  # [B]
    widest = max(each.valid.shape[1] for each in groups)

    def chosen_of(*parts: jax.Array) -> jax.Array:
        chosen, *others = (jnp.pad(x, ((0, 0), (0, widest - x.shape[1]), *[(0, 0)] * (x.ndim - 2))) for x in parts)
        for number, other in enumerate(others, 1):  # one by one: side by side they are all of them once more
            chosen = jnp.where((choice == number).reshape(-1, *[1] * (other.ndim - 1)), other, chosen)
        return chosen

    chosen = Groups(*(chosen_of(*parts) for parts in zip(*groups, strict=True)))
    if key is None:
        return chosen
    probability = jnp.take_along_axis(jax.nn.softmax(scores / temperature, axis=-1), choice[:, None], axis=1)
    one = 1 + (probability - jax.lax.stop_gradient(probability))[..., None].astype(chosen.embeds.dtype)
    return chosen._replace(embeds=one * chosen.embeds, features=one * chosen.features)


def weigh(groups: list[Groups], weights: jax.Array) -> Groups:
    """The sum of primitives with one ratio, `weights` f32 `[B, K]`; at the positions of the last, which is of runs."""

    def mixed(*parts):
        return jnp.einsum("bk,bkgd->bgd", weights.astype(parts[0].dtype), jnp.stack(parts, axis=1))

    embeds, features, _, _ = zip(*groups, strict=True)
    return groups[-1]._replace(embeds=mixed(*embeds), features=mixed(*features))
