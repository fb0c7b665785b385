"""What a folder holds instead of plain weights is said in one sentence, by name."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxspec.checkpoints.tensors import SINGLE
from jaxspec.drafters.checkpoint import load_drafter_folder
from jaxspec.targets.registry import load_model
from tests.broken_folders import REFERENCE, assert_names, edit_config, edit_tensors


@pytest.fixture
def head(tmp_path):
    return shutil.copytree(REFERENCE / "eagle2", tmp_path / "head")


def sentence_of(load, *parts) -> str:
    with pytest.raises(ValueError) as caught:
        load()
    message = str(caught.value)
    assert_names(message, *parts)
    assert "\n" not in message and len(message) < 500, message
    return message


LOADERS = {"target": load_model, "drafter": lambda folder: load_drafter_folder(folder, None)}


@pytest.mark.parametrize(
    ("said", "parts"),
    [
        ({"quant_method": "awq", "bits": 4}, ["awq, 4 bits"]),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, ["gptq, 8 bits"]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, ["bitsandbytes, 4 bits"]),
        ({"load_in_8bit": True}, ["bitsandbytes, 8 bits"]),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, ["(fp8)"]),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, ["compressed-tensors"]),
        ({"quant_algo": "NVFP4"}, ["NVFP4"]),
        ({"group_size": 64, "bits": 4}, ["4 bits"]),
    ],
)
@pytest.mark.parametrize("place", LOADERS)
def test_quantised_by_config(place, said, parts, folder, head):
    folder = {"target": folder, "drafter": head}[place]
    edit_config(folder, quantization_config=said)
    sentence_of(lambda: LOADERS[place](folder), folder / "config.json", "quantised", *parts)


def test_quantised_in_a_part_of_the_config(folder):
    edit_config(folder, "text_config", quantization_config={"quant_method": "awq"})
    sentence_of(lambda: load_model(folder), "awq")
    edit_config(folder, "text_config", quantization_config=None, compression_config={"quant_method": "sparse"})
    sentence_of(lambda: load_model(folder), "sparse")


@pytest.mark.parametrize("said", [None, {}, {"quant_method": "bitsandbytes", "load_in_4bit": False}])
def test_quantisation_switched_off(said, folder):
    edit_config(folder, quantization_config=said)
    load_model(folder)


@pytest.mark.parametrize(
    ("parts", "method"),
    [
        (["qweight", "qzeros", "scales"], "GPTQ or AWQ"),
        (["qweight", "g_idx", "scales"], "GPTQ or AWQ"),
        (["weight_packed", "weight_scale", "weight_shape"], "compressed-tensors"),
        (["weight", "weight_scale_inv"], "fp8"),
        (["weight", "weight_scale", "input_scale"], "fp8"),
        (["weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"], "bitsandbytes"),
        (["weight", "SCB"], "bitsandbytes"),
        (["weight_blocks", "weight_scales"], "HQQ, quanto or EETQ"),
    ],
)
@pytest.mark.parametrize("place", LOADERS)
def test_quantised_by_tensors(place, parts, method, folder, head):
    """Where the config says nothing, names of tensors do."""
    folder = {"target": folder, "drafter": head}[place]

    def edit(tensors):
        for name in [name for name in tensors if name.endswith("_proj.weight") and "layers" in name]:
            del tensors[name]
            tensors |= {name.removesuffix("weight") + part: np.zeros((2, 2), np.int8) for part in parts}

    edit_tensors(folder, edit)
    sentence_of(lambda: LOADERS[place](folder), folder, "quantised weights", method, "more")


@pytest.mark.parametrize(
    "names",
    [
        ["pytorch_model.bin"],
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
        ["medusa_lm_head.pt"],
        ["model-Q4_K_M.gguf"],
        ["flax_model.msgpack"],
        ["tf_model.h5"],
        ["model.pth"],
        ["consolidated.safetensors"],
        ["consolidated.00.pth"],
        ["model.fp16.safetensors"],
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("place", LOADERS)
def test_other_files(place, names, with_config, folder, head):
    folder = {"target": folder, "drafter": head}[place]
    (folder / SINGLE).unlink()
    for name in (*names, "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(b"weights")
    if not with_config:
        (folder / "config.json").unlink()
    message = sentence_of(lambda: LOADERS[place](folder), folder, *names, "safetensors")
    assert "training_args" not in message and "optimizer" not in message


@pytest.mark.parametrize("place", LOADERS)
def test_adapters(place, folder, head, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    sentence_of(lambda: LOADERS[place](adapter), adapter, "LoRA adapter of org/base", "merge")
    (adapter / "adapter_config.json").write_text("{")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    sentence_of(lambda: LOADERS[place](adapter), adapter, "PEFT adapter")
    folder = {"target": folder, "drafter": head}[place]
    (folder / "adapter_model.bin").write_bytes(b"")  # beside a whole model: which one is meant, nobody knows
    sentence_of(lambda: LOADERS[place](folder), folder, "PEFT adapter")


def test_a_pipeline(folder, tmp_path):
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    sentence_of(lambda: load_model(pipeline), pipeline, "diffusers pipeline", "StableDiffusionPipeline")
    (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30"}')
    sentence_of(lambda: load_model(folder), folder, "diffusers", "UNet2DConditionModel")


EAGLE3 = [
    ({"architectures": ["LlamaForCausalLMEagle3"]}, {}),
    ({"speculators_model_type": "eagle3"}, {}),
    ({"model_type": "eagle-3"}, {}),
    ({}, {"d2t": (32,), "t2d": (199,)}),
    ({}, {"midlayer.hidden_norm.weight": (64,), "midlayer.self_attn.q_proj.weight": (64, 128)}),
    ({}, {"layers.0.hidden_norm.weight": (64,)}),
    ({}, {"fc.weight": (64, 192)}),
]


@pytest.mark.parametrize(("said", "shapes"), EAGLE3)
def test_eagle3(said, shapes, head):
    edit_config(head, **said)
    edit_tensors(head, lambda tensors: tensors.update({name: np.zeros(shape) for name, shape in shapes.items()}))
    sentence_of(lambda: load_drafter_folder(head, None), head, "EAGLE-3", "eagle2, vispec")


def test_the_wrong_place(folder, head):
    """A target where a drafter should stand, and the other way round."""
    sentence_of(lambda: load_drafter_folder(folder, None), folder, "a whole LLaVA-1.5 model")
    edit_config(head, model_type="llama")  # as published heads call themselves
    sentence_of(lambda: load_model(head), head, "an EAGLE head", "no target")
    edit_tensors(head, lambda tensors: tensors.update(d2t=np.zeros(32, np.int64)))
    edit_tensors(head, lambda tensors: tensors.pop("fc.weight"))
    sentence_of(lambda: load_model(head), head, "an EAGLE-3 head")


def test_an_unreadable_type(folder):
    header = json.dumps({"a.weight": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    sentence_of(lambda: load_model(folder), folder / SINGLE, "a.weight", "F8_E4M3", "BF16", "quantised weights")


def test_long_lists_are_counted(folder):
    """Of many problems the first of each kind are named, and all are counted."""
    tensors = load_file(folder / SINGLE)
    renamed = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / SINGLE)
    with pytest.raises(ValueError) as caught:
        load_model(folder)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 8 and all(line.strip().startswith(("missing: ", "extra: ")) for line in lines)
    assert_names(str(caught.value), f"missing: {len(tensors) - 3} more", f"extra: {len(tensors) - 3} more")
