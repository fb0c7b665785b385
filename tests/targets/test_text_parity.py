"""Text-only targets equal transformers' causal language models, in padded batches."""

import numpy as np
import pytest
import torch
import transformers

from jaxspec.targets.registry import load_model
from jaxspec.targets.target import Target
from tests.folders import redraw, relative_error

TOLERANCE = 1e-5
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
    "llama": (transformers.LlamaForCausalLM, {"num_key_value_heads": 2}),
    "mistral": (transformers.MistralForCausalLM, {"num_key_value_heads": 1, "sliding_window": None}),
    "qwen2, tied": (transformers.Qwen2ForCausalLM, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "gemma3, window 4": (
        transformers.Gemma3ForCausalLM,
        {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
    ),
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, side, tmp_path):
    kind, options = CONFIGS[name]
    model = redraw(kind(kind.config_class(**TEXT, **options)).eval())
    model.save_pretrained(tmp_path)
    target = Target(load_model(tmp_path), None, tmp_path, ())
    ids = np.random.default_rng(0).integers(3, 99, (3, 17))
    lengths = np.array([17, 9, 4])
    mask = (np.arange(17) < lengths[:, None]).astype(np.int64)
    if side == "left":
        mask = mask[:, ::-1].copy()
    tensors = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    with torch.no_grad():
        expected = model(**tensors, position_ids=(tensors["attention_mask"].cumsum(1) - 1).clamp(min=0)).logits.numpy()
    real = mask.astype(bool)
    ours = np.asarray(target.logits({"input_ids": ids, "attention_mask": mask}))
    assert relative_error(ours[real], expected[real]) < TOLERANCE


def test_sliding_windows_of_mistral_are_refused(tmp_path):
    transformers.MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=7).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sliding_window 7 is not supported"):
        load_model(tmp_path)
