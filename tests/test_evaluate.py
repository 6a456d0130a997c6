"""The scoreboard: intervals, win rate, and the real command line."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, command

import evaluate
import selfplay
import spin
from evaluate import answer, bootstrap, duel, duel_table, new_run, read_data, summary, wilson, win_rate
from model import UserError
from rewards import PairJudge
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
    assert report["all"]["n"] == 2 and report["1 operation"]["greedy"][0] == 0 and "3 operations" not in report


def test_both_forms_of_data(tmp_path):
    path = tmp_path / "data.jsonl"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "later"}]
    path.write_text(json.dumps({"prompt": "p", "answer": "b"}) + "\n\n" + json.dumps({"messages": chat}) + "\n" + json.dumps({"question": "p", "answer": "c"}))
    assert read_data(path) == [([{"role": "user", "content": "p"}], "b"), (chat[:2], "a"), ([{"role": "user", "content": "p"}], "c")]


def test_a_line_may_hold_any_letter(tmp_path):
    """U+2028 ends a line for some, never in JSONL."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a\u2028b", "answer": "c\u0085"}, ensure_ascii=False) + "\n" for _ in range(2)), encoding="utf-8")
    assert read_data(path) == 2 * [([{"role": "user", "content": "a\u2028b"}], "c\u0085")]


GOOD = '{"prompt": "p", "answer": "a"}'


@pytest.mark.parametrize("second, says", [
    ("not json", "line 2: not JSON"), ("[1]", "line 2: expected an object"), ('{"prompt": "p"}', 'line 2: expected an object with "prompt" and "answer"'),
    ('{"prompt": "p", "answer": ""}', "line 2: an empty"), ('{"prompt": "p", "answer": 3}', "line 2: every message needs a text"),
    ('{"messages": []}', "line 2: the first turn"), ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 2: the first turn"),
    ('{"messages": 5}', "line 2: every message"), ("[" * 100000, "line 2: not JSON"), ("", "1 line of data")])
def test_bad_data_is_one_line_with_its_number(tmp_path, second, says):
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD + "\n" + second + "\n")
    with pytest.raises(UserError, match=says) as error:
        read_data(path)
    assert "\n" not in str(error.value)


def test_bootstrap_agrees_with_the_normal_interval():
    values = (torch.arange(400) % 4 == 0).float()
    low, high = bootstrap(values)
    half = 1.96 * values.std().item() / 20
    assert low == pytest.approx(0.25 - half, abs=0.01) and high == pytest.approx(0.25 + half, abs=0.01)


def test_duel_by_reward_and_both_conventions_for_ties():
    rows = [{"instruction": str(i), "dataset": s} for i, s in enumerate("aabb")]
    longer = lambda queries, answers: [[len(x) for x in group] for group in answers]
    wins = duel(["xx", "x", "x", ""], ["x", "x", "x", "x"], rows, longer)
    assert wins.tolist() == [1, 0.5, 0.5, 0]
    table = duel_table(wins, [r["dataset"] for r in rows])
    a, b, overall = [line.split() for line in table.splitlines()[1:4]]
    assert a[2] == "75.0" and b[2] == "25.0" and overall[2] == "50.0" and overall[5] == "25.0" and overall[-1] == "50.0%"


def test_pair_judge_is_asked_in_both_orders(tiny, monkeypatch):
    """A judge that always says A is no judge: every duel a tie. One that prefers the longer answer is believed, wherever it stands."""
    import rewards
    model, tokenizer = tiny
    judge = PairJudge(model, tokenizer)
    a, b = model.head[judge.letters].detach()

    def says(prefers):  # prefers(text of the first answer, of the second) -> is it the first?
        def states(m, rows):
            texts = [tokenizer.decode(ids) for group in rows for ids in group]
            pairs = [(t.split("Answer A:\n")[1].split("\n\nAnswer B:")[0], t.split("Answer B:\n")[1].split("\n\nReply")[0]) for t in texts]
            return torch.stack([(a - b) if prefers(*pair) else (b - a) for pair in pairs])
        monkeypatch.setattr(rewards, "last_states", states)
        return judge(["q", "q", "r"], ["long", "x", "y"], ["z", "longer", "w"]).tolist()
    assert says(lambda first, second: True) == [0.5, 0.5, 0.5]
    assert says(lambda first, second: len(first) > len(second))[:2] == [1.0, 0.0]


def test_open_instructions_from_the_command_line(tmp_path, tiny):
    """Greedy answers of both, a table by set, and a file that the official alpaca_eval reads; an existing file is not touched."""
    (tmp_path / "set.json").write_text(json.dumps([{"instruction": "Add 1 and 2.", "dataset": "sums"}, {"instruction": 'Take "abc", repeat it.', "dataset": "words"}]))
    (tmp_path / "mine.py").write_text("def long(queries, answers):\n    return [[len(a) for a in group] for group in answers]\n")
    start = str(ROOT / "tiny")
    run = lambda *flags: command(evaluate, tmp_path, start, *flags)
    flags = ["--against", start, "--instructions", "set.json", "--reward", "mine.py:long", "--answer-tokens", "20"]
    done = run(*flags)
    assert done.returncode == 0 and "sums (n=1)" in done.stdout and "overall (n=2)" in done.stdout and "100.0%" in done.stdout, done.stderr
    rows = json.loads((tmp_path / "model_outputs.json").read_text())
    assert [set(r) for r in rows] == [{"instruction", "dataset", "output", "generator"}] * 2
    assert [r["output"] for r in rows] == [a for a, in answer(*tiny, [r["instruction"] for r in rows], temperature=0)]
    (tmp_path / "empty.json").write_text("[]")
    for more, says in (([], "exists already"), (["--outputs", "b.json", "--judge", start], "either --reward or --judge"), (["--outputs", "b.json", "--reward", "math"], "knows no answers"),
                       (["--outputs", "b.json", "--instructions", "empty.json"], "expected a list"), (["--outputs", "b.json", "--instructions", "no.json"], "not readable")):
        done = run(*flags, *more)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_runs_are_numbered_and_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(new_run(None, "lsp", {})) for _ in range(2)] == ["runs/lsp-1", "runs/lsp-2"]
    (tmp_path / "runs" / "link").symlink_to("nowhere")
    for taken in ("lsp-1", "link"):
        with pytest.raises(UserError, match="exists already"):
            new_run(taken, "lsp", {})


@pytest.mark.parametrize("module", [selfplay, spin])
def test_a_taken_name_is_refused_before_anything_is_loaded(module, tmp_path, monkeypatch):
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    monkeypatch.setattr(module, "set_up", lambda *_: pytest.fail("loads first"))
    done = command(module, tmp_path, "--model", str(ROOT / "tiny"), "--run", "taken")
    assert done.returncode == 2 and "exists already" in done.stderr


def test_the_start_has_room_to_grow(tiny):
    """The embedded default answers between 45 % and 65 % of held-out instructions at temperature 1."""
    from evaluate import rate
    model, tokenizer = tiny
    assert 0.45 < rate(model, tokenizer, language.evaluation_set(500))["sampled"].mean() < 0.65


def test_command_line(tmp_path):
    start = str(ROOT / "tiny")
    done = subprocess.run([sys.executable, str(ROOT / "evaluate.py"), start, "--against", start, "--items", "30"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "win rate" in done.stdout and "greedy" in done.stdout, done.stderr
    assert "50.0 % [50.0, 50.0]" not in done.stdout  # even the same model meets itself with other luck
    for flags in (["nowhere"], [start, "--items", "0"], ["--wrong"], [start, "--picture", "x.png"], [start, "--seed", "-1"]):
        done = command(evaluate, tmp_path, *flags)
        assert done.returncode == 2 and len(done.stderr.strip()) > 0


def test_figures_of_every_instruction(tmp_path):
    """--json: what `reproduce` reads; the means of its items are the table's."""
    done = command(evaluate, tmp_path, str(ROOT / "tiny"), "--items", "30", "--held-out", "1", "--json", "x.json")
    figures = json.loads((tmp_path / "x.json").read_text())
    assert done.returncode == 0 and len(figures["kinds"]) == len(figures["items"]["sampled"]) == 30 and len(figures["items"]["longer"]) == 300
    assert sum(figures["items"]["sampled"]) / 30 == pytest.approx(figures["scores"]["all"]["sampled"][0], abs=1e-6)
