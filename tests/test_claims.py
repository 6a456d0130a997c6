"""The comparison: intervals by hand, command lines, resuming, and verdicts on made-up results."""
import json
import math
import subprocess

import pytest
import torch

import evaluate
import selfplay
import spin
from recipes import claims
from recipes.claims import Results, method_commands, run_method, seeds_and_items, slug, verdict
from support import console
from tiny import language


def test_interval_over_seeds_and_items_by_hand():
    """Seeds with means 1, 2, 3: t is 4.303, times 1/sqrt(3). Items: 1.96 times sqrt(2)/sqrt(2)."""
    x = torch.tensor([[0.0, 2.0], [1.0, 3.0], [2.0, 4.0]])
    mean, low, high = seeds_and_items(x)
    half = math.hypot(4.303 / math.sqrt(3), 1.959964)
    assert mean == pytest.approx(2)
    assert (low, high) == (pytest.approx(2 - half, abs=1e-4), pytest.approx(2 + half, abs=1e-4))
    # One seed: the items alone.
    assert seeds_and_items(x[:1])[2] == pytest.approx(1 + 1.959964, abs=1e-4)
    # A single number decides nothing.
    assert verdict(seeds_and_items(torch.tensor([[0.5]]))) == "not decided"


def test_verdict():
    assert verdict([1, 0.1, 2]) == "yes"
    assert verdict([-1, -2, -0.1]) == "no"
    assert verdict([0, -1, 1]) == "not decided"
    assert verdict([-0.5, -0.9, 0.1], worse_by=1.0) == "yes"


def test_verdict_on_a_claim_of_several_parts():
    assert claims.all_of("yes", "yes") == "yes"
    assert claims.all_of("yes", "not decided") == "not decided"
    assert claims.all_of("not decided", "no") == "no"


def test_every_command_line_is_one_the_games_take():
    """Only known flags, and as many games a step for every method."""
    commands = method_commands(30)
    pays = set()
    for command, after in commands.values():
        script, *words = command.split()
        args = {"selfplay.py": selfplay, "spin.py": spin}[script].parse_args(words)
        assert after is None or after in commands
        if script == "selfplay.py":
            assert (args.queries, args.answers) == (32, 16) and args.steps in (30, 90)
            pays.add(args.pay)
    assert pays <= set(selfplay.PAY)
    assert len({slug(m) for m in commands}) == len(commands)


def test_what_starts_from_another_model_waits_for_it():
    """All of the first round start from the default, and the long runs are started first."""
    first, second = claims.in_rounds(method_commands(30), range(2))
    assert {m for m, _ in second} == {"GRPO, then LSP", "LSP, then GRPO"}
    assert len(first) + len(second) == len(set(first + second)) == 2 * len(method_commands(30))
    assert ["long" in m for m, _ in first[:4]] == [True, True, True, False]


# --------------------------------------------------------------------------------------------------
# Verdicts on made-up results

GAINS = {
    "GRPO on data": 0.10, "LSP-Zero": 0.06, "LSP": 0.10, "GRPO, then LSP": 0.14,
    "LSP, then GRPO": 0.14, "LSP paid r-zero": 0.15, "LSP-Zero, eager": 0.05,
    "LSP-Zero, eager, 3 x as long": 0.02, "LSP, eager, 3 x as long": 0.12,
    "more fine-tuning": 0.04, "SPIN, one long iteration": 0.05,
}


def made_up(out, gains, zero_valid=-0.02, spin=(0.03, 0.05, 0.06, 0.065), seeds=2):
    """Made-up Results: every method gains what `gains` says on every item.

    zero_valid: how much the validity of LSP-Zero's queries changes in a step.
    spin: the gain after each iteration of SPIN.
    """
    for s in range(seeds):
        (out / f"start-s{s}.json").write_text(json.dumps(scores(0.5)))
        luck = 0.002 * (s - (seeds - 1) / 2)
        for method, (command, _) in method_commands(30).items():
            folder, is_spin = out / "runs" / f"{slug(method)}-s{s}", command.startswith("spin")
            for t, gain in enumerate(spin if method == "SPIN" else [gains.get(method, 0.1)]):
                iterate = folder / (f"iteration-{t}" if is_spin else "model")
                iterate.mkdir(parents=True)
                (iterate / "model.safetensors").touch()
                (iterate / "scores.json").write_text(json.dumps(scores(0.5 + gain + luck)))
            (folder / "iteration-9-unfinished").mkdir()  # is nobody's iterate
            slope = zero_valid * (1 + 0.05 * s) if method == "LSP-Zero, eager, 3 x as long" else 0
            write_curves(folder, is_spin, slope)
    return Results(out, method_commands(30), range(seeds))


def scores(share):
    """The scores of a model that answers every item with this share of right answers."""
    kinds = [k for k in language.KINDS for _ in range(5)]
    rates = {"sampled": torch.full((20, 8), share), "greedy": torch.full((20, 1), share)}
    items = {k: [share] * 20 for k in ("sampled", "greedy", "pass@8", "longer")}
    summary = evaluate.summary(rates, language.evaluation_set(20))
    return {"model": "x", "scores": summary, "kinds": kinds, "items": items}


def write_curves(folder, is_spin, slope):
    """A run's metrics and settings, with 30 steps; `slope` is that of the well-formed queries."""
    if is_spin:
        rows = [{"step": i + 1, "loss": 0.5, "tokens": 10, "seconds": 0.1} for i in range(30)]
        settings = {"game": "spin", "iterations": 4, "pairs": 300}
    else:
        rows = [{"step": i + 1, "valid": 0.9 + slope * i, "spread": 0.4, "distinct": 0.9,
                 "similarity": 0.1, "tokens": 100, "seconds": 0.5} for i in range(30)]
        settings = {"game": "lsp", "steps": 30, "queries": 32, "answers": 8}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "settings.json").write_text(json.dumps(settings))


def said(results):
    """{number of the claim: (verdict, figures)}."""
    return {claim.split(".")[0]: (verdict, figures)
            for claim, verdict, figures in claims.claims(results)}


def test_claims_that_hold(tmp_path):
    found = said(made_up(tmp_path, GAINS))
    assert {k: v for k, (v, _) in found.items()} == {
        "1": "yes", "2": "yes", "3": "yes", "4a": "yes", "4b": "yes", "5": "yes",
        "6a": "yes", "6b": "yes", "7": "yes", "8": "", "9": "yes", "10": "yes"}
    assert "LSP +10.0" in found["1"][1] and "-0.5" in found["3"][1]
    assert "r-zero 0.90" in found["8"][1] and "r-zero 0.10" in found["8"][1]
    assert "minimax 0.90" in found["8"][1]
    assert "+3.0" in found["6a"][1] and "+2.5" in found["6b"][1]


def test_claims_that_fail(tmp_path):
    """Everything falls: no claim may hold."""
    falling = {m: -g for m, g in GAINS.items()}
    falling |= {"GRPO on data": 0.1, "more fine-tuning": 0.2, "SPIN, one long iteration": 0.2}
    found = said(made_up(tmp_path, falling, 0.0, (-0.01, -0.02, -0.02, -0.01)))
    assert {v for k, (v, _) in found.items() if k not in ("3", "4a", "8")} == {"no"}
    assert found["3"][0] == "no" and found["4a"][0] in ("no", "not decided")


def test_a_game_that_only_gets_better_has_not_degenerated(tmp_path):
    """Its queries stay well formed, and it ends above LSP: that shows neither claim 3 nor 4."""
    found = said(made_up(tmp_path, GAINS | {"LSP-Zero, eager, 3 x as long": 0.25}, 0.0))
    assert found["3"][0] != "yes" and found["4a"][0] != "yes" and found["4b"][0] == "no"


def test_one_seed_decides_nothing_about_curves(tmp_path):
    found = said(made_up(tmp_path, GAINS, seeds=1))
    assert found["3"][0] == found["4a"][0] == "not decided" and found["1"][0] == "yes"


def test_table_and_picture(tmp_path):
    results = made_up(tmp_path, GAINS)
    table = claims.table(results).splitlines()
    # Head, line and start; then a row a method, and SPIN's four iterations.
    assert len(table) == 2 + 1 + len(method_commands(30)) - 1 + 4
    assert len({line.count("|") for line in table}) == 1
    lsp, later = (next(line for line in table if line.startswith(f"| {name} |"))
                  for name in ("LSP", "GRPO, then LSP"))
    assert "60.0 [" in lsp and "+10.0 [" in lsp
    assert "55.0 [" in lsp  # the win rate is 1/2 + gain/2
    assert "| 7,680 | 3,000 | 0.2 |" in lsp
    assert "| 15,360 | 6,000 | 0.5 |" in later  # with the run that it started from
    claims.picture(results, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10000


def test_report_in_words_and_as_a_picture(tmp_path, capsys):
    """claims.md holds the table and every claim; a question has no verdict."""
    claims.write_up(made_up(tmp_path, GAINS), tmp_path)
    text = (tmp_path / "claims.md").read_text()
    assert text in capsys.readouterr().out and (tmp_path / "claims.png").is_file()
    assert text.startswith("| method |") and text.count("\n- **") == len(claims.CLAIMS) == 12
    assert "- **1. Self-play without data improves the start: yes.** LSP +10.0 [" in text
    assert "in the last tenth)** distinct: minimax 0.90" in text


# --------------------------------------------------------------------------------------------------
# The folder of all runs

def test_quick_changes_the_defaults_alone():
    args = claims.parse_args(["--quick", "--steps", "7"])
    assert (args.seeds, args.steps, args.out) == (1, 7, "claims-quick")
    args = claims.parse_args([])
    assert (args.seeds, args.steps, args.out) == (3, 300, "claims")


def test_folder_of_other_settings_is_refused(tmp_path):
    out = claims.open_folder(tmp_path / "x", method_commands(30))
    assert claims.open_folder(out, method_commands(30)) == out
    with pytest.raises(console.UserError, match="other settings"):
        claims.open_folder(out, method_commands(31))
    (tmp_path / "file").touch()
    with pytest.raises(console.UserError, match="file: cannot be made a folder"):
        claims.open_folder(tmp_path / "file", method_commands(30))


def test_finished_runs_are_kept_and_cut_ones_put_aside(tmp_path, monkeypatch):
    """What is finished is not played again. What was cut off is renamed, never overwritten.

    That holds even if the run was saved with a picture.
    """
    calls, commands = [], method_commands(30)

    class Fake:
        """A process that writes what a whole run, or evaluate.py score, would write."""
        returncode = 0

        def __init__(self, words, cwd, **rest):
            calls.append(words[1])
            if "selfplay" in words[1]:
                write_run(cwd / "runs" / "lsp-s0", "{}\n" * 30)
            else:
                assert words[2] == "score"
                open(words[words.index("--json") + 1], "w").close()

        def communicate(self):
            return "", ""

    monkeypatch.setattr(subprocess, "Popen", Fake)
    write_run(tmp_path / "runs" / "lsp-s0", "half\n")
    children = set()
    assert run_method(tmp_path, "LSP", 0, "tiny", commands, children) is None
    assert len(calls) == 2 and not children
    cut = tmp_path / "runs" / "lsp-s0-cut-1"
    assert (cut / "metrics.jsonl").read_text() == "half\n"
    assert run_method(tmp_path, "LSP", 0, "tiny", commands, children) is None
    assert len(calls) == 2


def write_run(folder, metrics):
    """The files of a run of 30 steps, with a picture, as it leaves them."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").touch()
    (folder / "metrics.jsonl").write_text(metrics)
    (folder / "settings.json").write_text('{"steps": 30}')
    (folder / "curves.png").write_text("")
