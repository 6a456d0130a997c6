"""What is self-play worth? Six questions about both papers, each answered by runs of both methods.

    python recipes/claims.py                  the questions, and what each costs
    python recipes/claims.py worth            plays what is missing and writes docs/results/worth.md
    python recipes/claims.py worth --quick    one seed, a 25th of the steps: its shape, in minutes
    python recipes/claims.py worth --draw     only writes the page again, from the results there are

The papers are Language Self-Play (LSP, arXiv 2509.07414) and Self-Play Fine-Tuning (SPIN, arXiv
2401.01335). All methods start from the embedded default in tiny/. They are compared on the same
held-out instructions, by which no setting was chosen.

Below are the questions: the runs of each, its claims with the figures that decide them (fixed
before the runs), and its picture. support/trials.py plays and keeps results,
support/intervals.py has the statistics, and support/pages.py writes.
"""
import argparse
import os
import random
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support import console, pages, trials
from support.intervals import all_of, negated, verdict, worth
from support.pages import Panel, Question, points, share
from support.trials import AT_START, FOUR, Missing, Results, Run
from tiny import language

REPORTED = "drawing 3"
SETS = {REPORTED: "--held-out 3 --items 6000"}
WAYS = {  # a column or a panel -> how answers are asked for, of which instructions
    "sampled": ("sampled", REPORTED), "greedy": ("greedy", REPORTED),
    "pass@8": ("pass@8", REPORTED), "chains of four": ("sampled", FOUR)}
QUICKER = 25  # --quick divides steps and pairs by it
QUICK = f" --quick: one seed, a {QUICKER}th of the steps, 500 instructions"


def play(name, steps, flags="", game="lsp", **more):
    """A Run of selfplay.py."""
    return Run(name, " ".join(f"selfplay.py --game {game} --steps {steps} {flags}".split()), **more)


LSP, ZERO = play("LSP", 500, seeds=5), play("LSP-Zero", 500, game="lsp-zero")
GRPO = play("GRPO on endless data", 500, game="grpo", seeds=5)  # 5: claim 2 straddled with three
RANDOM = play("LSP, random Challenger", 500, "--alpha-ch 0")
PAID = {pay: play(f"LSP paid {pay}", 500, f"--pay {pay}")
        for pay in ("r-zero", "absolute-zero", "sqlm", "spice")}


# --------------------------------------------------------------------------------------------------
# How much data is it worth?

def instructions(n):
    """A function seed -> n instructions with their answers. More of them begin with the same."""
    def rows(seed):
        rng, found = random.Random(f"instructions {seed}"), {}
        while len(found) < n:
            found[language.draw(rng)] = None
        return [{"question": query, "answer": language.solve(query)} for query in found]
    return rows


ON_DATA = {n: play(f"GRPO on {n}", 500, game="grpo", data=instructions(n))
           for n in (32, 64, 128, 256, 1024, 4096)}


def improves(run):
    """A claim's function: does a run, sampled, gain over the start?"""
    return lambda r: (verdict(r.gain(run)), f"sampled {points(r.gain(run))}, greedy "
                      f"{points(r.gain(run, 'greedy'))}")


def beats(run, other, way="sampled", worse_by=0.0):
    """A claim's function: is a run right more often than another, or at most so much less?"""
    def judge(r):
        gain = r.gain(run, way, over=other)
        return verdict(gain, worse_by), f"{run.name} minus {other.name}, {way}: {points(gain)}"
    return judge


def differences(runs, other, way="sampled"):
    """A finding: what each run gains over another. It was not declared, so it has no verdict."""
    def judge(r):
        gains = [f"{run.name} {points(r.gain(run, way, over=other))}" for run in runs]
        return "", f"looked at afterwards: {'; '.join(gains)}"
    return judge


def worth_of(run):
    """A finding: as how many instructions of data a run is worth, each way."""
    def judge(r):
        found = []
        for title, (way, of) in WAYS.items():
            q = r._replace(instructions=of)
            sizes = [n for n, other in ON_DATA.items() if q.has(other)]
            if len(sizes) < 2:
                raise Missing("GRPO on two sizes of data")
            curve = [q.items(ON_DATA[n], way) for n in sizes]
            found.append(f"{title} {between(*worth(sizes, curve, q.items(run, way)), sizes)}")
        return "", "; ".join(found)
    return judge


def between(n, low, high, sizes):
    """A number of instructions with its interval, as text. 0 and inf lie beyond the sizes."""
    n, low, high = (f"less than {sizes[0]:,}" if x == 0 else f"more than {sizes[-1]:,}"
                    if x > sizes[-1] else f"{x:,.0f}" for x in (n, low, high))
    return f"{n} [{low}, {high}]"


def on_chains_of_four(r):
    """Not in the papers: does it help with instructions longer than any in training?"""
    gains = [(run, r._replace(instructions=FOUR).gain(run)) for run in (LSP, GRPO)]
    return verdict(gains[0][1]), ", ".join(f"{run.name} {points(gain)}" for run, gain in gains)


def worth_panels(r):
    """Gains over the start by the size of the data; self-play, which has none, is a band."""
    def panel(title, way, of):
        q = r._replace(instructions=of)
        there = {n: run for n, run in ON_DATA.items() if q.has(run)}
        line = [*there], [q.gain(run, way) for run in there.values()]
        bands = {run.name: q.gain(run, way) for run in (LSP, ZERO, GRPO) if q.has(run)}
        return Panel(f"{title}: gain, points", {"GRPO on n": line}, "n, instructions to learn from",
                     bands, log=True)
    return [panel(title, *how) for title, how in WAYS.items()]


WORTH = Question(
    "How much data is self-play worth?",
    "GRPO learns from a fixed set of n instructions, or from endless fresh ones; LSP and LSP-Zero "
    "learn from none. All play as many games: 500 steps of 32 queries and 16 answers. Each seed "
    "draws a set of its own. The size at which GRPO's curve reaches LSP says what LSP is worth "
    "(a curve that never falls is fitted to GRPO's, and read on a logarithmic axis; the interval "
    "is a bootstrap over seeds and instructions).",
    [LSP, ZERO, GRPO, *ON_DATA.values()],
    [("1. LSP improves the start without data", improves(LSP)),
     ("1b. So does LSP-Zero", improves(ZERO)),
     ("2. LSP comes within a point of GRPO on endless data", beats(LSP, GRPO, worse_by=1.0)),
     ("2b. The same, greedy", beats(LSP, GRPO, "greedy", 1.0)),
     ("2c. LSP minus GRPO on 4,096 instructions, greedy",
      differences([LSP], ON_DATA[4096], "greedy")),
     ("LSP is worth so many instructions", worth_of(LSP)),
     ("LSP-Zero is worth so many", worth_of(ZERO)),
     ("10. LSP also improves chains one operation longer than any in training",
      on_chains_of_four)],
    worth_panels)


# --------------------------------------------------------------------------------------------------
# Does it go on?

KEPT = "--keep-every 500"  # models on the way, which are scored, too
LONG = {500: LSP, 1000: play("LSP, 1,000 steps", 1000),
        2500: play("LSP, 2,500 steps", 2500, KEPT, seeds=5),
        5000: play("LSP, 5,000 steps", 5000),
        10000: play("LSP, 10,000 steps", 10000, seeds=1)}
LONG_GRPO = {500: GRPO, 1000: play("GRPO, 1,000 steps", 1000, game="grpo"),
             2500: play("GRPO, 2,500 steps", 2500, KEPT, game="grpo", seeds=5),
             5000: play("GRPO, 5,000 steps", 5000, game="grpo")}
LONG_R_ZERO = play("LSP paid r-zero, 2,500 steps", 2500, f"{KEPT} --pay r-zero")
LONG_RANDOM = play("LSP, random Challenger, 2,500 steps", 2500, "--alpha-ch 0")
RESTARTED = [LSP]  # the result becomes start, judge and reference
for i in range(2, 6):
    RESTARTED.append(play(f"LSP, restart {i - 1}", 500, after=RESTARTED[-1]))
THEN_LSP = play("GRPO, then LSP", 500, after=GRPO)
THEN_GRPO = play("LSP, then GRPO", 500, game="grpo", after=LSP)


def goes_on_panels(r):
    """Gains over the start by steps, and how the longest runs change on the way."""
    def line(q, runs, way):
        there = {steps: run for steps, run in runs.items() if q.has(run)}
        return [*there], [q.gain(run, way) for run in there.values()]
    panels, restarts = [], {500 * (i + 1): run for i, run in enumerate(RESTARTED)}
    for title, (way, of) in WAYS.items():
        q = r._replace(instructions=of)
        lines = {"LSP": LONG, "LSP paid r-zero": {500: PAID["r-zero"], 2500: LONG_R_ZERO},
                 "GRPO on endless data": LONG_GRPO,
                 "random Challenger": {500: RANDOM, 2500: LONG_RANDOM}, "LSP, restarted": restarts}
        panels.append(Panel(f"{title}: gain, points",
                            {k: line(q, v, way) for k, v in lines.items()}, "steps", log=True))
    return [*panels, *(way_panel(r, way) for way in ("sampled", "greedy", "pass@8")),
            *curve_panels(r, [LONG[2500], LONG_R_ZERO, LONG_GRPO[2500], LONG_RANDOM, LONG[5000],
                              LONG[10000]],
                          ("reward", "valid", "spread", "agreement", "similarity",
                           "entropy_solver"))]


def way_panel(r, way):
    """The gains on the way through 2,500 steps, of the models that were kept."""
    lines = {}
    for run in filter(r.has, (LONG[2500], LONG_R_ZERO, LONG_GRPO[2500])):
        first = r.results(run)[0]
        names = [model["name"] for model in first["models"]]  # step-500, .., model
        last = re.search(r"--steps (\d+)", first["command"])[1]
        steps = [int(name.partition("-")[2] or last) for name in names]
        lines[run.name] = steps, [r.gain(run, way, model=i) for i in range(len(names))]
    return Panel(f"on the way, {way}: gain, points", lines, "step")


def curve_panels(r, runs, keys=("reward", "valid", "spread", "agreement")):
    """Panels of curves over the tenths of the steps."""
    titles = {"reward": "mean reward", "valid": "well-formed queries", "spread":
              "groups with spread", "agreement": "judge prefers the right answer",
              "similarity": "what queries have in common",
              "entropy_solver": "entropy of answers, nats a token"}
    tenths, panels = [i + 0.5 for i in range(trials.TENTHS)], []
    for key in keys:
        lines = {}
        for run in runs:
            try:
                lines[run.name] = tenths, [[x, x, x] for x in r.curve(run, key)]
            except Missing:
                lines[run.name] = [], []  # the other runs keep their colours
        panels.append(Panel(titles[key], lines, "tenth of the steps"))
    return panels


GOES_ON = Question(
    "Does it go on?",
    "Runs of 500 steps, and longer ones, whose learning-rate schedule is stretched to fit. Three "
    "of those of 2,500 steps are scored at steps 500, 1,000, 1,500 and 2,000, too, before the "
    "learning rate has decayed. A random (untrained) Challenger does not learn from its queries "
    "(alpha_Ch 0). In a restart, the result of 500 steps becomes the start, the judge and the "
    "reference of the next 500.",
    [*LONG.values(), *LONG_GRPO.values(), PAID["r-zero"], LONG_R_ZERO, RANDOM, LONG_RANDOM,
     *RESTARTED[1:], THEN_LSP, THEN_GRPO],
    [("LSP goes on from 500 to 2,500 steps, sampled", beats(LONG[2500], LSP)),
     ("The same, greedy", beats(LONG[2500], LSP, "greedy")),
     ("LSP goes on from 2,500 to 5,000 steps, sampled", beats(LONG[5000], LONG[2500])),
     ("The same, greedy", beats(LONG[5000], LONG[2500], "greedy")),
     ("At 2,500 steps LSP is within a point of GRPO on endless data, sampled",
      beats(LONG[2500], LONG_GRPO[2500], worse_by=1.0)),
     # Declared before a run of 5,000 steps had been scored.
     ("The same at 5,000 steps", beats(LONG[5000], LONG_GRPO[5000], worse_by=1.0)),
     ("GRPO on endless data goes on from 2,500 to 5,000 steps, sampled",
      beats(LONG_GRPO[5000], LONG_GRPO[2500])),
     ("The same, greedy", beats(LONG_GRPO[5000], LONG_GRPO[2500], "greedy")),
     ("1,000 steps of LSP minus as many of GRPO, sampled",
      differences([LONG[1000]], LONG_GRPO[1000])),
     ("1,000 steps of LSP minus 500, sampled", differences([LONG[1000]], LSP)),
     # Declared when the Challenger of the first runs of 2,500 steps had come to ask too hard.
     ("In 2,500 steps, paid for queries at the frontier (r-zero), LSP gets further, sampled",
      beats(LONG_R_ZERO, LONG[2500])),
     ("The same, greedy", beats(LONG_R_ZERO, LONG[2500], "greedy")),
     ("It is within a point of GRPO on endless data, sampled",
      beats(LONG_R_ZERO, LONG_GRPO[2500], worse_by=1.0)),
     # Declared when the first run of 2,500 steps paid r-zero had been seen, too.
     ("A Challenger paid r-zero teaches more in 2,500 steps than one that does not learn, sampled",
      beats(LONG_R_ZERO, LONG_RANDOM)),
     ("The same, greedy", beats(LONG_R_ZERO, LONG_RANDOM, "greedy")),
     ("2,500 steps of LSP minus as many with that random Challenger, sampled",
      differences([LONG[2500]], LONG_RANDOM)),
     ("The same, greedy", differences([LONG[2500]], LONG_RANDOM, "greedy")),
     ("Five starts of 500 steps get further than one of 2,500, greedy",
      beats(RESTARTED[-1], LONG[2500], "greedy")),
     ("The last restart minus the first start, greedy",
      differences(RESTARTED[-1:], AT_START, "greedy")),
     ("Each restart minus LSP, sampled", differences(RESTARTED[1:], LSP)),
     ("The same, greedy", differences(RESTARTED[1:], LSP, "greedy")),
     ("5. Self-play after GRPO improves on GRPO alone", beats(THEN_LSP, GRPO)),
     ("5b. That minus 1,000 steps of GRPO, sampled", differences([THEN_LSP], LONG_GRPO[1000])),
     ("The same, greedy", differences([THEN_LSP], LONG_GRPO[1000], "greedy")),
     # Declared before the first run of LSP, then GRPO.
     ("GRPO after LSP comes within a point of 1,000 steps of GRPO, sampled",
      beats(THEN_GRPO, LONG_GRPO[1000], worse_by=1.0)),
     ("The same, greedy", beats(THEN_GRPO, LONG_GRPO[1000], "greedy", 1.0))],
    goes_on_panels, {"reward": "reward", "valid": "well-formed", "spread": "spread",
                     "agreement": "judge right", "distinct": "distinct"})


# --------------------------------------------------------------------------------------------------
# Is it learning, or sharpening?

OWN = "--judge recipes/own_answer.py:agrees"
MORE_QUERIES = play("LSP, 64 queries", 500, "--queries 64")
MORE_QUERIES_NO_JUDGE = play("LSP-Zero, 64 queries, paid r-zero", 500,
                             "--queries 64 --pay r-zero", game="lsp-zero")
HOTTER = play("LSP, temperature 1.2", 500, "--temperature 1.2")
FASTER = play("LSP, rate 3e-4", 500, "--lr 3e-4")
DIVIDED = play("LSP, divided by the deviation", 500, "--advantage std")
ZERO_DIVIDED = play("LSP-Zero, divided by the deviation", 500, "--advantage std", game="lsp-zero")
OWN_JUDGE = [play("LSP, the judge answers itself", 500, OWN),
             play("LSP, the judge answers itself, for the Solver alone", 500,
                  f"{OWN} --quality-challenger 0")]
VARIANTS = [
    LSP, ZERO, RANDOM, *PAID.values(),
    play("LSP, 32 answers", 500, "--answers 32"), MORE_QUERIES,
    play("LSP, no KL", 500, "--kl 0"), play("LSP, KL 0.02", 500, "--kl 0.02"),
    HOTTER, FASTER, DIVIDED, play("LSP, mean over tokens", 500, "--aggregate mean"),
    *OWN_JUDGE,
    play("LSP, 32 answers, no KL, paid r-zero", 500, "--answers 32 --kl 0 --pay r-zero"),
    play("LSP, 64 queries, paid r-zero", 500, "--queries 64 --pay r-zero"),
    MORE_QUERIES_NO_JUDGE]
LONGER = [LONG[1000], LONG[2500], LONG_R_ZERO, LONG_RANDOM]


def moves_greedy(runs, by):
    """A claim's function: does any of some runs gain so many points greedy?

    No: all seeds of each have been played, and the interval of each ends below. That needs no
    correction, as all must say so. Yes: one lies above with an interval for so many tries.
    """
    def judge(r):
        seeds = {run: len(r._replace(least=1).seeds(run)) if r.has(run) else 0 for run in runs}
        there = [run for run in runs if seeds[run] >= r.least]
        if not there:
            raise Missing("all variants")
        strict = r._replace(outside=r.outside / len(runs))
        left = sum(seeds[run] < run.seeds for run in runs)
        gains = {run: r.gain(run, "greedy") for run in there}
        above = [run for run in there if verdict(strict.gain(run, "greedy"), -by) == "yes"]
        if above:
            gains, said = {run: strict.gain(run, "greedy") for run in above}, "yes"
        elif not left and all(verdict(gain, -by) == "no" for gain in gains.values()):
            said = "no"
        else:
            said = "not decided"
        best = max(gains, key=lambda run: gains[run][0])
        more = f" ({left} {'lacks' if left == 1 else 'lack'} seeds)" if left else ""
        return said, (f"the best of {len(runs)}{more} is {best.name}: {points(gains[best])} in "
                      f"{r.minutes(best):.1f} minutes of one thread")
    return judge


def learning_panels(r):
    """What moves the best answer, and what all answers. The table has the minutes."""
    return [gains_panel(r, LEARNING.runs, ways) for ways in (("greedy", "pass@8"), ("sampled",))]


def gains_panel(r, runs, ways=("sampled", "greedy")):
    """The gains of runs over the start, by name."""
    runs = [run for run in runs if r.has(run)]
    gains = {way: (range(len(runs)), [r.gain(run, way) for run in runs]) for way in ways}
    return Panel("gain over the start, points", gains, names=[run.name for run in runs])


LEARNING = Question(
    "Is it learning, or sharpening?",
    "A model that is only surer of its answers gains sampled, not greedy, and pass@8 falls. Each "
    "variant of 500 steps changes one thing of LSP, or a few, as its name says. Those of 64 "
    "queries a step play twice as many games (a query and its answers). For the verdict that no "
    "variant gains four (or eight) points, all must have been played, and the interval of each "
    "must end below that. For the verdict that one does, its interval is corrected for the number "
    "of variants.",
    [*VARIANTS, ZERO_DIVIDED, *LONGER],
    [("LSP gains greedy in 500 steps", lambda r: (
        verdict(r.gain(LSP, "greedy")), points(r.gain(LSP, "greedy")))),
     ("A variant of 500 steps gains four points greedy", moves_greedy(VARIANTS, 4.0)),
     ("A variant gains eight points greedy", moves_greedy(VARIANTS + LONGER, 8.0)),
     # These two were declared when one seed of 64 queries had been played.
     ("64 queries a step gain more than 32, greedy, in twice the games",
      beats(MORE_QUERIES, LSP, "greedy")),
     ("64 queries a step gain more than as many games in 1,000 steps, greedy",
      beats(MORE_QUERIES, LONG[1000], "greedy")),
     ("64 queries, paid r-zero, and no judge: minus LSP, greedy",
      differences([MORE_QUERIES_NO_JUDGE], LSP, "greedy")),
     ("As many games of GRPO on endless data, minus that, greedy",
      differences([LONG_GRPO[1000]], MORE_QUERIES_NO_JUDGE, "greedy")),
     ("Hotter, faster, or divided by the deviation as GRPO is: minus LSP, sampled",
      differences([HOTTER, FASTER, DIVIDED], LSP)),
     ("The same, greedy", differences([HOTTER, FASTER, DIVIDED], LSP, "greedy")),
     ("The judge answers itself: minus LSP, sampled", differences(OWN_JUDGE, LSP)),
     ("The same, greedy", differences(OWN_JUDGE, LSP, "greedy")),
     # These two were declared when LSP so divided had been played. LSP-Zero has no judge.
     ("Divided, LSP-Zero gains more than LSP, greedy", beats(ZERO_DIVIDED, DIVIDED, "greedy")),
     ("Divided, LSP-Zero comes within a point of itself, greedy",
      beats(ZERO_DIVIDED, ZERO, "greedy", worse_by=1.0)),
     ("LSP gains in pass@8, too", lambda r: (
         verdict(r.gain(LSP, "pass@8")), points(r.gain(LSP, "pass@8"))))],
    learning_panels, {"entropy_solver": "entropy", "kl_solver": "KL", "agreement": "judge right"})


# --------------------------------------------------------------------------------------------------
# What does the self-reward do?

EAGER = "--alpha-ch 0.03"  # large enough for LSP and LSP-Zero to drift apart in 900 steps
WEIGHTS = {  # whom the quality self-reward is given to, with which weight
    "quality 0.25": "--quality 0.25", "quality 4": "--quality 4",
    "self-reward for the Solver alone": "--quality-challenger 0",
    "self-reward for the Challenger alone": "--quality 0 --quality-challenger 1"}
WEIGHED = {name: play(f"LSP, {name}", 500, flags) for name, flags in WEIGHTS.items()}
EAGER_ZERO = play("LSP-Zero, eager", 900, EAGER, game="lsp-zero")
EAGER_LSP = play("LSP, eager", 900, EAGER)
EAGER_WEIGHED = {name: play(f"LSP, eager, {name}", 900, f"{EAGER} {flags}")
                 for name, flags in WEIGHTS.items()}
WRITES = "--judge recipes/written_grade.py:writes"
WRITTEN = play("LSP, grades written", 500, WRITES)
EAGER_WRITTEN = play("LSP, eager, grades written", 900, f"{EAGER} {WRITES}")
CHALLENGER_ALONE = EAGER_WEIGHED["self-reward for the Challenger alone"]
SOLVER_ALONE = EAGER_WEIGHED["self-reward for the Solver alone"]
LIGHT, HEAVY = EAGER_WEIGHED["quality 0.25"], EAGER_WEIGHED["quality 4"]


def degenerates(r):
    """LSP: without the quality reward, the Challenger ends up writing nonsense."""
    rise, valid = r.gain(EAGER_ZERO), r.end(EAGER_ZERO, "valid", over=EAGER_ZERO, then=0)
    return (all_of(verdict(rise), verdict(negated(valid))),
            f"it gains {points(rise)}; well-formed queries {share(valid)} from the first tenth to "
            "the last")


def ends_higher(run, other, key):
    """A claim's function: is a run's figure higher than another's, in the last tenth?"""
    def judge(r):
        more = r.end(run, key, over=other)
        return verdict(more), f"{run.name} minus {other.name}: {share(more)}"
    return judge


SELF_REWARD = Question(
    "What does the self-reward do?",
    "The quality self-reward R_Q with weight 0 (LSP-Zero), 0.25, 1 (LSP) and 4, and given to one "
    "player alone. Then, in place of the expected grade, one that is drawn for each answer (grades "
    "written). All of it once as usual (alpha_Ch 0.005), and once with an eager Challenger, whose "
    "loss has six times that weight (0.03), for 900 steps. In these, fewer of LSP-Zero's queries "
    "stay well formed.",
    [ZERO, LSP, *WEIGHED.values(), WRITTEN,
     EAGER_ZERO, EAGER_LSP, *EAGER_WEIGHED.values(), EAGER_WRITTEN],
    [("3. LSP-Zero improves, then its queries degenerate (eager)", degenerates),
     ("4a. The self-reward prevents this: more well-formed queries at the end",
      ends_higher(EAGER_LSP, EAGER_ZERO, "valid")),
     ("4b. At the end LSP has more right answers than LSP-Zero", beats(EAGER_LSP, EAGER_ZERO)),
     ("4c. Given to the Challenger alone, it keeps queries well formed, too",
      ends_higher(CHALLENGER_ALONE, EAGER_ZERO, "valid")),
     ("4d. Given to the Challenger alone, the model is right more often than with both",
      beats(CHALLENGER_ALONE, EAGER_LSP)),
     # These three were declared before their new runs; the other claims had been seen.
     ("4e. With both, more queries are well formed than with the Solver alone",
      ends_higher(EAGER_LSP, SOLVER_ALONE, "valid")),
     ("4f. Eager, weight 4 keeps more queries well formed than weight 0.25",
      ends_higher(HEAVY, LIGHT, "valid")),
     ("4g. Eager, with weight 0.25 the model is right more often than with weight 4",
      beats(LIGHT, HEAVY)),
     ("4h. As usual, each weight minus LSP, sampled", differences(WEIGHED.values(), LSP)),
     ("The same, greedy", differences(WEIGHED.values(), LSP, "greedy")),
     ("4i. Eager, each weight minus LSP-Zero, sampled",
      differences(EAGER_WEIGHED.values(), EAGER_ZERO)),
     ("4j. Given to the Challenger alone minus to the Solver alone, sampled",
      differences([CHALLENGER_ALONE], SOLVER_ALONE)),
     # These four were declared before any of their own runs; all others had been played.
     ("4k. Where grades are written, LSP comes within a point of LSP as it is, sampled",
      beats(WRITTEN, LSP, worse_by=1.0)),
     ("The same, greedy", beats(WRITTEN, LSP, "greedy", 1.0)),
     ("4l. Eager, where grades are written, LSP comes within a point, too, sampled",
      beats(EAGER_WRITTEN, EAGER_LSP, worse_by=1.0)),
     ("4m. Eager, written grades keep queries well formed, too",
      ends_higher(EAGER_WRITTEN, EAGER_ZERO, "valid"))],
    lambda r: [gains_panel(r, SELF_REWARD.runs),
               *curve_panels(r, SELF_REWARD.runs[-7:], ("valid", "reward", "spread"))],
    {"valid": "well-formed", "reward": "reward", "spread": "spread", "agreement": "judge right"})


# --------------------------------------------------------------------------------------------------
# Does it matter how the Challenger is paid?

EAGER_500 = play("LSP, eager, 500 steps", 500, EAGER)
EAGER_PAID = {pay: play(f"LSP paid {pay}, eager", 500, f"{EAGER} --pay {pay}") for pay in PAID}


def how_diverse(r):
    """Not in the papers: does the Challenger's pay change how alike its queries are?"""
    runs = [run for run in PAYS.runs if r.has(run)]
    return "", "; ".join(f"{run.name} {r.curve(run, 'similarity')[-1]:.2f}" for run in runs)


PAYS = Question(
    "Does it matter how the Challenger is paid?",
    "Five pays of five papers, and a Challenger that does not learn. LSP pays most for the "
    "hardest queries (minimax), the others for those at the frontier, which are answered right now "
    "and then. Once with the usual alpha_Ch of 0.005, and once with an eager Challenger (0.03).",
    [RANDOM, LSP, *PAID.values(), EAGER_500, *EAGER_PAID.values()],
    [("9. Paying for queries at the frontier (r-zero) beats paying for the hardest (minimax)",
      beats(PAID["r-zero"], LSP)),
     ("9b. The same with an eager Challenger", beats(EAGER_PAID["r-zero"], EAGER_500)),
     ("9c. A Challenger that learns beats a random one", beats(LSP, RANDOM)),
     ("9d. The same with an eager Challenger, paid r-zero", beats(EAGER_PAID["r-zero"], RANDOM)),
     ("9e. Each eager pay minus LSP, eager, sampled", differences(EAGER_PAID.values(), EAGER_500)),
     ("8. Share of pieces that two queries of a step have in common, in the last tenth",
      how_diverse)],
    lambda r: [gains_panel(r, PAYS.runs),
               *curve_panels(r, [RANDOM, EAGER_500, *EAGER_PAID.values()],
                             ("reward", "valid", "spread", "similarity"))],
    {"reward": "reward", "valid": "well-formed", "spread": "spread", "distinct": "distinct"})


# --------------------------------------------------------------------------------------------------
# SPIN where its paper stood

PAIRS = 5000


def own_answers(seed):
    """The very answers that the start was fine-tuned on, some of them careless. For any seed."""
    solver = [(messages, reply) for part, messages, reply in language.fine_tuning_set(8 * PAIRS)
              if part == "solver"][:4 * PAIRS]
    return [{"question": messages[0]["content"], "answer": reply} for messages, reply in solver]


def spin_runs(suffix, **data):
    """(SPIN, more fine-tuning, SPIN in one long iteration) on some answers."""
    return (Run(f"SPIN{suffix}", f"spin.py --pairs {PAIRS}", **data),
            Run(f"more fine-tuning{suffix}", f"spin.py --game sft --pairs {PAIRS}", **data),
            Run(f"SPIN{suffix}, one long iteration",
                f"spin.py --pairs {PAIRS} --iterations 1 --epochs 14", **data))


SPIN, FINE_TUNING, ONE_LONG = spin_runs("")
OWN_SPIN, OWN_FINE_TUNING, OWN_LONG = spin_runs(" on its own data", data=own_answers)
SIX_EPOCHS = Run("more fine-tuning on its own data, six epochs",
                 f"spin.py --game sft --pairs {4 * PAIRS} --iterations 1 --epochs 6",
                 data=own_answers)


def shrinks(run):
    """A claim's function. SPIN: each iteration adds less. The first is compared with the last."""
    def judge(r):
        seeds, number = r.seeds(run, AT_START), len(r.results(run)[0]["models"])
        levels = [r.items(AT_START, seeds=seeds)]
        levels += [r.items(run, seeds=seeds, model=t) for t in range(number)]
        steps = [after - before for before, after in zip(levels, levels[1:])]
        shrink = r.percent(steps[0] - steps[-1])
        return (all_of(verdict(r.gain(run)), verdict(shrink)), "gain of each iteration "
                + ", ".join(points(r.percent(step)) for step in steps)
                + f"; the first minus the last: {points(shrink)}")
    return judge


def spin_panels(r):
    """Gains over the start after each iteration, on right answers and on its own data."""
    def panel(title, runs, way):
        lines = {}
        for run in filter(r.has, runs):
            number = len(r.results(run)[0]["models"])
            gains = [r.gain(run, way, model=t) for t in range(number)]
            lines[run.name] = range(number + 1), [[0.0, 0.0, 0.0], *gains]
        return Panel(f"{title}, {way}: gain, points", lines, "iterations")
    own = (OWN_SPIN, OWN_FINE_TUNING, OWN_LONG, SIX_EPOCHS)
    return [panel(title, runs, way) for way in ("sampled", "greedy") for title, runs in (
        ("right answers", (SPIN, FINE_TUNING, ONE_LONG)), ("its own data", own))]


SPIN_PAPER = Question(
    "Does SPIN go past fine-tuning where its paper stood?",
    "The paper's start was fine-tuned on the very answers that SPIN then used, and some of those "
    "are poor. So SPIN and more fine-tuning are played twice: on answers that are all right, and "
    f"on the start's own fine-tuning data, of which {100 * language.CARELESS:.0f} % are careless.",
    [SPIN, FINE_TUNING, ONE_LONG, OWN_SPIN, OWN_FINE_TUNING, OWN_LONG, SIX_EPOCHS],
    [("6a. SPIN improves, and its gains shrink", shrinks(SPIN)),
     ("6b. SPIN gets further than more fine-tuning", beats(SPIN, FINE_TUNING)),
     ("6c. On its own data SPIN improves, and its gains shrink", shrinks(OWN_SPIN)),
     ("6d. On its own data SPIN gets further than more fine-tuning",
      beats(OWN_SPIN, OWN_FINE_TUNING)),
     ("6e. On its own data SPIN gets further than six epochs of fine-tuning",
      beats(OWN_SPIN, SIX_EPOCHS)),
     ("7. Training longer inside iteration 0 does not replace iterations", beats(SPIN, ONE_LONG)),
     ("7b. The same on its own data", beats(OWN_SPIN, OWN_LONG))],
    spin_panels)

QUESTIONS = {"worth": WORTH, "goes-on": GOES_ON, "learning": LEARNING,
             "self-reward": SELF_REWARD, "pays": PAYS, "spin": SPIN_PAPER}


# --------------------------------------------------------------------------------------------------
# The command

def wanted_of(question, args):
    """{Run: how many seeds of it are wanted}. Of the start, as many as of any."""
    wanted = {run: 1 if args.quick else args.seeds or run.seeds for run in question.runs}
    return {AT_START: max(wanted.values())} | wanted


def quicker(run):
    """The same run for --quick."""
    command = re.sub(r"--(steps|pairs|keep-every) (\d+)",
                     lambda m: f"--{m[1]} {max(10, int(m[2]) // QUICKER)}", run.command)
    return run._replace(command=command, after=run.after and quicker(run.after))


def rough_minutes(run, found):
    """About how long a run takes on one thread: as another seed of it did, else a guess."""
    known = [result["minutes"] for (slug, _), result in found.items()
             if slug == run.slug and result["command"] == run.command and "minutes" in result]
    if known or not run.command:
        return (known or [0])[0]
    flags = dict(re.findall(r"--([\w-]+) (\S+)", run.command))
    if "pairs" in flags:
        return int(flags["pairs"]) / PAIRS * (int(flags.get("iterations", 4))
                                              * int(flags.get("epochs", 2)) / 8) * 3
    seconds = {"lsp": 0.55, "lsp-zero": 0.5, "grpo": 0.36}[flags["game"]]  # a step of 32 x 16
    games = int(flags.get("queries", 32)) * (8 + int(flags.get("answers", 16)) / 2) / 512
    return int(flags["steps"]) * seconds * games / 60


def trials_of(question, args):
    """[(Run, seed)]: the first seed of every run, then the second, .. In each the longest first."""
    runs = sorted(question.runs, key=lambda run: -rough_minutes(run, {}))
    wanted = wanted_of(question, args)
    return [(quicker(run) if args.quick else run, trials.FIRST_SEED + s)
            for s in range(wanted[AT_START]) for run in (AT_START, *runs) if s < wanted[run]]


def cost(queue, wanted, quick):
    """(trials without a result, about how many minutes of one thread they take)."""
    missing = [(run, seed) for run, seed in wanted if not queue.is_done(run, seed)]
    models = sum(4 if run.command.startswith("spin") else 5 if KEPT in run.command else 1
                 for run, _ in missing)
    asking = models * (0.3 if quick else 0.7)  # minutes for the scores of a model
    return missing, asking + sum(rough_minutes(run, queue.found) for run, _ in missing)


def open_folder(name):
    """The folder of all runs, made if it is not there. Raises UserError.

    It belongs to one start: runs of another one are refused.
    """
    out = Path(name).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise console.UserError(
            f"--out {name}: cannot be made a folder ({error.strerror})") from None
    mark, weights = out / "start.txt", trials.start_weights()
    if mark.is_file() and mark.read_text(encoding="utf-8").strip() != weights:
        raise console.UserError(f"{out} holds runs of another start: choose another --out")
    mark.write_text(weights + "\n", encoding="utf-8")
    return out


def write_up(name, question, results, args):
    """Write the page and the picture of a question from the results there are."""
    r = Results(trials.read_results(results), REPORTED)
    if not r.has(AT_START):
        raise console.UserError(f"{results}: no results of the start yet; leave --draw out")
    pages.draw(results / f"{name}.png", question.title, question.panels(r))
    path = results / f"{name}.md"
    text = pages.page(name, question, r, wanted_of(question, args), QUICK if args.quick else "")
    path.write_text(text, encoding="utf-8")
    print(text)
    print(f"the same in {path}")


def parse_args(argv=None):
    """The command's settings. --quick changes the defaults of the folders."""
    parser = argparse.ArgumentParser(
        prog="claims.py", description="Play what a question about the papers' claims needs, and "
        "write its page.", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False)
    whole = console.positive(int)
    parser.add_argument("name", nargs="?", choices=list(QUESTIONS), metavar="NAME",
                        help=f"one of {', '.join(QUESTIONS)}; without it they are listed")
    parser.add_argument("--seeds", type=whole, default=argparse.SUPPRESS,
                        help="seeds of each run (default: as declared, mostly 3)")
    parser.add_argument("--quick", action="store_true",
                        help=f"one seed, a {QUICKER}th of the steps and 500 instructions, into "
                             "claims-quick: it shows the shape, and decides nothing")
    parser.add_argument("--draw", action="store_true",
                        help="play nothing: write the page from the results there are")
    parser.add_argument("--jobs", type=whole, default=os.cpu_count(),
                        help="runs at once, one thread each")
    parser.add_argument("--out", default="claims",
                        help="folder for all runs; the same command continues (--quick: "
                             "claims-quick)")
    parser.add_argument("--results", default=str(Path("docs") / "results"),
                        help="folder for results and pages, below the project's (--quick: "
                             "claims-quick/results)")
    if parser.parse_args(argv).quick:
        parser.set_defaults(out="claims-quick", results=str(Path("claims-quick") / "results"))
    args = parser.parse_args(argv)
    args.seeds = getattr(args, "seeds", None)
    return args


def listed(args, results):
    """What the questions cost, each alone and all together, as text. Raises UserError."""
    lines, every = [], {}
    for name, question in QUESTIONS.items():
        queue, wanted = trials.Queue(args.out, results, name, {}), trials_of(question, args)
        every |= {(run.slug, seed): (run, seed) for run, seed in wanted}
        lines += [f"{name:<12} {question.title}", f"{'':12} {costs(queue, wanted, args)}"]
    return "\n".join([*lines, f"{'all':<12} {costs(queue, every.values(), args)}"])


def costs(queue, wanted, args):
    """What `cost` says, as text."""
    missing, minutes = cost(queue, wanted, args.quick)
    return (f"{len(wanted)} runs, {len(missing)} of them to be played: about {minutes:,.0f} "
            "minutes of one thread")


def main(argv=None):
    """Play what is missing for a question, and write its page; without a name, list them all."""
    args = parse_args(argv)
    results = Path(args.results)
    if not args.quick:
        results = ROOT / results  # an absolute one stays as it is
    if args.name is None:
        return print(listed(args, results))
    question = QUESTIONS[args.name]
    if not args.draw:
        sets = {name: re.sub(r"--items \d+", "--items 500", flags) if args.quick else flags
                for name, flags in SETS.items()}
        queue = trials.Queue(open_folder(args.out), results, args.name, sets)
        wanted = trials_of(question, args)
        print(f"{question.title}\n{costs(queue, wanted, args)}, {args.jobs} at once", flush=True)
        queue.play_all(wanted, args.jobs)
    write_up(args.name, question, results, args)


if __name__ == "__main__":
    sys.exit(console.run_command(main))
