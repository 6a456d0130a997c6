"""Questions of arithmetic, as a file to learn from and files to score on. For any chat model.

    python recipes/arithmetic.py          writes the three files below into this folder
    python selfplay.py --model FOLDER --game grpo --reward math --data arithmetic.jsonl \\
        --eval-data arithmetic-held-out.jsonl --eval-items 120

arithmetic.jsonl has times tables from 2 to 12, and sums and differences of numbers below 100. In
arithmetic-held-out.jsonl there are 40 others of each kind. Where 3 times 4 is held out, 4 times 3
is, too. times-tables.jsonl has all products, for games that learn from no file.
docs/real-models.md has what came of it.
"""
import json
import random
from pathlib import Path

QUESTION = "What is {} {} {}? Reply with the number only."
HELD_OUT = 40  # of each kind


def rows(rng, kind, pairs):
    """(to learn from, held out): lists of {"question", "answer", "kind"}, of pairs a >= b."""
    pairs, found = [*pairs], []
    rng.shuffle(pairs)
    for a, b in pairs:
        word, answer = {"product": ("times", a * b), "sum": ("plus", a + b),
                        "difference": ("minus", a - b)}[kind]
        orders = [(a, b)] if kind == "difference" else dict.fromkeys([(a, b), (b, a)])
        found += [{"question": QUESTION.format(x, word, y), "answer": str(answer), "kind": kind}
                  for x, y in orders]
    while found[HELD_OUT]["answer"] == found[HELD_OUT - 1]["answer"]:  # do not part two orders
        found = found[1:] + found[:1]
    return found[HELD_OUT:], found[:HELD_OUT]


def main():
    """Write both files into this folder."""
    rng = random.Random(0)
    table = [(a, b) for a in range(2, 13) for b in range(2, a + 1)]
    numbers = [(a, b) for a in range(10, 100) for b in range(10, a)]
    parts = [rows(rng, "product", table), rows(rng, "sum", rng.sample(numbers, 60)),
             rows(rng, "difference", rng.sample(numbers, 120))]
    files = dict(zip(("arithmetic", "arithmetic-held-out"), zip(*parts)))
    files["times-tables"] = parts[0]
    for name, chosen in files.items():
        found = [row for part in chosen for row in part]
        rng.shuffle(found)
        lines = "".join(json.dumps(row) + "\n" for row in found)
        Path(f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}.jsonl: {len(found)} questions")


if __name__ == "__main__":
    main()
