"""The course as a notebook: `python recipes/notebook.py` makes docs/course.ipynb of docs/course.md.

The page is the source. Its Python blocks become cells. All of them are run, and what they print and
draw is stored. That takes some four minutes on one core. After a change of the text alone, --no-run
keeps the stored outputs.

It needs jupytext, nbclient and ipykernel: pip install -r tests/requirements.txt
"""
import argparse
import base64
import copy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support import console

COURSE, NOTEBOOK = ROOT / "docs" / "course.md", ROOT / "docs" / "course.ipynb"
CELL_SECONDS = 900  # a cell is given up after this long


def cells_of(text):
    """The page as a notebook without outputs: a cell for each Python block and each section."""
    import jupytext
    notebook = jupytext.reads(text, {"extension": ".md", "split_at_heading": True})
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"  # else they would be drawn by chance, and differ each time
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"}}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def run(notebook, folder=NOTEBOOK.parent, seconds=CELL_SECONDS):
    """Run all cells in a folder, and keep their outputs. Raises UserError for a cell that fails."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError
    metadata = copy.deepcopy(notebook.metadata)  # the kernel would add its version of Python
    client = NotebookClient(notebook, timeout=seconds, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(folder)}})
    try:
        client.execute()
    except CellExecutionError as error:
        raise console.UserError(f"a cell failed: {error.ename}: {error.evalue}") from error
    except CellTimeoutError as error:
        raise console.UserError(f"a cell took longer than {seconds} seconds") from error
    notebook.metadata = metadata
    return notebook


def with_images(notebook):
    """Store each drawing as an image in HTML, too.

    JupyterLab shows no stored SVG in a notebook that it does not trust yet, as that of a new clone.
    """
    for output in [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]:
        if svg := output.get("data", {}).get("image/svg+xml"):
            data = base64.b64encode(svg.encode()).decode()
            output["data"]["text/html"] = f'<img src="data:image/svg+xml;base64,{data}">'
    return notebook


def with_outputs_of(notebook, old):
    """Take the outputs of an older notebook with the same code. Raises UserError for other code."""
    new, known = ([cell for cell in book.cells if cell.cell_type == "code"]
                  for book in (notebook, old))
    if [cell.source for cell in new] != [cell.source for cell in known]:
        raise console.UserError("the code of the cells has changed: run them, without --no-run")
    for cell, before in zip(new, known):
        cell.outputs, cell.execution_count = before.outputs, before.execution_count
    return notebook


def main(argv=None):
    """Make the notebook of the page."""
    parser = argparse.ArgumentParser(prog="notebook.py", description=__doc__.split(":")[0] + ".",
                                     allow_abbrev=False)
    parser.add_argument("--out", default=str(NOTEBOOK),
                        help="the notebook to write (default: the project's docs/course.ipynb)")
    parser.add_argument("--no-run", action="store_true",
                        help="keep the outputs that are stored in --out")
    args = parser.parse_args(argv)
    try:
        import nbformat
        notebook = cells_of(COURSE.read_text(encoding="utf-8"))
    except ImportError as error:
        raise console.UserError(f"{error.name} is missing: pip install -r tests/requirements.txt"
                                ) from None
    if not Path(args.out).resolve().parent.is_dir():
        raise console.UserError(f"--out {args.out}: expected a file in a folder that exists")
    if args.no_run and not Path(args.out).is_file():
        raise console.UserError(f"--no-run: {args.out} is not there, so it has no outputs")
    if args.no_run:
        notebook = with_outputs_of(notebook, nbformat.read(args.out, 4))
    else:
        notebook = run(notebook)
    nbformat.write(with_images(notebook), args.out)
    print(f"written: {args.out} ({Path(args.out).stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    sys.exit(console.run_command(main))
