"""evaluate.py report writes one page about runs, complete in itself.

Nothing that a model wrote may become part of the page's code.
"""
import html
import json
import re
import shutil
import subprocess
from unittest import mock

import pytest
from conftest import ROOT, command, read_lines

import evaluate
import selfplay
import spin
from support import report

EVIL = 'Take "</script><script>alert(1)</script>", reverse it.'


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two runs of the embedded default: a game of LSP, and one of SPIN.

    A query of the first run was replaced by a hostile one.
    """
    folder = tmp_path_factory.mktemp("report")
    small = ("--model", str(ROOT / "tiny"), "--device", "cpu", "--eval-items", "8")
    lsp = command(selfplay, folder, *small, "--steps", "3", "--queries", "3", "--answers", "4",
                  "--run", "lsp")
    assert lsp.returncode == 0
    game = command(spin, folder, *small, "--pairs", "6", "--iterations", "2", "--run", "spin")
    assert game.returncode == 0
    games = folder / "runs" / "lsp" / "games.jsonl"
    lines = read_lines(games)
    lines[0]["games"][0]["query"] = EVIL
    games.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "runs" / "lsp" / "warnings.txt").write_text("step 3: something <went> wrong\n")
    done = command(evaluate, folder, "report", "runs/lsp", "runs/spin", "--ask", "3")
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout and "logprob_rival" in done.stdout, done.stderr
    return folder


def test_the_page_is_whole_in_itself(runs):
    """The page fetches nothing from any address, and shows the games as they were.

    The start and every checkpoint answer the same instructions.
    """
    page = (runs / "report.html").read_text()
    without_links_to_itself = re.sub(r'(xlink:)?href="#[^"]*"|url\(#[^)]*\)', "", page)
    assert not re.search(r"(src|href)=|url\(|@import", without_links_to_itself)
    data = r'<script type="application/json" id="games">(.*)</script>\n<script>'
    games = json.loads(re.search(data, page)[1])["runs/lsp"]
    assert games == read_lines(runs / "runs" / "lsp" / "games.jsonl")
    assert page.count("</script>") == 2
    assert games[0]["games"][0]["query"] == EVIL
    table = page[page.index("answered by every checkpoint"):page.index("<h2>Settings")]
    assert table.count("<tr>") == 1 + 3
    for name in ("model", "iteration-0", "iteration-1"):
        assert table.count(f"<br>{name}<") == 1
    assert table.count("<br>start<") == 1  # both runs began from the same model
    for query in evaluate.language.evaluation_set(3):
        assert html.escape(query) in table
    assert "something &lt;went&gt; wrong" in page
    assert page.count("<svg") == len(re.findall(r"<div><svg", page)) > 10


def test_a_page_without_answers_loads_no_model(runs, monkeypatch):
    monkeypatch.setattr(evaluate, "load", None)
    assert command(evaluate, runs, "report", "runs/spin", "--ask", "0").returncode == 0
    assert "every checkpoint" not in (runs / "runs" / "spin" / "report.html").read_text()


def test_a_figure_of_some_steps_is_drawn_and_told_by_those(tmp_path):
    """Scores on held-out questions are measured every so many steps. Between them is nothing."""
    rows = [{"step": i, "reward": 0.5} for i in range(1, 31)]
    rows[9]["held_greedy"], rows[19]["held_greedy"] = 0.25, 0.75
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "settings.json").write_text("{}")
    figures = report.read_metrics(tmp_path)
    known = {i: y for i, y in zip(figures["step"], figures["held_greedy"]) if y == y}
    assert known == {10: 0.25, 20: 0.75}
    assert "0.250 ->    0.750" in report.first_and_last({"a": figures})
    drawn = []
    axis = mock.MagicMock()
    axis.plot = lambda x, y, **style: drawn.append((list(x), list(y)))
    report.plot(axis, "held_greedy", {"a": figures})
    assert drawn == [([10, 20], [0.25, 0.75])]


def test_the_curves_as_a_picture(runs):
    """--picture draws the same curves as one PNG. The real one: `command` draws none."""
    words = ["report", "runs/spin", "--ask", "0", "--picture", "one.png"]
    done = command(evaluate, runs, *words)
    assert done.returncode == 0 and "curves: one.png" in done.stdout, done.stderr
    assert report.picture([runs / "runs" / "lsp", runs / "runs" / "spin"], runs / "real.png")
    assert (runs / "real.png").read_bytes().startswith(b"\x89PNG")


def test_many_games_are_thinned(runs, monkeypatch):
    path = runs / "runs" / "lsp" / "games.jsonl"
    monkeypatch.setattr(report, "GAMES_SIZE", path.stat().st_size - 1)
    games, k = report.read_games(path.parent)
    assert k == 2
    assert [line["step"] for line in games] == [1, 3]


@pytest.mark.parametrize("flags, says", [
    (["runs"], "no run's folder"),
    (["runs/lsp", "--out", "no/where.html"], "folder that exists"),
    (["runs/lsp", "--out", "runs"], "folder that exists"),
    (["runs/lsp", "--picture", "no/where.png"], "--picture no/where.png: expected a file's path"),
])
def test_bad_input_is_one_line(runs, flags, says):
    done = command(evaluate, runs, "report", *flags)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name, text", [
    ("settings.json", "{"), ("evaluation.json", "[1]"), ("games.jsonl", '{"step": 1}\n'),
    ("settings.json", "[" * 100000),
])
def test_a_damaged_run_is_one_line(runs, tmp_path, name, text):
    shutil.copytree(runs / "runs" / "lsp", tmp_path / "lsp")
    (tmp_path / "lsp" / name).write_text(text)
    done = command(evaluate, tmp_path, "report", "lsp", "--ask", "0")
    assert done.returncode == 2 and name in done.stderr and done.stderr.count("\n") == 1


def test_in_a_real_browser(runs):
    """The page's script runs and shows the games as text.

    At a phone's width nothing is wider than the screen.
    """
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no headless browser (chromium or google-chrome) is installed")
    page = runs / "looked-at.html"
    measure = ("<script>document.title = document.body.scrollWidth + ' of ' + innerWidth</script>"
               "</body>")
    page.write_text((runs / "report.html").read_text().replace("</body>", measure))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900",
         "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60)
    dom = done.stdout
    wide, screen = map(int, re.search(r"<title>(\d+) of (\d+)</title>", dom).groups())
    assert wide <= screen
    assert dom.count('class="game"') == 3
    assert "alert(1)" in dom and "<script>alert" not in dom


def test_where_the_curves_began_and_ended():
    """Twenty steps rise from 0 to 19: the mean of the first ten is 4.5, and of the last ten 14.5.

    What a run lacks is left out, and so is a run without steps.
    """
    lines = report.first_and_last({
        "a": {"step": [*range(20)], "reward": [float(i) for i in range(20)]},
        "b": {"step": [1], "margin": [0.25]},
        "c": {},
    }).splitlines()
    assert len(set(map(len, lines))) == 1
    assert [" ".join(line.split()) for line in lines] == [
        "first -> last a b", "reward 4.500 -> 14.500", "margin 0.250 -> 0.250"]
    assert report.first_and_last({"c": {}}) == "no step was finished"
