"""LSP, SPIN and their neighbours at equal sampled tokens: which gains most for what it samples?

    python recipes/neighbours.py             plays what has no result yet, and draws the table
    python recipes/neighbours.py --seeds 1   the first seed of each method alone
    python recipes/neighbours.py --draw      plays nothing

All start from the embedded default and sample about 250,000 tokens, queries and answers alike;
fine-tuning samples none, and learns from as many answers as SPIN. A method with fewer tokens than
its default has fewer steps. All are asked the same held-out instructions, by which no setting was
chosen. Results lie in docs/results/recipes/, one file a run (support/trials.py); the table goes
into docs/recipes.md, the picture beside it. The same command goes on where it was stopped.
"""
import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support import console, pages, trials
from support.trials import FIRST_SEED, Missing, Results, Run

PAGE, RESULTS = ROOT / "docs" / "recipes.md", ROOT / "docs" / "results"
SET = "drawing 1"  # of held-out instructions; the recipes' settings were looked at on drawing 0
SETS = {SET: "--held-out 1 --items 2000"}
HERE = ", equal tokens"  # claims.py has runs of the same games with other settings
START = Run("start" + HERE, "")

# {Run: what the method is told of the truth}
METHODS = {
    Run("GRPO" + HERE, "selfplay.py --game grpo --steps 80"): "queries; R",
    Run("LSP" + HERE, "selfplay.py --game lsp --steps 68"): "R",
    Run("self-training" + HERE, "recipes/self_training.py --steps 5"): "queries; R",
    Run("multiagent finetuning" + HERE, "recipes/multiagent.py --steps 5"): "queries",
    Run("LANCE" + HERE, "recipes/lance.py --steps 8"): "nothing",
    Run("R-Zero" + HERE, "recipes/r_zero.py --updates 7 --questions 256"): "nothing",
    Run("ReverseGen" + HERE, "recipes/reverse_gen.py --steps 5 --proposals 8192"):
        "which queries have an answer; R; right answers",
    Run("fine-tuning" + HERE, "spin.py --game sft --iterations 1 --pairs 40000 --epochs 1"):
        "queries; right answers",
    Run("SPIN" + HERE, "spin.py --iterations 2 --pairs 20000 --epochs 1"): "queries; right answers",
}


def table(r):
    """The table in Markdown, of trials.Results: one row a method, those that gain most first."""
    heads = ["method", "told", "seeds", "sampled tokens", "sampled, %", "gain",
             "gain per 100,000 tokens", "greedy, gain", "pass@8, gain", "minutes"]
    lines = [["start", "", f"{len(r.seeds(START))}", "", level(r, START), *[""] * 5],
             *(row(r, run) for run in ranked(r))]
    return "\n".join("| " + " | ".join(cells) + " |"
                     for cells in (heads, ["---"] * len(heads), *lines))


def ranked(r):
    """The methods that have results, those that gain most first."""
    return sorted((run for run in METHODS if has(r, run)), key=lambda m: -r.gain(m, over=START)[0])


def row(r, run):
    """The cells of one method."""
    tokens = sum(result["tokens"] for result in r.results(run)) / len(r.results(run))
    gain = r.gain(run, over=START)
    per = pages.points([1e5 * x / tokens for x in gain]) if tokens else ""
    return [run.name.removesuffix(HERE), METHODS[run], f"{len(r.seeds(run, START))}",
            f"{tokens:,.0f}", level(r, run), pages.points(gain), per,
            *(pages.points(r.gain(run, way, over=START)) for way in ("greedy", "pass@8")),
            f"{r.minutes(run):.1f}"]


def has(r, run):
    """Is there a result of a run, and one of the start with the same seed?"""
    try:
        return bool(r.seeds(run, START))
    except Missing:
        return False


def level(r, run):
    """Right answers at temperature 1 in percent, with their interval, as text."""
    return "{:.1f} [{:.1f}, {:.1f}]".format(*r.level(run))


def draw(r, page):
    """Put the table into a page between its marks, and the picture beside the page."""
    names = [run.name.removesuffix(HERE) for run in ranked(r)]
    panels = [pages.Panel("", {way: ([], [r.gain(run, way, over=START) for run in ranked(r)])},
                          names=names) for way in ("sampled", "greedy", "pass@8")]
    pages.draw(page.with_suffix(".png"), "gain over the start in points, with 95 % intervals, at "
               "equal sampled tokens", panels)
    marks = "<!-- table -->", "<!-- end of the table -->"
    parts = re.split("|".join(marks), page.read_text(encoding="utf-8"))
    if len(parts) != 3:
        raise console.UserError(f"{page}: no place for the table between {' and '.join(marks)}")
    text = f"{parts[0]}{marks[0]}\n{table(r)}\n{marks[1]}{parts[2]}"
    page.write_text(text, encoding="utf-8")


def parse_args(argv=None):
    """The command's settings."""
    parser = argparse.ArgumentParser(
        prog="recipes/neighbours.py", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    count = console.positive(int)
    parser.add_argument("--seeds", type=count, default=3, help="seeds of each method")
    parser.add_argument("--jobs", type=count, default=1, help="runs at once, one thread each")
    parser.add_argument("--most", type=count, default=argparse.SUPPRESS,
                        help="play so many runs at the most (default: all that are missing)")
    parser.add_argument("--draw", action="store_true",
                        help="play nothing: draw from the results that there are")
    parser.add_argument("--out", default="neighbours", help="folder for all runs")
    return parser.parse_args(argv)


def main(argv=None):
    """Play what is missing, the first seed of all methods first, and draw."""
    args = parse_args(argv)
    if not args.draw:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        queue = trials.Queue(args.out, RESULTS, "recipes", SETS)
        missing = [(run, FIRST_SEED + s) for s in range(args.seeds) for run in (START, *METHODS)
                   if not queue.is_done(run, FIRST_SEED + s)]
        queue.play_all(missing[:getattr(args, "most", None)], args.jobs)
    r = Results(trials.read_results(RESULTS), SET)
    if not has(r, START):
        raise console.UserError(f"{RESULTS / 'recipes'}: no results yet; leave --draw out")
    draw(r, PAGE)
    print(table(r))
    print(f"the same in {PAGE}, as a picture in {PAGE.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(console.run_command(main))
