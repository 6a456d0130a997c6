"""The house stays a house: imports point downward, lines are short, public names are explained."""
import ast
import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, command

# A module may import those of a lower floor. Within support/ a circle alone is forbidden.
FLOORS = {"support": 0, "tiny": 1, "model": 1, "rewards": 2, "evaluate": 3, "selfplay": 4,
          "spin": 4, "recipes": 5}
FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "support").glob("*.py"),
                *(ROOT / "recipes").glob("*.py"), *(ROOT / "tiny").glob("*.py")])


def name_of(path):
    """support/files.py -> support.files"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(source):
    """The modules of this project that a source imports, anywhere in it."""
    known, found = {name_of(path) for path in FILES}, set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & known


def wrong_arrows(graph):
    """The imports of a graph {module: modules it imports} that point upward or sideways."""
    def floor(name):
        return FLOORS[name.split(".")[0]]
    return sorted((name, other) for name, others in graph.items() for other in others
                  if floor(other) >= floor(name) and not (floor(name) == floor(other) == 0))


def circle(graph):
    """Modules of a graph that import each other in a circle; [] if there are none."""
    left = {name: set(others) for name, others in graph.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def without_an_encoding(source):
    """The lines of a source that read or write text without saying that it is UTF-8."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            modes = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
            binary = any("b" in str(mode) for mode in modes)
            given = {keyword.arg for keyword in node.keywords}
            method = isinstance(node.func, ast.Attribute) and name == "open"  # webbrowser.open, ..
            if name in ("read_text", "write_text", "open") and not (
                    "encoding" in given or binary or method):
                found.append(node.lineno)
    return found


GRAPH = {name_of(path): imports_of(path.read_text()) for path in FILES}


def test_every_file_is_read_and_written_as_utf_8():
    """Not in the encoding of somebody's locale: there, a template's letters would be others."""
    wrong = {name_of(path): without_an_encoding(path.read_text()) for path in FILES}
    assert {name: lines for name, lines in wrong.items() if lines} == {}
    assert without_an_encoding("p.read_text()\nopen(p)\nopen(p, 'rb')\np.write_text('a')\n"
                               "open(p, encoding='utf-8')") == [1, 2, 4]


def test_imports_only_point_downward():
    """recipes -> selfplay | spin -> evaluate -> rewards -> model -> support, without a circle."""
    assert wrong_arrows(GRAPH) == [] and circle(GRAPH) == []
    assert "support.console" in GRAPH["model"] and "model" in GRAPH["rewards"]  # it does see them


@pytest.mark.parametrize("name, other", [("support.files", "model"), ("selfplay", "spin"),
                                         ("rewards", "evaluate"), ("spin", "recipes.claims"),
                                         ("tiny.language", "model")])
def test_an_import_that_points_upward_is_seen(name, other):
    """The test above can fail."""
    assert wrong_arrows(GRAPH | {name: GRAPH[name] | {other}}) == [(name, other)]


def test_a_circle_is_seen():
    """So can the test of circles."""
    graph = GRAPH | {"support.console": {"support.runs"}}
    assert {"support.console", "support.runs"} <= set(circle(graph))


def test_lines_end_before_column_101():
    """A projector shows 100 columns."""
    wide = [f"{path.name}:{i}" for path in [*FILES, *(ROOT / "tests").glob("*.py")]
            for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert wide == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_public_names_are_explained(path):
    """Every public function, class and method has a docstring; so has every file."""
    tree = ast.parse(path.read_text())
    named = [node for node in ast.walk(tree)
             if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")]
    inner = {id(child) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
             for child in ast.walk(node) if child is not node}
    bare = [node.name for node in named if id(node) not in inner and not ast.get_docstring(node)]
    assert bare == [] and (ast.get_docstring(tree) or path.stat().st_size == 0)


def test_the_map_in_the_readme_is_true():
    """Its files exist, and the line counts are right within a tenth."""
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| \[`([^`]+)`\]\([^)]*\) \| (\d*) ?\|", readme, re.M)
    assert len(rows) >= 10
    for name, lines in rows:
        assert (ROOT / name).exists(), name
        if lines:
            count = len((ROOT / name).read_text().splitlines())
            assert abs(count - int(lines)) <= count / 10, f"{name} has {count} lines"


def test_ruff_finds_nothing():
    """Unused names, order of imports, and the rest of pyproject.toml's list."""
    if not shutil.which("ruff"):
        pytest.skip("ruff is not installed: pip install -r tests/requirements.txt")
    done = subprocess.run(["ruff", "check", "--no-cache", "."], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("own, said", [({}, "2 None"), ({"PYTEST_XDIST_WORKER": "gw0"}, "1 1"),
                                       ({"OMP_NUM_THREADS": "3"}, "3 3")])
def test_two_workers_of_one_thread_or_one_process_of_two(own, said):
    """Workers inherit the environment of the process that starts them: it must set nothing."""
    outer = {key: value for key, value in os.environ.items()
             if key not in ("PYTEST_XDIST_WORKER", "OMP_NUM_THREADS")}
    code = ("import os, conftest, torch; "
            "print(torch.get_num_threads(), os.environ.get('OMP_NUM_THREADS'))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", env=outer | own,
                          capture_output=True, text=True)
    assert done.stdout.strip() == said, done.stderr


@pytest.mark.parametrize("name", ["selfplay", "spin", "evaluate", "recipes.claims",
                                  "recipes.explain", "recipes.figures", "recipes.neighbours",
                                  "recipes.notebook", "recipes.pictures", "recipes.train_tiny"])
def test_every_command_says_what_it_does(name, tmp_path):
    """-h works for each file that can be started."""
    done = command(importlib.import_module(name), tmp_path, "-h")
    assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr
