"""The README says of the targets what the registry says, and the registry names what the tests compare with."""

from pathlib import Path

import pytest
import transformers

from jaxspec.targets.registry import FAMILIES
from jaxspec.targets.support import BEGIN, END, table, with_table

README = Path(__file__).parents[2] / "README.md"


def test_readme_has_the_table():
    text = README.read_text(encoding="utf-8")
    assert text == with_table(text), "README.md is out of date; run: python -m jaxspec.targets.support README.md"


def test_every_family_has_a_row():
    rows = table().splitlines()[2:]
    assert len(rows) == len(FAMILIES)
    for row, (model_type, family) in zip(rows, FAMILIES.items(), strict=True):
        assert f"(`{model_type}`)" in row and family.title in row and family.checked in row
        assert ("| no | no | no |" in row) == (not family.images)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_architectures_are_those_of_transformers(model_type):
    assert getattr(transformers, FAMILIES[model_type].architecture).config_class.model_type == model_type


@pytest.mark.parametrize("text", ["", BEGIN, BEGIN + END + END, END + BEGIN])
def test_markers_are_required_once_and_in_order(text):
    with pytest.raises(ValueError, match="once|after"):
        with_table(text)
