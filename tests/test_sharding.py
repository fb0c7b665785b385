"""Parameters lie on a mesh as the rules say, and 8 devices compute what one computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.folders import llava_config, write_llava

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    # 99 tokens are not divisible by 2, so that the vocabulary stays whole.
    folder = write_llava(tmp_path_factory.mktemp("sharding") / "llava", llava_config(text={"attention_bias": True}))
    command = [sys.executable, ROOT / "tests" / "sharded_logits.py", folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_logits_equal_those_of_one_device(report):
    assert report["devices"] == report["logits_devices"] == 8
    assert report["equal"]
    assert report["relative_error"] < 1e-5


@pytest.mark.parametrize(
    ("path", "spec", "shard"),
    [
        ("language_model.layers.0.self_attn.q_proj.kernel", ["fsdp", "tensor"], [16, 16]),
        ("language_model.layers.1.self_attn.v_proj.kernel", ["fsdp", "tensor"], [16, 8]),
        ("language_model.layers.1.self_attn.o_proj.kernel", ["tensor", "fsdp"], [16, 16]),
        ("language_model.layers.0.mlp.gate_proj.kernel", ["fsdp", "tensor"], [16, 24]),
        ("language_model.layers.0.mlp.down_proj.kernel", ["tensor", "fsdp"], [24, 16]),
        ("vision_tower.encoder.layers.0.self_attn.out_proj.kernel", ["tensor", "fsdp"], [12, 12]),
        ("vision_tower.encoder.layers.0.mlp.fc1.kernel", ["fsdp", "tensor"], [12, 20]),
        ("multi_modal_projector.linear_2.kernel", ["tensor", "fsdp"], [16, 16]),
        ("language_model.embed_tokens.embedding", [None, "fsdp"], [99, 16]),
        ("language_model.lm_head.kernel", ["fsdp", None], [16, 99]),
    ],
)
def test_matrices_are_split(report, path, spec, shard):
    found = report["shards"][path]
    assert (found["spec"], found["shard"]) == (spec, shard)


def test_every_large_matrix_is_split_and_every_vector_whole(report):
    for path, found in report["shards"].items():
        if len(found["shape"]) == 1 or path.startswith("vision_tower.embeddings."):
            assert found["shard"] == found["shape"], path
        else:
            assert found["shard"] != found["shape"], path
