"""LLaVA equals transformers' LLaVA, for every setting that config.json may choose and every arrangement of images,
in padded batches and cached decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import SamplingParams
from jaxspec.cache import Cache
from jaxspec.kernels.masks import Mask
from jaxspec.targets.registry import FAMILIES
from jaxspec.targets.target import Target
from tests.folders import IMAGE_TOKEN, bare_target, batch_of, llava_config, relative_error, torch_llava, torch_logits
from tests.greedy import check_greedy

TOLERANCE = FAMILIES["llava"].tolerance

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
# With head_dim 12 the wavelengths are 6, 29, 135, ..: one below, one between and four above the bounds 16 and 64.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Several settings share a model where they act in different places: compiling is what takes time here.
CONFIGS = {
    "multi-head, theta 1e6": {
        "text": {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    },
    "multi-query, linear rope": {"text": {"num_key_value_heads": 1, "rope_parameters": LINEAR}},
    "head_dim, llama3 rope": {"text": {"head_dim": 12, "rope_parameters": LLAMA3}},
    "tied in text_config, biases": {"text": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}},
    "tied at the top, projector without bias": {"tie_word_embeddings": True, "multimodal_projector_bias": False},
    "epsilons, gelu, last vision layer": {
        "text": {"rms_norm_eps": 0.01},
        "vision": {"hidden_act": "gelu", "layer_norm_eps": 0.1},
        "vision_feature_layer": -1,
    },
    "class token, two vision layers": {"vision_feature_select_strategy": "full", "vision_feature_layer": [-2, -1]},
}
# One image, two apart, two adjacent, at both ends, none.
ROWS = [[3, "i", 4], [2, "i", 3, "i", 2], [2, "i", "i", 3], [5], ["i", 4, "i"], [9]]


def check(target: Target, model, inputs: dict):
    real = inputs["attention_mask"].astype(bool)
    assert relative_error(np.asarray(target.logits(inputs))[real], torch_logits(model, inputs)[real]) < TOLERANCE


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava") / "default"
    model = torch_llava(llava_config())
    model.save_pretrained(folder)
    return bare_target(folder), model


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name, tmp_path):
    config = llava_config(**CONFIGS[name])
    model = torch_llava(config)
    model.save_pretrained(tmp_path)
    target = bare_target(tmp_path)
    assert (target.model.language_model.lm_head is None) == name.startswith("tied")
    tokens_per_image = 5 if name.startswith("class token") else 4
    assert target.config.tokens_per_image == tokens_per_image
    check(target, model, batch_of([2, "i", 9], [1, "i", 1, "i", 2], tokens_per_image=tokens_per_image))
    rows = [3, "i", 2, "i", 1], [1, "i", 4], [12]
    check_greedy(target, model, batch_of(*rows, tokens_per_image=tokens_per_image, side="left"))


@pytest.mark.parametrize("penalty", [1.4, 0.8])
def test_penalties_and_log_probabilities(default, penalty):
    """The repetition penalty counts the prompt, image tokens included and padding not; the bias comes before it."""
    rows = [3, "i", 2, "i", 1], [1, "i", 4], [12]
    sampling = SamplingParams(repetition_penalty=penalty, logit_bias={5: 2.5, 7: -100, IMAGE_TOKEN: 1.0}, logprobs=4)
    asked = {"repetition_penalty": penalty, "sequence_bias": {(5,): 2.5, (7,): -100.0, (IMAGE_TOKEN,): 1.0}}
    check_greedy(*default, batch_of(*rows, side="left"), sampling, asked)


def test_settings_matter():
    """The same weights give other logits under settings that bring no tensor of their own."""
    inputs = batch_of([2, "i", 9])
    reference = torch_logits(torch_llava(llava_config()), inputs)
    settings = [{"text": {"rope_parameters": {**LLAMA3, "rope_type": kind}}} for kind in ("linear", "llama3")]
    settings += [{"text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}}]
    settings += [{"text": {"rms_norm_eps": 0.01}}, {"vision": {"hidden_act": "gelu"}}, {"vision_feature_layer": -1}]
    for setting in settings:
        assert relative_error(torch_logits(torch_llava(llava_config(**setting)), inputs), reference) > 1e-3, setting


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("rows", [ROWS, [[7], [2]]], ids=["images", "text"])
def test_padded_batches(default, rows, side):
    check(*default, batch_of(*rows, side=side))


def test_images_that_touch_and_images_to_spare(default):
    """Images without text between them are told apart by their numbers of tokens; one that no prompt shows is
    refused."""
    target, model = default
    inputs = batch_of([2, "i", "i", 3])
    del inputs["attention_mask"]
    assert relative_error(target.logits(inputs), torch_logits(model, batch_of([2, "i", "i", 3]))) < TOLERANCE
    inputs["pixel_values"] = np.concatenate([inputs["pixel_values"], np.full((1, 3, 16, 16), 9.0, np.float32)])
    with pytest.raises(ValueError, match="image tokens for 2 images, 3 were given"):
        target.logits(inputs)


def test_cached_decoding(default):
    """A prefill and eight single-token steps over the cache give the logits of one forward pass, row by row."""
    target, model = default
    steps, rows = 8, [[2, "i", 3, "i", 2], [1, "i", 4]]
    whole = batch_of(*[[*row, steps] for row in rows])
    lengths = whole["attention_mask"].sum(axis=1) - steps
    ids = jnp.asarray(whole["input_ids"])

    @jax.jit
    def prefill(model, ids, images, lengths):
        features, new_kv = model.prefill(model.embed(ids, images), lengths)
        last = jnp.take_along_axis(features, (lengths - 1)[:, None, None], axis=1)
        return model.unembed(last)[:, 0], Cache.of_prompt(new_kv, lengths, 40)

    @jax.jit
    def step(model, token, cache):
        features, new_kv = model.forward(model.embed(token[:, None]), cache.lengths[:, None], Mask(), cache)
        return model.unembed(features)[:, 0], cache.append(new_kv, jnp.ones_like(cache.lengths))

    prompts = ids[:, : lengths.max()]
    images = target.adapter.place(target.adapter.lay_out(whole), np.asarray(prompts))
    logits, cache = prefill(target.model, prompts, images, jnp.asarray(lengths))
    expected, each = torch_logits(model, whole), np.arange(len(rows))
    assert relative_error(logits, expected[each, lengths - 1]) < TOLERANCE
    for index in range(steps):
        at = lengths + index
        logits, cache = step(target.model, ids[each, at], cache)
        assert relative_error(logits, expected[each, at]) < TOLERANCE
