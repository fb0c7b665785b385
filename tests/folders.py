"""Small folders, as transformers writes them and as jaxspec does, and prompts for the LLaVA ones."""

from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from flax import nnx

from jaxspec.checkpoints.names import abstract
from jaxspec.targets.registry import config_from, family_of, load_model, save_model
from jaxspec.targets.target import Target

VOCAB, IMAGE_TOKEN, IMAGE_SIZE = 99, 98, 16
TOKENS_PER_IMAGE = 4
TEXT_SCALES = {"embed_tokens": 0.3, "q_proj": 3.0}


def llava_config(text: dict | None = None, vision: dict | None = None, **top) -> transformers.LlavaConfig:
    """Two text layers with 4:2 heads, two vision layers, images of 16 x 16 in 4 patches, unless said otherwise."""
    vision_config = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
    }
    text_config = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision_config | (vision or {})),
        text_config=transformers.LlamaConfig(**text_config | (text or {})),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=TOKENS_PER_IMAGE,
        **top,
    )


def torch_llava(config: transformers.LlavaConfig, seed: int = 0) -> transformers.LlavaForConditionalGeneration:
    return redraw(transformers.LlavaForConditionalGeneration(config).eval(), seed)


def redraw(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The model with new weights, so that every matrix, bias and norm shows in the logits, and every next token depends
    on all that came before: greedy text does not repeat itself."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                text = "vision" not in name
                scale = next((scale for part, scale in TEXT_SCALES.items() if text and part in name), 1.0)
                parameter.copy_(scale * draw / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.2 * draw + ("norm" in name and name.endswith("weight")))
    return model


def write_llava(folder: Path, config: transformers.LlavaConfig | None = None, dtype=np.float32) -> Path:
    return write_random(folder, config or llava_config(), dtype)


def write_random(folder: Path, config: transformers.PreTrainedConfig, dtype=np.float32) -> Path:
    """A folder of random weights of any family, without transformers' model and without a processor."""
    empty = folder.with_name(folder.name + "_processor")
    empty.mkdir()
    family = family_of(config)
    graph, state = nnx.split(abstract(lambda rngs: family.model(family.config_from_hf(config), rngs=rngs)))
    rng = np.random.default_rng(0)

    def draw(leaf):
        values = rng.standard_normal(leaf.shape, np.float32)
        return values / np.float32(leaf.shape[0] ** 0.5) if values.ndim > 1 else 1 + np.float32(0.2) * values

    save_model(nnx.merge(graph, jax.tree.map(draw, state)), config, empty, folder, dtype)
    return folder


def padded(sequences, side: str) -> dict:
    """`input_ids` and `attention_mask` i64 `[B, S]` of token sequences, padded on that side."""
    length = max(map(len, sequences))
    ids, mask = np.zeros((2, len(sequences), length), np.int64)
    for index, sequence in enumerate(sequences):
        real = slice(0, len(sequence)) if side == "right" else slice(length - len(sequence), length)
        ids[index, real], mask[index, real] = sequence, 1
    return {"input_ids": ids, "attention_mask": mask}


def bare_target(folder: Path) -> Target:
    """The target of a folder without a processor."""
    model = load_model(folder)
    return Target(model, config_from(folder)[0].adapter(model.config), None, folder, ())


def torch_pair(model: torch.nn.Module, folder: Path) -> tuple[Target, torch.nn.Module]:
    """transformers' model with new weights, and ours from the folder that it saves."""
    redraw(model.eval()).save_pretrained(folder)
    return bare_target(folder), model


def batch_of(*rows, tokens_per_image: int = TOKENS_PER_IMAGE, side: str = "right", seed: int = 0) -> dict:
    """Processor outputs for `rows` of pieces: a number is that many text tokens, "i" is an image."""
    rng = np.random.default_rng(seed)
    sequences = []
    for row in rows:
        pieces = [[IMAGE_TOKEN] * tokens_per_image if p == "i" else rng.integers(3, IMAGE_TOKEN, p) for p in row]
        sequences.append(np.concatenate(pieces).astype(np.int64))
    inputs = padded(sequences, side)
    images = sum(row.count("i") for row in rows)
    if images:
        inputs["pixel_values"] = rng.normal(size=(images, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    return inputs


def torch_logits(model: transformers.LlavaForConditionalGeneration, inputs: dict) -> np.ndarray:
    """transformers' logits `[B, S, V]`, with positions that count from the first real token of each row."""
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    position_ids = (tensors["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**tensors, position_ids=position_ids).logits.numpy()


def relative_error(ours, theirs) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
