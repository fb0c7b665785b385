"""How tests of loading break a folder, and look at the sentence that says so."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

REFERENCE = Path(__file__).parent / "reference"


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, section=None, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config if section is None else config[section]).update(values)
    path.write_text(json.dumps(config))


def error_of(load, kind=ValueError) -> str:
    with pytest.raises(kind) as caught:
        load()
    return str(caught.value)


def assert_names(message: str, *parts):
    assert not [part for part in map(str, parts) if part not in message], message
