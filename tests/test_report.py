"""evaluate.py report: one page about runs, whole in itself, in which nothing that a model wrote becomes part of the page."""
import html
import json
import re
import shutil
import subprocess

import pytest
from conftest import ROOT, command

import evaluate
import selfplay
import spin

EVIL = 'Take "</script><script>alert(1)</script>", reverse it.'


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two runs of the embedded default, one a game of LSP, the other of SPIN; a query of the first was made evil."""
    folder = tmp_path_factory.mktemp("report")
    small = ("--model", str(ROOT / "tiny"), "--device", "cpu", "--eval-items", "8")
    assert command(selfplay, folder, *small, "--steps", "3", "--queries", "3", "--answers", "4", "--run", "lsp").returncode == 0
    assert command(spin, folder, *small, "--pairs", "6", "--iterations", "2", "--run", "spin").returncode == 0
    games = folder / "runs" / "lsp" / "games.jsonl"
    lines = [json.loads(line) for line in games.read_text().splitlines()]
    lines[0]["games"][0]["query"] = EVIL
    games.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "runs" / "lsp" / "warnings.txt").write_text("step 3: something <went> wrong\n")
    done = command(evaluate, folder, "report", "runs/lsp", "runs/spin", "--ask", "3")
    assert done.returncode == 0 and "report.html" in done.stdout and "logprob_rival" in done.stdout, done.stderr
    return folder


def test_the_page_is_whole_in_itself(runs):
    """No address to fetch from; the games as they were; the same instructions under the start and every checkpoint."""
    page = (runs / "report.html").read_text()
    assert not re.search(r"""(src|href)=|url\(|@import""", re.sub(r'(xlink:)?href="#[^"]*"|url\(#[^)]*\)', "", page))
    games = json.loads(re.search(r'<script type="application/json" id="games">(.*)</script>\n<script>', page)[1])
    assert games["runs/lsp"] == [json.loads(line) for line in (runs / "runs" / "lsp" / "games.jsonl").read_text().splitlines()]
    assert page.count("</script>") == 2 and games["runs/lsp"][0]["games"][0]["query"] == EVIL
    table = page[page.index("answered by every checkpoint"):page.index("<h2>Settings")]
    assert table.count("<tr>") == 1 + 3 and [table.count(f"<br>{name}<") for name in ("model", "iteration-0", "iteration-1")] == [1, 1, 1]
    assert table.count("<br>start<") == 1  # both began from the same
    for query in evaluate.language.evaluation_set(3):
        assert html.escape(query) in table
    assert "something &lt;went&gt; wrong" in page and page.count("<svg") == len(re.findall(r"<div><svg", page)) > 10


def test_a_page_without_answers_loads_no_model(runs, monkeypatch):
    monkeypatch.setattr(evaluate, "load", None)
    assert command(evaluate, runs, "report", "runs/lsp", "--ask", "0").returncode == 0
    assert "every checkpoint" not in (runs / "runs" / "lsp" / "report.html").read_text()


def test_many_games_are_thinned(runs, monkeypatch):
    path = runs / "runs" / "lsp" / "games.jsonl"
    monkeypatch.setattr(evaluate, "GAMES_SIZE", path.stat().st_size - 1)
    games, k = evaluate.read_games(path.parent)
    assert k == 2 and [line["step"] for line in games] == [1, 3]


@pytest.mark.parametrize("flags, says", [(["runs"], "no run's folder"), (["runs/lsp", "--out", "no/where.html"], "folder that exists"), (["runs/lsp", "--out", "runs"], "folder that exists")])
def test_bad_input_is_one_line(runs, flags, says):
    done = command(evaluate, runs, "report", *flags)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name, text", [("settings.json", "{"), ("evaluation.json", "[1]"), ("games.jsonl", '{"step": 1}\n'), ("settings.json", "[" * 100000)])
def test_a_damaged_run_is_one_line(runs, tmp_path, name, text):
    shutil.copytree(runs / "runs" / "lsp", tmp_path / "lsp")
    (tmp_path / "lsp" / name).write_text(text)
    done = command(evaluate, tmp_path, "report", "lsp", "--ask", "0")
    assert done.returncode == 2 and name in done.stderr and done.stderr.count("\n") == 1


def test_in_a_real_browser(runs):
    """Its script runs, shows the games as text, and at a phone's width nothing is wider than the screen."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no headless browser (chromium or google-chrome) is installed")
    page = runs / "looked-at.html"
    page.write_text((runs / "report.html").read_text().replace("</body>", "<script>document.title = document.body.scrollWidth + ' of ' + innerWidth</script></body>"))
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60)
    dom = done.stdout
    wide, screen = map(int, re.search(r"<title>(\d+) of (\d+)</title>", dom).groups())
    assert wide <= screen and dom.count('class="game"') == 3 and "alert(1)" in dom and "<script>alert" not in dom


def test_where_the_curves_began_and_ended():
    """Twenty steps that rise from 0 to 19: the first ten's mean is 4.5, the last ten's 14.5; what a run lacks is left out, and a run without steps."""
    lines = evaluate.first_and_last({"a": {"step": [*range(20)], "reward": [float(i) for i in range(20)]}, "b": {"step": [1], "margin": [0.25]}, "c": {}}).splitlines()
    assert len(set(map(len, lines))) == 1
    assert [" ".join(line.split()) for line in lines] == ["first -> last a b", "reward 4.500 -> 14.500", "margin 0.250 -> 0.250"]
    assert evaluate.first_and_last({"c": {}}) == "no step was finished"
