"""What the README quotes: messages about bad input, and lines of the code."""
import inspect
import re

import pytest
import torch
from conftest import ROOT, command

import evaluate
import model as llama
import rewards
import selfplay
import spin

README = (ROOT / "README.md").read_text()
TABLE = re.search(r"What bad input says.*?\n\n(.*?)\n\n", README, re.DOTALL)[1]
ROW = r"    python (\w+)\.py (.*?)  +(.*)"
LINES = [re.fullmatch(ROW, line).groups() for line in TABLE.splitlines()]
MODULES = {"selfplay": selfplay, "spin": spin, "evaluate": evaluate, "rewards": rewards}


@pytest.mark.parametrize("module, flags, says", LINES, ids=[flags for _, flags, _ in LINES])
def test_bad_input_says_what_the_readme_says(module, flags, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # The README's machine. This also serves machines that cannot tell their free memory.
    monkeypatch.setattr(llama, "free_memory", lambda device: 22.4 * 2**30)

    def there():
        return sorted([*ROOT.iterdir(), *(ROOT / "runs").glob("*")])
    before = there()
    done = command(MODULES[module], ROOT, *flags.split())
    assert done.returncode == 2
    assert f"error: {says}" in done.stderr.splitlines()[-1]
    assert there() == before


def test_the_lines_of_the_course_are_lines_of_the_code():
    """Each row of the course's table of equations quotes the line that computes it."""
    table = README.split("| what | equation | line | here |")[1].split("\n\n")[0]
    quoted = re.findall(r"\| `([^`]*)` in `(\w+)\.(\w+)` \|", table)
    assert len(quoted) == table.count("\n") - 1  # one in each row, below the heading's two lines
    for line, module, name in quoted:
        thing = getattr(MODULES[module], name)
        if callable(thing):
            source = inspect.getsource(thing)
        else:  # a value: up to the next empty line
            source = (ROOT / f"{module}.py").read_text().split(f"\n{name} = ")[1].split("\n\n")[0]
        assert line in source, f"{module}.{name} has no such line: {line}"
