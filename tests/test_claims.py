"""The claims: declared runs, their queue and results by a pretended game, pages from made-up ones.
"""
import json
import math
import re
import subprocess

import pytest
import torch
from conftest import ROOT, command

import selfplay
import spin
from recipes import claims
from recipes.claims import GRPO, LSP, ON_DATA, QUESTIONS, ZERO, quicker, trials_of
from support import console, intervals, pages, report, trials
from support.trials import AT_START, FOUR, Missing, Queue, Results, Run, counted, packed, unpacked
from tiny import language

RUNS = list(dict.fromkeys(run for question in QUESTIONS.values() for run in question.runs))


# --------------------------------------------------------------------------------------------------
# Intervals

def test_students_t_as_in_its_table():
    """Three seeds have two degrees of freedom. The last one is of ten comparisons together."""
    for df, outside, t in ((1, 0.05, 12.706), (2, 0.05, 4.303), (4, 0.05, 2.776), (9, 0.05, 2.262),
                           (2, 0.005, 14.089)):
        assert intervals.student(df, outside) == pytest.approx(t, abs=2e-3)


def test_interval_over_seeds_and_items_by_hand():
    """Seeds with means 1, 2, 3: t is 4.303, times 1/sqrt(3). Items: 1.96 times sqrt(2)/sqrt(2)."""
    x = torch.tensor([[0.0, 2.0], [1.0, 3.0], [2.0, 4.0]])
    mean, low, high = intervals.seeds_and_items(x)
    half = math.hypot(4.303 / math.sqrt(3), 1.959964)
    assert mean == pytest.approx(2)
    assert (low, high) == (pytest.approx(2 - half, abs=1e-3), pytest.approx(2 + half, abs=1e-3))
    # One seed: the items alone, and of two comparisons together 2.241 deviations.
    assert intervals.seeds_and_items(x[:1])[2] == pytest.approx(1 + 1.959964, abs=1e-4)
    assert intervals.seeds_and_items(x[:1], 0.025)[2] == pytest.approx(1 + 2.2414, abs=1e-4)
    # A single number decides nothing.
    assert intervals.verdict(intervals.seeds_and_items(torch.tensor([[0.5]]))) == "not decided"


def test_verdicts():
    assert intervals.verdict([1, 0.1, 2]) == "yes"
    assert intervals.verdict([-1, -2, -0.1]) == "no"
    assert intervals.verdict([0, -1, 1]) == "not decided"
    assert intervals.verdict([-0.5, -0.9, 0.1], worse_by=1.0) == "yes"
    assert intervals.all_of("yes", "yes") == "yes"
    assert intervals.all_of("yes", "not decided") == "not decided"
    assert intervals.all_of("not decided", "no") == "no"
    assert intervals.negated([1, -2, 3]) == [-1, -3, 2]


def test_a_curve_is_made_to_rise_and_read_by_hand():
    assert intervals.rising([1, 3, 2, 4]) == [1, 2.5, 2.5, 4]
    assert intervals.rising([3, 2, 1]) == [2, 2, 2]
    # Halfway from 4 to 16 on a logarithmic axis is 8.
    sizes, curve = [1, 4, 16], [0.1, 0.2, 0.4]
    assert intervals.reached(sizes, curve, 0.3) == pytest.approx(8)
    assert intervals.reached(sizes, curve, 0.2) == 4
    assert intervals.reached(sizes, curve, 0.05) == 0 and intervals.reached(sizes, curve, 0.5) > 16


def test_worth_in_data_by_hand():
    """Of two seeds with .2 and .4, a quarter of the drawn pairs are .2 alone, a quarter .4 alone.

    So the interval goes from 4 to 16, and the mean .3 is worth 8. Where nothing varies, nothing is
    unsure. With a curve that stays below, a method is worth more than the largest set.
    """
    def models(*shares):
        return torch.tensor([[share] * 5 for share in shares])
    sizes, by_size = [1, 4, 16], [models(0.1, 0.1), models(0.2, 0.2), models(0.4, 0.4)]
    assert intervals.worth(sizes, by_size, models(0.3, 0.3)) == pytest.approx([8, 8, 8], rel=1e-4)
    assert intervals.worth(sizes, by_size, models(0.2, 0.4)) == pytest.approx([8, 4, 16], rel=1e-4)
    assert intervals.worth(sizes, by_size, models(0.5, 0.5)) == [math.inf] * 3
    assert claims.between(0.0, 0.0, math.inf, sizes) == "less than 1 [less than 1, more than 16]"
    assert claims.between(8.1, 4.0, 16.0, sizes) == "8 [4, 16]"


# --------------------------------------------------------------------------------------------------
# Declared runs

def test_every_run_is_one_the_games_take():
    """Only known flags; a name, and so a file, for each; one start for what follows another run."""
    for run in RUNS:
        for one in (run, quicker(run)):
            script, *words = one.command.split()
            args = {"selfplay.py": selfplay, "spin.py": spin}[script].parse_args(words)
        assert getattr(args, "steps", 200) >= 20 and run.after in (None, *RUNS)
        assert re.fullmatch(r"[a-z0-9.'-]+", run.slug)
    assert len({run.slug for run in RUNS}) == len(RUNS)
    commands = [(run.command, run.after, run.data) for run in RUNS]
    assert len(set(commands)) == len(RUNS), "a run is played twice by two names"


def test_who_is_compared_in_worth_plays_as_many_games():
    for run in QUESTIONS["worth"].runs:
        args = selfplay.parse_args(run.command.split()[1:])
        assert (args.queries, args.answers, args.steps) == (32, 16, 500)


def test_data_of_n_instructions():
    """Each seed draws a set of its own; a larger set begins with the smaller; nothing held out."""
    few, more, other = ON_DATA[32].data(10), ON_DATA[64].data(10), ON_DATA[32].data(11)
    assert len({row["question"] for row in more}) == 64 and more[:32] == few != other
    assert all(language.solve(row["question"]) == row["answer"] for row in more)
    assert not any(language.is_held_out(row["question"]) for row in more)


def test_the_starts_own_answers_are_careless_in_part(monkeypatch):
    monkeypatch.setattr(claims, "PAIRS", 100)
    rows = claims.own_answers(10)
    right = sum(language.solve(row["question"]) == row["answer"] for row in rows) / len(rows)
    assert len(rows) == 400 and 0.8 < right < 0.95


def test_one_seed_of_everything_comes_first():
    args = claims.parse_args(["goes-on"])
    wanted = trials_of(QUESTIONS["goes-on"], args)
    seeds = [seed for _, seed in wanted]
    assert seeds == sorted(seeds) and wanted[0] == (AT_START, 10) and max(seeds) == 14
    assert wanted[1][0].name == "LSP, 10,000 steps"  # the longest is not left for the end
    assert [seed for run, seed in wanted if run is claims.LONG[2500]] == [10, 11, 12, 13, 14]
    quick = trials_of(QUESTIONS["goes-on"], claims.parse_args(["goes-on", "--quick"]))
    assert {seed for _, seed in quick} == {10}
    assert next(run for run, _ in quick if run.name == LSP.name).command.endswith("--steps 20")


# --------------------------------------------------------------------------------------------------
# Results

def test_what_a_result_keeps_of_each_instruction():
    """Three instructions with 8 answers each: 8, 2 and 0 right."""
    items = {"sampled": [1.0, 0.25, 0.0], "greedy": [1.0, 0.0, 0.0], "pass@8": [1.0, 1.0, 0.0]}
    kept = counted(items, 8)
    assert (kept["sampled"]["right"], kept["sampled"]["of"]) == (10, 24)
    assert (kept["greedy"]["right"], kept["greedy"]["of"]) == (1, 3)
    assert kept["pass@8"] == {"right": 2, "of": 3}
    assert unpacked(kept["sampled"]["each"]).tolist() == [8, 2, 0]
    rates = torch.randint(9, (6000,), generator=torch.Generator().manual_seed(0)).tolist()
    assert len(packed(rates)) < 4000 and unpacked(packed(rates)).tolist() == rates


def scores(share, n=200):
    """The scores of a model that always answers the first share of n instructions rightly."""
    each = [float(i < round(share * n)) for i in range(n)]
    one = counted({"sampled": each, "greedy": each}, 8)
    return {name: one for name in (*claims.SETS, FOUR)}


def made_up(folder, gains, runs=RUNS, seeds=(10, 11, 12), valid=()):
    """Files of made-up results: each run is right in half the cases and what `gains` adds.

    gains: {name: gain, or one for each iteration}; 0.1 for the others. valid: {name: what its
    well-formed queries change by over a run}.
    """
    for seed in seeds:
        for run in (AT_START, *runs):
            own = gains.get(run.name, 0.1 if run.command else 0.0)
            own = own if isinstance(own, tuple) else (own,)
            kind = "iteration" if run.command.startswith("spin") else "step"
            names = [f"{kind}-{i}" for i in range(len(own))]
            if kind == "step":
                names[-1] = "model"
            models = [{"name": name, "scores": scores(0.5 + gain)}
                      for name, gain in zip(names, own)]
            slope = dict(valid).get(run.name, 0.0) * (1 + 0.01 * seed)
            curves = {key: [0.9 + slope * i / 9 for i in range(10)] for key in
                      ("valid", "reward", "spread", "agreement", "distinct", "similarity",
                       "entropy_solver", "kl_solver")}
            played = {"minutes": 2.0, "curves": curves} if run.command else {}
            trials.write_json(folder / "any" / f"{run.slug}-s{seed}.json", played | {
                "run": run.name, "seed": seed, "command": run.command, "commit": "abc",
                "weights": trials.start_weights(), "models": models})
    return Results(trials.read_results(folder), claims.REPORTED)


def said(question, r):
    """{a claim's number or first words: (verdict, figures)}."""
    return {claim.split(".")[0]: (verdict, figures)
            for claim, verdict, figures in pages.judged(QUESTIONS[question], r)}


def test_gains_are_paired_and_of_the_seeds_that_both_have(tmp_path):
    made_up(tmp_path, {}, [LSP], seeds=(10, 11))
    r = made_up(tmp_path, {}, [GRPO], seeds=(11, 12))
    assert r.seeds(LSP, GRPO) == [11] and r.seeds(LSP) == [10, 11] and r.has(GRPO)
    assert r.gain(LSP)[0] == pytest.approx(10) and r.gain(LSP, over=GRPO) == [0, 0, 0]
    # 20 of 200 instructions gain: 1.96 deviations of sqrt(.1 x .9) by sqrt(200)
    assert r.gain(LSP)[1] == pytest.approx(10 - 100 * 1.96 * math.sqrt(0.09 / 199), abs=0.01)
    assert r.gain(LSP, "pass@8")[0] == r.gain(LSP, "greedy")[0] == pytest.approx(10)
    assert r.minutes(LSP) == 2 and r.minutes(LSP._replace(after=GRPO)) == 4
    with pytest.raises(Missing, match="LSP-Zero"):
        r.gain(ZERO)
    with pytest.raises(Missing, match="a seed that all have"):
        made_up(tmp_path, {}, [ZERO], seeds=(12,)).gain(ZERO, over=LSP)
    with pytest.raises(Missing, match="2 seeds of LSP and of GRPO on endless data"):
        r._replace(least=2).gain(LSP, over=GRPO)
    assert r._replace(least=2).gain(LSP)[0] == pytest.approx(10)


SHRINKING = (0.1, 0.15, 0.17, 0.18)
HOLD = {"SPIN": SHRINKING, "SPIN on its own data": SHRINKING,
        "more fine-tuning": 0.05, "more fine-tuning on its own data": 0.05,
        "more fine-tuning on its own data, six epochs": 0.05,
        "SPIN, one long iteration": 0.05, "SPIN on its own data, one long iteration": 0.05,
        "LSP, 2,500 steps": (0.1, 0.2), "LSP, 5,000 steps": 0.3, "LSP, restart 4": 0.3,
        "GRPO, then LSP": 0.2, "LSP-Zero, eager": 0.05, "LSP paid r-zero": 0.2,
        "LSP paid r-zero, eager": 0.3, "LSP, random Challenger": 0.02,
        "LSP, eager, self-reward for the Challenger alone": 0.2, "LSP, 32 answers": 0.15,
        "GRPO, 2,500 steps": 0.2, "GRPO, 5,000 steps": 0.3, "LSP paid r-zero, 2,500 steps": 0.3,
        "LSP, eager, quality 0.25": 0.2, "LSP, 64 queries": 0.15, "GRPO on 32": 0.05,
        "GRPO on 64": 0.08, "LSP-Zero, divided by the deviation": 0.2,
        "LSP, grades written": 0.15, "LSP, eager, grades written": 0.15}


def test_claims_that_hold(tmp_path):
    r = made_up(tmp_path, HOLD, valid={"LSP-Zero, eager": -0.3, "LSP, eager, quality 0.25": -0.3,
                                       "LSP, eager, self-reward for the Solver alone": -0.3})
    for name in QUESTIONS:
        verdicts = [verdict for verdict, _ in said(name, r).values()]
        assert set(verdicts) <= {"yes", ""}, (name, said(name, r))
        assert verdicts.count("yes") >= 4
    assert "-0.3" in said("self-reward", r)["3"][1]
    assert said("spin", r)["6a"][1].startswith("gain of each iteration +10.0 [")
    assert "is LSP paid r-zero: +20.0" in said("learning", r)[
        "A variant of 500 steps gains four points greedy"][1]
    assert "sampled 128 [" in said("worth", r)["LSP is worth so many instructions"][1]


def test_claims_that_fail(tmp_path):
    """Everything falls: no claim may hold."""
    shares = {run.name: -0.1 for run in RUNS} | {"SPIN": (-0.01, -0.05), "LSP, eager": -0.2,
              "GRPO, then LSP": -0.3, "LSP, 2,500 steps": -0.2, "LSP, 5,000 steps": -0.3,
              "LSP, restart 4": -0.3, "LSP paid r-zero, 2,500 steps": -0.3,
              "LSP paid r-zero": -0.3, "LSP paid r-zero, eager": -0.3,
              "GRPO on endless data": 0.2, "SPIN on its own data": (-0.1, -0.2), "LSP": -0.15,
              "SPIN, one long iteration": 0.1, "SPIN on its own data, one long iteration": 0.1,
              "more fine-tuning": 0.1, "LSP, eager, self-reward for the Challenger alone": -0.4,
              "LSP, eager, quality 0.25": -0.4, "LSP, 64 queries": -0.2,
              "LSP-Zero, divided by the deviation": -0.2, "LSP, then GRPO": -0.2,
              "GRPO, 5,000 steps": -0.2, "LSP, grades written": -0.2,
              "LSP, eager, grades written": -0.3}
    r = made_up(tmp_path, shares, valid={"LSP, eager": -0.3, "LSP-Zero, eager": 0.1,
                                         "LSP, eager, quality 4": -0.3,
                                         "LSP, eager, grades written": -0.3,
                                         "LSP, eager, self-reward for the Challenger alone": -0.3})
    for name in QUESTIONS:
        verdicts = {verdict for verdict, _ in said(name, r).values()}
        assert verdicts <= {"no", "not decided", ""} and "no" in verdicts, (name, said(name, r))


def test_differences_are_of_each_run_minus_the_other_and_without_a_verdict(tmp_path):
    """+15 minus +10 is +5, and the other way round -5; nobody declared them."""
    r = made_up(tmp_path, {"LSP-Zero": 0.15}, [LSP, ZERO])
    both, other = claims.differences([ZERO, LSP], LSP)(r), claims.differences([LSP], ZERO)(r)
    assert both == ("", "looked at afterwards: LSP-Zero +5.0 [+2.0, +8.0]; LSP +0.0 [+0.0, +0.0]")
    assert other == ("", "looked at afterwards: LSP -5.0 [-8.0, -2.0]")


def test_a_verdict_that_many_comparisons_do_not_bear_says_so(tmp_path):
    """A gain of 2.5 points on 200 instructions is decided alone, and not among five."""
    r = made_up(tmp_path, {"LSP": 0.025, "LSP-Zero": 0.025})
    line = pages.claims(QUESTIONS["worth"], r)[0]
    assert line.startswith("- **1. LSP improves the start without data: yes.** (corrected for 5 "
                           "comparisons: not decided) Sampled +2.5 [")


def test_no_variant_gains_so_much_is_said_once_all_are_played(tmp_path):
    """+10 points everywhere: [5.8, 14.2] by 200 instructions, [3.6, 16.4] for 20 tries."""
    made_up(tmp_path, {}, [LSP], seeds=(10, 11, 12, 13, 14))
    r = made_up(tmp_path, {"LSP-Zero": 0.15}, claims.VARIANTS[1:])
    of = {by: claims.moves_greedy(claims.VARIANTS, by)(r) for by in (3, 5, 12, 22)}
    assert [said for said, _ in of.values()] == ["yes", "yes", "not decided", "no"]
    assert "is LSP-Zero: +15.0 [+10.0" in of[22][1] and "is LSP-Zero: +15.0 [+7.3" in of[3][1]
    said, figures = claims.moves_greedy(claims.VARIANTS + claims.LONGER, 22)(r)
    assert said == "not decided" and "the best of 24 (4 lack seeds) is LSP-Zero" in figures
    assert "2 (1 lacks seeds)" in claims.moves_greedy([LSP, claims.LONG[1000]], 22)(r)[1]
    with pytest.raises(Missing):
        claims.moves_greedy(claims.LONGER, 8)(r)
    one = made_up(tmp_path / "one", {}, claims.VARIANTS, seeds=(10,))
    assert claims.moves_greedy(claims.VARIANTS, 22)(one)[0] == "not decided"
    assert claims.moves_greedy(claims.VARIANTS, 22)(one._replace(least=1))[1].startswith("the best")
    with pytest.raises(Missing, match="all variants"):
        claims.moves_greedy(claims.VARIANTS, 22)(one._replace(least=3))
    most = made_up(tmp_path / "one", {}, claims.VARIANTS[1:], seeds=(11, 12))._replace(least=3)
    said, figures = claims.moves_greedy(claims.VARIANTS, 22)(most)  # LSP has one seed, and is left
    assert said == "not decided" and "the best of 20 (1 lacks seeds) is " in figures
    assert claims.moves_greedy(claims.VARIANTS, 3)(most)[0] == "yes"


def test_no_two_lines_of_a_panel_have_one_colour(tmp_path):
    """Where bands lie behind a line, it has the first colour, and they have the others."""
    r = made_up(tmp_path, {})
    for question in QUESTIONS.values():
        for panel in question.panels(r):
            assert len(panel.lines) + len(panel.bands) <= len(report.COLOURS)


def test_a_run_without_a_curve_leaves_the_others_their_colours(tmp_path):
    """A colour goes by a line's place in its panel."""
    r = made_up(tmp_path, {}, [LSP, GRPO])
    panel, = claims.curve_panels(r, [LSP, ZERO, GRPO], ["reward"])
    assert [(name, len(xs)) for name, (xs, _) in panel.lines.items()] == [
        (LSP.name, trials.TENTHS), (ZERO.name, 0), (GRPO.name, trials.TENTHS)]


def test_a_claim_on_curves_needs_two_seeds_for_an_interval(tmp_path):
    r = made_up(tmp_path, {}, QUESTIONS["self-reward"].runs, seeds=(10,))
    assert said("self-reward", r)["4a"] == (None, "Not played yet: 2 seeds of LSP, eager and of "
                                                  "LSP-Zero, eager")
    with pytest.raises(Missing, match="^2 seeds of LSP$"):
        r.end(LSP, "valid", over=LSP, then=0)
    r = made_up(tmp_path, {}, QUESTIONS["self-reward"].runs, seeds=(11,))
    assert said("self-reward", r)["4a"] == (
        None, "with fewer than 3 seeds there is no verdict: LSP, eager minus LSP-Zero, eager: "
        "+0.00 [+0.00, +0.00]")
    r = made_up(tmp_path, {}, QUESTIONS["self-reward"].runs, seeds=(12,))
    assert said("self-reward", r)["4a"][0] == "not decided"


def test_a_claim_with_fewer_than_three_seeds_has_no_verdict(tmp_path):
    """What counts is the seeds that both have. It is one of the eight comparisons all the same.

    Alone, +2.5 points of 200 instructions are decided. Among eight they are not.
    """
    made_up(tmp_path, {"GRPO on endless data": 0.3}, [GRPO], seeds=(10,))
    r = made_up(tmp_path, {"LSP": 0.025}, [LSP])
    found = said("worth", r)
    assert found["1"][0] == "yes" and found["1b"] == (None, "Not played yet: LSP-Zero")
    assert found["2"] == (None, "with fewer than 3 seeds there is no verdict: LSP minus GRPO on "
                                "endless data, sampled: -27.5 [-33.7, -21.3]")
    first, _, third, *_ = pages.claims(QUESTIONS["worth"], r)
    assert first.startswith("- **1. LSP improves the start without data: yes.** (corrected for 8 c")
    assert third.startswith("- **2. LSP comes within a point of GRPO on endless data.** With fewer")


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_page_and_its_picture_are_drawn_from_results_alone(name, tmp_path, capsys):
    """What is missing is shown as missing."""
    made_up(tmp_path, HOLD, QUESTIONS[name].runs[:-1], valid={"LSP-Zero, eager": -0.3})
    assert claims.main([name, "--draw", "--results", str(tmp_path)]) is None
    text = (tmp_path / f"{name}.md").read_text()
    assert text in capsys.readouterr().out and (tmp_path / f"{name}.png").stat().st_size > 10000
    last = QUESTIONS[name].runs[-1].name
    assert f"| {last} | 0 | missing |" in text and "runs are missing.** Claims" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1 and rows[2].startswith("| start | 3 | 50.0")
    assert text.count("\n- **") == len(QUESTIONS[name].claims)
    several = {"goes-on": ["| LSP, 2,500 steps, step 0 | 3 | 60", "| LSP, 2,500 steps | 3 | 70"],
               "spin": [f"| SPIN, iteration {t} | 3 | " for t in range(4)]}
    assert all(row in text for row in several.get(name, []))
    assert "quick" not in text and f"    python recipes/claims.py {name}\n" in text
    own = QUESTIONS[name].ends
    assert all(f"*{column}*: `{key}`, " in text.replace("\n", " ") for key, column in own.items())
    assert ("tenth of the steps" in text) == bool(own)


def test_a_panel_with_nothing_in_it_is_not_drawn(tmp_path):
    """Where all are empty, one is: a page has its picture."""
    from matplotlib.image import imread
    full, empty = pages.Panel("full", {"a": ([1, 2], [[1, 0, 2]] * 2)}), pages.Panel("empty", {})
    widths = []
    for panels in ([full], [full, empty, pages.Panel("no xs", {"a": ([], [])})], [full, full],
                   [empty]):
        pages.draw(tmp_path / "a.png", "title", panels)
        widths.append(imread(tmp_path / "a.png").shape[1])
    one, with_empty, two, none = widths
    assert one == with_empty == none < two


def test_a_legend_of_more_than_two_panels_stands_once_below_them(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **more: drawn.append(figure))

    def panels(*labels):
        return [pages.Panel("title", {label: ([1, 2], [[1, 1, 1]] * 2)}) for label in labels]

    for labels, below, own in (("aaab", ["a"], [False, False, False, True]),
                               ("aabb", [], [True] * 4)):
        pages.draw(tmp_path / "a.png", "title", panels(*labels))
        figure = drawn.pop()
        assert [text.get_text() for key in figure.legends for text in key.get_texts()] == below
        assert [axis.get_legend() is not None for axis in figure.axes] == own


def test_without_any_result_nothing_is_drawn(tmp_path):
    done = command(claims, tmp_path, "worth", "--draw", "--results", str(tmp_path))
    assert done.returncode == 2 and "no results of the start yet" in done.stderr
    (tmp_path / "worth").mkdir()
    (tmp_path / "worth" / "lsp-s10.json").write_text("{")
    done = command(claims, tmp_path, "worth", "--draw", "--results", str(tmp_path))
    assert done.returncode == 2 and "lsp-s10.json: not a result" in done.stderr


def test_a_quick_look_says_that_it_is_one(tmp_path):
    made_up(tmp_path / "claims-quick" / "results", {}, QUESTIONS["pays"].runs, seeds=(10,))
    done = command(claims, tmp_path, "pays", "--quick", "--draw")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "A quick look (--quick: one seed, a 25th of the steps, 500 instructions). It" in text
    assert "With fewer than 3 seeds there is no verdict: LSP minus" in text and ": yes" not in text


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "results").glob("*.md")),
                         ids=lambda path: path.stem)
def test_a_committed_page_is_that_of_the_committed_results(path):
    """Nobody edits a figure by hand, and no result is forgotten."""
    question, args = QUESTIONS[path.stem], claims.parse_args([path.stem])
    r = Results(trials.read_results(path.parent), claims.REPORTED)
    wanted = claims.wanted_of(question, args)
    assert path.read_text() == pages.page(path.stem, question, r, wanted)


def test_a_committed_result_is_of_the_run_that_is_declared(tmp_path):
    """By another command, or from another start, a row would say what was not played."""
    queue = Queue(tmp_path, ROOT / "docs" / "results", "all", claims.SETS)
    declared = {run.slug: run for run in (AT_START, *RUNS)}
    for path in [path for name in QUESTIONS for path in queue.results.glob(f"{name}/*.json")]:
        slug, _, seed = path.stem.rpartition("-s")
        assert queue.is_done(declared[slug], int(seed)), path.name


def test_no_committed_result_says_where_it_lay():
    """A path of somebody's machine begins with a slash."""
    for path in (ROOT / "docs" / "results").glob("*/*.json"):
        assert '"/' not in path.read_text(), path.name


# --------------------------------------------------------------------------------------------------
# The queue

class Game:
    """Stands for subprocess.Popen: writes what a run of 20 steps, or evaluate.py score, writes."""
    calls, fails, stops = [], (), ()

    def __init__(self, words, cwd, **rest):
        script, *flags = words[1:]
        self.returncode, self.calls = 0, self.calls
        if script.endswith("evaluate.py"):
            self.calls.append("score")
            each = {"sampled": [1.0, 0.5], "greedy": [1.0, 0.0], "pass@8": [1.0, 1.0]}
            (cwd / flags[flags.index("--json") + 1]).write_text(
                json.dumps({"samples": 8, "items": each, "longer": each}))
            return
        name = flags[-1] if "--resume" in flags else flags[flags.index("--run") + 1]
        self.calls.append(f"{name.removeprefix('runs/')}{' resumed' * ('--resume' in flags)}")
        self.returncode = int(name in self.fails)
        if not self.returncode:
            write_run(cwd / "runs" / name.removeprefix("runs/"), 7 if name in self.stops else 20)

    def communicate(self):
        return "", "something\nerror: no luck\n" * self.returncode


def write_run(folder, steps):
    """The files of a run of 20 steps that has done some of them, with a picture."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "model.safetensors").touch()
    row = json.dumps({"step": 1, "seconds": 3.0, "tokens": 10, "valid": 0.5})
    (folder / "metrics.jsonl").write_text(f"{row}\n" * steps)
    (folder / "settings.json").write_text(json.dumps({
        "steps": 20, "model": "/somewhere/of/mine", "judge": f"{ROOT}/recipes/own_answer.py:agrees",
        "data": f"{folder.parent.parent}/data/x.jsonl"}))
    (folder / "curves.png").write_text("")


FIRST = Run("First", "selfplay.py --steps 20")
SECOND = Run("Second, of data", "selfplay.py --game grpo --steps 20", after=FIRST,
             data=lambda seed: [{"question": "a", "answer": "b"}] * seed)


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """A Queue whose games are pretended."""
    monkeypatch.setattr(subprocess, "Popen", Game)
    monkeypatch.setattr(Game, "calls", [])
    monkeypatch.setattr(trials, "commit", lambda: "abc")  # git is asked by Popen, too
    return Queue(tmp_path / "out", tmp_path / "results", "worth", {"drawing 3": "--held-out 3"})


def again(queue):
    """The queue of a command that is started again."""
    return Queue(queue.out, queue.results, queue.name, queue.sets)


def test_what_a_run_starts_from_is_played_before_it(queue):
    """And once, though two runs wait for it."""
    third = SECOND._replace(name="Third")
    (queue.out).mkdir()
    queue.play_all([(SECOND, 10), (third, 10), (FIRST, 10), (AT_START, 10)], 2)
    played = [call for call in Game.calls if call != "score"]
    assert played[0] == "first-s10" and len(played) == 3 and Game.calls.count("score") == 4
    result = json.loads((queue.results / "worth" / "second-of-data-s10.json").read_text())
    assert result["after"] == "First" and result["settings"]["model"] == "First"
    assert result["data"]["rows"] == 10 and result["minutes"] == 1.0 and result["tokens"] == 200
    assert result["curves"]["valid"] == [0.5] * 10 and "/somewhere" not in json.dumps(result)
    assert result["settings"]["judge"] == "recipes/own_answer.py:agrees"
    assert result["settings"]["data"] == "data/x.jsonl"
    scores = result["models"][0]["scores"]
    assert set(scores) == {"drawing 3", FOUR} and scores["drawing 3"]["sampled"]["right"] == 12


def test_what_is_finished_is_not_played_again(queue):
    """Not even scored; but of a run whose result is gone, only the scores are asked again."""
    (queue.out).mkdir()
    queue.play_all([(FIRST, 10)], 1)
    assert Game.calls == ["first-s10", "score"]
    again(queue).play_all([(FIRST, 10)], 1)
    assert len(Game.calls) == 2
    (queue.results / "worth" / "first-s10.json").unlink()
    again(queue).play_all([(FIRST, 10)], 1)
    assert Game.calls == ["first-s10", "score", "score"]
    # Another question that also asks a second set: the same run, more scores.
    more = Queue(queue.out, queue.results, "pays", queue.sets | {"drawing 2": "--held-out 2"})
    assert not more.is_done(FIRST, 10)
    more.play_all([(FIRST, 10)], 1)
    assert again(more).is_done(FIRST, 10) and Game.calls.count("first-s10") == 1
    assert len([*queue.results.rglob("*.json")]) == 1


def test_a_stopped_run_is_resumed_and_one_without_a_checkpoint_put_aside(queue, monkeypatch):
    monkeypatch.setattr(Game, "stops", ("first-s10",))
    (queue.out).mkdir()
    with pytest.raises(console.UserError, match="1 of 1 runs failed: First, seed 10: stopped"):
        queue.play_all([(FIRST, 10)], 1)
    monkeypatch.setattr(Game, "stops", ())
    folder = queue.out / "runs" / "first-s10"
    (folder / "checkpoint.safetensors").touch()
    again(queue).play_all([(FIRST, 10)], 1)
    assert Game.calls == ["first-s10", "first-s10 resumed", "score"]
    write_run(queue.out / "runs" / "first-s11", 7)
    again(queue).play_all([(FIRST, 11)], 1)
    cut = queue.out / "runs" / "first-s11-cut-1" / "metrics.jsonl"
    assert len(cut.read_text().splitlines()) == 7 and Game.calls[-2:] == ["first-s11", "score"]


def test_a_run_that_fails_does_not_stop_the_others(queue, monkeypatch):
    monkeypatch.setattr(Game, "fails", ("first-s10",))
    (queue.out).mkdir()
    with pytest.raises(console.UserError, match="1 of 2 runs failed: First, seed 10: error: no lu"):
        queue.play_all([(FIRST, 10), (FIRST, 11)], 1)
    assert (queue.results / "worth" / "first-s11.json").is_file()


def test_results_of_another_command_or_start_are_refused(queue, monkeypatch):
    (queue.out).mkdir()
    queue.play_all([(FIRST, 10)], 1)
    with pytest.raises(console.UserError, match="result of First, seed 10, is of another command"):
        again(queue).is_done(FIRST._replace(command="selfplay.py --steps 21"), 10)
    monkeypatch.setattr(trials, "start_weights", lambda: "others")
    with pytest.raises(console.UserError, match="or start than this version's"):
        again(queue).is_done(FIRST, 10)


# --------------------------------------------------------------------------------------------------
# The command

def test_without_a_name_the_questions_are_listed(tmp_path):
    done = command(claims, tmp_path, "--results", str(tmp_path), "--out", "x")
    assert done.returncode == 0 and not (tmp_path / "x").exists()
    for name, question in QUESTIONS.items():
        assert name in done.stdout and question.title in done.stdout
    assert re.search(r"36 runs, 36 of them to be played: about \d+ minutes of one", done.stdout)


def test_cost_goes_by_what_a_run_took_before(tmp_path):
    made_up(tmp_path, {}, [LSP], seeds=(10,))
    queue = Queue(tmp_path, tmp_path, "worth", {})
    missing, minutes = claims.cost(queue, [(LSP, 10), (LSP, 11), (AT_START, 11)], quick=False)
    assert missing == [(LSP, 11), (AT_START, 11)] and minutes == pytest.approx(2 + 2 * 0.7)
    guess = claims.rough_minutes(LSP, {})
    assert claims.rough_minutes(claims.LONG[2500], {}) == pytest.approx(5 * guess)


def test_quick_changes_the_defaults_of_the_folders():
    args = claims.parse_args(["worth", "--quick", "--jobs", "1"])
    assert (args.out, args.results, args.seeds) == ("claims-quick", "claims-quick/results", None)
    args = claims.parse_args(["worth", "--seeds", "5"])
    assert (args.out, args.results, args.seeds) == ("claims", "docs/results", 5)
    assert set(claims.wanted_of(QUESTIONS["worth"], args).values()) == {5}


def test_folder_of_another_start_is_refused(tmp_path):
    out = claims.open_folder(tmp_path / "x")
    assert claims.open_folder(out) == out
    (out / "start.txt").write_text("another\n")
    with pytest.raises(console.UserError, match="runs of another start"):
        claims.open_folder(out)
    (tmp_path / "file").touch()
    with pytest.raises(console.UserError, match="file: cannot be made a folder"):
        claims.open_folder(tmp_path / "file")
