"""colab/quickstart.ipynb runs from its first cell to its last, as in Colab without an accelerator."""

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "colab" / "quickstart.ipynb"
METHODS = "vispec", "eagle2", "specvlm", "massv", "medusa", "lookup"
SECONDS = 240
"""For one cell, on a busy machine."""


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Iterator[dict[str, list]]:
    """The outputs of every cell by its id, and of one more that stops the page."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("stop_page()\nprint(serving.is_alive())", id="stopped"))
    folder = tmp_path_factory.mktemp("colab")
    with pytest.MonkeyPatch.context() as patch:
        # The package of this checkout; and as little as possible of this machine.
        patch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("JAX_PLATFORMS", "cpu")
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
    yield {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def text(outputs: list) -> str:
    """What was printed."""
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def shown(outputs: list, kind: str) -> list[str]:
    """What was displayed as that MIME type."""
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def table(outputs: list) -> dict[str, dict[str, str]]:
    """The Markdown table of a cell: rows by arm and temperature."""
    (markdown,) = shown(outputs, "text/markdown")
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    return {f"{row[0]} {row[1]}": dict(zip(header, row, strict=True)) for row in rows}


def test_it_is_committed_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


def test_it_says_what_it_installs(executed):
    cell = nbformat.read(NOTEBOOK, as_version=4).cells[1]
    assert re.search(r'^REQUIREMENT = "jaxspec-vlm\[serve,plot\]"', cell.source, re.MULTILINE)
    assert executed["install"] == []  # there is nothing to install here


def test_the_embedded_model_answers_about_its_picture(executed):
    assert shown(executed["ask"], "image/png")
    assert len(text(executed["ask"]).splitlines()[1]) > 40


@pytest.mark.parametrize("cell", ["colours", "own"])
def test_answers_have_the_colours_of_their_tokens(executed, cell):
    (html,) = shown(executed[cell], "text/html")
    assert html.count('class="draft"') > 3 and html.count('class="own"') > 3


def test_speculation_and_autoregressive_decoding_say_the_same(executed):
    rows = table(executed["speed"])
    assert list(rows) == ["autoregressive 0", "vispec 0", "autoregressive 1", "vispec 1"]
    assert {row["identical answers"] for row in rows.values()} == {"2/2"}
    assert float(rows["vispec 0"]["mean acceptance length (with bonus)"]) > 3


def test_every_drafter_says_the_same(executed):
    rows = table(executed["drafters"])
    assert list(rows) == [f"{name} 0" for name in ("autoregressive", *METHODS)]
    assert {row["identical answers"] for row in rows.values()} == {"2/2"}
    assert all(float(row["decode tokens/s"]) > 0 and float(row["speed-up"]) > 0 for row in rows.values())
    assert len(shown(executed["drafters"], "image/png")) == 1


def test_the_seed_decides(executed):
    said = text(executed["sampling"])
    assert "same seed, same answer: True" in said and "the same without drafter: True" in said
    one, two = (re.search(rf"seed {seed}: +(.*)", said)[1] for seed in (1, 2))
    assert one != two


def test_what_needs_an_accelerator_says_so(executed):
    assert text(executed["real"]).startswith("Skipped: this runtime has no accelerator")


def test_the_page_answers_and_stops(executed):
    assert "the page answers: 200" in text(executed["page"]) and "open http://127.0.0.1:" in text(executed["page"])
    assert text(executed["stopped"]) == "False\n"
