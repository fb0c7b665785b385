"""A random LLaVA folder with the demo's processor, and a random draft head for it: all that a command loads."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jaxspec.demo.processor import build_processor
from jaxspec.drafters.checkpoint import save_drafter_folder
from jaxspec.drafters.vispec import ViSpecConfig, ViSpecHead
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.llava import Llava, LlavaConfig
from jaxspec.targets.registry import save_model
from tests.helpers import config_for, randomized

RECORDED = 9.0  # more than a random head can accept, so that its warning shows


def write_models(folder: Path) -> tuple[Path, Path]:
    """Folders of the target and of the drafter `vispec`."""
    processor = build_processor(folder / "processor", scenes=300)
    config = config_for(
        processor,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    target = randomized(Llava(LlavaConfig.from_hf(config), rngs=nnx.Rngs(0)), seed=0, scale=1.0)
    save_model(target, config, folder / "processor", folder / "target", np.float32)
    head = ViSpecHead(ViSpecConfig(target.config.text), rngs=nnx.Rngs(1))
    about = {"mean_acceptance_length": RECORDED}
    save_drafter_folder(head, "vispec", TreeConfig(1, 4, 6), target, folder / "vispec", np.float32, about)
    return folder / "target", folder / "vispec"


@pytest.fixture(scope="package", autouse=True)
def jax_settings():
    """The commands' setting of the compilation cache is undone."""
    cache = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", cache)


@pytest.fixture(scope="package")
def asking(models, tmp_path_factory) -> Path:
    """The target's folder, with a generation_config.json."""
    folder = shutil.copytree(models[0], tmp_path_factory.mktemp("asking") / "target")
    said = {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.5}
    (folder / "generation_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="package")
def models(tmp_path_factory):
    """(target folder, drafter folder)."""
    return write_models(tmp_path_factory.mktemp("models"))
