"""The comparison: its intervals by hand, its command lines, its resuming, and its verdicts on results that were made up."""
import json
import math
import subprocess

import pytest
import torch

import evaluate
import selfplay
import spin
from evaluate import Results, claims, method_commands, reproduce_picture, reproduce_table, run_method, seeds_and_items, slug, verdict
from tiny import language


def test_interval_over_seeds_and_items_by_hand():
    """Three seeds with means 1, 2, 3: Student's t 4.303 x 1/sqrt(3); two items with means 1 and 3: 1.96 x sqrt(2)/sqrt(2)."""
    x = torch.tensor([[0.0, 2.0], [1.0, 3.0], [2.0, 4.0]])
    mean, low, high = seeds_and_items(x)
    half = math.hypot(4.303 / math.sqrt(3), 1.959964)
    assert (mean, low, high) == (pytest.approx(2), pytest.approx(2 - half, abs=1e-4), pytest.approx(2 + half, abs=1e-4))
    assert seeds_and_items(x[:1])[2] == pytest.approx(1 + 1.959964, abs=1e-4)  # one seed: items alone
    assert verdict(seeds_and_items(torch.tensor([[0.5]]))) == "not decided"  # a single number decides nothing


def test_verdict():
    assert [verdict(v) for v in ([1, 0.1, 2], [-1, -2, -0.1], [0, -1, 1])] == ["yes", "no", "not decided"]
    assert verdict([-0.5, -0.9, 0.1], worse_by=1.0) == "yes"


def test_every_command_line_is_one_the_games_take():
    """Only known flags, and as many games a step for every method."""
    commands = method_commands(30)
    for command, after in commands.values():
        script, *words = command.split()
        args = {"selfplay.py": selfplay, "spin.py": spin}[script].parse_args(words)
        assert after is None or after in commands
        if script == "selfplay.py":
            assert (args.queries, args.answers) == (32, 16) and args.steps in (30, 90)
    assert {selfplay.parse_args(c.split()[1:]).pay for c, _ in commands.values() if c.startswith("selfplay")} <= set(selfplay.PAY)
    assert len({slug(m) for m in commands}) == len(commands)


GAINS = {"GRPO on data": 0.10, "LSP-Zero": 0.06, "LSP": 0.10, "GRPO, then LSP": 0.14, "LSP, then GRPO": 0.14, "LSP paid r-zero": 0.15, "LSP-Zero, eager": 0.05,
         "LSP-Zero, eager, 3 x as long": 0.02, "LSP, eager, 3 x as long": 0.12, "more fine-tuning": 0.04, "SPIN, one long iteration": 0.05}


def made_up(out, gains, zero_valid=-0.02, spin=(0.03, 0.05, 0.06, 0.065), seeds=2):
    """Results that were made up: every method gains what `gains` says on every item; LSP-Zero's queries lose validity by the step."""
    kinds = [k for k in language.KINDS for _ in range(5)]
    queries = language.evaluation_set(20)

    def scores(share):
        rates = {"sampled": torch.full((20, 8), share), "greedy": torch.full((20, 1), share)}
        return {"model": "x", "scores": evaluate.summary(rates, queries), "kinds": kinds, "items": {k: [share] * 20 for k in ("sampled", "greedy", "pass@8", "longer")}}

    for s in range(seeds):
        (out / f"start-s{s}.json").write_text(json.dumps(scores(0.5)))
        for method, (command, _) in method_commands(30).items():
            folder, is_spin = out / "runs" / f"{slug(method)}-s{s}", command.startswith("spin")
            for t, gain in enumerate(spin if method == "SPIN" else [gains.get(method, 0.1)]):
                iterate = folder / (f"iteration-{t}" if is_spin else "model")
                iterate.mkdir(parents=True)
                (iterate / "model.safetensors").touch()
                (iterate / "scores.json").write_text(json.dumps(scores(0.5 + gain + 0.002 * (s - (seeds - 1) / 2))))
            (folder / "iteration-9-unfinished").mkdir()  # is nobody's iterate
            valid = [0.9 + (zero_valid * (1 + 0.05 * s) * i if method == "LSP-Zero, eager, 3 x as long" else 0) for i in range(30)]
            rows = [{"step": i + 1, "valid": v, "spread": 0.4, "distinct": 0.9, "similarity": 0.1, "tokens": 100, "seconds": 0.5} for i, v in enumerate(valid)]
            if is_spin:
                rows = [{"step": r["step"], "loss": 0.5, "tokens": 10, "seconds": 0.1} for r in rows]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
            settings = {"game": "spin", "iterations": 4, "pairs": 300} if is_spin else {"game": "lsp", "steps": 30, "queries": 32, "answers": 8}
            (folder / "settings.json").write_text(json.dumps(settings))
    return Results(out, method_commands(30), range(seeds))


def said(results):
    return {claim.split(".")[0]: (verdict, figures) for claim, verdict, figures in claims(results)}


def test_claims_that_hold(tmp_path):
    found = said(made_up(tmp_path, GAINS))
    assert {k: v for k, (v, _) in found.items()} == {"1": "yes", "2": "yes", "3": "yes", "4a": "yes", "4b": "yes", "5": "yes", "6a": "yes", "6b": "yes", "7": "yes", "8": "", "9": "yes", "10": "yes"}
    assert "LSP +10.0" in found["1"][1] and "-0.5" in found["3"][1] and "r-zero 0.90" in found["8"][1] and "r-zero 0.10" in found["8"][1]
    assert "+3.0" in found["6a"][1] and "+2.5" in found["6b"][1]


def test_claims_that_fail(tmp_path):
    """Everything falls: no claim may hold."""
    found = said(made_up(tmp_path, {m: -g for m, g in GAINS.items()} | {"GRPO on data": 0.1, "more fine-tuning": 0.2, "SPIN, one long iteration": 0.2}, 0.0, (-0.01, -0.02, -0.02, -0.01)))
    assert {v for k, (v, _) in found.items() if k not in ("3", "4a", "8")} == {"no"}
    assert found["3"][0] == "no" and found["4a"][0] in ("no", "not decided")


def test_a_game_that_only_gets_better_has_not_degenerated(tmp_path):
    """Its queries stay well formed, and it ends above LSP: claims 3 and 4 must not be counted as shown."""
    found = said(made_up(tmp_path, GAINS | {"LSP-Zero, eager, 3 x as long": 0.25}, 0.0))
    assert found["3"][0] != "yes" and found["4a"][0] != "yes" and found["4b"][0] == "no"


def test_one_seed_decides_nothing_about_curves(tmp_path):
    found = said(made_up(tmp_path, GAINS, seeds=1))
    assert found["3"][0] == found["4a"][0] == "not decided" and found["1"][0] == "yes"


def test_table_and_picture(tmp_path):
    results = made_up(tmp_path, GAINS)
    table = reproduce_table(results).splitlines()
    assert len(table) == 2 + 1 + len(method_commands(30)) - 1 + 4 and len({line.count("|") for line in table}) == 1
    lsp, later = (next(line for line in table if line.startswith(f"| {name} |")) for name in ("LSP", "GRPO, then LSP"))
    assert "60.0 [" in lsp and "+10.0 [" in lsp and "55.0 [" in lsp and "| 7,680 | 3,000 | 0.2 |" in lsp  # win rate 1/2 + gain/2
    assert "| 15,360 | 6,000 | 0.5 |" in later  # with the run that it started from
    reproduce_picture(results, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10000


def test_finished_runs_are_kept_and_cut_ones_put_aside(tmp_path, monkeypatch):
    """What is finished is not played again; what was cut off, even if it was saved with a picture, is renamed, never overwritten."""
    calls, steps = [], method_commands(30)

    class Fake:
        returncode = 0

        def __init__(self, words, cwd, **rest):
            calls.append(words[1])
            if "selfplay" in words[1]:
                folder = cwd / "runs" / "lsp-s0"
                (folder / "model").mkdir(parents=True)
                (folder / "model" / "model.safetensors").touch()
                (folder / "curves.png").write_text("")
                (folder / "settings.json").write_text('{"steps": 30}')
                (folder / "metrics.jsonl").write_text("{}\n" * 30)
            else:
                open(words[words.index("--json") + 1], "w").close()

        def communicate(self):
            return "", ""
    monkeypatch.setattr(subprocess, "Popen", Fake)
    cut = tmp_path / "runs" / "lsp-s0"
    (cut / "model").mkdir(parents=True)
    (cut / "metrics.jsonl").write_text("half\n")
    (cut / "settings.json").write_text('{"steps": 30}')
    (cut / "curves.png").write_text("")
    children = set()
    assert run_method(tmp_path, "LSP", 0, "tiny", steps, children) is None and len(calls) == 2 and not children
    assert (tmp_path / "runs" / "lsp-s0-cut-1" / "metrics.jsonl").read_text() == "half\n"
    assert run_method(tmp_path, "LSP", 0, "tiny", steps, children) is None and len(calls) == 2
