"""The course as a notebook: it agrees with its page, its outputs are stored, and all cells run."""
import base64
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, command

from recipes import notebook
from support.console import UserError

pytest.importorskip("jupytext", reason="jupytext is not installed")
pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

PAGE = ROOT / "docs" / "course.md"


@pytest.fixture(scope="module")
def stored():
    """docs/course.ipynb."""
    return json.loads((ROOT / "docs" / "course.ipynb").read_text())


def source_of(cell):
    return "".join(cell["source"])


def test_page_and_notebook_agree(stored):
    """The same cells in the same order. If not: python recipes/notebook.py"""
    fresh = notebook.cells_of(PAGE.read_text())
    assert [(cell.cell_type, cell.source, cell.id) for cell in fresh.cells] == [
        (cell["cell_type"], source_of(cell), cell["id"]) for cell in stored["cells"]]
    assert fresh.metadata == stored["metadata"]


def test_a_change_of_the_page_is_seen(stored):
    """The test above can fail."""
    fresh = notebook.cells_of(PAGE.read_text().replace("group=16", "group=17"))
    assert [cell.source for cell in fresh.cells] != [source_of(c) for c in stored["cells"]]


def test_every_block_of_the_page_is_a_cell(stored):
    blocks = re.findall(r"(?ms)^```python\n(.*?)\n```$", PAGE.read_text())
    cells = [source_of(c) for c in stored["cells"] if c["cell_type"] == "code"]
    assert cells == blocks and len(cells) > 20


def test_the_outputs_are_stored_and_small(stored):
    cells = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert "error" not in kinds and len(kinds) > 20
    said = json.dumps([cell["outputs"] for cell in cells])
    assert not re.search(r"/tmp/|/home/|site-packages|Traceback|Warning", said)
    assert len(said) < 200_000


def test_all_cells_run(monkeypatch):
    """From the folder of the notebook, as JupyterLab does, with short games."""
    monkeypatch.setenv("COURSE_QUICK", "1")
    book = notebook.run(notebook.cells_of(PAGE.read_text()), seconds=120)
    said = "".join(output.get("text", "") for cell in book.cells if cell.cell_type == "code"
                   for output in cell.outputs)
    assert said.count("still to be done") == 7
    assert "loss 0.693" in said and "right answers, %" in said
    assert re.search(r"L_Sol -?0\.000000", said)  # advantages are centred


def test_a_cell_that_fails_is_an_error():
    with pytest.raises(UserError, match="a cell failed: .*ZeroDivisionError"):
        notebook.run(notebook.cells_of("# A\n\n```python\n1 / 0\n```\n"))


def test_a_cell_that_does_not_end_is_an_error():
    sleeps = "# A\n\n```python\nimport time\ntime.sleep(600)\n```\n"
    with pytest.raises(UserError, match="longer than 2 seconds"):
        notebook.run(notebook.cells_of(sleeps), seconds=2)


def first_cell():
    return next(c.source for c in notebook.cells_of(PAGE.read_text()).cells
                if c.cell_type == "code")


def test_the_first_cell_clones_only_where_nothing_is(tmp_path, monkeypatch):
    """In a hosted notebook there is no project: it is cloned, and its packages are installed."""
    done = []

    def pretend(words, check):
        done.append(words)
        if words[0] == "git":
            (tmp_path / "language-self-play" / "docs").mkdir(parents=True)
            (tmp_path / "language-self-play" / "selfplay.py").touch()
    monkeypatch.setattr("sys.path", ["first"])
    monkeypatch.setattr(subprocess, "run", pretend)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time it is there
        exec(first_cell(), {})
        monkeypatch.chdir(tmp_path)
    assert [words[:2] for words in done] == [["git", "clone"], [sys.executable, "-m"]]
    assert done[1][2:4] == ["pip", "install"]
    assert done[1][-1].endswith("requirements.txt")


def test_outputs_are_kept_where_the_code_is_the_same():
    """--no-run: a new text, the old outputs. Other code is refused."""
    old = notebook.cells_of("# A\n\n```python\nprint(1)\n```\n")
    old.cells[1].outputs, old.cells[1].execution_count = [SimpleNamespace(text="1")], 1
    new = notebook.with_outputs_of(notebook.cells_of("# B\n\n```python\nprint(1)\n```\n"), old)
    assert new.cells[0].source == "# B" and new.cells[1].outputs == old.cells[1].outputs
    with pytest.raises(UserError, match="has changed"):
        notebook.with_outputs_of(notebook.cells_of("# A\n\n```python\nprint(2)\n```\n"), old)


def test_drawings_are_stored_as_images_too(stored):
    """JupyterLab shows no SVG of a notebook that it does not trust; HTML with an image it does."""
    from nbformat.v4 import new_output
    book = notebook.cells_of("# A\n\n```python\nSVG(x)\n```\n")
    book.cells[1].outputs = [new_output("display_data", {"image/svg+xml": "<svg/>"}),
                             new_output("stream", text="1")]
    drawn, said = notebook.with_images(book).cells[1].outputs
    data = re.fullmatch('<img src="data:image/svg.xml;base64,(.*)">', drawn.data["text/html"])[1]
    assert base64.b64decode(data) == b"<svg/>" and said.text == "1"
    kinds = [set(o["data"]) for c in stored["cells"] for o in c.get("outputs", []) if "data" in o]
    assert all("text/html" in kind for kind in kinds if "image/svg+xml" in kind) and kinds


@pytest.mark.parametrize("flags, says", [
    (("--out", "nowhere/a.ipynb"), "--out nowhere/a.ipynb: expected a file"),
    (("--no-run", "--out", "a.ipynb"), "--no-run: a.ipynb is not there")])
def test_bad_input_is_one_line(tmp_path, flags, says):
    done = command(notebook, tmp_path, *flags)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
