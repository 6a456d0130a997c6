"""The comparison: its intervals by hand, its command lines, its resuming, and its verdicts on results that were made up."""
import json
import math

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
            assert (args.queries, args.answers) == (32, 8) and args.steps in (30, 90)
    assert {selfplay.parse_args(c.split()[1:]).pay for c, _ in commands.values() if c.startswith("selfplay")} == set(selfplay.PAY)
    assert len({slug(m) for m in commands}) == len(commands)


GAINS = {"GRPO on data": 0.10, "LSP-Zero": 0.06, "LSP": 0.10, "GRPO, then LSP": 0.14, "LSP, then GRPO": 0.14, "LSP paid r-zero": 0.15,
         "LSP-Zero, eager, 3 x as long": 0.02, "LSP, eager, 3 x as long": 0.12, "more fine-tuning": 0.04, "SPIN, one long iteration": 0.05}


@pytest.fixture
def results(tmp_path):
    """Two seeds of results that were made up: every method gains what GAINS says on every item; LSP-Zero's queries fall apart."""
    kinds = [k for k in language.KINDS for _ in range(5)]
    queries = evaluate.language.evaluation_set(20)

    def scores(share):
        rates = {"sampled": torch.full((20, 8), share), "greedy": torch.full((20, 1), share)}
        return {"model": "x", "scores": evaluate.summary(rates, queries), "kinds": kinds, "items": {k: [share] * 20 for k in ("sampled", "greedy", "pass@8", "longer")}}

    for s in range(2):
        (tmp_path / f"start-s{s}.json").write_text(json.dumps(scores(0.5)))
        for method, (command, _) in method_commands(30).items():
            folder = tmp_path / "runs" / f"{slug(method)}-s{s}"
            shares = [0.53, 0.55, 0.56, 0.565] if method == "SPIN" else [0.5 + GAINS.get(method, 0.1)]
            for t, share in enumerate(shares):
                iterate = folder / (f"iteration-{t}" if command.startswith("spin") else "model")
                iterate.mkdir(parents=True)
                (iterate / "scores.json").write_text(json.dumps(scores(share + 0.002 * (s - 0.5))))
            worse = lambda i: 0.9 - 0.02 * i - 0.001 * s * i if "LSP-Zero, eager" in method else 0.9
            rows = [{"step": i + 1, "valid": worse(i), "spread": 0.4, "distinct": 0.9, "tokens": 100, "seconds": 0.5} for i in range(30)]
            if command.startswith("spin"):
                rows = [{"step": r["step"], "loss": 0.5, "tokens": 10, "seconds": 0.1} for r in rows]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
            game = {"query": "q", "answers": ["a"] * 8} if command.startswith("selfplay") else {"prompt": "q", "answer": "a", "rival": "b"}
            (folder / "games.jsonl").write_text(json.dumps({"step": 1, "games": [game] * 32}) + "\n")
    return Results(tmp_path, method_commands(30), range(2))


def test_claims_on_results_that_were_made_up(results):
    said = {claim.split(".")[0]: (verdict, figures) for claim, verdict, figures in claims(results)}
    assert {k: v for k, (v, _) in said.items()} == {"1": "yes", "2": "yes", "3": "yes", "4": "yes", "5": "yes", "6a": "yes", "6b": "yes", "7": "yes", "8": "", "9": "yes", "10": "yes"}
    assert "LSP +10.0" in said["1"][1] and "-0.5" in said["3"][1] and "LSP paid r-zero 0.90" in said["8"][1]
    assert "+3.0" in said["6a"][1] and "+2.5" in said["6b"][1] + said["6a"][1]


def test_table_and_picture(results, tmp_path):
    table = reproduce_table(results).splitlines()
    assert len(table) == 2 + 1 + len(method_commands(30)) - 1 + 4 and len({line.count("|") for line in table}) == 1
    lsp = next(line for line in table if line.startswith("| LSP |"))
    assert "60.0 [" in lsp and "+10.0 [" in lsp and "55.0 [" in lsp and "| 256 | 3,000 | 0.2 |" in lsp  # win rate 1/2 + gain/2
    reproduce_picture(results, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10000


def test_finished_runs_are_kept_and_cut_ones_put_aside(tmp_path, monkeypatch):
    """Resuming: what is finished is not played again; what was cut off is renamed, never overwritten."""
    import subprocess
    calls = []

    def fake(words, cwd, **rest):
        calls.append(words[1:3])
        if "selfplay" in str(words[1]):
            (cwd / "runs" / "lsp-s0" / "model").mkdir(parents=True)
            (cwd / "runs" / "lsp-s0" / "curves.png").write_text("")
        else:
            open(words[words.index("--json") + 1], "w").close()
        return subprocess.CompletedProcess(words, 0, "", "")
    monkeypatch.setattr(subprocess, "run", fake)
    (tmp_path / "runs" / "lsp-s0").mkdir(parents=True)
    (tmp_path / "runs" / "lsp-s0" / "metrics.jsonl").write_text("half")
    assert run_method(tmp_path, "LSP", 0, "tiny", method_commands(30)) is None and len(calls) == 2
    assert (tmp_path / "runs" / "lsp-s0-cut-1" / "metrics.jsonl").read_text() == "half"
    assert run_method(tmp_path, "LSP", 0, "tiny", method_commands(30)) is None and len(calls) == 2
