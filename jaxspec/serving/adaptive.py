"""How much to draft: of a few trees, none among them, the one that gives most tokens a second at the moment.

A round costs what it costs whatever is accepted, and with many rows its cost grows with the nodes of the tree; what it
gives depends on what is asked. Both are measured while serving: seconds a round for every tree and number of slots, and
tokens a round for every tree.
"""

import dataclasses
from collections import deque

import numpy as np

from jaxspec.speculation.tree import TreeConfig

MEMORY = 96.0
"""Rounds (of one row) after which what a tree gave counts for a third."""
SHARE = 0.02
"""Of the time that trees which seem worse may take to be tried again."""
CHAIN = 3
"""Draft tokens of the smallest tree, at most."""
LATEST = 3
"""Measurements of a cost of which the least counts: what is slower than that is the machine's fault. The very first one
is left out."""


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


class Controller:
    """Chooses among trees.

    Args:
      trees: to choose from, the largest first; a single one is always chosen.
    """

    def __init__(self, trees: list[TreeConfig]) -> None:
        self.trees = trees
        self._gains = {tree: Gain() for tree in trees}
        self._measured: dict[tuple[int, TreeConfig], deque[float]] = {}  # seconds a round, by slots and tree
        self._elapsed = 0.0
        self._tried: dict[tuple[int, TreeConfig], float] = {}  # when it was last in use, on the clock of rounds

    def choose(self, slots: int) -> tuple[TreeConfig, bool]:
        """The tree of the next rounds with so many slots, and whether it is only tried: then a single round will do."""
        if len(self.trees) == 1:
            return self.trees[0], False
        for tree in self.trees:
            if not self._measured.get((slots, tree)) or not self._gains[tree].rounds:
                return tree, True
        best = max(self.trees, key=lambda tree: self.rate(slots, tree))
        for tree in self.trees:
            waited = self._elapsed - self._tried[slots, tree]
            others = len(self.trees) - 1
            if tree is not best and waited > self.pause(slots, tree, best) * others:
                return tree, True
        return best, False

    def pause(self, slots: int, tree: TreeConfig, best: TreeConfig) -> float:
        """Seconds until a tree is tried again: what is lost by it shall be a small share of them."""
        lost = 1 - self.rate(slots, tree) / self.rate(slots, best)
        return self._cost(slots, tree) * max(lost, 0.05) / SHARE

    def rate(self, slots: int, tree: TreeConfig) -> float:
        """Tokens a second and row."""
        return self._gains[tree].mean / self._cost(slots, tree)

    def measured(self, slots: int, tree: TreeConfig, rounds: int, seconds: float, emitted: list[np.ndarray]) -> None:
        """What `rounds` rounds took, and how many of the rows' rounds emitted 1, 2, .. tokens (i64 `[P]` per row)."""
        if not rounds:
            return
        self._elapsed += seconds
        key = slots, tree
        if key in self._measured:
            self._measured[key].append(seconds / rounds)
        else:
            self._measured[key] = deque(maxlen=LATEST)
        self._tried[key] = self._elapsed
        for counts in emitted:
            self._gains[tree].add(int((counts * np.arange(1, len(counts) + 1)).sum()), int(counts.sum()))

    def seconds(self, slots: int, tree: TreeConfig) -> float | None:
        """What a round takes, where that is known."""
        return self._cost(slots, tree) if self._measured.get((slots, tree)) else None

    def table(self) -> list[tuple[int, str, float, float]]:
        """What is known: slots, tree, seconds a round, tokens a round."""
        known = sorted(
            (key for key, costs in [*self._measured.items()] if costs), key=lambda key: (key[0], -key[1].total_tokens)
        )
        return [(slots, named(tree), self._cost(slots, tree), self._gains[tree].mean) for slots, tree in known]

    def _cost(self, slots: int, tree: TreeConfig) -> float:
        """Seconds a round: no more than what a larger tree takes."""
        larger = [self._measured.get((slots, each)) for each in self.trees if each.total_tokens >= tree.total_tokens]
        return min(min(costs) for costs in larger if costs)
