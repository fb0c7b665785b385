"""The tree that is chosen gives most tokens a second, and finding out costs little."""

import numpy as np
import pytest

from jaxspec import TreeConfig
from jaxspec.serving.adaptive import Controller, named, smaller_trees

TREE = TreeConfig(3, 8, 30)
TREES = smaller_trees(TREE)


def test_the_trees_to_choose_from():
    assert [named(tree) for tree in TREES] == ["3/8/30", "3/8/7", "2/1/4", "none"]
    assert [named(tree) for tree in smaller_trees(TreeConfig.chain(5))] == ["4/1/6", "2/1/4", "none"]
    assert [named(tree) for tree in smaller_trees(TreeConfig.chain(2))] == ["1/1/3", "none"]
    assert smaller_trees(TreeConfig.autoregressive()) == [TreeConfig.autoregressive()]


class World:
    """Rounds that cost `base + slots * nodes * each` and emit what the tree's depth allows, with noise."""

    def __init__(self, accepted, each, seed=0):
        self.accepted, self.each, self.rng = accepted, each, np.random.default_rng(seed)

    def cost(self, slots, tree):
        return 1.0 + self.each * slots * tree.total_tokens

    def gain(self, tree):
        return sum(self.accepted**depth for depth in range(tree.max_depth + 1))

    def serve(self, controller, slots, seconds):
        """Tokens of a row a second, and how often each tree ran."""
        spent, tokens, used = 0.0, 0, {tree: 0.0 for tree in controller.trees}
        while spent < seconds:
            tree, trying = controller.choose(slots)
            rounds = 1 if trying else 4
            depth = np.minimum(self.rng.geometric(1 - self.accepted, (slots, rounds)), tree.max_depth + 1)
            counts = [np.bincount(row - 1, minlength=5) for row in depth]
            cost = self.cost(slots, tree) * rounds * self.rng.uniform(1.0, 1.2)
            controller.measured(slots, tree, rounds, cost, counts)
            spent, tokens = spent + cost, tokens + int(depth.sum())
            used[tree] += cost
        return tokens / spent / slots, used

    def best(self, slots, trees):
        return max(self.gain(tree) / (1.1 * self.cost(slots, tree)) for tree in trees)


@pytest.mark.parametrize("accepted", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("each", [0.0005, 0.01, 0.2])
@pytest.mark.parametrize("slots", [1, 16])
def test_within_a_few_per_cent_of_the_best_tree(accepted, each, slots):
    world = World(accepted, each)
    controller = Controller(TREES)
    world.serve(controller, slots, 1000.0)  # in which every tree is met
    rate, _ = world.serve(controller, slots, 6000.0)
    assert rate > 0.94 * world.best(slots, TREES)


def test_it_follows_what_is_asked():
    """A drafter that begins to fail is switched off, and is found out when it is of use again."""
    controller = Controller(TREES)
    none = TREES[-1]
    good, bad = World(0.8, 0.02), World(0.05, 0.02)
    for world, off in ((good, False), (bad, True), (good, False)):
        world.serve(controller, 4, 2000.0)
        _, used = world.serve(controller, 4, 2000.0)
        assert (used[none] > 0.8 * 2000) == off, used
        assert off or used[none] < 0.1 * 2000


def test_a_single_tree_is_not_judged():
    assert Controller([TREE]).choose(8) == (TREE, False)


def test_a_machine_that_stalls_is_not_mistaken_for_a_slow_tree():
    """The first measurement holds a compilation, others a stall; what takes less than a larger tree costs no more."""
    controller = Controller(TREES)
    world = World(0.8, 0.01)
    for stall in (50.0, 1.0, 9.0):
        for tree in TREES:
            counts = [np.bincount([tree.max_depth], minlength=5)] * 4
            controller.measured(1, tree, 4, 4 * world.cost(1, tree) * stall, counts)
    costs = {name: cost for _, name, cost, _ in controller.table()}
    assert costs == pytest.approx({named(tree): world.cost(1, tree) for tree in TREES})
