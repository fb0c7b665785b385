"""`python -m jaxspec prepare`: from a file and its pictures to what training reads."""

import json

import numpy as np
from PIL import Image

from jaxspec.cli import main
from jaxspec.data.sources import open_conversations

TURNS = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A square."}]


def test_a_file_and_its_pictures_become_a_data_set(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(tmp_path / "images/a.png")
    records = [{"id": name, "image": f"{name}.png", "conversations": TURNS} for name in ("a", "missing")]
    file = tmp_path / "mix_v1.5.json"
    file.write_text(json.dumps(records))
    options = ["prepare", str(file), str(tmp_path / "data"), "--image-folder", str(tmp_path / "images")]
    assert main(options) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "mix_v1.5: 1 records, 1 with images; 1 skipped"
    assert told[1].startswith("  skipped missing: its image ")
    start = "train on it with: --conversations "
    assert told[2].startswith(start)
    source = open_conversations(told[2].removeprefix(start))
    assert [record["conversations"] for record in source] == [TURNS]


def test_a_file_that_is_not_there(tmp_path, capsys):
    assert main(["prepare", str(tmp_path / "none.json"), str(tmp_path / "data")]) == 2
    assert "no file" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
