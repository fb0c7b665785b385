"""LLaVA-NeXT equals transformers' LLaVA-NeXT for images of any size, several to a prompt, in padded batches
and cached decoding."""

import numpy as np
import pytest
import torch
import transformers
from transformers import LlavaNextImageProcessor

from jaxspec.targets.llava_next import LlavaNextAdapter, LlavaNextConfig
from jaxspec.targets.registry import FAMILIES
from tests.folders import padded, relative_error, torch_pair
from tests.greedy import check_greedy

VOCAB, IMAGE_TOKEN, TILE, PATCH = 99, 98, 24, 6
TOLERANCE = FAMILIES["llava_next"].tolerance
WIDE = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
CONFIGS = {
    "llama 4:2": {"text": transformers.LlamaConfig, "grid_pinpoints": WIDE, "num_key_value_heads": 2},
    "mistral 4:1, tied": {
        "text": transformers.MistralConfig,
        "grid_pinpoints": WIDE,
        "num_key_value_heads": 1,
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
    "one row of tiles, also a single one": {
        "text": transformers.LlamaConfig,
        "grid_pinpoints": [[24, 24], [24, 96]],
        "num_key_value_heads": 4,
    },
}
# Sizes (height, width): square, odd, extreme both ways, one pixel, larger than any grid.
SIZES = [(24, 24), (31, 50), (7, 90), (90, 7), (1, 1), (200, 133)]


def next_config(text, grid_pinpoints, **fields) -> transformers.LlavaNextConfig:
    return transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=TILE,
            patch_size=PATCH,
        ),
        text_config=text(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=1024,
            **fields,
        ),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=grid_pinpoints,
        tie_word_embeddings=fields.get("tie_word_embeddings", False),
    )


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda name: name)
def pair(request, tmp_path_factory):
    """Our target and transformers' model of one folder."""
    config = next_config(**CONFIGS[request.param])
    return torch_pair(transformers.LlavaNextForConditionalGeneration(config), tmp_path_factory.mktemp("next") / "model")


def pictures(sizes, config) -> dict:
    """What the image processor makes of random pictures."""
    rng = np.random.default_rng(len(sizes))
    processor = LlavaNextImageProcessor(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=[list(pair) for pair in config.grid_pinpoints],
    )
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    return dict(processor(images, return_tensors="np", input_data_format="channels_last"))


def batch(rows, config, side="right") -> dict:
    """Processor outputs for rows of pieces: a number is that many text tokens, a size is an image of that size."""
    rng = np.random.default_rng(0)
    sizes = [piece for row in rows for piece in row if isinstance(piece, tuple)]
    inputs = pictures(sizes, config) if sizes else {}
    counts = iter([layout.tokens for layout in LlavaNextAdapter(config).lay_out(inputs)])
    ids = [
        np.concatenate(
            [[IMAGE_TOKEN] * next(counts) if isinstance(p, tuple) else rng.integers(3, IMAGE_TOKEN, p) for p in row]
        )
        for row in rows
    ]
    return inputs | padded(ids, side)


def torch_logits(model, inputs) -> np.ndarray:
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items()}
    position_ids = (tensors["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**tensors, position_ids=position_ids).logits.numpy()


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_equal_transformers(pair, side):
    target, model = pair
    rows = [[3, SIZES[0], 4], [2, SIZES[1], 1, SIZES[2], 2], [SIZES[3], SIZES[4], 3], [SIZES[5], 2], [6]]
    inputs = batch(rows, target.config, side)
    real = inputs["attention_mask"].astype(bool)
    ours = np.asarray(target.logits(inputs))
    assert relative_error(ours[real], torch_logits(model, inputs)[real]) < TOLERANCE


def test_greedy_tokens_equal_transformers(pair):
    target, model = pair
    inputs = batch([[3, SIZES[1], 2, SIZES[3], 1], [2, SIZES[0], 3], [6]], target.config, "left")
    check_greedy(target, model, inputs)


@pytest.mark.parametrize("pinpoints", [WIDE, [[24, 24], [24, 96]]])
def test_token_counts_are_the_processors(pinpoints):
    config = LlavaNextConfig.from_hf(next_config(transformers.LlamaConfig, pinpoints))
    images = pictures(SIZES, config)
    processor = transformers.LlavaNextProcessor.__new__(transformers.LlavaNextProcessor)
    processor.patch_size, processor.num_additional_image_tokens = PATCH, 1
    processor.image_processor = type("Grid", (), {"image_grid_pinpoints": pinpoints})
    expected = [processor._get_number_of_features(*size, TILE, TILE) - 1 for size in SIZES]
    assert [layout.tokens for layout in LlavaNextAdapter(config).lay_out(images)] == expected


def test_a_class_token_is_refused():
    config = next_config(transformers.LlamaConfig, WIDE)
    config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="'full' is not supported in LLaVA-NeXT"):
        LlavaNextConfig.from_hf(config)
