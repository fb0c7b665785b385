"""How much to draft: of a few trees, none among them, the one that gives most tokens a second at the moment.

A round costs what it costs whatever is accepted, and with many rows its cost grows with the nodes of the tree; what it
gives depends on what is asked. Seconds a round are measured for every tree and number of slots, before there are
requests and while nothing else is done; tokens a round for every tree, all the time. A round that shares the device
with the reading of a prompt takes longer, whatever its tree, and tells nothing of it.
"""

import dataclasses
from collections import deque
from typing import NamedTuple

import numpy as np

from jaxspec.speculation.tree import TreeConfig

MEMORY = 96.0
"""Rounds (of one row) after which what a tree gave counts for a third."""
SHARE = 0.02
"""Of the time that trees which seem worse may take to be tried again."""
CHAIN = 3
"""Draft tokens of the smallest tree, at most."""
LATEST = 8
"""Measurements of a cost of which the least counts: what is slower than that is the machine's fault. Where nothing was
timed beforehand, the very first one is left out: it holds a compilation."""


def smaller_trees(tree: TreeConfig) -> list[TreeConfig]:
    """The trees that an engine chooses from: the whole one, of large ones a quarter, a short chain, and none."""
    trees = [tree]
    if tree.total_tokens >= 24:
        trees.append(dataclasses.replace(tree, total_tokens=tree.total_tokens // 4))
    chain = TreeConfig.chain(min(CHAIN, tree.max_depth), noise_weight=tree.noise_weight) if tree.max_depth else tree
    trees += [chain, TreeConfig.autoregressive()]
    return list(dict.fromkeys(trees))


def named(tree: TreeConfig) -> str:
    """As tables call it: depth/top_k/total_tokens, or none."""
    return "none" if tree.total_tokens == 1 else f"{tree.depth}/{tree.top_k}/{tree.total_tokens}"


@dataclasses.dataclass
class Gain:
    """Tokens that a round of one row emits with a tree, of late."""

    tokens: float = 0.0
    rounds: float = 0.0

    def add(self, tokens: int, rounds: int) -> None:
        keep = np.exp(-rounds / MEMORY)
        self.tokens, self.rounds = self.tokens * keep + tokens, self.rounds * keep + rounds

    @property
    def mean(self) -> float:
        return self.tokens / self.rounds if self.rounds else float("nan")


class Load(NamedTuple):
    """What a round's cost depends on, beside its tree."""

    slots: int
    looked: bool = False  # the host has a look within each round


class Controller:
    """Chooses among trees.

    Args:
      trees: to choose from, the largest first; a single one is always chosen.
    """

    def __init__(self, trees: list[TreeConfig]) -> None:
        self.trees = trees
        self._gains = {tree: Gain() for tree in trees}
        self._measured: dict[tuple[Load, TreeConfig], deque[float]] = {}  # seconds a round
        self._disturbed: set[tuple[Load, TreeConfig]] = set()  # measured beside other work only
        self._elapsed = 0.0
        self._tried: dict[tuple[Load, TreeConfig], tuple[float, float]] = {}
        """When it was last in use, on the clock of rounds, and for how long."""

    def choose(self, load: Load) -> tuple[TreeConfig, bool]:
        """The tree of the next rounds under such a load, and whether it is only tried: then a single round will do."""
        if len(self.trees) == 1:
            return self.trees[0], False
        for tree in self.trees:
            if not self._measured.get((load, tree)) or not self._gains[tree].rounds:
                return tree, True
        best = max(self.trees, key=lambda tree: self.rate(load, tree))
        for tree in self.trees:
            waited = self._elapsed - self._tried.get((load, tree), (0.0, 0.0))[0]
            others = len(self.trees) - 1
            if tree is not best and waited > self.pause(load, tree, best) * others:
                return tree, True
        return best, False

    def pause(self, load: Load, tree: TreeConfig, best: TreeConfig) -> float:
        """Seconds until a tree is tried again: what is lost by it shall be a small share of them."""
        lost = 1 - self.rate(load, tree) / self.rate(load, best)
        _, spent = self._tried.get((load, tree), (0.0, 0.0))
        return max(spent, self._cost(load, tree)) * max(lost, 0.05) / SHARE

    def rate(self, load: Load, tree: TreeConfig) -> float:
        """Tokens a second and row."""
        return self._gains[tree].mean / self._cost(load, tree)

    def costs(self, load: Load, tree: TreeConfig, seconds: float) -> None:
        """A round takes so long, measured with nothing else to do; from any thread."""
        self._measured.setdefault((load, tree), deque([seconds], maxlen=LATEST))

    def measured(
        self,
        load: Load,
        tree: TreeConfig,
        rounds: int,
        seconds: float,
        emitted: list[np.ndarray],
        disturbed: bool = False,
    ) -> None:
        """What `rounds` rounds took, `disturbed` by other work or not, and how many of the rows' rounds emitted 1, 2,
        .. tokens (i64 `[P]` per row)."""
        if not rounds:
            return
        self._elapsed += seconds
        key = load, tree
        if key not in self._measured:  # it was compiled
            self._measured[key] = deque(maxlen=LATEST)
        elif not disturbed:
            if key in self._disturbed:
                self._measured[key].clear()
            self._disturbed.discard(key)
            self._measured[key].append(seconds / rounds)
        elif key in self._disturbed or not self._measured[key]:  # better than nothing
            self._disturbed.add(key)
            self._measured[key].append(seconds / rounds)
        self._tried[key] = self._elapsed, seconds
        for counts in emitted:
            self._gains[tree].add(int((counts * np.arange(1, len(counts) + 1)).sum()), int(counts.sum()))

    def seconds(self, load: Load, tree: TreeConfig) -> float | None:
        """What a round takes, where that is known."""
        return self._cost(load, tree) if self._measured.get((load, tree)) else None

    def table(self) -> list[tuple[int, str, float, float]]:
        """What is known of rounds within which the host does not look: slots, tree, seconds a round, tokens a round."""
        known = sorted(
            (key for key, costs in [*self._measured.items()] if costs), key=lambda key: (key[0], -key[1].total_tokens)
        )
        return [
            (load.slots, named(tree), self._cost(load, tree), self._gains[tree].mean)
            for load, tree in known
            if not load.looked
        ]

    def _cost(self, load: Load, tree: TreeConfig) -> float:
        """Seconds a round: no more than what a larger tree takes."""
        larger = [self._measured.get((load, each)) for each in self.trees if each.total_tokens >= tree.total_tokens]
        return min(min(costs) for costs in larger if costs)
