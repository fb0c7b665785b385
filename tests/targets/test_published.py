"""Published models fit: from their config.json alone we build what transformers builds, at full size, without memory.

Every tensor name in the layout of transformers 5 and in that of the hub's files finds its parameter in the right shape,
the numbers of parameters are the published ones, the rotary frequencies are transformers', and a mesh splits nearly all
of it.
"""

import json
import math
import re

import jax
import numpy as np
import pytest
import torch
import transformers

from jaxspec.checkpoints.names import abstract, match, parameter_paths
from jaxspec.rope import rope_frequencies
from jaxspec.sharding import parameter_sharding
from jaxspec.targets.registry import family_of, read_config
from jaxspec.targets.text import TextModel
from tests.targets.published import CONFIGS

COUNTS = {
    "llava-hf/llava-1.5-7b-hf": 7_063_427_072,
    "llava-hf/llava-1.5-13b-hf": 13_351_494_656,
    "llava-hf/llava-v1.6-vicuna-7b-hf": 7_063_427_072 + 4096,  # the newline
    "llava-hf/llava-v1.6-vicuna-13b-hf": 13_351_494_656 + 5120,
    "llava-hf/llava-v1.6-mistral-7b-hf": 7_566_747_648,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "google/gemma-3-4b-it": 4_300_079_472,
    "google/gemma-3-12b-it": 12_187_325_040,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "google/gemma-3-1b-it": 999_885_952,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
}
LLAVA_FILES = (
    (r"model\.language_model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
    (r"model\.vision_tower\.", "vision_tower.vision_model."),
    (r"model\.(?=multi_modal_projector\.|image_newline)", ""),
)
QWEN_FILES = ((r"model\.visual\.", "visual."), (r"model\.language_model\.", "model."))
FILES = {"llava": LLAVA_FILES, "llava_next": LLAVA_FILES, "gemma3": LLAVA_FILES, "qwen2_5_vl": QWEN_FILES}
"""transformers 5's name -> the name in the hub's files, by model_type; the text models have kept theirs."""
LEFTOVERS = {  # in files of older versions
    "llava": {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": (64,),
        "vision_tower.vision_model.embeddings.position_ids": (1, 577),
    }
}
IN_FILES = {
    "llava": "language_model.model.layers.31.self_attn.q_proj.weight",
    "llava_next": "image_newline",
    "gemma3": "multi_modal_projector.mm_input_projection_weight",
    "qwen2_5_vl": "visual.blocks.31.attn.qkv.weight",
}


@pytest.fixture(scope="module", params=CONFIGS)
def published(request, tmp_path_factory):
    """Name, transformers' config, its model without memory, our config, our abstract model."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "config.json").write_text(json.dumps(CONFIGS[request.param]))
    hf_config = read_config(folder)
    family = family_of(hf_config)
    config = family.config_from_hf(hf_config)
    text = issubclass(family.model, TextModel)
    auto = transformers.AutoModelForCausalLM if text else transformers.AutoModelForImageTextToText
    with torch.device("meta"):
        theirs = auto.from_config(hf_config)
    return request.param, hf_config, theirs, config, abstract(lambda rngs: family.model(config, rngs=rngs))


def tensors_of(model, layout: str, model_type: str) -> dict[str, np.ndarray]:
    """Published names with arrays of the right shape that take no memory. Tied heads are not in the files."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if layout == "files":
        for pattern, replacement in FILES.get(model_type, ()):
            shapes = {re.sub("^" + pattern, replacement, name): shape for name, shape in shapes.items()}
        assert IN_FILES.get(model_type) in {None, *shapes}
        shapes |= LEFTOVERS.get(model_type, {})
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("layout", ["transformers", "files"])
def test_every_tensor_has_its_place(published, layout):
    name, hf_config, theirs, _, ours = published
    tensors = tensors_of(theirs, layout, hf_config.model_type)
    found = match(ours, tensors, family_of(hf_config).names, name)  # raises for anything missing, extra or mis-shaped
    assert len(found) == len(parameter_paths(ours)) == len(list(theirs.parameters()))
    assert all(array.shape == leaf.shape for _, leaf, array in found)


def test_parameter_counts(published):
    name, _, theirs, _, ours = published
    assert sum(math.prod(leaf.shape) for leaf in parameter_paths(ours).values()) == COUNTS[name]
    assert sum(parameter.numel() for parameter in theirs.parameters()) == COUNTS[name]


def test_rotary_frequencies(published):
    _, _, theirs, config, _ = published
    module = next(
        part for path, part in theirs.named_modules() if re.fullmatch(r"model\.(language_model\.)?rotary_emb", path)
    )
    buffers = dict(type(module)(module.config).named_buffers())
    text = config.text
    ropes = {"inv_freq": text.rope}
    if "inv_freq" not in buffers:
        ropes = {"full_attention_inv_freq": text.rope, "sliding_attention_inv_freq": text.kinds[0].rope}
    for key, rope in ropes.items():
        np.testing.assert_allclose(rope_frequencies(rope, text.head_dim), buffers[key], rtol=1e-5)


def test_attention_windows(published):
    """Of these only Gemma3 has any: five layers in six see 1024 tokens back, in the 1B 512."""
    name, _, theirs, config, _ = published
    windows = [kind.window for kind in config.text.layer_kinds]
    local = 512 if "1b" in name else 1024
    expected = [None if (layer + 1) % 6 == 0 else local for layer in range(config.text.num_layers)]
    assert windows == (expected if "gemma" in name else [])
    theirs = [module.sliding_window for module in theirs.modules() if type(module).__name__ == "Gemma3Attention"]
    assert list(windows) == theirs


def test_a_mesh_splits_nearly_everything(published):
    _, _, _, _, ours = published
    mesh = jax.sharding.AbstractMesh((2, 4), ("fsdp", "tensor"))
    total = shard = 0
    for path, leaf in parameter_paths(ours).items():
        total += math.prod(leaf.shape)
        shard += math.prod(parameter_sharding(mesh, path, leaf.shape).shard_shape(leaf.shape))
    assert shard < 1.005 * total / 8
