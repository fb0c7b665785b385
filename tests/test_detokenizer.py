"""The incremental detokenizer against plain references, over real tokenizers of every kind: the text, the pieces, stop
strings, and how much is decoded for them."""

import codecs
import functools

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxspec.demo.processor import wrapped_tokenizer
from jaxspec.detokenizer import Detokenizer, Replacer, TokenReader, detokenize
from tests.scripted import byte_fallback_tokenizer, byte_tokens

HALF = "\N{REPLACEMENT CHARACTER}"
TEXTS = ["the cat sat on the mat. it's 'ok', isn't it? 猫が好き é ñ 😀"] * 3


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["</s>", "<|eot|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(["<tool>", "猫"])  # not special: they are text
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def word_piece(clean_up: bool, decoder=True):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.decoder = decoders.WordPiece(cleanup=False) if decoder else None
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        sep_token="[SEP]",
        clean_up_tokenization_spaces=clean_up,
    )


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


KINDS = {
    "byte_fallback": lambda: byte_fallback_tokenizer("a", "▁b", "▁", "▁▁", "�", "猫", "\n"),
    "gemma": lambda: byte_fallback_tokenizer("a", "▁b", "▁", "▁▁", "猫", strip=False),
    "byte_level": byte_level,
    "demo": lambda: wrapped_tokenizer(300),
    "word_piece": lambda: word_piece(False),
    "cleaned": lambda: word_piece(True),
    "no_decoder": lambda: word_piece(True, decoder=False),
    "unigram": unigram,
    "slow": lambda: transformers.ByT5Tokenizer(extra_ids=0),
}
BYTES = {"byte_fallback", "gemma", "byte_level", "demo"}
"""Those whose text is known from bytes alone, incomplete ones included."""


@functools.cache
def tokenizer_of(kind: str):
    return KINDS[kind]()


@functools.cache
def reader_of(kind: str) -> TokenReader:
    return TokenReader(tokenizer_of(kind))


@functools.cache
def usual_tokens(kind: str) -> list[int]:
    """Tokens of characters of several bytes, and special ones: by chance alone they would seldom meet."""
    tokenizer = tokenizer_of(kind)
    ids = tokenizer("猫 é 😀 a. it's", add_special_tokens=False).input_ids + tokenizer.all_special_ids
    if kind in ("byte_fallback", "gemma"):
        ids += byte_tokens(tokenizer, " 猫😀\n")
    return sorted({token for token in ids if token is not None})


def token_lists(kind: str):
    one = st.one_of(st.sampled_from(usual_tokens(kind)), st.integers(0, len(tokenizer_of(kind)) - 1))
    return st.lists(one, max_size=24)


def data_of(kind: str, tokens) -> bytes:
    """What the tokens of a tokenizer in `BYTES` spell, special ones left out."""
    tokenizer, data = tokenizer_of(kind), b""
    for token in tokens:
        name = tokenizer.convert_ids_to_tokens(token)
        if token in reader_of(kind).special:
            continue
        if kind in ("byte_level", "demo"):
            data += own_bytes(name)
        elif name.startswith("<0x"):
            data += bytes([int(name[3:5], 16)])
        else:
            data += name.replace("▁", " ").encode()
    return data


@functools.cache
def own_bytes(name: str) -> bytes:
    """Bytes of a byte-level token: the alphabet's characters below 256 are themselves, the others in order the rest."""
    alphabet = sorted(map(ord, pre_tokenizers.ByteLevel.alphabet()))
    rest = [byte for byte in range(256) if byte not in alphabet]
    table = dict(zip(alphabet, [code for code in alphabet if code < 256] + rest, strict=True))
    symbols = list(map(ord, name))
    return bytes(table[symbol] for symbol in symbols) if set(symbols) <= table.keys() else name.encode()


def complete_text(kind: str, tokens) -> str:
    """What the first tokens of an answer say for certain, read from the beginning."""
    if kind in BYTES:
        return codecs.getincrementaldecoder("utf-8")("replace").decode(data_of(kind, tokens)).lstrip(" ")
    return tokenizer_of(kind).decode(tokens, skip_special_tokens=True).lstrip(" ")


def whole_text(kind: str, tokens) -> str:
    if kind in BYTES:
        return data_of(kind, tokens).decode(errors="replace").lstrip(" ")
    return complete_text(kind, tokens)


def pieces_of(row: Detokenizer, tokens, cuts) -> list[str]:
    pieces, edges = [], [0, *sorted(cuts), len(tokens)]
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        row.add(tokens[start:end])
        pieces.append(row.take())
    row.finish()
    return [*pieces, row.take()]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_text_is_that_of_the_tokenizer(kind, data):
    tokens = data.draw(token_lists(kind))
    whole = tokenizer_of(kind).decode(tokens, skip_special_tokens=True).lstrip(" ")
    text = detokenize(tokenizer_of(kind), tokens)
    if kind in BYTES:
        assert text == whole_text(kind, tokens)
    names = tokenizer_of(kind).convert_ids_to_tokens(tokens)
    # A slow tokenizer of single bytes drops those that are no character, the ones before it, too.
    if HALF not in whole and (kind != "slow" or all(map(str.isascii, names))):
        assert text == whole
    if kind == "byte_level":
        assert text == whole


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_pieces_join_to_the_text(kind, data):
    """Whatever the slices, with and without stop strings; every token has its place in the text."""
    tokens = data.draw(token_lists(kind))
    said = detokenize(tokenizer_of(kind), tokens)
    stops = data.draw(st.lists(st.sampled_from(parts_of(said) + ["a", "猫", " ", HALF, "</s>"]), max_size=3))
    rows = [Detokenizer(reader_of(kind), stops) for _ in range(2)]
    cuts = data.draw(st.lists(st.integers(0, len(tokens)), max_size=5))
    pieces = pieces_of(rows[0], tokens, cuts)
    pieces_of(rows[1], tokens, [])
    assert "".join(pieces) == rows[0].text == rows[1].text
    assert (rows[0].count, rows[0].stopped, rows[0].ends) == (rows[1].count, rows[1].stopped, rows[1].ends)
    assert len(rows[0].ends) == rows[0].count and rows[0].ends == sorted(rows[0].ends)
    assert all(0 <= end <= len(rows[0].text) for end in rows[0].ends)
    if not stops:
        assert rows[0].text == said and rows[0].count == len(tokens)


def parts_of(text: str) -> list[str]:
    return [text[at : at + length] for length in (1, 2, 3) for at in range(0, max(0, len(text) - length + 1), 3)]


def reference_stop(kind: str, tokens, stops) -> tuple[str, int, bool]:
    """Text, kept tokens, whether a stop string was found: everything is read again for every token."""
    shown, seen, owners = [], "", []  # the text with special tokens visible, what of it is shown, whose it is
    for index, token in enumerate(tokens):
        if token in reader_of(kind).special:
            new, is_text = tokenizer_of(kind).convert_ids_to_tokens(token), False
        else:
            length = sum(shown)
            new, is_text = complete_text(kind, tokens[: index + 1])[length:], True
        seen, shown, owners = seen + new, shown + [is_text] * len(new), owners + [index] * len(new)
    rest = whole_text(kind, tokens)[sum(shown) :]
    seen, shown, owners = seen + rest, shown + [True] * len(rest), owners + [len(tokens) - 1] * len(rest)
    for end in range(1, len(seen) + 1):
        complete = [stop for stop in stops if seen[:end].endswith(stop)]
        if complete:
            start = end - max(map(len, complete))
            kept = "".join(c for c, is_text in zip(seen[:start], shown, strict=False) if is_text)
            return kept, owners[end - 1] + 1, True
    return "".join(c for c, is_text in zip(seen, shown, strict=True) if is_text), len(tokens), False


@pytest.mark.parametrize("kind", ["byte_fallback", "gemma", "byte_level", "demo", "word_piece"])
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_stop_strings_against_a_plain_reference(kind, data):
    tokens = data.draw(token_lists(kind))
    text, names = whole_text(kind, tokens), [reader_of(kind).name(token) for token in reader_of(kind).special]
    known = [*parts_of(text), *names, *(text[-2:] + name for name in names), "猫", "猫猫", "aa", HALF]
    stops = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=4))
    row = Detokenizer(reader_of(kind), stops)
    cuts = data.draw(st.lists(st.integers(0, len(tokens)), max_size=5))
    pieces = pieces_of(row, tokens, cuts)
    assert ("".join(pieces), row.count, row.stopped) == reference_stop(kind, tokens, stops)


def test_a_complete_character_is_never_lost():
    tokenizer = tokenizer_of("byte_fallback")
    cat = byte_tokens(tokenizer, "猫")
    stray, word = cat[0], tokenizer.convert_tokens_to_ids("▁b")
    assert tokenizer.decode([*cat, stray]) == 4 * HALF  # what there is to do better
    assert detokenize(tokenizer, [*cat, stray]) == "猫" + HALF
    assert detokenize(tokenizer, [stray, *cat, word]) == HALF + "猫 b"
    row = Detokenizer(TokenReader(tokenizer))
    shown = []
    for token in [*cat, stray, stray, word]:
        row.add([token])
        shown.append(row.take())
    assert shown == ["", "", "猫", "", HALF, HALF + " b"]


def test_only_what_may_become_a_stop_string_is_held_back():
    tokenizer = tokenizer_of("byte_fallback")
    row = Detokenizer(TokenReader(tokenizer), ["b c!", "\n\n"])
    shown = []
    for character in "ab cb c b\nd":
        row.add(byte_tokens(tokenizer, character))
        shown.append(row.take())
    assert shown == ["a", "", "", "", "b c", "", "", "b c ", "", "b", "\nd"]
    row.finish()
    assert row.take() == "" and not row.stopped


def test_stop_strings_that_are_or_contain_special_tokens():
    tokenizer = tokenizer_of("byte_fallback")
    end, mark = tokenizer.convert_tokens_to_ids(["</s>", "<|eot|>"])
    said = [*byte_tokens(tokenizer, "one"), mark, *byte_tokens(tokenizer, "two"), end]
    cases = {
        "<|eot|>": ("one", 4),
        "</s>": ("onetwo", 8),
        "ne<|eot|>": ("o", 4),
        "<|eot|>tw": ("one", 6),
        "eot": ("one", 4),
        "onetwo": ("onetwo", 8),  # what is shown side by side is not side by side where it is looked for
    }
    for stop, expected in cases.items():
        row = Detokenizer(TokenReader(tokenizer), [stop])
        pieces_of(row, said, [])
        assert (row.text, row.count) == expected, stop
        assert row.stopped == (stop != "onetwo")


@pytest.mark.parametrize("kind", KINDS)
def test_work_is_linear(kind, monkeypatch):
    """However long the answer, every token is decoded a fixed number of times."""
    tokenizer = KINDS[kind]()
    decoded = []
    decode = type(tokenizer).decode

    def counted(self, tokens, *args, **options):
        decoded.append(1 if isinstance(tokens, int) else len(tokens))
        return decode(self, tokens, *args, **options)

    monkeypatch.setattr(type(tokenizer), "decode", counted)
    usual = usual_tokens(kind)
    for count in (66, 660):
        decoded.clear()
        row = Detokenizer(TokenReader(tokenizer), ["no such text"])
        pieces_of(row, [usual[index % len(usual)] for index in range(count)], range(0, count, 4))
        assert sum(decoded) <= 10 * count
    spaces = [reader_of(kind).tokenizer.convert_tokens_to_ids(" ")] if kind == "slow" else usual[:1]
    decoded.clear()
    pieces_of(Detokenizer(TokenReader(tokenizer)), spaces * 600, [])
    assert sum(decoded) <= 10 * 600


def test_tokens_beyond_the_vocabulary_say_nothing():
    """A target's vocabulary may be padded."""
    tokenizer = tokenizer_of("byte_fallback")
    cat = byte_tokens(tokenizer, "猫")
    assert detokenize(tokenizer, [cat[0], 99_999, *cat[1:]]) == "猫"


@settings(deadline=None)
@given(st.lists(st.text("ab'. ns", max_size=4), max_size=6), st.sampled_from([" .", " ' ", " n't", "aa", "aba"]))
def test_replacer_is_replace_in_pieces(pieces, old):
    replacer = Replacer(old, "x")
    assert "".join(map(replacer.add, pieces)) + replacer.rest() == "".join(pieces).replace(old, "x")
