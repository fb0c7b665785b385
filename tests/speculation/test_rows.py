"""Rows come and go between rounds: a request's answer is the same alone, joined late, and beside rows that leave."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxspec import Result
from jaxspec.prompting import encode_prompt
from jaxspec.speculation.state import DecodeState, Request, finish
from tests.drafting import DRAFTERS
from tests.helpers import MIXED_SAMPLING

SLOTS, CAPACITY = 3, 192
LIMITS = (24, 3, 17, 1, 20, 30)
events = st.one_of(
    st.tuples(st.just("join"), st.integers(0, SLOTS - 1), st.integers(0, len(LIMITS) - 1)),
    st.tuples(st.just("leave"), st.integers(0, SLOTS - 1), st.just(0)),
    st.tuples(st.sampled_from(["rounds", "undrafted", "halves"]), st.just(0), st.integers(1, 3)),
)


class Service:
    """A state with a few slots, and what the rows of it have to say."""

    def __init__(self, generator, requests):
        self.generator, self.programs, self.params = generator, generator.programs, generator._params
        asked = (requests[index % len(requests)] for index in range(len(LIMITS)))
        self.prompts = [encode_prompt(generator.target, *request) for request in asked]

    @functools.cached_property
    def alone(self) -> list[Result]:
        """The answers, each a batch of its own."""
        generate = self.generator.generate_encoded
        requests = zip(self.prompts, MIXED_SAMPLING, LIMITS, strict=True)
        return [generate([prompt], sampling, limit)[0] for prompt, sampling, limit in requests]

    def idle(self) -> DecodeState:
        return self.programs.idle(self.params, SLOTS, CAPACITY, extras=True)

    @functools.cache  # noqa: B019
    def prefilled(self, request: int) -> DecodeState:
        prompts = [self.prompts[request]]
        target = self.generator.target
        asked = Request.of(
            [MIXED_SAMPLING[request]],
            [prompts[0].input_ids],
            [LIMITS[request]],
            target.stop_token_ids,
            target.model.vocab_size,
            extras=True,
        )
        read = self.programs.read(self.params, prompts, CAPACITY)
        return self.programs.begin(self.params, read, asked, prompts, CAPACITY)

    def rounds(self, state: DecodeState, count: int) -> DecodeState:
        return self.programs.decode(self.params, state, jnp.int32(count))

    def undrafted(self, state: DecodeState, count: int) -> DecodeState:
        """Without drafts, of which there shall be some again."""
        return self.programs.decode_undrafted(self.params, state, jnp.int32(count), 3)

    def halves(self, state: DecodeState, count: int) -> DecodeState:
        """A look of the host in the middle of every round, which allows every token."""
        for _ in range(count):
            tree = self.programs.draft(self.params, state)
            words = -(-self.generator.target.model.vocab_size // 32)
            allowed = np.full((*tree.tokens.shape, words), 2**32 - 1, np.uint32)
            state = self.programs.confirm(self.params, state, tree, allowed)
        return state

    def run(self, schedule) -> int:
        """How many rows joined; asserts that each has said what it says alone, or its beginning if it was made to
        leave."""
        state = self.idle()
        rows, joined = [None] * SLOTS, 0

        def check(slot, left=False):
            if rows[slot] is None:
                return
            expected, count = self.alone[rows[slot]], int(state.counts[slot])
            assert np.asarray(state.tokens)[slot, :count].tolist() == expected.tokens[:count].tolist()
            assert left or count == len(expected.tokens)
            if expected.logprobs is not None:
                told = np.asarray(state.logprobs.token_logprobs)[slot, :count]
                np.testing.assert_allclose(told, expected.logprobs.token_logprobs[:count], atol=1e-4)

        for event, slot, value in [*schedule, ("rounds", 0, 100)]:
            if event == "join":
                check(slot, left=not bool(state.done[slot]))
                state = self.programs.insert(state, jnp.array([slot]), self.prefilled(value))
                rows[slot], joined = value, joined + 1
            elif event == "leave":
                state = finish(state, np.arange(SLOTS) == slot)
                check(slot, left=True)
                rows[slot] = None
            else:
                state = getattr(self, event)(state, value)
        assert bool(state.done.all())
        for slot in range(SLOTS):
            check(slot)
        return joined


@pytest.fixture(scope="module")
def services(generators, requests):
    return functools.cache(lambda name: Service(generators(name), requests))


@pytest.mark.parametrize("name", [*DRAFTERS, "autoregressive"])
def test_a_row_answers_as_if_it_were_alone(services, name):
    service = services(name)
    fixed = [("join", 1, 1), ("rounds", 0, 2), ("join", 0, 0), ("join", 2, 5), ("undrafted", 0, 3), ("leave", 0, 0)]
    assert (
        service.run([*fixed, ("join", 0, 2), ("halves", 0, 2), ("rounds", 0, 1), ("join", 1, 3), ("join", 1, 4)]) == 6
    )

    @settings(deadline=None, max_examples=3, suppress_health_check=list(HealthCheck))
    @given(schedule=st.lists(events, min_size=4, max_size=12))
    def any_schedule(schedule):
        service.run(schedule)

    any_schedule()


def test_nothing_is_compiled_when_rows_come_and_go(services):
    service = services("eagle2")
    service.run([("join", 0, 0), ("join", 1, 1), ("join", 2, 2), ("rounds", 0, 2)])
    before = service.programs.compilations
    service.run([("join", slot, request) for request in range(len(LIMITS)) for slot in range(SLOTS)])
    assert service.programs.compilations == before


def test_a_state_without_rows_stays_as_it_is(services):
    service = services("vispec")
    idle = service.idle()
    after = service.programs.decode(service.params, jax.tree.map(jnp.copy, idle), jnp.int32(5))
    assert bool(after.done.all()) and int(after.counts.sum()) == int(after.rounds.sum()) == 0


def test_several_rows_join_at_once(services):
    """Rows of another batch, in any order; a slot that does not exist takes none."""
    service = services("medusa")
    rows = [service.prefilled(request) for request in (0, 1, 2)]
    batch = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)
    state = service.idle()
    state = service.programs.insert(state, jnp.array([-1, SLOTS, -1]), batch)  # none of these is there
    assert bool(state.done.all()) and int(state.counts.sum()) == 0
    state = service.programs.insert(state, jnp.array([2, SLOTS, 0]), batch)
    assert np.asarray(state.done).tolist() == [False, True, False]
    state = service.programs.decode(service.params, state, jnp.int32(100))
    for slot, request in ((2, 0), (0, 2)):
        count = int(state.counts[slot])
        assert np.asarray(state.tokens)[slot, :count].tolist() == service.alone[request].tokens.tolist()
