"""Text-only targets equal transformers' causal language models, in padded batches and cached decoding."""

import numpy as np
import pytest
import torch
import transformers

from jaxspec.targets.registry import FAMILIES, load_model
from tests.folders import relative_error, torch_pair
from tests.greedy import check_greedy

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
CONFIGS = {
    "llama 4:2": (transformers.LlamaForCausalLM, {"num_key_value_heads": 2}),
    "mistral 4:1": (transformers.MistralForCausalLM, {"num_key_value_heads": 1, "sliding_window": None}),
    "qwen2 4:2, tied": (transformers.Qwen2ForCausalLM, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2 4:4, theta 1e6": (
        transformers.Qwen2ForCausalLM,
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen3 4:2, tied": (
        transformers.Qwen3ForCausalLM,
        {"num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": True},
    ),
    "gemma3 4:2, window 4, tied": (
        transformers.Gemma3ForCausalLM,
        {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
    ),
    "gemma3 4:1, window 6, untied": (
        transformers.Gemma3ForCausalLM,
        {
            "num_key_value_heads": 1,
            "head_dim": 12,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "tie_word_embeddings": False,
        },
    ),
}


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda name: name)
def pair(request, tmp_path_factory):
    kind, options = CONFIGS[request.param]
    return torch_pair(kind(kind.config_class(**TEXT, **options)), tmp_path_factory.mktemp("text") / "model")


def batch(lengths, side) -> dict:
    longest = max(lengths)
    mask = (np.arange(longest) < np.array(lengths)[:, None]).astype(np.int64)
    ids = np.random.default_rng(0).integers(3, 99, mask.shape)
    return {"input_ids": ids, "attention_mask": mask if side == "right" else mask[:, ::-1].copy()}


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_equal_transformers(pair, side):
    target, model = pair
    inputs = batch([17, 9, 4], side)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.no_grad():
        expected = model(**tensors, position_ids=(tensors["attention_mask"].cumsum(1) - 1).clamp(min=0)).logits.numpy()
    real = inputs["attention_mask"].astype(bool)
    assert (
        relative_error(np.asarray(target.logits(inputs))[real], expected[real])
        < FAMILIES[model.config.model_type].tolerance
    )


def test_greedy_tokens_equal_transformers(pair):
    check_greedy(*pair, batch([17, 9, 4], "left"))


def test_sliding_windows_of_mistral_are_refused(tmp_path):
    transformers.MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=7).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sliding_window 7 is not supported"):
        load_model(tmp_path)
