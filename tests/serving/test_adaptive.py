"""The tree that is chosen gives most tokens a second, and finding out costs little."""

import numpy as np
import pytest

from jaxspec import TreeConfig
from jaxspec.serving.adaptive import Controller, Load, named, smaller_trees

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
            tree, trying = controller.choose(Load(slots))
            rounds = 1 if trying else 4
            depth = np.minimum(self.rng.geometric(1 - self.accepted, (slots, rounds)), tree.max_depth + 1)
            counts = [np.bincount(row - 1, minlength=5) for row in depth]
            cost = self.cost(slots, tree) * rounds * self.rng.uniform(1.0, 1.2)
            controller.measured(Load(slots), tree, rounds, cost, counts)
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
    assert Controller([TREE]).choose(Load(8)) == (TREE, False)


def test_a_machine_that_stalls_is_not_mistaken_for_a_slow_tree():
    """The first measurement holds a compilation, others a stall; what takes less than a larger tree costs no more."""
    controller = Controller(TREES)
    world = World(0.8, 0.01)
    for stall in (50.0, 1.0, 9.0):
        for tree in TREES:
            counts = [np.bincount([tree.max_depth], minlength=5)] * 4
            controller.measured(Load(1), tree, 4, 4 * world.cost(1, tree) * stall, counts)
    costs = {name: cost for _, name, cost, _ in controller.table()}
    assert costs == pytest.approx({named(tree): world.cost(1, tree) for tree in TREES})


def test_reading_beside_rounds_does_not_change_the_choice():
    """The tree in use is measured beside prompts, twice as slow; the others were measured in peace."""
    controller, world = Controller(TREES), World(0.8, 0.01)
    load = Load(16)
    for tree in TREES:
        controller.costs(load, tree, world.cost(16, tree))
    best = max(TREES, key=lambda tree: world.gain(tree) / world.cost(16, tree))
    used = []
    for _ in range(300):
        tree, trying = controller.choose(load)
        rounds = 1 if trying else 4
        depth = np.minimum(world.rng.geometric(0.2, (16, rounds)), tree.max_depth + 1)
        counts = [np.bincount(row - 1, minlength=5) for row in depth]
        controller.measured(load, tree, rounds, 2 * rounds * world.cost(16, tree), counts, disturbed=True)
        used += [tree] * rounds
    rates = {tree: world.gain(tree) / world.cost(16, tree) for tree in TREES}
    assert np.mean([rates[tree] for tree in used]) > 0.95 * rates[best]
    assert controller.seconds(load, best) == world.cost(16, best)


def test_what_was_only_measured_beside_other_work_counts_until_it_is_alone():
    controller = Controller(TREES)
    load, tree, counts = Load(4), TREES[0], [np.array([1])]
    for seconds, disturbed, known in (
        *((9.0, False, None), (4.0, True, 4.0), (3.0, True, 3.0)),
        *((5.0, False, 5.0), (1.0, True, 5.0), (2.0, False, 2.0)),
    ):
        controller.measured(load, tree, 1, seconds, counts, disturbed)
        assert controller.seconds(load, tree) == known
