"""What a run looks like: its curves as a picture, and the whole run as one HTML page.

    picture(["runs/a", "runs/b"], "curves.png")      the curves of one or several runs
    write_page(["runs/a", "runs/b"], "report.html")  scores, curves, games and settings as a page
    first_and_last({"a": read_metrics("runs/a")})    where each curve began and ended, as text

Everything is read from the files in a run's folder. No model is loaded.
"""
import html
import io
import itertools
import json
import math
from pathlib import Path
from string import Template

from support.console import UserError
from support.files import read_json

PANELS = {  # the curves: name in metrics.jsonl -> what it shows
    "reward": "mean of the step",
    "quality": "mean of the step",
    "valid": "queries with a right answer",
    "held_sampled": "held-out questions, temperature 1",
    "held_greedy": "held-out questions, greedy",
    "spread": "groups whose rewards differ",
    "distinct": "share of different queries",
    "kl_solver": "nats per token",
    "kl_challenger": "nats per token",
    "loss": "mean over the pairs",
    "margin": "of pairs that differ",
    "accuracy": "pairs with a margin above 0",
    "logprob_answer": "of the answers in the data",
    "logprob_rival": "of the opponent's answers",
    "answer_tokens": "length of an answer",
    "query_tokens": "length of a query",
    "entropy_solver": "nats per token",
    "entropy_challenger": "nats per token",
    "similarity": "text that two queries share",
    "agreement": "judge prefers the right answer",
}
SPARSE = ("held_sampled", "held_greedy")  # measured every so many steps: points, not smoothed
SHARES = ("valid", "spread", "distinct", "agreement", "accuracy")  # these are drawn from 0 to 1

# One colour for each run. All are readable on white and on black.
COLOURS = ("#3b82f6", "#f97316", "#22a06b", "#d946a0", "#8b6f47", "#7c6cf0", "#64748b")

# Stands in matplotlib's SVG for the colour of the page's text, which may be light or dark.
INK = "#123456"

PAGE = Path(__file__).with_name("page.html")
GAMES_SIZE = 8_000_000  # characters of games in a page; with more, only every k-th step is shown
GAMES_OF_A_STEP = 64  # more games of one step are not shown


# --------------------------------------------------------------------------------------------------
# What a run has written

def read_metrics(run):
    """Read the metrics.jsonl of a run. Returns {name: [a value for each step]}, with "step".

    Where a step lacks a figure that others have, the value of the step before stands in for it.
    Before the first value, that first value does. (In the figures of SPARSE, NaN does.) A last line
    that was cut off is left out. Raises UserError for any other line that is not a JSON object of
    numbers.
    """
    path = Path(run) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    rows = []
    for i, line in enumerate(lines, 1):
        try:
            rows.append({name: float(value) for name, value in json.loads(line).items()})
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            cut_off = i == len(lines) and not line.endswith("\n")
            if not cut_off:
                raise UserError(f"{path}: line {i} is not a step's figures") from None
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        value = next(row[name] for row in rows if name in row)
        columns[name] = []
        for row in rows:
            value = row.get(name, math.nan if name in SPARSE else value)
            columns[name].append(value)
    return columns


def read_games(run):
    """Read the games of a run, few enough for a page. Returns (lines, k).

    lines holds {"step": .., "games": [dict, ..]} for every k-th line of games.jsonl, with at most
    GAMES_OF_A_STEP games each. A last line that was cut off is left out. A run without the file
    gives ([], 1). Raises UserError for a line that does not hold a step's games.
    """
    path = Path(run) / "games.jsonl"
    if not path.is_file():
        return [], 1
    lines, size = [], 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for i, line in enumerate(file, 1):
            if not line.endswith("\n"):
                continue  # cut off
            try:
                row = json.loads(line, parse_constant=str)  # a browser's JSON has no NaN
                games = [dict(game) for game in row["games"][:GAMES_OF_A_STEP]]
                lines.append({"step": row["step"], "games": games})
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(f"{path}: line {i} is not a step's games") from None
            size += len(line) * len(games) // max(1, len(row["games"]))
    k = max(1, math.ceil(size / GAMES_SIZE))
    return lines[::k], k


def read_scores(run):
    """Read the evaluation.json of a run. Returns {name of a model: its summary}, the start first.

    Returns {} if there is no such file. Raises UserError if it is not a JSON object.
    """
    file = Path(run) / "evaluation.json"
    return read_json(file).get("scores", {}) if file.is_file() else {}


def what_scores_are(runs):
    """What the scores of these runs are, times 100: right answers where all rewards are 0 or 1."""
    files = [Path(run) / "evaluation.json" for run in runs]
    right = all(read_json(file).get("right", True) for file in files if file.is_file())
    return "right answers, %" if right else "mean reward x 100"


# --------------------------------------------------------------------------------------------------
# Curves

def smooth(curve, parts):
    """Each value's mean with the values before it, over a `parts`-th of the curve, as a list."""
    window = max(1, len(curve) // parts)
    recent = (curve[max(0, end - window):end] for end in range(1, len(curve) + 1))
    return [sum(values) / len(values) for values in recent]


def thin(x, y, most=400):
    """Take every k-th point of a curve, so that at most `most` are left. Returns (x, y)."""
    k = max(1, math.ceil(len(x) / most))
    return x[::k], y[::k]


def tenth(curve, last, least=1):
    """The mean of the first tenth of a curve, or of its last tenth.

    The mean is over at least `least` values, if the curve has so many.
    """
    k = min(len(curve), max(least, len(curve) // 10))
    part = curve[-k:] if last else curve[:k]
    return sum(part) / k


def first_and_last(data):
    """A table of runs side by side as text: where each curve began, and where it ended.

    data: {run: read_metrics(run)}. Each figure is the mean over the first or the last tenth of the
    steps, and over at least ten steps.
    """
    data = {run: curves for run, curves in data.items() if curves}
    if not data:
        return "no step was finished"
    rows = [("first -> last", [str(run) for run in data])]
    for key in present(data):
        rows.append((key, [ends(curves.get(key)) for curves in data.values()]))
    width = 2 + max(len(cell) for _, cells in rows for cell in cells)
    return "\n".join(f"{key:<20}" + "".join(f"{c:>{width}}" for c in cells) for key, cells in rows)


def ends(curve):
    """One cell of `first_and_last`. Returns "" for a run that has no such curve."""
    if curve is None:
        return ""
    known = [value for value in curve if not math.isnan(value)]
    if len(known) < len(curve):  # a figure of SPARSE
        return f"{known[0]:8.3f} -> {known[-1]:8.3f}"
    return f"{tenth(curve, False, 10):8.3f} -> {tenth(curve, True, 10):8.3f}"


def present(data):
    """The names of the PANELS that at least one run has figures for, in order."""
    return [key for key in PANELS if any(key in curves for curves in data.values())]


def colours(runs):
    """Give each run its colour. Returns {run: colour}."""
    return dict(zip(runs, itertools.cycle(COLOURS)))


def plot(axis, key, data):
    """Draw one figure of several runs on a matplotlib axis. data: {run: read_metrics(run)}.

    The values are pale. Their mean over a twentieth of the run lies on top.
    """
    for run, colour in colours(data).items():
        if key in data[run]:
            steps, curve = data[run]["step"], data[run][key]
            if key in SPARSE:
                points = [(x, y) for x, y in zip(steps, curve) if not math.isnan(y)]
                axis.plot(*zip(*points), color=colour, marker="o", markersize=3, label=run)
                continue
            axis.plot(*thin(steps, curve), color=colour, alpha=0.35, linewidth=0.7)
            axis.plot(*thin(steps, smooth(curve, 20)), color=colour, label=run)
    axis.set_title(f"{key}\n{PANELS[key]}", fontsize=9)
    axis.locator_params(axis="x", integer=True)
    axis.grid(alpha=0.25)
    if key in SHARES:
        axis.set_ylim(-0.03, 1.03)


def plot_scores(axis, scores, colour):
    """Draw the right answers of each run's models on a matplotlib axis, the start first.

    scores: {run: read_scores(run)}. colour: {run: colour}.
    """
    for run, summaries in scores.items():
        alls = [summary["all"] for summary in summaries.values()]
        shares = [100 * s["sampled"][0] for s in alls]
        below = [100 * (s["sampled"][0] - s["sampled"][1]) for s in alls]
        above = [100 * (s["sampled"][2] - s["sampled"][0]) for s in alls]
        greedy = [100 * s["greedy"][0] for s in alls]
        axis.errorbar(range(len(alls)), shares, [below, above], color=colour[run], marker="o",
                      capsize=3)
        axis.plot(greedy, color=colour[run], linestyle=":", marker=".")
    names = max(scores.values(), key=len)
    axis.set_xticks(range(len(names)), names, fontsize=7, rotation=20)
    axis.set_title(f"{what_scores_are(scores)}\nsampled (line), greedy (dots)", fontsize=9)
    axis.grid(alpha=0.25)


def legend(axes):
    """Collect the line and the name of each run once, from all panels. Returns (lines, names)."""
    lines = {}
    for axis in axes.flat:
        for line, name in zip(*axis.get_legend_handles_labels()):
            lines[name] = line
    return list(lines.values()), list(lines)


def picture(runs, path):
    """Draw the curves of one or several runs into one PNG. Returns False if there are none.

    The last panel shows the right answers at temperature 1 and greedily, from the start to the end.
    Raises UserError for a run whose files are damaged.
    """
    from matplotlib.figure import Figure  # imported late: only a drawing needs it
    data = {str(run): read_metrics(run) for run in runs}
    scores = {run: read_scores(run) for run in data}
    keys = present(data)
    if not keys:
        return False
    count = len(keys) + any(scores.values())
    rows = 2 if count <= 10 else 3
    columns = math.ceil(count / rows)
    figure = Figure(figsize=(2.6 * columns, 2.75 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, key in zip(axes.flat, keys):
        plot(axis, key, data)
        axis.set_xlabel("step", fontsize=8)
    if any(scores.values()):
        plot_scores(axes.flat[len(keys)], scores, colours(data))
    for axis in axes.flat[count:]:
        axis.axis("off")
    lines, names = legend(axes)
    figure.legend(lines, names, fontsize=8, loc="outside lower center", ncols=4, title_fontsize=8,
                  title="pale: each step; full: the mean over a twentieth of the run")
    figure.savefig(path, dpi=110)
    return True


def show_run(folder):
    """Draw the curves of a finished run into its folder, and print where to look."""
    folder = Path(folder)
    games = folder / "games.jsonl"
    if picture([folder], folder / "curves.png"):
        every = f"every game: {games}; " if games.stat().st_size else ""  # fine-tuning has no games
        print(f"look at it: {folder / 'curves.png'}; {every}"
              f"as a page: python evaluate.py report {folder}")


def panel(key, data):
    """One figure of several runs as the text of an SVG image. data: {run: read_metrics(run)}."""
    import matplotlib
    from matplotlib.figure import Figure
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style = {"svg.fonttype": "none", "svg.hashsalt": key, "font.family": "sans-serif"}
    with matplotlib.rc_context(style | {"font.size": 9} | dict.fromkeys(inked, INK)):
        figure = Figure(figsize=(3.4, 2.3), layout="constrained")
        axis = figure.subplots()
        plot(axis, key, data)
        axis.spines[["top", "right"]].set_visible(False)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True,
                       metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    return svg[svg.index("<svg"):].replace(INK, "currentColor")


# --------------------------------------------------------------------------------------------------
# The page

def write_page(runs, path, answers=None):
    """Write one HTML file about one or several runs. A browser needs nothing but this file.

    runs: folders. answers: None, or (columns, rows), the same instructions answered by several
    checkpoints. columns: [(run, name of the checkpoint)]. rows: [(query, right answer or None,
    [the answer of each column])]. Raises UserError for a run whose files are damaged.
    """
    runs = [str(run) for run in runs]
    settings = {run: read_json(Path(run) / "settings.json") for run in runs}
    data = {run: read_metrics(run) for run in runs}
    played = {run: read_games(run) for run in runs}
    played = {run: (lines, k) for run, (lines, k) in played.items() if lines}
    marks = {run: mark(run, colour) for run, colour in colours(runs).items()}
    texts = json.dumps({run: lines for run, (lines, _) in played.items()}, ensure_ascii=False)
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(", ".join(Path(run).name for run in runs)),
        head=head_section(marks, settings, data),
        warnings=warnings_section(marks),
        scores=scores_section(marks),
        curves=curves_section(data),
        games=games_section(played),
        answers=answers_section(marks, *answers) if answers else "",
        settings=settings_section(marks, settings),
        data=texts.replace("<", "\\u003c"),  # so that no text of a game can end the script
    )
    Path(path).write_text(page, encoding="utf-8", errors="replace")


def escape(value):
    """A value as HTML text: no character of it can become markup."""
    return html.escape(str(value))


def table(header, rows):
    """An HTML table, which scrolls by itself where the screen is narrow. All cells are HTML."""
    lines = ["".join(f"<th>{cell}</th>" for cell in header)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>\n{body}\n</table></div>'


def mark(run, colour):
    """The name of a run behind a dot in its colour, as HTML."""
    dot = f'<span class="dot" style="background:{colour}"></span>'
    return f'<span class="nowrap">{dot} {escape(Path(run).name)}</span>'


def head_section(marks, settings, data):
    """What was played: the game, the model, the seed and the number of steps of each run."""
    parts = []
    for run, s in settings.items():
        model = Path(str(s.get("model", ""))).name
        played = f"{s.get('game', '')} on {model}, seed {s.get('seed')}"
        steps = len(data[run].get("step", []))
        parts.append(f"{marks[run]}: {escape(played)}, {steps} steps")
    return "<p>" + "<br>\n".join(parts) + "</p>"


def warnings_section(marks):
    """Each line of each run's warnings.txt."""
    lines = []
    for run in marks:
        file = Path(run) / "warnings.txt"
        if file.is_file():
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                lines.append(f"<p>{marks[run]}: {escape(line)}</p>")
    if not lines:
        return "<p>No run gave a warning.</p>"
    return "<h2>Warnings</h2>\n" + "\n".join(lines)


def scores_section(marks):
    """The right answers of the first and the last model of each run. One run shows all kinds."""
    rows = []
    for run, name in marks.items():
        scores = read_scores(run)
        models = list(scores)
        for model in dict.fromkeys(models[:1] + models[-1:]):
            for kind, s in scores[model].items():
                if kind == "all" or len(marks) == 1:
                    shares = [interval(s[way]) for way in ("sampled", "greedy", "pass@8")]
                    rows.append([name, escape(model), escape(kind), escape(s["n"]), *shares])
    if not rows:
        return ""
    header = ["run", "model", "kind", "n", "temperature 1", "greedy", "pass@8"]
    note = (f'<p class="quiet">{what_scores_are(marks).capitalize()}; in brackets: the 95 % '
            "interval.</p>")
    return f"<h2>Scores on held-out questions</h2>\n{table(header, rows)}\n{note}"


def interval(share):
    """[share, low, high] in percent, as HTML."""
    middle, low, high = (f"{100 * x:.1f}" for x in share)
    return f'<span class="nowrap">{middle} <span class="quiet">[{low}, {high}]</span></span>'


def curves_section(data):
    """One panel for each figure that a run has."""
    panels = [f"<div>{panel(key, data)}</div>" for key in present(data)]
    if not panels:
        return "<h2>Curves</h2>\n<p>No step was finished.</p>"
    return '<h2>Curves</h2>\n<div class="panels">\n' + "\n".join(panels) + "\n</div>"


def games_section(played):
    """The menu of the runs and the slider over their steps. The script in the page fills the rest.

    played: {run: what read_games returns}, without the runs that have no games.
    """
    if not played:
        return ""
    options = [f'<option value="{escape(run)}">{escape(Path(run).name)}</option>' for run in played]
    k = max(k for _, k in played.values())
    most = max(len(line["games"]) for lines, _ in played.values() for line in lines)
    notes = []
    if k > 1:
        notes.append(f"This page shows one step in {k}. All steps are in games.jsonl.")
    if most == GAMES_OF_A_STEP:
        notes.append(f"At most {GAMES_OF_A_STEP} games of a step are shown.")
    return f"""<h2>The games</h2>
<p><select id="run" aria-label="run">{"".join(options)}</select>
<input type="range" id="at" min="0" value="0" aria-label="step"> <span id="step"></span>
<span class="quiet">{" ".join(notes)}</span></p>
<div id="shown"></div>"""


def answers_section(marks, columns, rows):
    """The same instructions, answered by every checkpoint. See write_page."""
    header = ["", *(f"{marks[str(run)]}<br>{escape(name)}" for run, name in columns)]
    lines = [[escape(query), *(coloured(answer, right) for answer in answers)]
             for query, right, answers in rows]
    return f"<h2>The same instructions, answered by every checkpoint</h2>\n{table(header, lines)}"


def coloured(answer, right):
    """An answer as HTML, marked as right or wrong. It has no mark if `right` is None."""
    kind = ""
    if right is not None:
        kind = "right" if answer == right else "wrong"
    return f'<span class="{kind}">{escape(answer or "(nothing)")}</span>'


def settings_section(marks, settings):
    """All settings of all runs. Values that differ between runs are bold."""
    rows = []
    for key in dict.fromkeys(key for s in settings.values() for key in s):
        values = [escape(s.get(key, "")) for s in settings.values()]
        if len(set(values)) > 1:
            values = [f"<b>{value}</b>" for value in values]
        rows.append([f"<code>{escape(key)}</code>", *values])
    return f"<h2>Settings</h2>\n{table(['', *marks.values()], rows)}"
