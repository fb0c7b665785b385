"""Prompt lookup: equal to a plain n-gram search, kept up to date over rounds, loaded by its name."""

import functools

import jax
import numpy as np
import pytest

from jaxspec import Generator, SamplingParams, TreeConfig, load_drafter
from jaxspec.drafters.checkpoint import load_drafter_folder, save_drafter_folder
from jaxspec.drafters.contract import DrafterContext
from jaxspec.drafters.lookup import IMAGE, LookupConfig, PromptLookup, look_up
from jaxspec.speculation.params import BatchSampling
from jaxspec.speculation.tree import NO_TOKEN

CAPACITY = 24
search = jax.jit(look_up, static_argnums=(2, 3))


def slow_lookup(history: list[int], max_ngram: int, count: int, min_ngram: int = 1) -> list[int]:
    """The draft by a search through lists; it may end early."""
    for n in range(max_ngram, min_ngram - 1, -1):
        wanted = history[-n:]
        if len(wanted) < n or IMAGE in wanted:
            continue
        for start in range(len(history) - n - 1, -1, -1):
            if history[start : start + n] == wanted and history[start + n] != IMAGE:
                text = list(history)
                for place in range(start + n, start + n + count):
                    if text[place] == IMAGE:
                        break
                    text.append(text[place])
                return text[len(history) :]
    return []


def padded(draft: list[int], count: int) -> list[int]:
    return draft + [NO_TOKEN] * (count - len(draft))


def random_history(rng, length: int, alphabet: int, images: float) -> list[int]:
    history = np.where(rng.random(length) < images, IMAGE, rng.integers(0, alphabet, length)).tolist()
    history[-1] = max(history[-1], 0)  # the root is no image
    return history


@pytest.mark.parametrize("max_ngram, min_ngram", [(1, 1), (2, 1), (3, 1), (5, 1), (3, 2), (3, 3)])
def test_equal_to_a_plain_search(max_ngram, min_ngram):
    rows, found = 200, 0
    for seed, alphabet, images, count in [
        (0, 2, 0.0, 4),
        (1, 3, 0.2, 4),
        (2, 8, 0.1, 4),
        (3, 40, 0.0, 4),
        (4, 3, 0.5, 9),
    ]:
        rng = np.random.default_rng([seed, max_ngram])
        buffer = rng.integers(0, alphabet, (rows, CAPACITY))  # what is past a length must not matter
        histories = [random_history(rng, rng.integers(1, CAPACITY + 1), alphabet, images) for _ in range(rows)]
        for row, history in enumerate(histories):
            buffer[row, : len(history)] = history
        lengths = np.array([len(history) for history in histories])
        drafts = search(buffer, lengths, LookupConfig(max_ngram, min_ngram), count)
        for draft, history in zip(drafts.tolist(), histories, strict=True):
            expected = slow_lookup(history, max_ngram, count, min_ngram)
            found += len(expected) == count
            assert draft == padded(expected, count)
    assert found > rows // 2


def test_examples():
    def draft(history):
        buffer = np.zeros((1, CAPACITY), np.int32)
        buffer[0, : len(history)] = history
        return search(buffer, np.array([len(history)]), LookupConfig(), 4)[0].tolist()

    assert draft([1, 2, 3, 4, 5, 9, 2, 3, 7, 7, 7, 7, 1, 2, 3]) == [4, 5, 9, 2]  # the longest match, not the latest
    assert draft([5, 1, 0, 5, 2, 0, 5]) == [2, 0, 5, 2]  # the latest of the longest; then on with itself
    assert draft([4, 4]) == [4, 4, 4, 4]
    assert draft([1, 2, IMAGE, IMAGE, 1]) == [2, NO_TOKEN, NO_TOKEN, NO_TOKEN]  # nothing of the image
    assert draft([1, IMAGE, IMAGE, 1]) == [NO_TOKEN] * 4
    assert draft([8]) == [NO_TOKEN] * 4


def test_rounds_see_the_whole_text():
    """Through prompts with images and padding, and rounds that emit different numbers of tokens, up to the end."""
    rng, batch, config = np.random.default_rng(0), 3, TreeConfig.chain(3)
    lookup, sampling = PromptLookup(), BatchSampling.from_params([SamplingParams()] * batch)
    lengths = [4, 9, 7]
    ids, image_ids = rng.integers(0, 4, (batch, 9)), np.full((batch, 9), -1)
    image_ids[1, 2:5], image_ids[2, 0], image_ids[2, 3:5] = 0, 0, 1
    root = rng.integers(0, 4, batch).astype(np.int32)
    propose = jax.jit(lambda state, root: lookup.propose(None, config, state, root, None, sampling))
    advance = jax.jit(lambda state, tokens, count: lookup.advance(None, state, tokens, None, count))
    context = DrafterContext.of(input_ids=ids, image_ids=image_ids, lengths=lengths, root=root)
    state = lookup.prefill(None, context, CAPACITY)
    texts = [
        [*np.where(image_ids[row] >= 0, IMAGE, ids[row])[: lengths[row]].tolist(), int(root[row])]
        for row in range(batch)
    ]
    while max(map(len, texts)) < CAPACITY:
        tree = propose(state, root)
        steps = np.arange(4)
        for row, text in enumerate(texts):
            assert tree.tokens[row].tolist() == [text[-1], *padded(slow_lookup(text, 3, 3), 3)]
            assert tree.parents[row].tolist() == np.maximum(steps - 1, 0).tolist()
            assert tree.depths[row].tolist() == steps.tolist()
            np.testing.assert_array_equal(tree.ancestors[row], np.tri(4, dtype=bool))
        tokens = rng.integers(0, 4, (batch, 4)).astype(np.int32)
        count = np.minimum(rng.integers(0, 5, batch), CAPACITY - np.array([len(text) for text in texts]))
        state = advance(state, tokens, count)
        for row, text in enumerate(texts):
            text += tokens[row, : count[row]].tolist()
        root = np.array([text[-1] for text in texts], np.int32)


def test_answers_that_repeat_themselves_are_drafted(generators, requests):
    """The same tokens in fewer rounds."""
    prompts, images = zip(*requests, strict=True)
    ask = functools.partial(Generator.generate_batch, prompts=prompts, images=images, max_new_tokens=60)
    expected, results = ask(generators("autoregressive")), ask(generators("lookup"))
    for one, two in zip(expected, results, strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)
    assert max(result.stats.mean_acceptance_length for result in results) > 1.5


def test_loaded_by_its_name_unless_a_folder_has_it(target, tmp_path, monkeypatch):
    drafter = load_drafter("lookup", target)
    assert (drafter.method, drafter.tree, drafter.about) == ("lookup", TreeConfig.chain(10), {})
    assert drafter.model.config == LookupConfig(max_ngram=3)
    monkeypatch.chdir(tmp_path)
    chain, short = TreeConfig.chain(5), PromptLookup(LookupConfig(max_ngram=4, min_ngram=2))
    save_drafter_folder(short, "lookup", chain, target.model, tmp_path / "lookup", np.float32)
    again = load_drafter("lookup", target)
    assert (again.tree, again.model.config) == (chain, LookupConfig(max_ngram=4, min_ngram=2))
    assert load_drafter_folder(tmp_path / "lookup", target.model)[1] == chain


def test_refusals(target):
    with pytest.raises(ValueError, match="prompt lookup drafts a chain: the tree's top_k must be 1, got 3"):
        Generator(target, load_drafter("lookup", target), TreeConfig(2, 3, 8))
    with pytest.raises(ValueError, match="max_ngram must be at least 1, got 0"):
        LookupConfig(max_ngram=0)
    with pytest.raises(ValueError, match=r"min_ngram must be between 1 and max_ngram \(3\), got 4"):
        LookupConfig(min_ngram=4)
