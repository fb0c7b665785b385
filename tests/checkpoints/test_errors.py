"""A folder that does not fit is refused in one sentence that names the file, the value and what would be right."""

import functools
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jaxspec.drafters.checkpoint import load_drafter_folder
from jaxspec.targets.registry import config_from, load_model
from tests.broken_folders import REFERENCE, assert_names, edit_config, edit_tensors, error_of
from tests.families import FAMILIES
from tests.folders import llava_config
from tests.helpers import tiny_llava

QUERY = "language_model.model.layers.0.self_attn.q_proj.weight"
PATCHES = "vision_tower.vision_model.embeddings.patch_embedding.weight"
NORM = "language_model.model.norm.weight"


@pytest.fixture(params=["eagle2", "vispec"])
def drafter_folder(request, tmp_path):
    return shutil.copytree(REFERENCE / request.param, tmp_path / "drafter")


@pytest.fixture(scope="module")
def model():
    return tiny_llava(vocab_size=199, hidden_size=64, image_token_id=198, layers=1)


@pytest.fixture
def target(model, drafter_folder):
    """The target that the drafter was made for, as far as a loader can see."""
    embedding = load_file(drafter_folder / "model.safetensors")["embed_tokens.weight"]
    model.language_model.embed_tokens.embedding[...] = jnp.asarray(embedding)
    return model


# Tensors


def test_all_tensor_problems_at_once(folder):
    def edit(tensors):
        del tensors[QUERY], tensors["multi_modal_projector.linear_1.bias"]
        tensors["language_model.model.layers.7.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
        tensors["language_model.lm_head.weight"] = np.zeros((98, 32), np.float32)
        tensors[PATCHES] = tensors[PATCHES].swapaxes(1, 3).copy()  # as many values, but no convolution over 3 channels
        tensors[NORM] = np.ones(32, np.int32)
        tensors["model.multi_modal_projector.linear_2.bias"] = tensors["multi_modal_projector.linear_2.bias"]

    edit_tensors(folder, edit)
    message = error_of(lambda: load_model(folder))
    assert_names(
        message,
        folder,
        f"missing: {QUERY} (32, 32)",
        "missing: multi_modal_projector.linear_1.bias (32,)",
        "extra: language_model.model.layers.7.mlp.up_proj.weight (48, 32)",
        "mis-shaped: language_model.lm_head.weight is (98, 32), the config wants (99, 32)",
        f"mis-shaped: {PATCHES} is (24, 8, 8, 3), the config wants (24, 3, 8, 8)",
        f"wrong dtype: {NORM} is int32, not a floating-point type",
        "doubled: ",
        "multi_modal_projector.linear_2.bias",
    )
    assert len(message.splitlines()) == 8


@pytest.mark.parametrize("shape", [(), (1024,), (32, 32, 1)])
def test_a_matrix_of_another_rank(folder, shape):
    size = np.prod(shape, dtype=int)
    edit_tensors(folder, lambda tensors: tensors.update({QUERY: np.zeros(size, np.float32).reshape(shape)}))
    assert_names(error_of(lambda: load_model(folder)), f"{QUERY} is {shape}, the config wants (32, 32)")


# Files


def test_no_files(folder, tmp_path):
    assert_names(error_of(lambda: load_model(tmp_path), FileNotFoundError), "config.json", tmp_path)
    (folder / "model.safetensors").unlink()
    assert_names(error_of(lambda: load_model(folder), FileNotFoundError), "model.safetensors", folder)


@pytest.mark.parametrize("lost", [1, 5000])
def test_truncated_file(folder, lost):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    assert_names(error_of(lambda: load_model(folder)), path, "truncated", len(whole) - lost, len(whole))


def test_truncated_header(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    path.write_bytes(whole[:100])
    assert_names(error_of(lambda: load_model(folder)), path, "not a complete safetensors file", 100, header)


def table(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        table(b"\x80\x02 pickled"),
        table(b"[1, 2]"),
        table(b'{"a": 1}'),
        table(b'{"a": {"dtype": "F32"}}'),
    ],
)
def test_no_safetensors_file(folder, content):
    path = folder / "model.safetensors"
    path.write_bytes(content)
    message = error_of(lambda: load_model(folder))
    assert_names(message, path, "safetensors file")
    assert message.startswith(f"{path} is not a ")


def test_tensor_that_does_not_fill_its_shape(folder):
    path = folder / "model.safetensors"
    path.write_bytes(table(b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}') + bytes(8))
    assert_names(error_of(lambda: load_model(folder)), path, "tensor a has 8 bytes", "F32 (3,) takes 12")


def test_unreadable_dtype(folder):
    path = folder / "model.safetensors"
    path.write_bytes(table(b'{"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}') + bytes(2))
    assert_names(error_of(lambda: load_model(folder)), path, "tensor a", "F8_E4M3", "BF16")


def test_index_without_its_files(folder):
    index = folder / "model.safetensors.index.json"
    shards = {NORM: "model.safetensors", QUERY: "model-00002-of-00003.safetensors"}
    index.write_text(json.dumps({"weight_map": shards}))
    load_model(folder)  # as in transformers, model.safetensors counts and the index beside it does not
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    message = error_of(lambda: load_model(folder), FileNotFoundError)
    assert_names(message, index, "model-00002-of-00003.safetensors")
    index.write_text(json.dumps({"weight_map": {NORM: "shard.safetensors", "absent.weight": "shard.safetensors"}}))
    assert_names(error_of(lambda: load_model(folder)), index, "absent.weight")
    for broken in ({"metadata": {}}, {"weight_map": {NORM: ["shard.safetensors"]}}, {"weight_map": []}):
        index.write_text(json.dumps(broken))
        assert_names(error_of(lambda: load_model(folder)), index, "weight_map")
    index.write_text("{")
    assert_names(error_of(lambda: load_model(folder)), index, "not JSON")


# Configs

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("section", "values", "parts"),
    [
        (None, {"model_type": "qwen9_vl"}, ["config.json", "'qwen9_vl'", "llava"]),
        (None, {"model_type": None}, ["config.json", "None", "llava"]),
        (None, {"vision_feature_layer": 3}, ["vision_feature_layer 3", "2 layers"]),
        (None, {"vision_feature_layer": [-1, -4]}, ["vision_feature_layer -4", "2 layers"]),
        (None, {"projector_hidden_act": "relu"}, ["'relu'", "'gelu'"]),
        ("vision_config", {"model_type": "siglip_vision_model"}, ["'siglip_vision_model'", "clip_vision_model"]),
        ("vision_config", {"hidden_act": "relu"}, ["'relu'", "quick_gelu", "gelu"]),
        ("vision_config", {"image_size": 17}, ["image_size (17)", "patch_size (8)"]),
        ("text_config", {"model_type": "phi"}, ["'phi'", "llama"]),
        ("text_config", {"model_type": "mistral"}, ["sliding_window 4096", "null"]),
        ("text_config", {"hidden_act": "gelu"}, ["'gelu'", "silu"]),
        ("text_config", {"rope_parameters": YARN}, ["'yarn'", "default, linear, llama3"]),
        ("text_config", {"num_key_value_heads": 3}, ["num_attention_heads (4)", "num_key_value_heads (3)"]),
    ],
)
def test_unsupported_configs(folder, section, values, parts):
    edit_config(folder, section, **values)
    assert_names(error_of(lambda: load_model(folder)), *parts)


@pytest.mark.parametrize("text", ["", "{", "[]", '"llava"'])
def test_config_that_is_no_object(folder, text):
    (folder / "config.json").write_text(text)
    assert_names(error_of(lambda: load_model(folder)), folder / "config.json", "JSON")


@pytest.mark.parametrize(
    ("section", "values", "parts"),
    [
        ("text_config", {"hidden_size": "abc"}, ["text_config.hidden_size must be an integer, got 'abc'"]),
        ("text_config", {"num_attention_heads": 0}, ["text_config.num_attention_heads must be at least 1, got 0"]),
        ("text_config", {"num_hidden_layers": 2.5}, ["text_config.num_hidden_layers must be an integer, got 2.5"]),
        ("text_config", {"rms_norm_eps": "small"}, ["rms_norm_eps", "'small'"]),
        ("text_config", {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, ["rope theta", "'x'"]),
        ("vision_config", {"patch_size": True}, ["vision_config.patch_size must be an integer, got True"]),
        ("vision_config", {"image_size": 10**20}, ["vision_config.image_size must be at most"]),
        (None, {"text_config": "llama"}, ["text_config must be a JSON object, got 'llama'"]),
        (None, {"vision_feature_layer": "last"}, ["vision_feature_layer", "'last'"]),
        (None, {"model_type": ["llava"]}, ["model_type ['llava'] is not supported"]),
    ],
)
def test_configs_of_wrong_types(folder, section, values, parts):
    edit_config(folder, section, **values)
    message = error_of(lambda: load_model(folder))
    assert_names(message, folder / "config.json", *parts)
    assert "\n" not in message and len(message) < 500


JUNK = st.sampled_from(["abc", "", -1, 0, 1.5, True, None, [], [1, "a"], {}, {"a": 1}, [[]], 10**30])


@functools.cache
def config_of(family: str) -> str:
    return (llava_config() if family == "llava" else FAMILIES[family]()[0]).to_json_string()


@settings(deadline=None, max_examples=60)
@given(family=st.sampled_from(["llava", "qwen2_5_vl", "gemma3", "llama"]), junk=JUNK, data=st.data())
def test_any_value_is_understood_or_refused_in_one_sentence(tmp_path_factory, family, junk, data):
    raw = part = json.loads(config_of(family))
    while True:  # into a part of the config, perhaps
        key = data.draw(st.sampled_from(sorted(part)))
        if not isinstance(part[key], dict) or not part[key] or data.draw(st.booleans()):
            break
        part = part[key]
    part[key] = junk
    folder = tmp_path_factory.mktemp("junk")
    (folder / "config.json").write_text(json.dumps(raw))
    try:
        config_from(folder)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 600


@settings(deadline=None, max_examples=60)
@given(method=st.sampled_from(["eagle2", "vispec"]), junk=JUNK, data=st.data())
def test_any_value_of_a_drafter(tmp_path_factory, method, junk, data):
    folder = tmp_path_factory.mktemp("junk")
    raw = json.loads((REFERENCE / method / "config.json").read_text())
    keys = sorted({*raw, "jaxspec", "tap_layers", "total_token", "depth", "top_k", "num_q", "draft_vocab_size"})
    raw[data.draw(st.sampled_from(keys))] = junk
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "model.safetensors").symlink_to(REFERENCE / method / "model.safetensors")
    try:
        load_drafter_folder(folder, None)
    except ValueError as error:
        assert "does not fit its config.json" in str(error) or "\n" not in str(error) and len(str(error)) < 600


def test_rope_scaling_of_older_files(folder):
    """`rope_scaling` with `type`, as transformers 4 wrote it, is understood."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["text_config"]["rope_parameters"]
    config["text_config"] |= {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    path.write_text(json.dumps(config))
    rope = load_model(folder).config.text.rope
    assert (rope.type, rope.theta, rope.factor) == ("linear", 5000.0, 2.0)


# Drafters


def test_drafter_for_other_widths(drafter_folder, target):
    edit_config(drafter_folder, hidden_size=32, vocab_size=97)
    message = error_of(lambda: load_drafter_folder(drafter_folder, target))
    assert_names(
        message, drafter_folder, "another target", "hidden_size 32 (target: 64)", "vocab_size 97 (target: 199)"
    )


def test_drafter_for_another_embedding(drafter_folder, target):
    embedding = target.language_model.embed_tokens.embedding
    embedding[...] = embedding[...][::-1]  # the same values in another order
    message = error_of(lambda: load_drafter_folder(drafter_folder, target))
    assert_names(message, drafter_folder, "another target", "embed_tokens.weight")
    edit_tensors(drafter_folder, lambda tensors: tensors.update({"embed_tokens.weight": np.ones((9, 64), np.float32)}))
    message = error_of(lambda: load_drafter_folder(drafter_folder, target))
    assert_names(message, drafter_folder, "embed_tokens.weight", "(9, 64)", "(199, 64)")


def test_drafter_embedding_in_another_dtype(drafter_folder, target):
    def edit(tensors):
        tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"].astype(np.float16)

    edit_tensors(drafter_folder, edit)
    load_drafter_folder(drafter_folder, target)


def test_drafter_tensors(drafter_folder, target):
    def edit(tensors):
        del tensors["fc.weight"], tensors["layers.0.mlp.up_proj.weight"]
        tensors["layers.0.input_layernorm.weight"] = np.ones(64, np.float32)
        tensors["fc.bias"] = np.zeros(63, np.float32)

    edit_tensors(drafter_folder, edit)
    assert_names(
        error_of(lambda: load_drafter_folder(drafter_folder, target)),
        drafter_folder,
        "missing: fc.weight (64, 128)",
        "missing: layers.0.mlp.up_proj.weight",
        "extra: layers.0.input_layernorm.weight (64,)",
        "mis-shaped: fc.bias is (63,), the config wants (64,)",
    )


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"jaxspec": {"method": "hydra"}}, ["'hydra'", "eagle2, vispec"]),
        ({"num_hidden_layers": 2}, ["1 layer", "2"]),
        ({"hidden_act": "gelu"}, ["'gelu'", "silu"]),
    ],
)
def test_drafter_configs(drafter_folder, target, values, parts):
    edit_config(drafter_folder, **values)
    assert_names(error_of(lambda: load_drafter_folder(drafter_folder, target)), *parts)


def test_no_drafter_folder(drafter_folder, target, folder):
    (drafter_folder / "config.json").write_text("{")
    assert_names(error_of(lambda: load_drafter_folder(drafter_folder, target)), "config.json", "not JSON")
    (drafter_folder / "config.json").unlink()
    message = error_of(lambda: load_drafter_folder(drafter_folder, target), FileNotFoundError)
    assert_names(message, "config.json", drafter_folder, "drafter")
