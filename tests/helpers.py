"""Small random models that several tests share."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx

from jaxspec.cli import main
from jaxspec.demo.processor import IMAGE_SIZE, PATCH_SIZE
from jaxspec.layers import TextConfig
from jaxspec.speculation.params import SamplingParams
from jaxspec.targets.clip import ClipVisionConfig
from jaxspec.targets.llava import Llava, LlavaConfig

MIXED_SAMPLING = [
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.5),
    SamplingParams(temperature=1.0, seed=4, logprobs=2),
    SamplingParams(temperature=0.8, top_p=0.9, seed=5, frequency_penalty=0.7, min_tokens=6),
    SamplingParams(temperature=1.0, seed=6),
    SamplingParams(logprobs=0),
    SamplingParams(temperature=1.0, top_k=12, seed=7, logit_bias={9: 4.0}),
]
"""Requests of every kind, to be answered beside each other."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GivenNoise:
    """`jaxspec.speculation.sampling.Noise` with the values that a test wants: f32 `[B, P, V]`."""

    values: jax.Array

    def levels(self, start: int, count: int, tokens: jax.Array | None = None) -> jax.Array:
        values = jnp.asarray(self.values)[:, start : start + count]
        return values if tokens is None else values[..., tokens]


def config_for(processor, **text) -> transformers.LlavaConfig:
    """A small LLaVA for the demo's processor; `text` holds the fields of its text model."""
    tokenizer = processor.tokenizer
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            projection_dim=16,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **text,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        architectures=["LlavaForConditionalGeneration"],
    )


def tiny_llava(
    vocab_size=97, hidden_size=32, image_token_id=96, patches=4, layers=2, kv_heads=2, seed=0, scale=1.0, **text
) -> Llava:
    """A LLaVA with random float32 weights; `patches` image tokens per image, a square number."""
    config = LlavaConfig(
        text=TextConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_layers=layers,
            num_heads=4,
            num_kv_heads=kv_heads,
            head_dim=hidden_size // 4,
            **text,
        ),
        vision=ClipVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_layers=2,
            num_heads=2,
            image_size=4 * round(patches**0.5),
            patch_size=4,
        ),
        image_token_id=image_token_id,
    )
    model = Llava(config, rngs=nnx.Rngs(seed))
    return randomized(model, seed, scale)


def randomized(model: nnx.Module, seed: int, scale: float) -> nnx.Module:
    """The model with every matrix redrawn at fan-in scale, so that logits are far apart and depend on everything."""
    graph, state = nnx.split(model)
    rng = np.random.default_rng(seed)

    def redraw(leaf):
        if leaf.ndim < 2:
            return leaf
        return jnp.asarray(rng.normal(size=leaf.shape) * scale / np.sqrt(leaf.shape[0]), leaf.dtype)

    return nnx.merge(graph, jax.tree.map(redraw, state))


def answer_scenes(target: Path, output: Path, count: int) -> None:
    """A target's answers of up to 12 tokens to scenes, every other one sampled."""
    files = ["--data", "scenes", "--target", str(target), "--output", str(output)]
    numbers = ["--count", str(count), "--batch-size", "4", "--shard-size", "8", "--max-new-tokens", "12"]
    sampling = ["--temperature", "1", "--sampled-share", "0.5", "--compilation-cache", ""]
    cache = jax.config.jax_compilation_cache_dir
    assert main(["distill", *files, *numbers, *sampling]) == 0
    jax.config.update("jax_compilation_cache_dir", cache)
