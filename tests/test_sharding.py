"""Parameters lie on a mesh as the rules say, and 8 devices compute what one computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.families import FAMILIES

ROOT = Path(__file__).parent.parent
VISION = ("llava", "llava_next", "qwen2_5_vl", "gemma3")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    command = [sys.executable, ROOT / "tests" / "sharded_logits.py", tmp_path_factory.mktemp("sharding")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("family", ["llava", *FAMILIES])
def test_logits_equal_those_of_one_device(report, family):
    found = report["families"][family]
    assert report["devices"] == found["logits_devices"] == 8
    assert found["images"] == (family in VISION)
    assert found["equal"]
    assert found["relative_error"] < 1e-5


@pytest.mark.parametrize("family", ["llava", *FAMILIES])
def test_every_matrix_is_split_and_every_vector_whole(report, family):
    for path, found in report["families"][family]["shards"].items():
        assert (found["shard"] == found["shape"]) == (len(found["shape"]) == 1), path


LAYER, CLIP_LAYER = "language_model.layers.1.", "vision_tower.encoder.layers.0."


@pytest.mark.parametrize(
    ("family", "path", "spec"),
    [
        ("llava", LAYER + "self_attn.q_proj.kernel", ["fsdp", "tensor"]),
        ("llava", LAYER + "self_attn.v_proj.kernel", ["fsdp", "tensor"]),
        ("llava", LAYER + "self_attn.o_proj.kernel", ["tensor", "fsdp"]),
        ("llava", LAYER + "mlp.gate_proj.kernel", ["fsdp", "tensor"]),
        ("llava", LAYER + "mlp.down_proj.kernel", ["tensor", "fsdp"]),
        ("llava", CLIP_LAYER + "self_attn.out_proj.kernel", ["tensor", "fsdp"]),
        ("llava", CLIP_LAYER + "mlp.fc1.kernel", ["fsdp", "tensor"]),
        ("llava", "vision_tower.embeddings.position_embedding.embedding", [None, "fsdp"]),
        ("llava", "multi_modal_projector.linear_2.kernel", ["tensor", "fsdp"]),
        ("llava", "language_model.embed_tokens.embedding", [None, "fsdp"]),  # an odd vocabulary
        ("llava", "language_model.lm_head.kernel", ["fsdp", None]),
        ("qwen2_5_vl", "visual.patch_embed.proj.kernel", ["fsdp", "tensor"]),
        ("qwen2_5_vl", "visual.blocks.1.attn.qkv.kernel", ["fsdp", "tensor"]),
        ("qwen2_5_vl", "visual.blocks.1.attn.proj.kernel", ["tensor", "fsdp"]),
        ("qwen2_5_vl", "visual.blocks.1.mlp.down_proj.kernel", ["tensor", "fsdp"]),
        ("qwen2_5_vl", "visual.merger.mlp.0.kernel", ["fsdp", "tensor"]),
        ("qwen2_5_vl", "visual.merger.mlp.2.kernel", ["tensor", "fsdp"]),
        ("gemma3", "vision_tower.embeddings.patch_embedding.kernel", ["fsdp", "tensor"]),
        ("gemma3", CLIP_LAYER + "mlp.fc2.kernel", ["tensor", "fsdp"]),
        ("gemma3", "multi_modal_projector.mm_input_projection_weight", ["fsdp", "tensor"]),
    ],
)
def test_matrices_are_split_as_the_rules_say(report, family, path, spec):
    found = report["families"][family]["shards"][path]
    parts = [size if axis is None else size // 2 for size, axis in zip(found["shape"], spec, strict=True)]
    assert (found["spec"], found["shard"]) == (spec, parts)
