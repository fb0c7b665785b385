"""Every pair of values occurs, in few combinations, the same ones every time."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tests.pairwise import pairwise


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_every_pair_occurs(sizes):
    factors = [[f"{place}{value}" for value in range(size)] for place, size in enumerate(sizes)]
    rows = pairwise(*factors)
    assert all(value in factor for row in rows for value, factor in zip(row, factors, strict=True))
    for (a, one), (b, other) in itertools.combinations(enumerate(factors), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(one, other))
    assert rows == pairwise(*factors) and len(set(rows)) == len(rows)
    largest = sorted(sizes)[-2:]
    assert len(rows) <= 2 * largest[0] * largest[-1] or len(sizes) == 1
