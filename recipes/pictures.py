"""The pictures of the course, drawn from real tensors: `python recipes/pictures.py`.

    docs/cache.svg    how a group shares its prompt: when it is sampled, and in the packed row
    docs/mask.svg     who sees whom in the packed row
    docs/flow.svg     from reward and quality to both advantages

The ids, the mask, the rewards and the advantages are those of the project's own functions, for
texts that are fixed here. In a notebook each function draws other texts, too.
"""
import argparse
import html
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import load, pack, states
from rewards import ExactReward, QualityReward
from selfplay import PAY, advantages
from support import console

QUERY, ANSWERS = "Add 3 and 5.", ["8", "8", "9", "81"]
STEP = [(QUERY, ["8", "8", "9"]),
        ("Take \"kobani\", reverse it.", ["inabok", "inabok", "inabok"]),
        ("Take \"kobani\", then then", ["kobani", "k", ""])]

# --------------------------------------------------------------------------------------------------
# Drawing: a picture is a list of SVG elements

COLOURS = ["#e5e7eb", "#bfdbfe", "#fed7aa", "#bbf7d0", "#f5d0fe", "#fde68a"]  # prompt, completions
SHARED = "#f9fafb"  # by several completions
INK, PALE, GOOD, BAD = "#1f2937", "#6b7280", "#15803d", "#b91c1c"


def colour_of(owners):
    """The colour of a token, by the set of completions that it is in; all are in the prompt's."""
    if owners is None:
        return COLOURS[0]
    return SHARED if len(owners) > 1 else COLOURS[1 + min(owners) % 5]


def owners_of(packed, P):
    """Of each place of a packed row: in which completions it is; None in a prompt of P tokens."""
    found = [None if place < P else set() for place in range(packed.ids.shape[1])]
    for place, owner in zip(packed.source.tolist(), packed.owner.tolist()):
        if place >= P:  # the state here predicts the completion's next token
            found[place].add(owner)
    return found


def box(x, y, width, height, fill="none", text="", size=12, ink=INK):
    """A rectangle with a text in its middle."""
    return (f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{fill}" '
            f'stroke="{INK}" stroke-width="0.8"/>'
            + words(x + width / 2, y + height / 2 + size * 0.36, text, size, "middle", ink))


def words(x, y, text, size=12, anchor="start", ink=INK, weight="normal"):
    """A text. y: its base line."""
    return (f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{ink}" '
            f'font-weight="{weight}">{html.escape(text)}</text>')


def arrow(x1, y1, x2, y2):
    """A line with a head."""
    return (f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" '
            'marker-end="url(#head)"/>')


def svg(width, height, parts, title):
    """A whole picture, as text. It has its own background, light in any theme."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="DejaVu Sans, Arial, sans-serif" role="img">',
        f"<title>{html.escape(title)}</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>', *parts, "</svg>", ""])


# --------------------------------------------------------------------------------------------------
# The tensors

def encoded(model, tokenizer, query, answers):
    """(ids of the query's prompt, ids of each answer with its end token)."""
    asked = [{"role": "user", "content": query}]
    return tokenizer.chat(asked), [tokenizer.reply(asked, text, model.end_ids) for text in answers]


def mask_of(packed):
    """The mask [B, T, T] that model.states hands to the model."""
    seen = []

    def look(ids, positions, mask):
        seen.append(mask[:, 0])
        return torch.zeros(*ids.shape, 1)
    states(look, packed)
    return seen[0]


def spell(tokenizer, ids):
    """The texts of tokens; a space can be seen."""
    return [tokenizer.text.id_to_token(i).replace(" ", "\u00b7") for i in ids]


# --------------------------------------------------------------------------------------------------
# The pictures

def cache_picture(tokenizer, prompt, completions):
    """How a group's texts share rows while they are sampled, and the packed row, as SVG text.

    completions: G lists of ids. A row of the cache is shared while texts are the same so far.
    """
    cell, top, left = 60, 62, 14
    start = left + 176  # where the completions begin
    G, longest = len(completions), max(map(len, completions))
    parts = [words(left, 22, "Sampling: one row of the cache for each different beginning", 14,
                   weight="bold"),
             words(left, 42, f"{G} answers to one query; time runs to the right", 11, ink=PALE),
             box(left, top, 170, 26 * G, COLOURS[0], "the prompt, once")]
    names = [spell(tokenizer, ids) for ids in completions]
    order = sorted(range(G), key=lambda g: completions[g])  # equal beginnings stand together
    different = list(dict.fromkeys(map(tuple, completions)))
    for t in range(longest):
        nodes = {}
        for row, g in enumerate(order):
            if t < len(completions[g]):
                nodes.setdefault(tuple(completions[g][:t + 1]), []).append(row)
        for rows in nodes.values():
            g, alike = order[rows[0]], {tuple(completions[order[row]]) for row in rows}
            colour = colour_of({different.index(ids) for ids in alike})
            parts.append(box(start + cell * t, top + 26 * rows[0], cell, 26 * len(rows), colour,
                             names[g][t]))
        parts.append(words(start + cell * (t + 0.5), top + 26 * G + 16,
                           f"{len(nodes)} row" + "s" * (len(nodes) > 1), 10, "middle", PALE))
    packed, = pack([prompt], [different], tokens=4096)
    shown = spell(tokenizer, packed.ids[0].tolist())
    last, place = packed.last[0].tolist(), packed.positions[0].tolist()
    owners = owners_of(packed, len(prompt))
    y, own = top + 26 * G + 62, len(last) - len(prompt)
    parts += [words(left, y, "Training: the packed row, each beginning once", 14, weight="bold"),
              words(left, y + 20, "an end token is predicted, and never read: it is not in the row",
                    11, ink=PALE),
              box(left, y + 34, 170, 30, COLOURS[0], f"the prompt, {len(prompt)} tokens")]
    for k in range(own):
        i = len(prompt) + k
        parts += [box(start + cell * k, y + 34, cell, 30, colour_of(owners[i]), shown[i]),
                  words(start + cell * (k + 0.5), y + 80, f"position {place[i]}", 10, "middle",
                        PALE),
                  words(start + cell * (k + 0.5), y + 93, f"{i}, last {last[i]}", 10, "middle",
                        PALE)]
    width = start + cell * max(longest, own) + 14
    return svg(max(width, 540), y + 106, parts, "How a group shares its prompt")


def mask_picture(tokenizer, prompt, completions):
    """Who sees whom in the packed row of one group, as SVG text."""
    packed, = pack([prompt], [list(dict.fromkeys(map(tuple, completions)))], tokens=4096)
    mask, owners = mask_of(packed)[0], owners_of(packed, len(prompt))
    names, T, cell = spell(tokenizer, packed.ids[0].tolist()), len(owners), 26
    left, top = 108, 124
    parts = [words(12, 22, "Who sees whom", 14, weight="bold"),
             words(12, 40, "a row may look at the columns that are filled", 11, ink=PALE)]
    for i in range(T):
        colour = colour_of(owners[i])
        parts += [words(left - 8, top + cell * i + 17, names[i], 11, "end"),
                  f'<g transform="translate({left + cell * i + 17} {top - 6}) rotate(-60)">'
                  + words(0, 0, names[i], 11) + "</g>"]
        j = 0
        while j < T:  # a rectangle for each run of places that may be seen
            run = 0
            while j + run < T and mask[i, j + run]:
                run += 1
            if run:
                parts.append(f'<rect x="{left + cell * j}" y="{top + cell * i}" '
                             f'width="{cell * run}" height="{cell}" fill="{colour}"/>')
            j += max(1, run)
    lines = "".join(f"M{left} {top + cell * i}h{cell * T}M{left + cell * i} {top}v{cell * T}"
                    for i in range(T + 1))
    parts.append(f'<path d="{lines}" stroke="#d1d5db" fill="none"/>')
    return svg(left + cell * T + 40, top + cell * T + 14, parts, "The mask of a packed row")


def flow_picture(queries, answers, reward, quality):
    """From R and R_Q [N, G] to A_Sol [N, G] and A_Ch [N], as SVG text."""
    paid = PAY["minimax"](queries, reward, quality)
    a_sol, a_ch = advantages(reward + quality, paid)
    N, G = reward.shape
    left, top, high = 14, 88, 22

    def signed(x):
        if abs(x) < 0.005:
            return "0.00", PALE
        return f"{x:+.2f}", GOOD if x > 0 else BAD
    heads = [(240, "R"), (300, "R_Q"), (390, "A_Sol"), (520, "V"), (575, "V_Q"), (640, "-V + V_Q"),
             (735, "A_Ch")]
    parts = [words(left, 22, "From reward and quality to both advantages", 14, weight="bold"),
             words(left, 40, "A_Sol = R + R_Q, less its mean over the group.   A_Ch = -V + V_Q, "
                             "less its mean over the queries.", 11, ink=PALE),
             words(390, 58, "the Solver learns from", 11, "middle", PALE),
             words(770, 58, "the Challenger learns from", 11, "end", PALE)]
    parts += [words(x, 76, head, 12, "middle", weight="bold") for x, head in heads]
    for i in range(N):
        y = top + i * (high * (G + 1) + 16)
        parts.append(words(left, y + 12, queries[i], 12, weight="bold"))
        for j in range(G):
            line = y + 16 + high * j
            text, ink = signed(a_sol[i, j])
            parts += [words(left + 16, line + 15, answers[i][j] or "(nothing)", 12),
                      box(216, line, 48, high - 3, "#eff6ff", f"{reward[i, j]:.0f}"),
                      box(276, line, 48, high - 3, "#fff7ed", f"{quality[i, j]:.2f}"),
                      box(362, line, 56, high - 3, "#f9fafb", text, ink=ink),
                      arrow(326, line + 10, 358, line + 10)]
        middle = y + 16 + high * (G - 1) / 2
        text, ink = signed(a_ch[i])
        parts += [words(462, middle + 15, "means:", 10, "middle", PALE),
                  box(496, middle, 48, high - 3, "#eff6ff", f"{reward[i].mean():.2f}"),
                  box(551, middle, 48, high - 3, "#fff7ed", f"{quality[i].mean():.2f}"),
                  box(612, middle, 56, high - 3, "#f9fafb", f"{paid[i]:+.2f}"),
                  arrow(670, middle + 10, 702, middle + 10),
                  box(706, middle, 58, high - 3, "#f9fafb", text, ink=ink)]
    bottom = top + N * (high * (G + 1) + 16)
    return svg(784, bottom + 6, parts, "From reward and quality to both advantages")


def drawn():
    """{file name: SVG text} of all pictures, with the embedded default."""
    model, tokenizer = load(ROOT / "tiny")
    group = encoded(model, tokenizer, QUERY, ANSWERS)
    queries, answers = [query for query, _ in STEP], [texts for _, texts in STEP]
    reward = ExactReward()(queries, answers)
    quality = QualityReward(model, tokenizer)(queries, answers)
    return {"cache.svg": cache_picture(tokenizer, *group),
            "mask.svg": mask_picture(tokenizer, *group),
            "flow.svg": flow_picture(queries, answers, reward, quality)}


def main(argv=None):
    """Draw all pictures."""
    parser = argparse.ArgumentParser(prog="pictures.py", description=__doc__.split(":")[0] + ".",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--out", default=str(ROOT / "docs"), help="folder for the pictures")
    args = parser.parse_args(argv)
    if not Path(args.out).is_dir():
        raise console.UserError(f"--out {args.out}: no such folder")
    for name, text in drawn().items():
        (Path(args.out) / name).write_text(text, encoding="utf-8")
        print(f"drawn: {Path(args.out) / name}")


if __name__ == "__main__":
    sys.exit(console.run_command(main))
