"""MASSV's folders: drafters that come back, text models as they are published, and what is refused."""

import copy
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxspec import TreeConfig, load_drafter
from jaxspec.checkpoints.tensors import read_file
from jaxspec.drafters.checkpoint import load_drafter_folder, save_drafter_folder
from jaxspec.drafters.eagle import EagleHead
from jaxspec.drafters.massv import MASSV, check_tokenizer
from jaxspec.targets.registry import family_of, load_model
from jaxspec.training.massv import new_massv
from tests.drafters.test_massv import LMS, random_massv, targets
from tests.families import FAMILIES, TEXT, small_tokenizer
from tests.folders import write_random
from tests.targets.published import CONFIGS

REFERENCE = Path(__file__).parent.parent / "reference"


def lm_folder(tmp_path: Path, family: str, **text) -> Path:
    """A Hugging Face folder of a random small text model."""
    hf_config, _ = FAMILIES[family]()
    raw = hf_config.to_dict() | text
    if raw.get("layer_types"):
        raw["layer_types"] = raw["layer_types"][: raw["num_hidden_layers"]]
    return write_random(tmp_path / family, type(hf_config).from_dict(raw))


def assert_same(state, other):
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "gemma3", "qwen3", "gemma3_text"])
def test_saved_drafters_come_back(family, tmp_path):
    target = targets(family)
    for multimodal in {target.config.vision_width > 0, False}:
        draft_model = random_massv(target.model, LMS[family], multimodal)
        save_drafter_folder(draft_model, "massv", TreeConfig(2, 2, 9), target.model, tmp_path / "it", np.float32)
        loaded = load_drafter(tmp_path / "it", target)
        assert (loaded.method, loaded.tree) == ("massv", TreeConfig(2, 2, 9))
        assert loaded.model.config == draft_model.config
        assert_same(nnx.state(loaded.model), nnx.state(draft_model))
        config = json.loads((tmp_path / "it/config.json").read_text())
        assert config["model_type"] == LMS[family] and config["architectures"][0].endswith("ForCausalLM")
        names = {name.split(".")[0] for name in read_file(tmp_path / "it/model.safetensors")}
        assert names == {"language_model", "projector"} if multimodal else {"language_model"}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_a_text_models_folder_is_the_text_only_drafter(family, layers, tmp_path):
    target = targets("llava_next")
    folder = lm_folder(tmp_path, family, num_hidden_layers=layers)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"top_k": 50}))  # of its sampling: no tree
    drafter = load_drafter(folder, target)
    assert (drafter.method, drafter.tree, drafter.about) == ("massv", TreeConfig.chain(5), {})
    assert not drafter.model.config.multimodal
    assert_same(nnx.state(drafter.model.language_model), nnx.state(load_model(folder).language_model))


@pytest.mark.parametrize("differs", [False, True])
def test_a_tied_text_model_that_holds_a_head(differs, tmp_path):
    folder = lm_folder(tmp_path, "qwen2", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(differs)
    save_file(tensors, folder / "model.safetensors")
    language = load_drafter(folder, targets("llava_next")).model.language_model
    assert (language.lm_head is not None) == differs


def test_published_heads_are_no_text_models(tmp_path):
    """They may call themselves `llama`, and leave out what would tell them apart."""
    folder = shutil.copytree(REFERENCE / "eagle2", tmp_path / "head")
    config = json.loads((folder / "config.json").read_text())
    for key in ("num_q", "bias"):
        del config[key]
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    del tensors["embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors")
    model = random_target(vocab_size=199, hidden_size=64)
    drafter, tree = load_drafter_folder(folder, model)
    assert type(drafter) is EagleHead and tree == TreeConfig(5, 10, 60)


def random_target(**text):
    config = transformers.LlamaConfig(**TEXT | text)
    family = family_of(config)
    return family.model(family.config_from_hf(config), rngs=nnx.Rngs(0))


PAIRS = {
    "Qwen/Qwen2.5-VL-7B-Instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "google/gemma-3-12b-it": "google/gemma-3-1b-it",
    "llava-hf/llava-1.5-7b-hf": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}


def test_published_pairs_fit():
    """And nothing else of them does, since each family has a tokenizer of its own."""
    for target, own in PAIRS.items():
        raw = CONFIGS[target]
        hf_config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
        target_config = family_of(hf_config).config_from_hf(hf_config)
        for lm in PAIRS.values():
            config = MASSV.read_config(CONFIGS[lm])
            assert MASSV.read_config(json.loads(json.dumps(MASSV.write_config(config)))) == config
            assert bool(MASSV.misfits(config, target_config)) == (lm != own)


def refusal(folder: Path, target) -> str:
    with pytest.raises(ValueError) as caught:
        load_drafter(folder, target)
    return str(caught.value)


def test_refusals(tmp_path):
    target = targets("gemma3")
    vocab_size, width = target.config.text.vocab_size, target.config.vision_width
    folder = lm_folder(tmp_path, "gemma3_text", vocab_size=vocab_size + 65)
    message = refusal(folder, target)
    assert f"vocab_size {vocab_size + 65} (target: {vocab_size}, more than padding explains)" in message

    other = targets("qwen2_5_vl")
    draft_model = random_massv(other.model, "qwen2", True)
    save_drafter_folder(draft_model, "massv", TreeConfig.chain(5), other.model, tmp_path / "it", np.float32)
    message = refusal(tmp_path / "it", target)
    assert f"vision_width {other.config.vision_width} (target: {width})" in message
    assert "vision_width" in refusal(tmp_path / "it", targets("qwen2"))

    tensors = load_file(tmp_path / "it/model.safetensors")
    del tensors["projector.linear_2.bias"], tensors["language_model.model.norm.weight"]
    save_file(tensors, tmp_path / "it/model.safetensors")
    message = refusal(tmp_path / "it", other)
    assert "missing: projector.linear_2.bias (32,)" in message
    assert "missing: language_model.model.norm.weight (32,)" in message

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "phi"}))
    assert "model_type 'phi' is not supported as a drafter; only llama, mistral" in refusal(folder, target)


def test_another_tokenizer_of_the_same_size_is_refused(tmp_path):
    """Whatever kind of tokenizer the file is of; added tokens may differ, and so may sizes."""
    theirs = targets("qwen2_5_vl").tokenizer
    ours = small_tokenizer()
    assert len(ours) < len(theirs)
    check_tokenizer(tmp_path, theirs)  # a folder that holds none
    ours.save_pretrained(tmp_path)
    check_tokenizer(tmp_path, theirs)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())

    def check(raw):
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        check_tokenizer(tmp_path, theirs)

    renamed = copy.deepcopy(raw)
    marks = renamed["added_tokens"]
    for mark in marks:
        token = mark["content"]
        mark["content"] = f"<|{token}|>"
        if token in renamed["model"]["vocab"]:
            renamed["model"]["vocab"][mark["content"]] = renamed["model"]["vocab"].pop(token)
    assert marks
    check(renamed)

    first, second = theirs.convert_ids_to_tokens([100, 200])
    raw["model"]["vocab"] |= {first: 200, second: 100}
    expected = f"drafter {tmp_path} has another tokenizer than the target: its token 100 is {second!r}, "
    expected += f"the target's is {first!r}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        check(raw)
    raw["model"]["vocab"] = [[token, 0.0] for token in sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get)]
    with pytest.raises(ValueError, match=re.escape(expected)):
        check(raw)


def test_a_text_model_with_another_tokenizer_is_refused_before_it_is_loaded(tmp_path):
    target = targets("qwen2_5_vl")
    folder = lm_folder(tmp_path, "qwen2", vocab_size=target.config.text.vocab_size)
    small_tokenizer().save_pretrained(folder)
    load_drafter(folder, target)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["vocab"] |= dict(zip(target.tokenizer.convert_ids_to_tokens([100, 200]), (200, 100), strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    for load in (lambda: load_drafter(folder, target), lambda: new_massv(target, folder, True)):
        with pytest.raises(ValueError, match="has another tokenizer than the target: its token 100 is"):
            load()


def test_a_projector_comes_and_goes(tmp_path):
    target = targets("qwen2_5_vl")
    folder = lm_folder(tmp_path, "qwen2", vocab_size=target.config.text.vocab_size)
    with_eyes = new_massv(target, folder, True, seed=3)
    assert with_eyes.config.vision_width == target.config.vision_width
    save_drafter_folder(with_eyes, "massv", TreeConfig.chain(5), target.model, tmp_path / "eyes", np.float32)
    continued, without = new_massv(target, tmp_path / "eyes", True), new_massv(target, tmp_path / "eyes", False)
    assert_same(nnx.state(continued), nnx.state(with_eyes))
    assert without.projector is None
    assert_same(nnx.state(without), nnx.state(load_drafter(folder, target).model))
    lm_target = targets("qwen2")
    with pytest.raises(ValueError, match="needs a target with vision features"):
        new_massv(lm_target, folder, True)
