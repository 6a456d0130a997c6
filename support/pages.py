"""The page and the picture of a question, from results: a table, its claims, and panels of curves.

All of it is computed from the values that it is given, a trials.Results and what is declared.
"""
import textwrap
from collections import Counter
from typing import Callable, NamedTuple

from support.report import COLOURS, PANELS
from support.trials import AT_START, FOUR, Missing


class Question(NamedTuple):
    """A question, and how it is answered."""
    title: str
    about: str  # a paragraph for its page
    runs: list  # trials.Runs; each has a row in the table
    claims: list  # (claim, Results -> (verdict, figures)); without a verdict it is a finding
    panels: Callable  # Results -> the Panels of the picture
    ends: dict = {}  # more columns: {figure of metrics.jsonl, in the last tenth: its name}


class Panel(NamedTuple):
    """A part of a picture. Points are [mean, low, high]."""
    title: str
    lines: dict  # {label: (xs, points)}
    x: str = ""  # what the xs are
    bands: dict = {}  # {label: one point, for all xs}
    log: bool = False
    names: list = []  # instead of a line over xs: bars to the right, each with its name


SEEDS = 3  # with fewer of them, a claim has no verdict
LEGEND = ("Right answers on held-out instructions, by which no setting was chosen; gains over the "
          "start in points, paired by instruction. *sampled*: at temperature 1, eight answers to "
          "each; *pass@8*: one of the eight is right; *chains of four*: one operation more than in "
          "any training, sampled; {ends}*minutes*: of one thread, on the machine that played the "
          "run, with those of the runs it began from. Intervals are of 95 %: Student's t over "
          "seeds and the normal one over instructions, added in squares; with one seed, over "
          "instructions alone. A difference is taken over the seeds that both runs have. *yes*: "
          "the whole interval lies where the claim says; *no*: none of it does; *looked at "
          "afterwards*: not declared before its figures were known, so without a verdict. Some "
          "verdicts change if the intervals are corrected for the number of comparisons on this "
          "page (Bonferroni; with three seeds, the part between seeds becomes two to four times "
          "as wide). They say so.")


def points(interval):
    """[mean, low, high] in points of a hundred, as text."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*interval)


def share(interval):
    """[mean, low, high] of a share between 0 and 1, as text."""
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*interval)


# --------------------------------------------------------------------------------------------------
# Claims

def judged(question, r):
    """[(claim, verdict, figures)]. The verdict is "" of a finding, and None without SEEDS seeds."""
    found = []
    for claim, judge in question.claims:
        try:
            found.append((claim, *judge(r._replace(least=SEEDS))))
        except Missing:
            found.append((claim, None, without_verdict(judge, r)))
    return found


def without_verdict(judge, r):
    """What can be said where fewer than SEEDS seeds are there."""
    try:
        return f"with fewer than {SEEDS} seeds there is no verdict: {judge(r)[1]}"
    except Missing as missing:
        return f"Not played yet: {missing}"


def claims(question, r):
    """The claims as lines of Markdown: a verdict for each alone, and for all together.

    Together: of all that have a verdict, or may get one once they are played.
    """
    found = judged(question, r)
    count = sum(said != "" for _, said, _ in found)
    together = judged(question, r._replace(outside=r.outside / max(1, count)))
    lines = []
    for (claim, said, figures), (_, strict, _) in zip(found, together):
        also = f" (corrected for {count} comparisons: {strict})" if strict != said else ""
        figures = figures[:1].upper() + figures[1:]
        lines.append(f"- **{claim}{f': {said}' if said else ''}.**{also} {figures}.")
    return lines


# --------------------------------------------------------------------------------------------------
# The table and the page

def table(question, r):
    """The table in Markdown: a row for each model, with gains over the start."""
    heads = ["run", "seeds", "sampled, %", "gain", "greedy, %", "gain", "pass@8, gain",
             "chains of four, gain", *question.ends.values(), "minutes"]
    rows = [row(question, r, AT_START, -1)]
    for run in question.runs:
        number = len(r.results(run)[0]["models"]) if r.has(run) else 1
        rows += [row(question, r, run, i, number) for i in range(number)]
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def row(question, r, run, model, number=1):
    """The cells of one model of a run that has `number` of them. Minutes stand beside the last."""
    ends = [""] * len(question.ends)
    if not r.has(run):
        return [run.name, "0", "missing", *[""] * 5, *ends, ""]
    own = r.results(run)[0]["models"][model]["name"]  # iteration-0, step-500, model
    name = run.name + (f", {own.replace('-', ' ')}" if number > 1 and own != "model" else "")
    cells, is_start = [name, f"{len(r.seeds(run))}"], run is AT_START
    for way in ("sampled", "greedy"):
        cells.append("{:.1f} [{:.1f}, {:.1f}]".format(*r.level(run, way, model)))
        cells.append("" if is_start else points(r.gain(run, way, model=model)))
    if is_start:
        return [*cells, "", "", *ends, ""]
    cells += [points(r.gain(run, "pass@8", model=model)),
              points(r._replace(instructions=FOUR).gain(run, model=model))]
    if model < number - 1:
        return [*cells, *ends, ""]
    return [*cells, *(end(r, run, key) for key in question.ends), f"{r.minutes(run):.1f}"]


def end(r, run, key):
    """A figure in the last tenth of a run, as text; nothing for a run that has no such figure."""
    try:
        return f"{r.curve(run, key)[-1]:.2f}"
    except Missing:
        return ""


def page(name, question, r, wanted, said=""):
    """The page of a question in Markdown.

    name: of the question, its picture, and its folder of results. wanted: {Run: how many seeds}.
    said: flags of a quick look, and what they mean; empty for the whole answer.
    """
    results = [result for run in wanted if r.has(run) for result in r.results(run)]
    lacking = sum(max(0, count - (len(r.seeds(run)) if r.has(run) else 0))
                  for run, count in wanted.items())
    lines = [f"# {question.title}", "", wrapped(question.about), ""]
    if said:
        lines += [wrapped(f"**A quick look ({said.strip()}). It shows the shape of the answer, and "
                          "decides nothing.**"), ""]
    if lacking:
        lines += [wrapped(f"**{lacking} of {sum(wanted.values())} runs are missing.** Claims "
                          f"about a run with fewer than {SEEDS} seeds have no verdict. With one "
                          "seed, the interval leaves out the chance between seeds."), ""]
    seeds, commits = ({x[key] for x in results} for key in ("seed", "commit"))
    return "\n".join([
        *lines, f"![{question.title}]({name}.png)", "", table(question, r), "",
        wrapped(legend(question)), "",
        *(wrapped(line, "  ") for line in claims(question, r)), "",
        f"    python recipes/claims.py {name}{said.partition(':')[0]}", "",
        wrapped(f"{len(results)} results, seeds {', '.join(map(str, sorted(seeds)))}; commits "
                f"{', '.join(sorted(commits))}; {sum(x.get('minutes', 0) for x in results):.0f} "
                "minutes of one thread in all, without the scores. Each result is a file in the "
                f"folder {name}/ beside this page, or in that of another question."), ""])


def legend(question):
    """What the columns of a question's table are, and its intervals, as a paragraph."""
    ends = "".join(f"*{name}*: `{key}`, {PANELS[key]}; " for key, name in question.ends.items())
    return LEGEND.format(ends=f"from metrics.jsonl, over the last tenth of the steps: {ends}"
                         if ends else "")


def wrapped(text, indent=""):
    """A paragraph in lines of 100 columns."""
    return textwrap.fill(text, 100, subsequent_indent=indent, break_long_words=False,
                         break_on_hyphens=False)


# --------------------------------------------------------------------------------------------------
# The picture

def draw(path, title, panels):
    """Draw panels into a picture, four in a row, without pyplot. Empty ones are left out.

    A legend covers lines. So one that more than two panels share stands once, below all of them.
    """
    from matplotlib.figure import Figure
    panels = [panel for panel in panels
              if panel.bands or any(len(xs) for xs, _ in panel.lines.values())] or panels[:1]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    widths = [1.6 if panel.names else 1 for panel in panels[:columns]]  # names need room
    figure = Figure(figsize=(4 * sum(widths), 3.6 * rows + 0.3), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False, width_ratios=widths).flatten()
    figure.suptitle(title, fontsize=12)
    for axis in every[len(panels):]:
        axis.axis("off")
    for axis, panel in zip(every, panels):
        (draw_names if panel.names else draw_lines)(axis, panel)
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel(panel.x, fontsize=9)
        axis.grid(alpha=0.25)
    labels = [tuple(axis.get_legend_handles_labels()[1]) for axis in every[:len(panels)]]
    common, times = Counter(labels).most_common(1)[0]
    shared = common if times > 2 else ()
    for axis, names in zip(every, labels):
        if names and names != shared:
            axis.legend(fontsize=7)
    if shared:
        lines, _ = every[labels.index(shared)].get_legend_handles_labels()
        figure.legend(lines, shared, fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=80)


def errors_of(of):
    """(means, [below, above]) of points [mean, low, high], as matplotlib draws them."""
    return ([mean for mean, _, _ in of],
            [[mean - low for mean, low, _ in of], [high - mean for mean, _, high in of]])


def draw_lines(axis, panel):
    """Lines over xs with intervals, and bands behind them."""
    for i, (label, point) in enumerate(panel.bands.items()):
        colour = COLOURS[(i + 1) % len(COLOURS)]
        axis.axhline(point[0], color=colour, linewidth=1, label=label)
        axis.axhspan(*point[1:], color=colour, alpha=0.12, linewidth=0)
    for i, (label, (xs, of)) in enumerate(panel.lines.items()):
        colour = COLOURS[(i if not panel.bands else 0) % len(COLOURS)]
        if any(low < high for _, low, high in of):
            means, errors = errors_of(of)
            axis.errorbar(xs, means, errors, marker="o", markersize=4, capsize=3, color=colour,
                          label=label)
        elif of:
            axis.plot(xs, [mean for mean, _, _ in of], color=colour, label=label)
    if panel.log and any(len(xs) for xs, _ in panel.lines.values()):
        axis.set_xscale("log", base=2)
        ticks = sorted({x for xs, _ in panel.lines.values() for x in xs})
        if all(isinstance(x, int) for x in ticks):
            axis.set_xticks(ticks, [f"{x:,}" for x in ticks], fontsize=8)


def draw_names(axis, panel):
    """A row for each name, with a point and its interval for each line."""
    count = len(panel.names)
    for i, (label, (_, of)) in enumerate(panel.lines.items()):
        means, errors = errors_of(of)
        places = [count - 1 - j - 0.2 * (i - (len(panel.lines) - 1) / 2) for j in range(count)]
        axis.errorbar(means, places, xerr=errors, linestyle="", marker="o", markersize=4,
                      capsize=2, color=COLOURS[i], label=label)
    axis.set_yticks(range(count), reversed(panel.names), fontsize=7)
    axis.axvline(0, color="0.5", linewidth=0.8)
