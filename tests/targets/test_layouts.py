"""One model in every layout it is published in: the same logits; and what we save, transformers reads."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors import safe_open
from safetensors.torch import save_file

from jaxspec.checkpoints.names import parameter_paths
from jaxspec.targets.llava import LlavaAdapter
from jaxspec.targets.registry import load_model, save_model
from jaxspec.targets.target import Target
from tests.folders import batch_of, llava_config, relative_error, torch_llava, torch_logits

INPUTS = batch_of([2, "i", 3], [1, "i", "i", 2])
REAL = INPUTS["attention_mask"].astype(bool)
PREFIXES = {  # of transformers' modules, in the files of llava-hf
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


def old_name(name: str) -> str:
    new, old = next(item for item in PREFIXES.items() if name.startswith(item[0]))
    return old + name.removeprefix(new)


def write(folder, model, tensors):
    folder.mkdir()
    model.config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def assert_same_parameters(a, b):
    a, b = parameter_paths(a), parameter_paths(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path][...], b[path][...], err_msg=path)


def logits_of(model, folder):
    return np.asarray(Target(model, LlavaAdapter(model.config), None, folder, ()).logits(INPUTS))[REAL]


@pytest.fixture(scope="module")
def reference():
    model = torch_llava(llava_config())
    return model, {name: tensor.detach() for name, tensor in model.named_parameters()}


@pytest.fixture(scope="module")
def loaded(reference, tmp_path_factory):
    """The module names of transformers 5 as they are."""
    return load_model(write(tmp_path_factory.mktemp("layouts") / "new", *reference))


def test_logits(reference, loaded, tmp_path):
    assert relative_error(logits_of(loaded, tmp_path), torch_logits(reference[0], INPUTS)[REAL]) < 1e-5


def test_old_names(reference, loaded, tmp_path):
    model, tensors = reference
    old = {old_name(name): tensor for name, tensor in tensors.items()}
    old["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # in files of older versions
    old["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)
    assert_same_parameters(load_model(write(tmp_path / "old", model, old)), loaded)


def test_shards(reference, loaded, tmp_path):
    model, _ = reference
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_parameters(load_model(tmp_path), loaded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(reference, tmp_path, dtype):
    """A file's values arrive unchanged in float32, whatever type it has."""
    model, tensors = reference
    cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    read = load_model(write(tmp_path / "cast", model, cast))
    same = load_model(write(tmp_path / "float32", model, {name: tensor.float() for name, tensor in cast.items()}))
    assert_same_parameters(read, same)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(read))} == {jnp.dtype("float32")}
    half = load_model(tmp_path / "cast", jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("same", [True, False])
def test_a_head_in_a_tied_folder(reference, tmp_path, same):
    """As in transformers, a head that the file holds counts unless it is the embedding."""
    _, tensors = reference
    tied = llava_config(text={"tie_word_embeddings": True})
    model = transformers.LlavaForConditionalGeneration(tied)
    if same:
        tensors = {**tensors, "lm_head.weight": tensors["model.language_model.embed_tokens.weight"].clone()}
    folder = write(tmp_path / "tied", model, tensors)
    language_model = load_model(folder).language_model
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    assert (language_model.lm_head is None) == same
    hidden = np.eye(32, dtype=np.float32)
    np.testing.assert_allclose(language_model.unembed(hidden).T, theirs.lm_head.weight.detach(), rtol=1e-6)


@pytest.mark.parametrize("text", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_transformers_reads_what_we_save(tmp_path, text):
    config = llava_config(text=text)
    model = torch_llava(config)
    model.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    (tmp_path / "processor").mkdir()
    save_model(ours, config, tmp_path / "processor", tmp_path / "ours", np.float32)
    again, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    np.testing.assert_array_equal(torch_logits(again, INPUTS), torch_logits(model, INPUTS))
    assert_same_parameters(load_model(tmp_path / "ours"), ours)


def test_a_loaded_model_needs_its_file_no_more(reference, loaded, tmp_path):
    """Not even the tensors that lie in the file exactly as in memory."""
    folder = write(tmp_path / "llava", *reference)
    path = folder / "model.safetensors"
    read = load_model(folder)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same_parameters(read, loaded)


def test_saved_dtype(loaded, tmp_path):
    (tmp_path / "processor").mkdir()
    save_model(loaded, llava_config(), tmp_path / "processor", tmp_path / "half", jnp.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / "half" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), nnx.state(loaded))
    graph = nnx.graphdef(loaded)
    assert_same_parameters(load_model(tmp_path / "half"), nnx.merge(graph, rounded))
