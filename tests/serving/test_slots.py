"""Slots without an engine's threads: what the host sees of rounds, whatever it looked at between them."""

import pytest

from jaxspec import SamplingParams, TreeConfig
from jaxspec.detokenizer import Detokenizer
from jaxspec.prompting import encode_prompt
from jaxspec.serving.engine import Engine
from jaxspec.serving.grammar import Grammars
from jaxspec.serving.reading import FairQueue
from jaxspec.serving.requests import EngineSettings, Request
from jaxspec.serving.row import Row
from jaxspec.serving.slots import WINDOW
from tests.serving.listening import eventually

QUESTION = "What is a chart for?"


@pytest.fixture
def resting(generators):
    """An engine that does nothing by itself; its slots are the test's."""

    def make(name):
        generator = generators(name)
        settings = EngineSettings(max_length=256, max_num_seqs=2, warm_up=False)
        return generator, Engine(generator.target, generator.drafter, generator.tree, settings)

    return make


def row_of(engine, sampling=SamplingParams(), limit=30, grammar=None, client="", question=QUESTION):
    prompt = encode_prompt(engine.target, question)
    asked = Request(prompt, sampling.resolved(engine.generation_defaults), limit, grammar, client)
    ends = frozenset(engine.target.stop_token_ids)
    return Row(asked, engine._reader_of_tokens, ends, engine._slots.width, lambda: None)


def join(engine, *rows):
    for row in rows:
        engine._slots.insert(row, engine._prompts.begin(row).state)


@pytest.mark.parametrize("name", ["autoregressive", "vispec"])
def test_no_token_is_lost_when_a_neighbour_with_a_grammar_leaves(resting, name):
    """One round is not seen yet when the whole window runs."""
    generator, engine = resting(name)
    slots, limit = engine._slots, 2 + WINDOW
    target = engine.target
    grammar = Grammars(target.tokenizer, target.model.vocab_size, target.stop_token_ids).regex("[a-z]{60}")
    follower, plain = row_of(engine, limit=40, grammar=grammar), row_of(engine, limit=limit)
    join(engine, follower, plain)
    slots.run(engine.tree, 1)
    slots.remove([follower])
    seen = len(plain.tokens)
    slots.run(TreeConfig.autoregressive(), WINDOW)
    (alone,) = generator.generate_encoded([plain.request.prompt], SamplingParams(), limit)
    assert len(alone.tokens) == limit
    assert seen == 1 and plain.done
    assert plain.tokens == alone.tokens.tolist()


def test_drafts_count_as_deep_as_they_were(resting):
    """Rounds with the whole tree, with a chain of three and with none: of three, two and no levels."""
    _, engine = resting("vispec")
    whole, chain, none = engine._trees[0], engine._trees[-2], engine._trees[-1]
    row = row_of(engine, SamplingParams(min_tokens=60), 60)
    join(engine, row)
    depths = 0
    for tree, rounds in ((whole, 2), (chain, 1), (none, 3)):
        ran = engine._slots.run(tree, rounds)
        depths += ran.rounds * tree.max_depth
    stats = row.finish("cancelled").stats
    assert (stats.rounds, stats.drafted_depth) == (6, depths)
    assert stats.draft_acceptance_rate == (stats.emitted_tokens - 6) / depths


def test_an_answer_that_cannot_be_told_ends_alone(resting, monkeypatch):
    _, engine = resting("autoregressive")
    broken, good = row_of(engine), row_of(engine)
    join(engine, broken, good)
    add = Detokenizer.add

    def adding(text, tokens):
        if text is broken.text:
            raise LookupError("no such token")
        return add(text, tokens)

    monkeypatch.setattr(Detokenizer, "add", adding)
    engine._slots.run(engine.tree, 3)
    assert (broken.failure, broken.cause) == ("the answer cannot be told", "LookupError: no such token")
    assert good.failure is None and len(good.tokens) == 4


def test_prompts_are_kept_without_room_for_answers(resting, caplog):
    """A quarter of the slots' bytes by default; what does not fit is said once."""
    _, engine = resting("vispec")
    assert engine.prefix_cache_bytes == max(256 * 2**20, engine._slots.nbytes // 4)
    reader, row = engine._prompts, row_of(engine, question=QUESTION * 20)
    whole = reader.begin(row).state.cache
    read, length = reader.prefixes.find(encode_prompt(engine.target, QUESTION * 21))
    assert length > 100
    assert len(row.request.prompt.input_ids) <= read.cache.capacity < whole.capacity
    reader.prefixes._reads.limit = 100
    for _ in range(2):
        reader.begin(row_of(engine))
    assert [record.getMessage().startswith("a prompt of ") for record in caplog.records] == [True]


def test_pieces_of_a_prompt_wait_for_each_other(generators, monkeypatch):
    """So a round that is asked for meanwhile stands behind one piece at most."""
    generator = generators("autoregressive")
    settings = EngineSettings(max_length=1024, max_num_seqs=2, warm_up=False, prefill_chunk=64)
    engine = Engine(generator.target, settings=settings)
    read_step, before = engine.programs.read_step, []

    def step(params, read, *chunk):
        before.append(read is None or all(leaf.is_ready() for leaf in (*read.cache.layers[-1], read.last)))
        return read_step(params, read, *chunk)

    monkeypatch.setattr(engine.programs, "read_step", step)
    row = row_of(engine)
    prompt = encode_prompt(engine.target, QUESTION * 60)
    row.request = Request(prompt, row.request.sampling, 30)
    engine._prompts.begin(row)
    assert len(before) == -(-len(prompt.input_ids) // 64) > 4 and all(before)


def test_clients_take_turns(resting):
    """Who asks much waits behind who asks little; each client's requests keep their order."""
    _, engine = resting("autoregressive")
    queue = FairQueue()
    rows = [row_of(engine, client=client) for client in "aaaabac"]
    for row in rows:
        queue.put(row)
    gone = queue.remove(lambda row: row is rows[1])
    assert gone == [rows[1]] and len(queue) == 6
    order = [queue.get() for _ in range(len(queue))]
    assert [rows.index(row) for row in order] == [0, 4, 6, 2, 3, 5]
    assert queue.rows() == []


def test_rounds_are_timed_before_there_are_any(generators):
    """Of every tree and number of slots that is compiled, while nobody asks; the least tree costs least."""
    generator = generators("vispec")
    settings = EngineSettings(max_length=256, max_num_seqs=2, warm_up=True)
    with Engine(generator.target, generator.drafter, generator.tree, settings) as engine:
        assert eventually(lambda: engine.ready, 300)
        known = {(slots, tree): seconds for slots, tree, seconds, _ in engine.stats().costs}
        assert {slots for slots, _ in known} == {1, 2} and len(known) == 2 * len(engine._trees)
        assert all(0 < seconds < 10 for seconds in known.values())
        before = engine.stats().compilations
        engine.submit(encode_prompt(engine.target, QUESTION), SamplingParams(), 20).result()
        assert engine.stats().compilations - before <= 3  # of the prompt's reading
