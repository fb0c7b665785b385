"""Gemma3 equals transformers' Gemma3: windows, two ropes, images that see themselves, in padded batches and
cached decoding."""

import numpy as np
import pytest
import torch
import transformers

from jaxspec.targets.gemma3 import Gemma3Config
from jaxspec.targets.registry import FAMILIES
from tests.folders import padded, relative_error, torch_pair
from tests.greedy import check_greedy

VOCAB, IMAGE, START, END = 99, 96, 97, 98
TOLERANCE = FAMILIES["gemma3"].tolerance
FULL, LOCAL = "full_attention", "sliding_attention"
CONFIGS = {
    "window 5, 4:2, tied": {
        "text": {"sliding_window": 5, "layer_types": [LOCAL, FULL, LOCAL], "num_key_value_heads": 2},
    },
    "window 3, 4:1, linear rope, untied": {
        "text": {
            "sliding_window": 3,
            "layer_types": [LOCAL, LOCAL, FULL],
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 5,
            "rope_parameters": {
                FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                LOCAL: {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        "tie_word_embeddings": False,
    },
    "no window, 4:4, no pooling": {
        "text": {"layer_types": [FULL, FULL, FULL], "num_key_value_heads": 4, "head_dim": 12},
        "mm_tokens_per_image": 16,
    },
}  # fmt: skip


def gemma_config(text, mm_tokens_per_image=4, tie_word_embeddings=True) -> transformers.Gemma3Config:
    return transformers.Gemma3Config(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 16,
            "patch_size": 4,
            "vision_use_head": False,
        },
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "query_pre_attn_scalar": 8,
        }
        | text,
        mm_tokens_per_image=mm_tokens_per_image,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        tie_word_embeddings=tie_word_embeddings,
    )


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda name: name)
def pair(request, tmp_path_factory):
    model = transformers.Gemma3ForConditionalGeneration(gemma_config(**CONFIGS[request.param]))
    return torch_pair(model, tmp_path_factory.mktemp("gemma") / "model")


def batch(rows, tokens_per_image, side) -> dict:
    """Inputs for rows of pieces: a number is that many text tokens, "i" an image between its marks."""
    rng = np.random.default_rng(0)
    image = [START, *[IMAGE] * tokens_per_image, END]
    sequences = [
        np.concatenate([image if piece == "i" else rng.integers(3, 90, piece) for piece in row]).astype(np.int64)
        for row in rows
    ]
    inputs = padded(sequences, side)
    images = sum(row.count("i") for row in rows)
    if images:
        inputs["pixel_values"] = rng.normal(size=(images, 3, 16, 16)).astype(np.float32)
    return inputs


def torch_logits(model, inputs) -> np.ndarray:
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    kinds = (tensors["input_ids"] == IMAGE).int()
    position_ids = (tensors["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**tensors, token_type_ids=kinds, position_ids=position_ids).logits.numpy()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "rows", [[[3, "i", 9], [1, "i", 2, "i", 4], ["i", "i", 3], [12]], [[7], [11]]], ids=["images", "text"]
)
def test_logits_equal_transformers(pair, rows, side):
    target, model = pair
    inputs = batch(rows, target.config.tokens_per_image, side)
    real = inputs["attention_mask"].astype(bool)
    assert relative_error(np.asarray(target.logits(inputs))[real], torch_logits(model, inputs)[real]) < TOLERANCE


def test_greedy_tokens_equal_transformers(pair):
    """Windows are shorter than what is generated, so that local layers forget the prompt and the first tokens."""
    target, model = pair
    inputs = batch([[3, "i", 9, "i", 2], [1, "i", 4], [12]], target.config.tokens_per_image, "left")
    check_greedy(target, model, inputs, token_type_ids=(inputs["input_ids"] == IMAGE).astype(np.int64))


@pytest.mark.parametrize(
    ("field", "value"),
    [("final_logit_softcapping", 30.0), ("attn_logit_softcapping", 50.0), ("use_bidirectional_attention", True)],
)
def test_unsupported_options_are_refused(field, value):
    config = gemma_config(CONFIGS["window 5, 4:2, tied"]["text"])
    setattr(config.text_config, field, value)
    with pytest.raises(ValueError, match=field):
        Gemma3Config.from_hf(config)
