"""A target that says what it is told to: after every token a certain next one. And a drafter that drafts what it is
told to. For tests of what happens to tokens, where a random model would never come by them."""

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx
from tokenizers import Tokenizer, decoders, models

from jaxspec import Drafter, Target, TreeConfig
from jaxspec.checkpoints.names import abstract
from jaxspec.speculation.tree import build_tree
from jaxspec.targets.processors import TextProcessor
from jaxspec.targets.prompts import EncodedPrompt
from jaxspec.targets.registry import family_of


def byte_fallback_tokenizer(*words: str, strip: bool = True) -> transformers.PreTrainedTokenizerFast:
    """Llama 2's kind: `words` and 256 byte tokens, `</s>` and `<|eot|>` special; tokens 0 to 3 are not text."""
    special = ["<unk>", "<s>", "</s>", "<|eot|>"]
    names = [*special, *words, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {name: token for token, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * strip)
    tokenizer.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def byte_tokens(tokenizer, text: str | bytes) -> list[int]:
    data = text.encode() if isinstance(text, str) else text
    return tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in data])


def scripted_target(tokenizer, *answers: list[int], broken: tuple[int, ...] = ()) -> Target:
    """A one-layer Llama without attention to speak of: each answer is a list of tokens, none of which occurs in two
    places, and its last is said for ever. Reading a `broken` token gives NaN."""
    size = len(tokenizer)
    config = transformers.LlamaConfig(
        vocab_size=size,
        hidden_size=size + size % 2,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    family = family_of(config)
    graph, state = nnx.split(abstract(lambda rngs: family.model(family.config_from_hf(config), rngs=rngs)))
    filled = jax.tree.map(lambda leaf: jnp.full(leaf.shape, float(len(leaf.shape) == 1), jnp.float32), state)
    model = nnx.merge(graph, filled)
    language = model.language_model
    embedding = np.eye(size, config.hidden_size, dtype=np.float32)
    embedding[list(broken)] = np.nan
    head = np.zeros((config.hidden_size, size), np.float32)
    for answer in answers:
        for now, following in zip(answer, [*answer[1:], answer[-1]], strict=True):
            head[now, following] = 1.0
    language.embed_tokens.embedding[...] = jnp.asarray(embedding)
    language.lm_head.kernel[...] = jnp.asarray(head)
    return Target(model, family.adapter(model.config), TextProcessor(tokenizer), None, (tokenizer.eos_token_id,))


def prompt_of(*tokens: int) -> EncodedPrompt:
    return EncodedPrompt(np.array(tokens, np.int32), [])


class ScriptedHead(nnx.Module):
    """Drafts after each token what `table` i32 `[V, 2]` says: the first as a chain of three, the second as a sibling
    of its first node."""

    def __init__(self, table: np.ndarray):
        self.table = nnx.Variable(jnp.asarray(table, jnp.int32))

    def prefill(self, model, context, capacity: int):
        return jnp.zeros_like(context.root)

    def propose(self, model, config: TreeConfig, state, root, noise, sampling):
        table = self.table[...]
        first = table[root, 0]
        second = table[first, 0]
        tokens = jnp.stack([root, first, table[root, 1], second, table[second, 0]], axis=1)
        shape = tokens.shape
        parents = jnp.broadcast_to(jnp.array([0, 0, 0, 1, 3]), shape)
        depths = jnp.broadcast_to(jnp.array([0, 1, 1, 2, 3]), shape)
        return build_tree(tokens, parents, depths, config.max_depth)

    def advance(self, model, state, tokens, features, count):
        return state


def scripted_drafter(size: int, chain: dict[int, int], siblings: dict[int, int]) -> Drafter:
    """Unlisted tokens are followed by token 0 in the drafts, and have 1 as a sibling."""
    table = np.zeros((size, 2), np.int32)
    table[:, 1] = 1
    for column, entries in enumerate((chain, siblings)):
        for token, following in entries.items():
            table[token, column] = following
    return Drafter(ScriptedHead(table), TreeConfig(2, 2, 5), "scripted", {})
