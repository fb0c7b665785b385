"""Qwen2.5-VL equals transformers' Qwen2.5-VL: images and videos of any size and number, in padded batches and cached
decoding.

transformers is given our positions: what its newer releases compute after a video is not what the model was trained
with (docs/TARGETS.md). `test_qwen2_5_vl_positions.py` has those, written out by hand.
"""

import numpy as np
import pytest
import torch
import transformers

from jaxspec.targets.chunks import position_offset
from jaxspec.targets.prompts import prompts_of
from jaxspec.targets.registry import FAMILIES
from tests.folders import padded, relative_error, torch_pair
from tests.greedy import check_greedy

VOCAB, IMAGE, VIDEO, START, END = 99, 95, 96, 97, 98
TOLERANCE = FAMILIES["qwen2_5_vl"].tolerance
CONFIGS = {
    "windows of 2 x 2 tokens, 4:2": {"window_size": 32, "full": [1], "kv": 2, "sections": [2, 1, 1]},
    "windows of 4 x 4, 4:1, tied": {"window_size": 64, "full": [2], "kv": 1, "sections": [1, 1, 2], "tied": True},
    "full attention first and last": {"window_size": 48, "full": [0, 2], "kv": 4, "sections": [2, 2]},
}  # fmt: skip


def qwen_config(window_size, full, kv, sections, tied=False) -> transformers.Qwen2_5_VLConfig:
    return transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_heads": 2,
            "patch_size": 8,
            "window_size": window_size,
            "fullatt_block_indexes": full,
            "out_hidden_size": 32,
        },
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": kv,
            "max_position_embeddings": 512,
            "bos_token_id": None,
            "eos_token_id": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
    )


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda name: name)
def pair(request, tmp_path_factory):
    model = transformers.Qwen2_5_VLForConditionalGeneration(qwen_config(**CONFIGS[request.param]))
    return torch_pair(model, tmp_path_factory.mktemp("qwen") / "model")


def batch(rows, side="right") -> dict:
    """Inputs for rows of pieces: a number is that many text tokens, (t, h, w) an image (t = 1) or video in patches."""
    rng = np.random.default_rng(0)
    grids = {IMAGE: [], VIDEO: []}
    sequences = []
    for row in rows:
        pieces = []
        for piece in row:
            if isinstance(piece, int):
                pieces.append(rng.integers(3, 90, piece))
            else:
                kind = VIDEO if len(piece) == 4 else IMAGE
                grids[kind].append(piece[:3])
                pieces.append([START, *[kind] * (piece[0] * piece[1] * piece[2] // 4), END])
        sequences.append(np.concatenate(pieces).astype(np.int64))
    inputs = padded(sequences, side)
    names = {IMAGE: ("pixel_values", "image_grid_thw"), VIDEO: ("pixel_values_videos", "video_grid_thw")}
    for kind, (pixels, name) in names.items():
        if grids[kind]:
            count = sum(t * h * w for t, h, w in grids[kind])
            inputs[pixels] = rng.normal(size=(count, 3 * 2 * 8 * 8)).astype(np.float32)
            inputs[name] = np.array(grids[kind])
    seconds = [piece[3] for row in rows for piece in row if not isinstance(piece, int) and len(piece) == 4]
    if seconds:
        inputs["second_per_grid_ts"] = np.array(seconds)
    return inputs


def positions(target, inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours, i64 `[3, B, S]`, and how far each row's next position is from its length, `[B, 1]`: what transformers'
    `get_rope_index` returns."""
    mask = inputs["attention_mask"].astype(bool)
    placed, deltas = np.zeros((3, *mask.shape), np.int64), []
    for index, prompt in enumerate(prompts_of(target.adapter, inputs)):
        length, ours = len(prompt.input_ids), prompt.position_ids
        placed[:, index, mask[index]] = np.arange(length) if ours is None else ours
        deltas.append([position_offset(prompt)])
    return torch.from_numpy(placed), torch.tensor(deltas)


def torch_logits(model, inputs, position_ids) -> np.ndarray:
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.no_grad():
        return model(**tensors, position_ids=position_ids).logits.numpy()


ROWS = {
    "images": [[3, (1, 4, 4), 2], [(1, 2, 6), 1, (1, 10, 4), 4], [2, (1, 2, 2), 3], [1, (1, 12, 14)]],
    "odd video": [[2, (3, 4, 6, 0.5), 3], [1, (1, 4, 4), 2, (5, 2, 4, 1.25), 4], [7]],  # the second's time is longest
    "text": [[5], [3]],
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("rows", ROWS)
def test_logits_equal_transformers(pair, rows, side):
    target, model = pair
    inputs = batch(ROWS[rows], side)
    real = inputs["attention_mask"].astype(bool)
    expected = torch_logits(model, inputs, positions(target, inputs)[0])
    assert relative_error(np.asarray(target.logits(inputs))[real], expected[real]) < TOLERANCE


def test_greedy_tokens_equal_transformers(pair, monkeypatch):
    """Two images of different sizes, a video of three frames, text only: decoding goes on from different positions."""
    target, model = pair
    inputs = batch([[3, (1, 4, 6), 2, (1, 2, 10), 3], [1, (3, 4, 6, 4.0), 4], [7]], "left")
    is_image, is_video = inputs["input_ids"] == IMAGE, inputs["input_ids"] == VIDEO
    ours = positions(target, inputs)
    monkeypatch.setattr(model.model, "get_rope_index", lambda *args, **kwargs: ours)
    check_greedy(target, model, inputs, mm_token_type_ids=is_image + 2 * is_video.astype(np.int64))
