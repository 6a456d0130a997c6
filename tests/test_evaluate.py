"""The scoreboard: intervals, win rate, and the real command line."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, command, copy_tokenizer

import evaluate
from evaluate import (
    PairJudge,
    answer,
    duel,
    duel_table,
    normal,
    summary,
    wilson,
    win_rate,
)
from tiny import language


def test_wilson_against_a_published_example():
    """Wilson 1927 for 81 of 263: 0.2553 to 0.3662 (Newcombe 1998, table I)."""
    low, high = wilson(81 / 263, 263)
    assert (low, high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    assert wilson(0.0, 10)[0] == 0
    assert wilson(1.0, 10)[1] == pytest.approx(1)


def test_win_rate_counts_ties_as_half():
    ours = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    theirs = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    win, low, high = win_rate(ours, theirs)
    assert win == pytest.approx((0.75 + 1.0 + 0.25) / 3)
    assert low < win < high
    assert win_rate(ours, ours)[0] == pytest.approx(0.5)


def test_summary_by_kind():
    queries = ["Add 2 and 3.", 'Take "kobani", reverse it.']
    rates = {"sampled": torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
             "greedy": torch.tensor([[1.0], [0.0]])}
    report = summary(rates, queries)
    assert report["numbers"]["sampled"][0] == 0.5
    assert report["numbers"]["pass@8"][0] == 1
    assert report["all"]["sampled"][0] == 0.25
    assert report["all"]["n"] == 2
    assert report["1 operation"]["greedy"][0] == 0
    assert "3 operations" not in report


def test_normal_interval_by_hand():
    """The interval is that of the values and of one more at each end: here of 1, 0, 0, 1.

    Their mean is 1/2 and their variance is 1/3.
    """
    half = 1.959964 * (1 / 3 / 4) ** 0.5
    assert normal(torch.tensor([1.0, 0.0])) == pytest.approx([0.5, max(0, 0.5 - half), 1])
    # -1, 0, 1 and again -1, 1: the mean is 0 and the variance is 1.
    half = 1.959964 / 5**0.5
    assert normal(torch.tensor([-1.0, 0, 1]), -1.0) == pytest.approx([0, -half, half])


@pytest.mark.parametrize("values, low, high", [
    ([1.0] * 10, 0.6, 0.8), ([0.0] * 10, 0.0, 0.0), ([0.5] * 40, 0.35, 0.5), ([1.0], 0.0, 0.5)])
def test_an_interval_is_never_a_point(values, low, high):
    """Ten wins of ten, or forty ties, do not prove that it will always be so."""
    mean, lower, upper = normal(torch.tensor(values))
    assert mean == values[0] and 0 <= lower <= mean <= upper <= 1
    assert low <= lower <= high and upper - lower > 0.05


def test_gains_are_paired_by_instruction():
    """Two models differ on one instruction of four: the gain is 1/4, and its interval is narrower
    than what two separate intervals would allow.
    """
    theirs = {"sampled": torch.tensor([[1.0, 0], [0, 0], [1, 1], [0, 1]] * 25),
              "greedy": torch.tensor([[1.0], [0], [1], [0]] * 25)}
    ours = {"sampled": torch.tensor([[1.0, 0], [1, 1], [1, 1], [0, 1]] * 25),
            "greedy": torch.tensor([[1.0], [0], [1], [1]] * 25)}
    gain = evaluate.gains(ours, theirs)
    assert {name: found[0] for name, found in gain.items()} == {
        "greedy": 0.25, "sampled": 0.25, "pass@8": 0.25}
    difference = torch.tensor([0.0, 0, 0, 1] * 25 + [-1, 1])
    middle, half = difference.mean(), 1.959964 * difference.std() / 102**0.5
    assert gain["greedy"][1:] == pytest.approx([(middle - half).item(), (middle + half).item()])
    apart = wilson(0.75, 100)[0] - wilson(0.5, 100)[1]
    assert gain["greedy"][1] > apart + 0.09
    assert "sampled +25.0 [+" in evaluate.gain_line(gain)


def test_duel_by_reward_and_both_conventions_for_ties():

    def longer(queries, answers):
        return [[len(x) for x in group] for group in answers]
    wins = duel(["xx", "x", "x", ""], ["x", "x", "x", "x"], list("abcd"), longer)
    assert wins.tolist() == [1, 0.5, 0.5, 0]
    table = duel_table(wins, list("aabb"))
    a, b, overall = [line.split() for line in table.splitlines()[1:4]]
    assert a[2] == "75.0" and b[2] == "25.0" and overall[2] == "50.0"
    assert overall[5] == "25.0" and overall[-1] == "50.0%"


def test_pair_judge_is_asked_in_both_orders(tiny, monkeypatch):
    """A judge that always says A decides nothing: every duel is a tie.

    A judge that prefers the longer answer is believed, wherever that answer stands.
    """
    model, tokenizer = tiny
    judge = PairJudge(model, tokenizer)
    a, b = model.head[judge.letters].detach()

    def parts(text):
        """The two answers in the judge's prompt."""
        first = text.split("Answer A:\n")[1].split("\n\nAnswer B:")[0]
        second = text.split("Answer B:\n")[1].split("\n\nReply")[0]
        return first, second

    def says(prefers):  # prefers(first, second): is the first answer the better one?
        def states(m, texts):
            asked = map(tokenizer.decode, texts)
            return torch.stack([a - b if prefers(*parts(text)) else b - a for text in asked])
        monkeypatch.setattr(evaluate, "last_states", states)
        return judge(["q", "q", "r"], ["long", "x", "y"], ["z", "longer", "w"]).tolist()
    assert says(lambda first, second: True) == [0.5, 0.5, 0.5]
    assert says(lambda first, second: len(first) > len(second))[:2] == [1.0, 0.0]


def test_open_instructions_from_the_command_line(tmp_path, tiny):
    """Both models answer greedily, and there is a table by set.

    The official alpaca_eval can read the file of answers. A file that exists is not overwritten.
    """
    (tmp_path / "set.json").write_text(json.dumps([
        {"instruction": "Add 1 and 2.", "dataset": "sums"},
        {"instruction": 'Take "abc", repeat it.', "dataset": "words"},
    ]))
    (tmp_path / "mine.py").write_text(
        "def long(queries, answers):\n"
        "    return [[len(a) for a in group] for group in answers]\n")
    start = str(ROOT / "tiny")

    def run(*flags):
        return command(evaluate, tmp_path, "duel", start, *flags)
    flags = ["--against", start, "--instructions", "set.json", "--reward", "mine.py:long",
             "--answer-tokens", "20"]
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    for text in ("sums (n=1)", "overall (n=2)", "100.0%"):
        assert text in done.stdout, done.stderr
    rows = json.loads((tmp_path / "model_outputs.json").read_text())
    assert [set(r) for r in rows] == [{"instruction", "dataset", "output", "generator"}] * 2
    answers = answer(*tiny, [r["instruction"] for r in rows], temperature=0)
    assert [r["output"] for r in rows] == [text for text, in answers]
    (tmp_path / "empty.json").write_text("[]")
    other = ["--outputs", "b.json"]
    for more, says in (
        ([], "exists already"),
        ([*other, "--judge", start], "either --reward or --judge"),
        ([*other, "--reward", "math"], "knows no answers"),
        ([*other, "--instructions", "empty.json"], "expected a list"),
        ([*other, "--instructions", "no.json"], "not readable"),
    ):
        done = run(*flags, *more)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_a_pair_that_is_too_long_is_cut_in_both_answers(tiny):
    """The judge still sees the query, a piece of each answer, and what it is asked for."""
    judge = PairJudge(*tiny)
    a, b = judge.fitting("Add 1 and 2.", 450 * "a", 300 * "b")
    ids = judge.ids("Add 1 and 2.", a, b)
    text = tiny[1].decode(ids)
    judge(["Add 1 and 2."] * 3, ["3", 450 * "a", "3"], ["4", "4", 300 * "b"])
    assert judge.cut == 1  # only one of the three pairs was too long
    assert judge.fitting("q", "3", "4") == ("3", "4")
    assert len(ids) <= 512
    assert "Add 1 and 2." in text and text.endswith("Reply with one letter, A or B.")
    assert 50 * "a" in text and 50 * "b" in text


def test_what_rewards_are_not_right_or_wrong_are_called_by_their_name():
    """Their mean is no share, and their gain is padded by their own range, not by 1."""
    rates = {"sampled": torch.full((4, 8), 0.02), "greedy": torch.full((4, 1), 0.03)}
    more = {way: rewards + 0.001 for way, rewards in rates.items()}
    rows = summary(rates, list("abcd"))["all"]
    assert rows["greedy"] == pytest.approx([0.03, 0.0268, 0.0312], abs=2e-3)
    text = evaluate.table({"now": {"all": rows}}, right=False)
    assert text.startswith("mean reward ") and "0.03 [" in text and "the best of the 8" in text
    gain = evaluate.gains(more, rates)["greedy"]
    assert gain[0] == pytest.approx(0.001) and -0.02 < gain[1] < gain[2] < 0.02
    assert "points" not in evaluate.gain_line(evaluate.gains(more, rates), right=False)


def test_a_duel_gives_its_referee_the_conversations_and_takes_no_useless_one(tmp_path):
    (tmp_path / "set.json").write_text(json.dumps([{"instruction": "Add 1 and 2."}] * 2))
    (tmp_path / "mine.py").write_text(
        "def chat(queries, answers, messages):\n"
        "    assert messages == [[{'role': 'user', 'content': q}] for q in queries]\n"
        "    return [[2, 1] for _ in queries]\n")
    start = str(ROOT / "tiny")
    words = ["duel", start, "--against", start, "--instructions", "set.json", "--answer-tokens",
             "9", "--reward"]
    done = command(evaluate, tmp_path, *words, "mine.py:chat")
    assert done.returncode == 0, done.stderr
    assert duel_table(torch.ones(2), ["all", "all"]) in done.stdout  # ours won both
    for useless in ("majority", "math:0.5", "exact:2", "mine.py:chat,majority"):
        done = command(evaluate, tmp_path, *words, useless, "--outputs", "b.json")
        assert done.returncode == 2 and "knows no answers" in done.stderr


def test_a_duel_says_how_many_answers_were_cut(tmp_path):
    """Else a limit that cuts every answer looks like two equal models. An input is asked, too."""
    (tmp_path / "set.json").write_text(json.dumps([
        {"instruction": "Reverse this word.", "input": "abc", "output": "cba"},
        {"instruction": 'Take "kobani", repeat it.'}]))
    (tmp_path / "mine.py").write_text(
        "def seen(queries, answers):\n"
        "    assert queries[0] == 'Reverse this word.\\n\\nabc'\n"
        "    return [[1, 1] for _ in queries]\n")
    start = str(ROOT / "tiny")
    words = ["duel", start, "--against", start, "--instructions", "set.json", "--reward",
             "mine.py:seen"]
    done = command(evaluate, tmp_path, *words, "--answer-tokens", "1")
    assert f"answers cut at --answer-tokens 1: 100.0 % of {start}" in done.stdout, done.stderr
    assert "50.0 [50.0, 50.0]" not in done.stdout  # two ties prove little
    rows = json.loads((tmp_path / "model_outputs.json").read_text())
    assert rows[0]["input"] == "abc" and rows[0]["instruction"] == "Reverse this word."


def test_instructions_that_do_not_fit_are_found_before_any_answer(tmp_path):
    rows = [{"instruction": "Add 1 and 2."}, {"instruction": 600 * "x"}]
    (tmp_path / "set.json").write_text(json.dumps(rows))
    (tmp_path / "mine.py").write_text("def f(queries, answers):\n    return 0\n")
    start = str(ROOT / "tiny")
    done = command(evaluate, tmp_path, "duel", start, "--against", start, "--instructions",
                   "set.json", "--reward", "mine.py:f", "--answer-tokens", "100")
    assert done.returncode == 2 and not (tmp_path / "model_outputs.json").exists()
    assert "--instructions set.json, entry 2: 604 tokens and up to 100 of an answer" in done.stderr


def test_score_refuses_a_model_that_does_not_speak_the_language(tmp_path):
    """It would be right in 0 % of the questions, which says nothing about it."""
    copy_tokenizer(tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace(language.CHALLENGER_PROMPT, "Another."))
    (tmp_path / "other" / "config.json").write_text("{}")
    done = command(evaluate, tmp_path, "score", str(ROOT / "tiny"), "other")
    assert done.returncode == 2 and done.stdout == ""
    assert "other does not speak the embedded language" in done.stderr


def test_a_chat_model_judges_on_the_command_line(tmp_path):
    """Both sides are the same model and answer greedily, so the two orders always disagree."""
    (tmp_path / "set.json").write_text(json.dumps([{"instruction": "Add 1 and 2."}]))
    start = str(ROOT / "tiny")
    done = command(evaluate, tmp_path, "duel", start, "--against", start, "--judge", start,
                   "--instructions", "set.json", "--answer-tokens", "9", "--outputs", "mine.json")
    assert done.returncode == 0, done.stderr
    assert "all (n=1)" in done.stdout and "100.0%" in done.stdout
    row, = json.loads((tmp_path / "mine.json").read_text())
    assert row["generator"] == "tiny" and len(row["output"]) > 0


def test_the_start_has_room_to_grow(tiny):
    """At temperature 1 the embedded default answers 45 % to 65 % of held-out instructions."""
    queries = language.evaluation_set(500)
    answers = answer(*tiny, queries, samples=2)
    right = torch.tensor([[text == language.solve(query) for text in group]
                          for query, group in zip(queries, answers)]).float()
    assert 0.45 < right.mean() < 0.65


def test_command_line(tmp_path):
    start = str(ROOT / "tiny")
    words = ["score", start, "--against", start, "--items", "30"]
    done = subprocess.run([sys.executable, str(ROOT / "evaluate.py"), *words], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "win rate" in done.stdout and "greedy" in done.stdout, done.stderr
    # The two sides draw different samples, so even the same model does not tie with itself.
    assert "50.0 % [50.0, 50.0]" not in done.stdout


@pytest.mark.parametrize("flags, says", [
    ([], "required"),
    (["START"], "invalid choice"),
    (["score"], "required: MODEL"),
    (["score", "nowhere"], "no such model folder"),
    (["score", "START", "--items", "0"], "not above zero"),
    (["score", "START", "--wrong"], "unrecognized"),
    (["score", "START", "--picture", "x.png"], "unrecognized"),
    (["score", "START", "--seed", "-1"], "not zero or more"),
    (["score", "START", "--held-out", "4"], "invalid choice: 4"),
    (["score", "START", "--reward", "x"], "unrecognized"),
    (["score", "START", "--device", "abacus"], "no such device"),
    (["score", "START", "START", "--json", "x.json"], "of one MODEL"),
    (["score", "START", "--json", "no/x.json"], "in a folder that exists"),
    (["duel", "START"], "required: --against, --instructions"),
    (["duel", "START", "--against", "START", "--instructions", "x"], "either --reward or --judge"),
    (["report"], "required: RUN"),
])
def test_bad_input_is_one_line(tmp_path, flags, says):
    words = [str(ROOT / "tiny") if flag == "START" else flag for flag in flags]
    done = command(evaluate, tmp_path, *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert says in done.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [
    ["score", "x"],
    ["duel", "x", "--against", "y", "--instructions", "z", "--reward", "r"],
    ["report", "x"],
])
def test_help_names_every_default(tmp_path, words):
    args = vars(evaluate.parse_args(words))
    defaults = [value for key, value in args.items()
                if key not in ("run_it", "model", "run") and str(value) not in (*words, "None")]
    assert defaults
    done = command(evaluate, tmp_path, words[0], "-h")
    text = " ".join(done.stdout.split())
    assert done.returncode == 0
    assert all(f"(default: {value})" in text for value in defaults)
    assert text.count("(default: ") == len(defaults)


def test_figures_of_every_instruction(tmp_path, monkeypatch):
    """recipes/claims.py reads the file of --json. The means of its items are those of the table."""
    monkeypatch.setattr(evaluate, "LONGER", 50)  # a thousand would take some seconds
    done = command(evaluate, tmp_path, "score", str(ROOT / "tiny"), "--items", "30", "--held-out",
                   "1", "--json", "x.json")
    figures = json.loads((tmp_path / "x.json").read_text())
    sampled = figures["items"]["sampled"]
    assert done.returncode == 0
    assert len(figures["kinds"]) == len(sampled) == 30
    assert len(figures["longer"]["greedy"]) == evaluate.LONGER and figures["samples"] == 8
    assert [x > 0 for x in sampled] == [x == 1 for x in figures["items"]["pass@8"]]
    assert sum(sampled) / 30 == pytest.approx(figures["scores"]["all"]["sampled"][0], abs=1e-6)


def test_the_luck_of_a_model_does_not_depend_on_the_one_it_is_set_against(tmp_path):
    """--against adds a model and a win rate, and changes no score of MODEL."""
    start = str(ROOT / "tiny")
    alone = command(evaluate, tmp_path, "score", start, "--items", "8").stdout
    both = command(evaluate, tmp_path, "score", start, "--against", start, "--items", "8").stdout
    assert both.startswith(alone.rstrip()) and both.count("pass@8: one") == 2
