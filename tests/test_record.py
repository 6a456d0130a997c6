"""The record of a run: figures by hand, warnings, and games as a person would read them."""
import json
import re
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT

import selfplay
from selfplay import Player, Step
from support import record


def step(**changes):
    """A step of two queries with three answers each.

    Ids are any numbers here, as only their count is read.
    """
    solver = Player([[1], [2]], [[[7, 2], [8, 2], [8, 2]], [[5], [5], [2]]],
                    [True, True, True, False, False, True], -torch.arange(9.0))
    challenger = Player([[1]], [[[3, 3, 2], [4]]], [True, False], torch.tensor([-2.0] * 4))
    return Step(
        ["abcd", "abce"], [["3", "2", "2"], ["x", "x", ""]], challenger, solver,
        torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]),
        torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 0.75]]),
        torch.tensor([[-2 / 3, 1 / 3, 1 / 3], [0.0, 0.0, 0.0]]), torch.tensor([-1 / 3, 1 / 3]),
        {"solver": {"loss": 0.5, "policy": 0.25, "kl": 0.125},
         "challenger": {"loss": 5.0, "policy": 2.5, "kl": 1.25}}, 4.0)._replace(**changes)


WITHOUT_A_JUDGE = {"quality": None}
WITHOUT_A_CHALLENGER = {"quality": None, "challenger": None, "a_ch": None}


# --------------------------------------------------------------------------------------------------
# Figures

def test_overlap_by_hand():
    """It counts the three-letter pieces that two texts share."""
    assert record.overlap(["abcd", "abce"]) == pytest.approx(1 / 3)  # abc; bcd; bce
    assert record.overlap(["abcd", "abce", "x"]) == pytest.approx(1 / 9)
    assert record.overlap(["", "", ""]) == 1
    assert record.overlap(["alone"]) == 0


def test_agreement_by_hand():
    """It counts how often a right answer has a higher quality than a wrong one of its group."""
    reward = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 0]])
    quality = torch.tensor([[0.5, 0.2, 0.9], [0.4, 0.1, 0.1], [1, 2, 3]])
    assert record.agreement(reward, quality) == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert record.agreement(reward[2:], quality[2:]) is None


def test_a_step_s_figures_by_hand():
    row = record.measure(step(), [True, False])
    assert row == pytest.approx({
        "reward": 1 / 3,
        "quality": 1.75 / 6,
        "agreement": 0.0,  # the judge prefers the wrong answer to both right ones
        "valid": 0.5,
        "distinct": 1.0,
        "similarity": 1 / 3,
        "spread": 0.5,  # the rewards of the second group are equal
        "tokens": 9 + 4,
        "gradient_norm": 4.0, "clipped": 1.0,  # it was above 1
        "loss_solver": 0.5, "policy_solver": 0.25, "kl_solver": 0.125,
        "entropy_solver": 4.0,  # the mean of 0 .. 8
        "answer_tokens": 9 / 6, "answer_cut": 2 / 6,
        "loss_challenger": 5.0, "policy_challenger": 2.5, "kl_challenger": 1.25,
        "entropy_challenger": 2.0, "query_tokens": 4 / 2, "query_cut": 1 / 2,
    })
    assert json.loads(json.dumps(row)) == row
    assert record.measure(step(queries=["a", "a"]), [True, True])["distinct"] == 0.5


@pytest.mark.parametrize("fields, valid, lacks", [
    ({}, None, {"valid", "agreement"}),  # a referee that cannot tell
    (WITHOUT_A_JUDGE, [True, False], {"quality", "agreement"}),
    (WITHOUT_A_CHALLENGER, [True, False], {
        "quality", "agreement", "loss_challenger", "policy_challenger", "kl_challenger",
        "entropy_challenger", "query_tokens", "query_cut"}),
])
def test_what_a_step_lacks_is_left_out(fields, valid, lacks):
    whole = record.measure(step(), [True, False])
    row = record.measure(step(**fields), valid)
    assert row.keys() == whole.keys() - lacks
    assert row["tokens"] == (9 if "challenger" in fields else 13)


# --------------------------------------------------------------------------------------------------
# Warnings

@pytest.mark.parametrize("key", list(record.WATCH))
def test_each_trouble_is_said_once(key):
    """A warning is given once: when its figure is bad over a whole window, and never again."""
    good = {"distinct": 1.0, "valid": 0.9, "spread": 0.4, "kl_solver": 0.05, "kl_challenger": 0.01,
            "answer_cut": 0.0, "query_cut": 0.0, "malformed": 0.0, "agreement": 0.8}
    bad = good | {key: 0.0 if key in ("distinct", "valid", "spread", "agreement") else 2.0}

    def rows(row, n):
        return [{"step": i} | row for i in range(n)]
    said = {}
    assert record.watch(rows(good, record.WINDOW), said, "lsp") == []
    assert record.watch(rows(bad, record.WINDOW - 1), said, "lsp") == []
    sentence, = record.watch(rows(bad, record.WINDOW), said, "lsp")
    assert "try" in sentence and f"step {record.WINDOW - 1}:" in sentence and key in sentence
    assert said == {key: sentence}
    assert record.watch(rows(bad, record.WINDOW), said, "lsp") == []


def test_a_figure_that_some_steps_lack_is_judged_by_the_others():
    """A step in which no group has a right and a wrong answer has no agreement.

    Where half of the steps lack it, the rest says too little. The warning says how many there were.
    """
    rows = [{"step": i} for i in range(record.WINDOW)]
    for row in rows[:10]:
        row["agreement"] = 0.1
    assert record.watch(rows, {}, "lsp") == []
    rows[10]["agreement"] = 0.1
    sentence, = record.watch(rows, {}, "lsp")
    assert "is 0.10 over 11 of the last 20 steps" in sentence


@pytest.mark.parametrize("game", ["lsp", "lsp-zero", "grpo"])
def test_no_warning_advises_what_its_game_refuses(game, tmp_path):
    """Each flag that a warning names can be given to the game that gets the warning."""
    (tmp_path / "data.jsonl").touch()
    values = {"--pay": "r-zero", "--game": "lsp-zero", "--judge": "expected"}
    figures = set(record.WATCH) - {
        "lsp": set(), "lsp-zero": {"agreement", "malformed"},
        "grpo": {"agreement", "malformed", "kl_challenger", "query_cut"}}[game]
    for key in figures:
        advice = record.WATCH[key][2]
        advice = advice if isinstance(advice, str) else advice[game]
        for flag, value in re.findall(r"(--[a-z-]+)(?: (lsp(?:-zero)?|r-zero|expected))?", advice):
            words = [] if flag == "--game" else ["--game", game]
            words += [flag, value or {"--data": str(tmp_path / "data.jsonl")}.get(flag, "2")]
            assert selfplay.parse_args(["--model", str(ROOT / "tiny"), *words]), advice
            assert flag != "--game" or value != game, advice
            assert flag not in values or value == values[flag] or flag == "--game"


# --------------------------------------------------------------------------------------------------
# Games as text

def test_a_game_as_text():
    """Equal answers are shown once, and the best answer comes first.

    An answer that no judge has graded has no quality.
    """
    text = record.game_text(3, step(**WITHOUT_A_JUDGE), [True, True])
    first, *answers, last = text.splitlines()
    assert first == "step 3  query: abcd"
    assert [line.split() for line in answers] == [
        ["2", "x2", "reward", "1.00", "advantage", "+0.33"],
        ["3", "reward", "0.00", "advantage", "-0.67"],
    ]
    assert "the Challenger's advantage" in last and last.endswith("-0.33")
    judged = record.game_text(3, step(answers=[["3", "2", ""], [""] * 3]), [False, True])
    assert "no such task" in judged and "(nothing)" in judged
    assert f"2{' ' * 32}reward 1.00  quality 0.25" in judged
    # A referee that cannot tell what has an answer says nothing of it.
    assert "no such task" not in record.game_text(3, step(), None)
    assert "Challenger" not in record.game_text(3, step(**WITHOUT_A_CHALLENGER), [True, True])


def test_games_as_records():
    """Equal answers are written once, with their number, and figures are rounded."""
    first, second = record.game_records(step(), [True, False])
    assert first == {
        "query": "abcd", "valid": True, "challenger_advantage": -0.333, "answers": [
            {"answer": "3", "times": 1, "reward": 0.0, "quality": 0.5},
            {"answer": "2", "times": 2, "reward": 1.0, "quality": 0.25}]}
    assert second["valid"] is False
    assert [(a["answer"], a["times"], a["quality"]) for a in second["answers"]] == [
        ("x", 2, 0.0), ("", 1, 0.75)]
    found, _ = record.game_records(step(**WITHOUT_A_CHALLENGER), None)
    assert found["challenger_advantage"] is None and found["valid"] is None
    assert [(a["answer"], a["times"], a["quality"]) for a in found["answers"]] == [
        ("3", 1, None), ("2", 2, None)]


def test_equal_answers_with_other_rewards_are_told_apart():
    """A reward of the user's own need not give equal answers the same."""
    reward = torch.tensor([[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]])
    odd = step(reward=reward, **WITHOUT_A_JUDGE)
    first, _ = record.game_records(odd, None)
    assert [(a["answer"], a["times"], a["reward"]) for a in first["answers"]] == [
        ("3", 1, 0.0), ("2", 1, 1.0), ("2", 1, 0.5)]
    assert record.game_text(1, odd, None).count("reward") == 3


# --------------------------------------------------------------------------------------------------
# An iteration of SPIN

class Pair(NamedTuple):
    """Only these two fields of a pair are read."""
    answer: list
    rival: list


def spell(ids):
    """Ids as text, as a tokenizer's `decode`."""
    return "".join(map(chr, ids))


def test_a_pair_as_text_and_as_record():
    """A line for people and one for the opponent, with differences that make up the margin."""
    pair = Pair([ord(letter) for letter in "five\n5"], [])
    text = record.pair_text("Add 2 and 3.", pair, torch.tensor([-1.0, -3.0]),
                            torch.tensor([-2.0, -2.5]), 0.75, spell)
    prompt, people, opponent, margin = text.splitlines()
    assert prompt.strip() == "Add 2 and 3."
    assert people.split() == ["people", "five", "5", "log", "p_t", "-2.00", "log", "p", "-1.00",
                              "difference", "+1.00"]
    assert opponent.split() == ["opponent", "(nothing)", "log", "p_t", "-2.50", "log", "p",
                                "-3.00", "difference", "-0.50"]
    assert margin.strip() == "margin +0.75"
    long = record.pair_text("x" * 500, Pair([120] * 500, [121]), torch.zeros(2), torch.zeros(2), 0,
                            spell)
    assert max(map(len, long.splitlines())) < 120
    assert record.pair_records(3, ["Add 2 and 3."], [Pair([53], [52])], spell) == [
        {"iteration": 3, "prompt": "Add 2 and 3.", "answer": "5", "rival": "4"}]


def test_pairs_that_teach_nothing_are_counted():
    pairs = [Pair([1], [1]), Pair([1], [2]), Pair([2], [2]), Pair([3], [3])]
    line = record.identical_line(pairs, 0.5, 0.693)
    assert "75.0 % of the new pairs" in line
    assert "loss 0.693" in line and line.endswith("lambda 0.5")


def test_what_an_iteration_changed(tmp_path):
    """The first figure of the iteration's own updates, and the mean of its last tenth."""
    rows = [{"step": 1, "iteration": 0, "loss": 9.0, "margin": 3.0}]
    rows += [{"step": i + 2, "iteration": 1, "loss": float(i), "margin": 2.0} for i in range(30)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert record.change_line(tmp_path, 1) == (  # 28 is the mean of the last three, 27 to 29
        "loss of all pairs 0.000 -> 28.000  of differing ones: margin 2.000 -> 2.000")
    assert record.change_line(tmp_path, 0) == (
        "loss of all pairs 9.000 -> 9.000  of differing ones: margin 3.000 -> 3.000")
