"""The scoreboard: intervals, win rate, and the real command line."""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from evaluate import new_run, summary, wilson, win_rate
from model import UserError
from tiny import language


def test_wilson_against_a_published_example():
    """Wilson 1927 for 81 of 263: 0.2553 to 0.3662 (Newcombe 1998, table I)."""
    assert wilson(81 / 263, 263) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    assert wilson(0.0, 10)[0] == 0 and wilson(1.0, 10)[1] == pytest.approx(1)


def test_win_rate_counts_ties_as_half():
    ours, theirs = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    win, low, high = win_rate(ours, theirs)
    assert win == pytest.approx((0.75 + 1.0 + 0.25) / 3) and low < win < high
    assert win_rate(ours, ours)[0] == pytest.approx(0.5)


def test_summary_by_kind():
    queries = ["Add 2 and 3.", 'Take "kobani", reverse it.']
    report = summary({"sampled": torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "greedy": torch.tensor([[1.0], [0.0]])}, queries)
    assert report["numbers"]["sampled"][0] == 0.5 and report["numbers"]["pass@8"][0] == 1 and report["all"]["sampled"][0] == 0.25
    assert report["all"]["n"] == 2 and report["1 step"]["greedy"][0] == 0 and "3 steps" not in report


def test_runs_are_numbered_and_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(new_run(None, "lsp", {})) for _ in range(2)] == ["runs/lsp-1", "runs/lsp-2"]
    with pytest.raises(UserError, match="exists already"):
        new_run("lsp-1", "lsp", {})


def test_the_start_has_room_to_grow(tiny):
    """The embedded default answers between 45 % and 65 % of held-out instructions at temperature 1."""
    from evaluate import rate
    model, tokenizer = tiny
    assert 0.45 < rate(model, tokenizer, language.evaluation_set(500))["sampled"].mean() < 0.65


def test_command_line(tmp_path):
    run = lambda *flags: subprocess.run([sys.executable, str(ROOT / "evaluate.py"), *flags], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    done = run(str(ROOT / "tiny"), "--against", str(ROOT / "tiny"), "--items", "30")
    assert done.returncode == 0 and "win rate" in done.stdout and "greedy" in done.stdout, done.stderr
    assert "50.0 % [50.0, 50.0]" not in done.stdout  # even the same model meets itself with other luck
    for flags in (["nowhere"], [str(ROOT / "tiny"), "--items", "0"], ["--wrong"], [str(ROOT / "tiny"), "--picture", "x.png"], [str(ROOT / "tiny"), "--seed", "-1"]):
        done = run(*flags)
        assert done.returncode == 2 and "Traceback" not in done.stderr
