"""The pictures of README.md and docs/, drawn from runs: `python recipes/figures.py`.

It draws what it finds runs for in runs/, and says how to play the runs that it lacks:

    docs/curves.png      the curves of one run of LSP, seed 0
    docs/gains.png       right answers before and after, by seed
"""
import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support import console, report

SEEDS = (0, 1, 2)
# A run's name -> how it is played.
COMMANDS = {f"lsp-s{s}": f"selfplay.py --steps 500 --seed {s}" for s in SEEDS}
BEFORE, AFTER = report.COLOURS[:2]


def scores_of(run):
    """{player: {"sampled": [share, low, high], "greedy": ..}} of a run, in percent."""
    names = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["scores"]
    return {name: {key: [100 * x for x in kinds["all"][key]] for key in ("sampled", "greedy")}
            for name, kinds in names.items()}


def with_intervals(axis, places, points, **style):
    """Draw points [mean, low, high] with their intervals."""
    means = [mean for mean, _, _ in points]
    below = [mean - low for mean, low, _ in points]
    above = [high - mean for mean, _, high in points]
    axis.errorbar(places, means, [below, above], marker="o", capsize=3, **style)


def draw_gains(runs, path):
    """Right answers of the start and of the trained model, by seed."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.2, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    figure.suptitle("LSP, 500 steps: right answers of 1,000 held-out instructions, %", fontsize=11)
    for axis, key in zip(axes, ("sampled", "greedy")):
        axis.grid(alpha=0.25)
        for player, shift, colour in (("start", -0.07, BEFORE), ("now", 0.07, AFTER)):
            points = [scores_of(run)[player][key] for run in runs]
            with_intervals(axis, [i + shift for i in range(len(runs))], points, linestyle="",
                           color=colour, label={"start": "before", "now": "after"}[player])
        axis.set_xticks(range(len(runs)), [f"seed {s}" for s in SEEDS])
        axis.set_xlim(-0.5, len(runs) - 0.5)
        axis.set_ylim(45, 85)
        axis.set_title({"sampled": "temperature 1", "greedy": "greedy"}[key], fontsize=10)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=90)


def draw_curves(runs, path):
    """The picture that a run draws of itself."""
    report.picture(runs, path)


PICTURES = {  # picture -> (what draws it, the runs it needs)
    "curves.png": (draw_curves, ["lsp-s0"]),
    "gains.png": (draw_gains, [f"lsp-s{s}" for s in SEEDS]),
}


def main(argv=None):
    """Draw every picture whose runs are there; name the commands for the others."""
    parser = argparse.ArgumentParser(prog="figures.py", description=__doc__.split(":")[0] + ".",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--runs", default="runs", help="folder of the runs")
    parser.add_argument("--out", default=str(ROOT / "docs"), help="folder for the pictures")
    args = parser.parse_args(argv)
    if not Path(args.out).is_dir():
        raise console.UserError(f"--out {args.out}: no such folder")
    for name, (draw, needed) in PICTURES.items():
        runs = [Path(args.runs) / run for run in needed]
        missing = [run for run in runs if not (run / "curves.png").is_file()]  # it is drawn last
        for run in missing:
            print(f"{name} needs a finished run: python {COMMANDS[run.name]} --run {run.name}")
        if not missing:
            draw(runs, Path(args.out) / name)
            print(f"drawn: {Path(args.out) / name}")


if __name__ == "__main__":
    sys.exit(console.run_command(main))
