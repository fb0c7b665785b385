"""Structured output on the host: masks against brute force, drafts that follow a grammar, tokenizers, bad grammars."""

import concurrent.futures
import functools
import itertools
import json

import jsonschema
import numpy as np
import pytest
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from jaxspec.serving import matcher
from jaxspec.serving.grammar import KEPT, Grammars
from jaxspec.serving.matcher import is_set, members
from jaxspec.speculation.tree import NO_TOKEN
from tests.scripted import byte_fallback_tokenizer
from tests.structured import SCHEMA, allowed_by, matches
from tests.test_detokenizer import tokenizer_of

WORDS = ("ab", "ba", "abc", "aa", "cab", "bb", "c", "cc")
STOP, EOT, PAD = 2, 3, 40
"""`</s>`, another special token, and how many ids there are behind the tokenizer's."""


@functools.cache
def small() -> tuple[transformers.PreTrainedTokenizerFast, Grammars]:
    tokenizer = byte_fallback_tokenizer(*WORDS)
    return tokenizer, Grammars(tokenizer, len(tokenizer) + PAD, (STOP, EOT))


def spelled() -> dict[int, str]:
    """The small tokenizer's tokens over the letters of the tests' expressions."""
    tokenizer, _ = small()
    return {
        **{tokenizer.convert_tokens_to_ids(word): word for word in WORDS},
        **{tokenizer.convert_tokens_to_ids(f"<0x{ord(letter):02X}>"): letter for letter in "abc"},
    }


patterns = st.recursive(
    st.sampled_from(["a", "b", "c", "ab", "[ab]", "[a-c]"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "?", "+", "{2}", "{1,3}"])).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    ),
    max_leaves=6,
)


def brute_force(pattern: str, said: list[int]) -> set[int]:
    """What may follow these tokens."""
    text = "".join(spelled()[token] for token in said)
    return allowed_by(pattern, text, spelled()) | ({STOP, EOT} if matches(pattern, text) else set())


def check_mask(mask: np.ndarray, pattern: str, said: list[int]) -> None:
    """It is that of a matcher which was told the tokens and nothing else, and what brute force finds, but where text
    is forced: there it is one token, of several that the text begins with."""
    fresh = small()[1].regex(pattern).matcher()
    fresh.accept(said)
    assert np.array_equal(mask, fresh.start())
    ours, all_of_them = set(members(mask)), brute_force(pattern, said)
    if ours != all_of_them:
        assert len(ours) == 1 and ours < all_of_them and not all_of_them & {STOP, EOT}
        begins = sorted((spelled()[token] for token in all_of_them), key=len)
        assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(begins))


@st.composite
def drafts(draw):
    """Tokens and parents of a tree; siblings differ but where there are no drafts."""
    count = draw(st.integers(1, 12))
    parents = [0] + [draw(st.integers(0, node - 1)) for node in range(1, count)]
    tokens = [draw(st.sampled_from([*spelled(), *spelled(), STOP, 0, 300, NO_TOKEN])) for _ in range(count)]
    for node in range(1, count):
        if any(parents[other] == parents[node] and tokens[other] == tokens[node] for other in range(1, node)):
            tokens[node] = NO_TOKEN
    return np.array(tokens, np.int32), np.array(parents, np.int32)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(patterns, drafts(), st.lists(st.integers(0, 10), max_size=4), st.booleans())
@example("(?:abc){2}", (np.array([0, NO_TOKEN, NO_TOKEN, NO_TOKEN]), np.array([0, 0, 1, 2])), [], True)
def test_masks_and_drafts_of_a_tree_are_those_of_brute_force(pattern, tree, choices, refill):
    matcher = small()[1].regex(pattern).matcher()
    said = []
    for choice in choices:  # the answer so far
        following = sorted(set(members(matcher.start())) - {STOP, EOT})
        if following:
            said.append(following[choice % len(following)])
            matcher.accept(said[-1:])
    before = matcher.start()
    check_mask(before, pattern, said)

    drafted, parents = tree
    tokens, allowed = matcher.tree(drafted, parents, refill)
    assert np.array_equal(matcher.start(), before) and tokens[0] == drafted[0]
    paths = {0: said}
    kept = {0}
    for node in range(len(tokens)):
        assert allowed[node].any()
        children = [child for child in range(1, len(tokens)) if parents[child] == node]
        given = [int(tokens[child]) for child in children if tokens[child] != NO_TOKEN]
        assert len(set(given)) == len(given)
        if node not in paths:
            assert tokens[node] == NO_TOKEN or parents[node] in paths  # nothing is drafted behind no draft
            assert not given
            continue
        check_mask(allowed[node], pattern, paths[node])
        follow = set(members(allowed[node]))
        assert set(given) <= follow
        for child in children:
            if node in kept and int(drafted[child]) in follow:
                assert tokens[child] == drafted[child]
                kept.add(child)
            elif not refill and tokens[child] != NO_TOKEN:
                assert tokens[child] == drafted[child]
            if tokens[child] != NO_TOKEN and tokens[child] not in (STOP, EOT):
                paths[child] = [*paths[node], int(tokens[child])]
        if refill and children and len(follow) <= len(children):
            assert set(given) == follow


def test_forced_text_is_drafted_down_the_deepest_children():
    tokenizer, grammars = small()
    matcher = grammars.regex("(?:a|b)cabcabc").matcher()
    matcher.accept([tokenizer.convert_tokens_to_ids("<0x61>")])
    parents = np.array([0, 0, 0, 2, 3, 3, 5])
    tokens, allowed = matcher.tree(np.array([0, 9, NO_TOKEN, 8, 8, 8, 8], np.int32), parents)
    chain = [spelled()[int(token)] for token in tokens[[2, 3, 5, 6]]]
    assert "cabcabc".startswith("".join(chain)) and len(chain) == 4
    assert all(is_set(allowed[parents[node]], int(tokens[node])) for node in (2, 3, 5, 6))


def test_the_end_and_what_comes_behind_it():
    tokenizer, grammars = small()
    a, b = (tokenizer.convert_tokens_to_ids(f"<0x{ord(letter):02X}>") for letter in "ab")
    matcher = grammars.regex("a").matcher(stop_token_ids=[b, 7, len(tokenizer) + PAD + 5])
    assert members(matcher.start()) == [a]
    matcher.accept([a])
    ends = [STOP, EOT, 7, b]
    assert members(matcher.start()) == sorted(ends)
    tokens, allowed = matcher.tree(np.array([a, STOP, a, a]), np.array([0, 0, 1, 0]))
    assert tokens.tolist() == [a, STOP, NO_TOKEN, NO_TOKEN] and allowed[1:].all()
    tokens, _ = matcher.tree(np.array([a, a, a, STOP, a]), np.zeros(5, np.int32))  # as many children as ends
    assert tokens.tolist()[3] == STOP and set(tokens.tolist()[1:]) == set(ends)
    with pytest.raises(RuntimeError, match=f"the grammar forbids token {a} after 1 tokens"):
        matcher.accept([a])
    matcher.accept([EOT])
    assert matcher.ended and members(matcher.start()) == sorted(ends)
    tokens, allowed = matcher.tree(np.array([EOT, a]), np.array([0, 0]))
    assert tokens.tolist() == [EOT, a] and members(allowed[0]) == sorted(ends)
    with pytest.raises(RuntimeError, match=f"token {a} follows the end"):
        matcher.accept([a])
    early = grammars.regex("a?ba").matcher(stop_token_ids=[b])  # a stop token that the grammar has as text
    early.accept([a, b])
    assert early.ended
    with pytest.raises(RuntimeError, match=f"forbids token {STOP} after 0"):
        grammars.regex("ab").matcher().accept([STOP])


def test_special_and_missing_tokens_are_never_allowed():
    tokenizer, grammars = small()
    matcher = grammars.regex("(?s:.*)").matcher()
    mask = members(matcher.start())
    continuation = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(0x80, 0xC0)]
    assert {0, 1, *range(len(tokenizer), len(tokenizer) + PAD), *continuation}.isdisjoint(mask)
    assert {STOP, EOT, *spelled()} <= set(mask)
    fewer = Grammars(tokenizer, len(tokenizer) - 20, (STOP,)).regex("(?s:.*)").matcher()  # no logits for its last ones
    assert max(members(fewer.start())) < len(tokenizer) - 20


def test_rows_are_independent_and_long():
    tokenizer, grammars = small()
    grammar = grammars.json_schema({"type": "array", "items": {"type": "integer"}})
    one, other = grammar.matcher(), grammar.matcher()
    ids = {letter: tokenizer.convert_tokens_to_ids(f"<0x{ord(letter):02X}>") for letter in "[]0123456789, "}
    one.accept([ids["["]])
    for index in range(1500):
        one.accept([ids[letter] for letter in f"{index}, "])
        if index % 50 == 0:
            mask = one.start()
            drafted = np.array([ids[" "], ids["3"], ids["4"], ids[","], ids["5"], NO_TOKEN], np.int32)
            tokens, _ = one.tree(drafted, np.array([0, 0, 1, 2, 0, 3]))
            assert tokens.tolist() == [*drafted[:5], ids[" "]] and np.array_equal(one.start(), mask)
    assert members(other.start()) == [ids["["]]
    one.accept([ids["1"], ids["]"], STOP])
    assert one.ended


def test_a_grammar_that_grows_too_complex_fails_alone():
    """The lexer has a limit, which copies share. A row that reaches it in a draft goes on without that draft, one that
    reaches it in its answer fails, and no other row does."""
    tokenizer, grammars = small()
    token = tokenizer.convert_tokens_to_ids("<0x61>")
    grammar = grammars.regex("(a{1,1000}){1,1000}")
    neighbour = grammar.matcher()
    neighbour.accept([token])
    mask = neighbour.start()

    row = grammar.matcher()
    row.accept([token])
    tokens, allowed = row.tree(np.full(200, token, np.int32), np.maximum(np.arange(200) - 1, 0))
    drafted = int((tokens == token).sum())
    assert 20 < drafted < 200 and (tokens[drafted:] == NO_TOKEN).all() and allowed.any(axis=1).all()
    row.accept([token] * 5)
    assert np.array_equal(row.start(), mask) and np.array_equal(neighbour.start(), mask)

    with pytest.raises(RuntimeError, match=r"the grammar allows no token after \d+ tokens: lexer error: too many"):
        for _ in range(1000):
            row.start()
            row.accept([token])
    neighbour.accept([token])
    assert np.array_equal(neighbour.start(), mask)
    assert grammar.matcher().start().any()


def test_a_parser_that_gives_up_again_and_again_is_not_followed(monkeypatch):
    """To begin anew takes as long as the answer did: after a few times drafts are left alone, after many it ends."""
    token, grammars = 5, small()[1]
    row = grammars.regex("(?:[a-c]{1,9}){1,9}").matcher()
    tree = np.full(4, token, np.int32), np.array([0, 0, 1, 2])
    row.accept([token])
    assert (row.tree(*tree)[0] == token).all()
    for _ in range(matcher.FOLLOWED):
        row._restore()
    tokens, allowed = row.tree(*tree)
    assert tokens.tolist() == [token, NO_TOKEN, NO_TOKEN, NO_TOKEN]
    assert np.array_equal(allowed[0], row.start()) and (allowed[1:] == matcher.ALL).all()
    with pytest.raises(RuntimeError, match="the grammar is too complex after 1 tokens"):
        for _ in range(matcher.RESTORED):
            row._restore()


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        ([], "a JSON schema must be an object, got list"),
        ({"const": float("nan")}, "not JSON: Out of range"),
        ({"const": object()}, "not JSON: Object of type object"),
        ({"const": "\ud800"}, "not JSON: .*surrogates"),
        ({"description": "x" * 100_001}, "has 100020 characters, it may have 100000"),
        (functools.reduce(lambda inner, _: {"items": inner}, range(65), {}), "deeper than 64 levels"),
        ({"properties": {"a": {"nullable": True}}}, "keyword 'nullable' at properties.a is not supported"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "keyword 'x-guidance' at the top is not supported"),
        ({"anyOf": [{"items": [{"if": {}}]}]}, "keyword 'if' at anyOf.items is not supported"),
        ({"$defs": {"unused": {"uniqueItems": True}}}, "keyword 'uniqueItems' at \\$defs.unused is not supported"),
        ({"type": "string", "format": "colour"}, "cannot be compiled: Unknown format: colour"),
        ({"type": "text"}, "cannot be compiled: Invalid type: text"),
        ({"items": 3}, "cannot be compiled: schema must be an object or boolean"),
        ({"enum": []}, "cannot be compiled: Unsatisfiable schema"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead and look-behind, is not supported"),
        ({"$ref": "https://example.com/schema"}, "cannot be compiled: Resource 'https://example.com/schema'"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf that may hold at once; say anyOf"),
        ({"type": "integer", "maximum": 10**400}, "cannot be compiled: number out of range"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "has no answer that the target's tokenizer can"),
    ],
)
def test_bad_schemas(schema, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        small()[1].json_schema(schema)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        (3, "a regular expression must be a string, got int"),
        ("a" * 10_001, "has 10001 characters, it may have 10000"),
        ("(", "cannot be compiled: unclosed group"),
        ("(?=a)b", "look-ahead and look-behind, is not supported"),
        (r"\bab", "cannot be compiled: lookarounds not supported yet"),
        (r"(a)\1", "backreferences are not supported"),
        ("(" * 2000 + "a" + ")" * 2000, "nested parentheses"),
        ("a?" * 5000, "cannot be compiled: "),
        (r"[^\x00-\x{10FFFF}]", "has no answer that the target's tokenizer can spell"),
        ("\udcff", "half a surrogate pair"),
    ],
)
def test_bad_patterns(pattern, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        small()[1].regex(pattern)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_the_longest_chain_of_references_does_not_end_the_process():
    definitions = {f"d{index}": {"$ref": f"#/$defs/d{index + 1}"} for index in range(2800)}
    grammar = small()[1].json_schema({"$defs": {**definitions, "d2800": {"type": "null"}}, "$ref": "#/$defs/d0"})
    assert [chr(token - 4 - len(WORDS)) for token in members(grammar.matcher().start())] == ["n"]


def test_tokenizers_that_cannot_be_followed():
    def problem(tokenizer, stops=(2,)) -> str:
        with pytest.raises(ValueError) as caught:
            Grammars(tokenizer, len(tokenizer), stops).json_object()
        return str(caught.value)

    assert "needs a fast tokenizer (a folder with tokenizer.json), the target has a ByT5Tokenizer" in problem(
        tokenizer_of("slow")
    )
    for kind in ("word_piece", "unigram", "no_decoder"):
        assert "structured output cannot read the target's tokenizer" in problem(tokenizer_of(kind))
    assert "this one's answers could not end" in problem(tokenizer_of("demo"), stops=())
    assert "this one's answers could not end" in problem(tokenizer_of("demo"), stops=(10_000,))
    state = json.loads(byte_fallback_tokenizer(*WORDS).backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for name in ("<0xC3>", "<0x04>"):  # the first byte of 'é', a control character
        vocabulary[f"gone{name}"] = vocabulary.pop(name)
    fewer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>"
    )
    grammars = Grammars(fewer, len(fewer), (2,))
    assert grammars.json_schema({"const": "e"}).matcher().start().any()
    with pytest.raises(ValueError, match="schema has the character 'é', which the target's tokenizer cannot spell"):
        grammars.json_schema({"const": "é"})
    vocabulary["gone{"] = vocabulary.pop("<0x7B>")
    lacking = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>"
    )
    assert problem(lacking).endswith("the target's has no token for 1 of them: '{'")


@pytest.mark.parametrize("kind", ["byte_fallback", "gemma", "byte_level", "demo"])
def test_every_kind_of_tokenizer_spells_json(kind):
    """Random answers under the schema validate, whatever tokens spell them."""
    tokenizer = tokenizer_of(kind)
    stop = tokenizer.eos_token_id
    grammar = Grammars(tokenizer, len(tokenizer) + PAD, (stop,)).json_schema(SCHEMA)
    rng = np.random.default_rng(0)
    for _ in range(5):
        matcher, said = grammar.matcher(), []
        while not matcher.ended:
            said.append(int(rng.choice(members(matcher.start()))))
            matcher.accept(said[-1:])
        jsonschema.validate(json.loads(tokenizer.decode(said[:-1])), SCHEMA)
        assert not set(said[:-1]) & set(tokenizer.all_special_ids)


def test_grammars_are_kept_and_shared_by_threads():
    tokenizer, _ = small()
    grammars = Grammars(tokenizer, len(tokenizer), (STOP,))
    one = grammars.regex("a+")
    assert grammars.regex("a+") is one and grammars.json_object() is grammars.json_object()
    assert grammars.json_schema({"type": "object"}) is grammars.json_object()

    def spell(count: int) -> list[int]:
        matcher = grammars.regex(f"[ab]{{{count % 20 + 1}}}").matcher()
        tokens = []
        while not matcher.ended:
            tokens.append(members(matcher.start())[-1])
            matcher.accept(tokens[-1:])
        return tokens

    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        together = list(executor.map(spell, range(200)))
    assert together == [spell(count) for count in range(200)]
    for count in range(KEPT):
        grammars.regex("a" * (count + 1))
    assert grammars.regex("a+") is not one
