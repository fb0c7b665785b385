"""A target of random weights that decodes, with a drafter or without: what is timed at published sizes.

A drafter that earns `a` tokens a round speeds decoding up by `a * step / round`, so `efficiency` (speed-up divided by
mean acceptance length) is `step / round`, whatever the weights.
"""

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.gpu_parts.part import BEFORE, BEHIND
from jaxspec.drafters.contract import DraftModel
from jaxspec.kernels.attention import implementation
from jaxspec.programs import Programs
from jaxspec.speculation.params import SamplingParams
from jaxspec.speculation.state import DecodeState, Request
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.llava import Llava, LlavaAdapter, LlavaConfig
from jaxspec.targets.prompts import EncodedPrompt


def prompts_of(config: LlavaConfig, batch: int, length: int | None = None) -> list[EncodedPrompt]:
    """Random ones of that length, each with an image of its own, `BEFORE` tokens from its beginning."""
    rng, tokens = np.random.default_rng(0), config.tokens_per_image
    made = []
    for _ in range(batch):
        ids = rng.integers(0, config.image_token_id, length or BEFORE + tokens + BEHIND).astype(np.int32)
        ids[BEFORE : BEFORE + tokens] = config.image_token_id
        pixels = rng.standard_normal((1, *config.vision.pixel_shape), np.float32)
        made.append(EncodedPrompt(ids, LlavaAdapter(config).lay_out({"pixel_values": pixels})))
    return made


class Runner:
    """One way to decode a batch. All programs are compiled by the first run, so that several can do so at once."""

    def __init__(
        self,
        model: Llava,
        draft_model: DraftModel | None,
        tree: TreeConfig,
        batch: int,
        *,
        capacity: int,
        kernel: str = "plain",
        sampling: SamplingParams = SamplingParams(),
    ) -> None:
        config = model.config
        self.model, self.draft_model, self.tree, self.batch, self.capacity = model, draft_model, tree, batch, capacity
        self.prompts, self.kernel = prompts_of(config, batch), kernel
        self.adapter = LlavaAdapter(config)
        self.programs = Programs(model, self.adapter, draft_model, tree)
        self.params = self.programs.params_of(model, draft_model)
        self.request = self.asking(sampling)

    def asking(self, sampling: SamplingParams, limit: int | None = None) -> Request[np.ndarray]:
        """So many tokens, or as many as there is room for."""
        ids = [prompt.input_ids for prompt in self.prompts]
        limit = self.capacity - len(ids[0]) if limit is None else limit
        return Request.of([sampling] * self.batch, ids, [limit] * self.batch, (), self.model.config.text.vocab_size)

    def begin(self, tables: Mapping[Any, Any] | None = None) -> DecodeState:
        """The prompts read and the first tokens chosen; the device may still be busy."""
        with implementation(self.kernel):
            read = self.programs.read(self.params, self.prompts, self.capacity, tables)
            return self.programs.begin(self.params, read, self.request, self.prompts, self.capacity)

    def decode(self, state: DecodeState, rounds: int) -> DecodeState:
        """`state` is consumed; this waits for the device."""
        with implementation(self.kernel):
            return jax.block_until_ready(self.programs.decode(self.params, state, jnp.int32(rounds)))

    def compiled_text(self, state: DecodeState) -> str:
        """The program of `decode` as XLA writes it."""
        with implementation(self.kernel):
            return self.programs._decode.lower(self.params, state, jnp.int32(1), self.tree).compile().as_text()

    def timed(self, rounds: int) -> tuple[float, float]:
        """Seconds of the prefill with its images, and of one round. Raises RuntimeError where a row ended before."""
        started = time.perf_counter()
        state = jax.block_until_ready(self.begin())
        prefilled = time.perf_counter()
        state = self.decode(state, rounds)
        ended = time.perf_counter()
        done = int(np.asarray(state.rounds).min())
        if done != rounds:
            raise RuntimeError(f"{done} rounds were run instead of {rounds}")
        return prefilled - started, (ended - prefilled) / rounds

    def warm(self) -> float:
        """Compiles everything; seconds that it took."""
        started = time.perf_counter()
        self.decode(jax.block_until_ready(self.begin()), 1)
        return time.perf_counter() - started


def nbytes(module: nnx.Module | None) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(module))) if module is not None else 0


def step_bytes(runner: Runner, rounds: int) -> float:
    """That an autoregressive step must read: weights but for the table of embeddings, keys and values of what is
    filled, in the middle of so many steps."""
    language, text = runner.model.language_model, runner.model.config.text
    weights = nbytes(language) - (0 if text.tie_word_embeddings else nbytes(language.embed_tokens))
    width = 2 * text.num_layers * text.num_kv_heads * text.head_dim * jnp.dtype(runner.model.dtype).itemsize
    filled = len(runner.prompts[0].input_ids) + rounds / 2
    return weights + runner.batch * filled * width


def draft_bytes(runner: Runner) -> float:
    """That the drafter reads in a round beside what the target does: its layers once for every level of the tree and
    what it takes in, and as often an LM head, the target's or its own. Its caches and the adaptor of images are left
    out."""
    if runner.draft_model is None:
        return 0.0
    head = runner.draft_model
    own = nbytes(getattr(head, "draft_head", None))
    layers = sum(nbytes(getattr(head, name, None)) for name in ("fc", "img_fc", "layers"))
    lm_head = own or nbytes(runner.model.language_model.lm_head)
    return runner.tree.max_depth * (layers + lm_head)
