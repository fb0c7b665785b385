"""Fewer combinations than all: every pair of values of two factors occurs (an orthogonal array's weaker kin)."""

import itertools
from collections.abc import Sequence
from typing import Any


def pairwise(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations of one value of each factor, in which any two values of different factors occur together.

    Greedy and always the same: the next combination begins with the first pair that is still missing, and takes of
    every other factor the value that adds most missing pairs. With two factors that is their product.
    """
    if len(factors) < 2:
        return [(value,) for factor in factors for value in factor]
    places = range(len(factors))
    pairs = itertools.combinations(places, 2)
    missing = {((a, x), (b, y)): None for a, b in pairs for x in range(len(factors[a])) for y in range(len(factors[b]))}
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for place in places:
            if place in row:
                continue
            gains = [sum(key((place, x), each) in missing for each in row.items()) for x in range(len(factors[place]))]
            row[place] = gains.index(max(gains))
        for pair in itertools.combinations(sorted(row.items()), 2):
            missing.pop(pair, None)
        rows.append(tuple(factors[place][row[place]] for place in places))
    return rows


def key(one: tuple[int, int], other: tuple[int, int]) -> tuple:
    return tuple(sorted((one, other)))
