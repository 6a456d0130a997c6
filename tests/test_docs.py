"""What README.md and docs/ say is true of the code: messages, lines, names, flags and links."""
import argparse
import contextlib
import importlib
import inspect
import io
import re
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT, command

from support import memory

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COURSE = (ROOT / "docs" / "course.md").read_text()
FOLDERS = (".", "support", "recipes", "tiny")
MODULES = {path.stem: ".".join(path.relative_to(ROOT).with_suffix("").parts)
           for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}


def ids_of(pages):
    return [str(page.relative_to(ROOT)) for page in pages]


every_page = pytest.mark.parametrize("page", PAGES, ids=ids_of(PAGES))


def module(name):
    """A module by the last part of its name: selfplay, console, plain, language, .."""
    return importlib.import_module(MODULES[name])


def joined_lines(text):
    """A text in which a line that ends with a backslash and the next line are one."""
    return re.sub(r" *\\\n *", " ", text)


# --------------------------------------------------------------------------------------------------
# What bad input says

TABLE = re.search(r"## What bad input says.*?\n\n(    .*?)\n\n",
                  (ROOT / "docs" / "reliability.md").read_text(), re.DOTALL)[1]
ROW = r"    python (?:recipes/)?(\w+)\.py (.*?)  +(.*)"
LINES = [re.fullmatch(ROW, line).groups() for line in TABLE.splitlines()]


@pytest.mark.parametrize("name, flags, says", LINES,
                         ids=[f"{name} {flags}" for name, flags, _ in LINES])
def test_bad_input_says_what_the_page_says(name, flags, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # The page's machine. This also serves machines that cannot tell their free memory.
    monkeypatch.setattr(memory, "free", lambda device: 22.4 * 2**30)

    def there():
        return sorted([*ROOT.iterdir(), *(ROOT / "runs").glob("*")])
    before = there()
    done = command(module(name), ROOT, *flags.split())
    assert done.returncode == 2
    assert f"error: {says}" in done.stderr.splitlines()[-1]
    assert there() == before


# --------------------------------------------------------------------------------------------------
# The course quotes the code

QUOTES = re.findall(r"\| `([^`]+)` in `(\w+)\.(\w+)` \|", COURSE)


def source_of(name, thing):
    """The source of a function, a class, or a value with a name: up to the next empty line."""
    value = getattr(module(name), thing)
    if inspect.isroutine(value) or inspect.isclass(value):
        return inspect.getsource(value)
    source = Path(module(name).__file__).read_text()
    return source.split(f"\n{thing} = ")[1].split("\n\n")[0]


@pytest.mark.parametrize("line, name, thing", QUOTES, ids=[f"{n}.{t}" for _, n, t in QUOTES])
def test_a_line_of_the_course_is_a_line_of_the_code(line, name, thing):
    """Each row of the two tables of equations quotes the line that computes it."""
    assert line in source_of(name, thing)


def test_each_row_of_the_tables_of_equations_quotes_a_line():
    rows = 0
    for head in ("| what | equation | line | here |",
                 "| what | fast line | compared with `plain.py` | here |"):
        rows += COURSE.split(head)[1].split("\n\n")[0].count("\n") - 1  # without the rule
    assert rows == len(QUOTES) > 20


# Where an exercise or a fork puts its lines: the line of the code that stands there.
PLACES = [("selfplay", "set_up", "judge = QualityReward(reference, tokenizer, args.micro_batch)"),
          ("selfplay", "gradients", "lp = logprobs(game.model, packed, args.temperature)"),
          ("model", "generate", "p = (logits / temperature"),
          ("selfplay", "PAY", '"minimax": lambda queries, R, R_Q: '),
          ("selfplay", "AGGREGATE", '"sum": lambda length: '),
          ("rewards", "RUBRIC", '7. The answer is likely to please the user."""'),
          ("language", "OPERATIONS", '"reverse it": lambda w: ')]


@pytest.mark.parametrize("name, thing, line", PLACES, ids=[f"{n}.{t}" for n, t, _ in PLACES])
def test_an_exercise_finds_its_place(name, thing, line):
    """The course names it, and the line is there, once. A row of a table is not quoted itself."""
    assert f"`{name}.{thing}`" in COURSE
    assert source_of(name, thing).count(line) == 1
    assert line in COURSE or "lambda" in line


# --------------------------------------------------------------------------------------------------
# Names: files, functions, tests

# What a run or a command writes, and what a reader brings.
WRITTEN = {"metrics.jsonl", "games.jsonl", "settings.json", "curves.png", "evaluation.json",
           "warnings.txt", "report.html", "not-finite.json", "model_outputs.json",
           "checkpoint.safetensors", "model.safetensors", "claims.md"}
BROUGHT = {"mine.py", "arithmetic.jsonl", "arithmetic-held-out.jsonl", "times-tables.jsonl",
           "gsm8k.jsonl", "chats.jsonl", "alpaca_eval.json", "after.json", "before.json",
            "FILE.jsonl", "nowhere.jsonl", "alpaca.json", "style.py", "nearly.py", "negative.py",
            "pays.png", "negative.png", "step.html", "pair.html"}
FILE = r"(?:[\w.-]+/)*[\w-]+\.(?:py|md|png|jsonl?|txt|html|safetensors|cff|toml)"


def spans_of(text):
    """What a page has between backticks, and the lines of its code blocks."""
    text = joined_lines(re.sub(r"(?ms)^```.*?^```", "", text))  # cells are run: test_notebook.py
    lines = text.splitlines()
    code = {i for i, line in enumerate(lines)
            if line.startswith("    ") and not re.match(r" +(?:[-*]|\d+\.) ", line)}
    prose = "\n".join("" if i in code else line for i, line in enumerate(lines))
    return ([span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose)],
            [lines[i].strip() for i in sorted(code)])


def missing_files(text):
    """The files that a page names and that are not there."""
    spans, code = spans_of(text)
    named = {span for span in spans if re.fullmatch(FILE, span)}
    named |= {word for line in code + spans for word in line.split()
              if re.fullmatch(FILE, word) and line.startswith(("python ", "torchrun ", "pip "))}
    return sorted(name for name in named
                  if Path(name).name not in WRITTEN | BROUGHT and not is_there(name))


def is_there(name):
    """Is it a file of the project? A bare name may be that of any file below docs/, tests/, .."""
    return (ROOT / name).exists() or "/" not in name and any(
        (ROOT / folder / name).exists() for folder in ("docs", "tests", "recipes", "tiny"))


def missing_names(text):
    """The functions and tests that a page names and that are not there."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    found = []
    for span in spans_of(text)[0]:
        if re.fullmatch(r"test_\w+", span):
            if f"def {span}(" not in tests:
                found.append(span)
        elif re.fullmatch(r"[a-z]\w*(\.\w+)+", span) and not re.fullmatch(FILE, span):
            first, *rest = span.split(".")
            if first not in MODULES or not hasattr(module(first), rest[0]):
                found.append(span)
    return found


@every_page
def test_files_that_a_page_names_are_there(page):
    assert missing_files(page.read_text()) == []


@every_page
def test_functions_that_a_page_names_are_there(page):
    assert missing_names(page.read_text()) == []


def test_a_name_that_is_not_there_is_seen():
    """The two tests above can fail."""
    assert missing_files("`docs/gone.md`, `gone.py` and `model.py`") == ["docs/gone.md", "gone.py"]
    assert missing_files("\n    python recipes/gone.py --quick\n") == ["recipes/gone.py"]
    assert missing_names("`selfplay.gone`, `gone.step`, `selfplay.step`, `console.parse`") == [
        "selfplay.gone", "gone.step"]
    assert missing_names("`test_nothing_of_the_kind`") == ["test_nothing_of_the_kind"]


# --------------------------------------------------------------------------------------------------
# Flags

# pytest's, torchrun's and lm_eval's
FOREIGN = {"--dist", "--nproc-per-node", "--shutdown-timeout", "--model_args"}
GAMES = ("selfplay.py", "spin.py")


def flags_of_parsers(path):
    """{command: its flags}, of a script's parsers: evaluate.py has one for each of its commands."""
    real, found = argparse._ActionsContainer.add_argument, {}

    def add(self, *names, **settings):
        prog = getattr(self, "prog", "")
        key = prog if path == "evaluate.py" else path
        found.setdefault(key, set()).update(name for name in names if name.startswith("--"))
        return real(self, *names, **settings)
    with (mock.patch.object(argparse._ActionsContainer, "add_argument", add),
          contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit)):
        module(Path(path).stem).main(["-h"])
    return found


def known_flags():
    """{script, or evaluate.py's command: its flags}."""
    found = {}
    for path in (*GAMES, "evaluate.py", "recipes/claims.py", "recipes/train_tiny.py",
                 "recipes/figures.py", "recipes/notebook.py", "recipes/pictures.py",
                 "recipes/self_training.py", "recipes/reverse_gen.py", "recipes/multiagent.py",
                 "recipes/lance.py", "recipes/r_zero.py", "recipes/neighbours.py"):
        found |= flags_of_parsers(path)
    # explain.py hands its flags to a game, and so does bench_llama.py. The scripts in tests/ are
    # not imported: their text says which flags they have.
    found["recipes/explain.py"] = found["selfplay.py"] | found["spin.py"] | {"--html"}
    for path in ("bench.py", "bench_llama.py", "faults.py", "fuzz.py", "track_memory.py"):
        source = (ROOT / "tests" / path).read_text()
        found[f"tests/{path}"] = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', source))
    found["tests/bench_llama.py"] |= found["selfplay.py"]
    return found


@pytest.fixture(scope="module")
def known():
    return known_flags()


def wrong_flags(text, known):
    """[(command or None, flag)]: what no parser of that command, or no parser at all, knows."""
    wrong = []
    for line in [part for parts in spans_of(text) for part in parts]:
        for part in re.split(r"(?=python |torchrun |vllm |lm_eval )", line):
            if part.startswith("python ") and "  " in part and part.count("--"):
                part = re.split(r" {3,}", part)[0]  # what stands behind a command is its comment
            script = re.search(r"((?:recipes/|tests/)?\w+\.py)(?: (score|duel|report)\b)?", part)
            own = None
            if part.startswith(("python ", "torchrun ")) and script and script[1] != "mine.py":
                own = " ".join(filter(None, script.groups()))
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", part):
                right = known.get(own, set()) if own else set().union(*known.values())
                if flag not in right | FOREIGN:
                    wrong.append((own, flag))
    return wrong


BAD_ON_PURPOSE = [("selfplay.py", "--stepz")]  # in the table of what bad input says


@every_page
def test_flags_that_a_page_names_exist(page, known):
    wrong = wrong_flags(page.read_text(), known)
    assert [pair for pair in wrong if pair not in BAD_ON_PURPOSE] == []


def test_a_flag_that_does_not_exist_is_seen(known):
    """The test above can fail, and it knows whose flag is whose."""
    assert len(known["selfplay.py"]) > 25 and "--micro-batch" in known["spin.py"]
    assert known["evaluate.py duel"] >= {"--against", "--instructions", "--judge"}
    assert wrong_flags("`--explain`", known) == [(None, "--explain")]
    assert wrong_flags("`python spin.py --answers 4`", known) == [("spin.py", "--answers")]
    assert wrong_flags("`python evaluate.py score a --ask 3`", known) == [
        ("evaluate.py score", "--ask")]
    assert wrong_flags("`python evaluate.py runs/a --against tiny`", known) == [
        ("evaluate.py", "--against")]
    assert wrong_flags("\n    python selfplay.py \\\n        --recompute\n", known) == [
        ("selfplay.py", "--recompute")]
    assert wrong_flags("`torchrun --nproc-per-node 2 -- selfplay.py --run a --clip 1`", known) == [
        ("selfplay.py", "--clip")]


# --------------------------------------------------------------------------------------------------
# Figures and lines

NUMBER = r"([+-]?\d+\.\d+)"


def intervals_in(text):
    """[(figure, low, high)] of a text, as texts: 1.5 [1.1, 1.9] and 1.5 points more [1.1, 1.9].

    An interval without a figure before it is ("", low, high).
    """
    return re.findall(rf"(?:{NUMBER}(?: points)?(?: more)?\*{{0,2}} )?\[{NUMBER}, {NUMBER}\]",
                      " ".join(text.split()))


def not_in(text, others):
    """The intervals of a text that are in none of the others, or have no figure before them.

    A figure without a sign may be that of a - b or of b - a: "1.5 [1.1, 1.9] behind".
    """
    known = {tuple(map(float, of)) for other in others for of in intervals_in(other) if of[0]}
    missing = []
    for of in intervals_in(text):
        x, low, high = (float(number or "nan") for number in of)
        ways = {(x, low, high)} | ({(-x, -high, -low)} if of[0][:1].isdigit() else set())
        if not ways & known:
            missing.append(of)
    return missing


def test_figures_of_the_claims_stand_on_their_pages():
    """What README.md and docs/claims.md tell of declared runs, recipes/claims.py drew of them."""
    drawn = [page.read_text() for page in (ROOT / "docs" / "results").glob("*.md")]
    parts = re.split(r"(?m)^(?=##)", (ROOT / "docs" / "claims.md").read_text())
    told = [part for part in parts if "](results/" in part]
    assert len(told) >= 8 and not_in("".join(told), drawn) == []
    other = [part for part in parts if part.startswith("### When the majority is the referee")]
    table = re.search(r"(?s)\| claim \| verdict \|.*?\n\n", (ROOT / "README.md").read_text())[0]
    assert len(intervals_in(table)) > 15 and not_in(table, drawn + other) == []


def test_a_figure_that_stands_on_no_page_is_seen():
    """The test above can fail."""
    page = "A minus B: +1.5 [+1.1, +1.9]. C: -0.4 [-0.8, -0.0]."
    told = "B is behind by 1.5 points\n[1.1, 1.9], C loses 0.4 [0.0, 0.8], or **+2.0 [1.1, 1.9]**."
    assert not_in(told, [page]) == [("+2.0", "1.1", "1.9")]
    assert intervals_in("2.2 points more [1.8, 2.6]") == [("2.2", "1.8", "2.6")]
    for wrong in ("+0.4 [0.0, 0.8]", "-1.5 [-1.9, -1.1]", "1.5 [1.1, 1.8]", "1.5 ([1.1, 1.9])"):
        assert len(not_in(wrong, [page])) == 1


@every_page
def test_prose_ends_before_column_101(page):
    """Not so tables, quoted lines and pictures, which cannot be broken."""
    lines = page.read_text().splitlines()
    assert [x for x in lines if len(x) > 100 and not x.startswith(("|", "    ", "![", "+"))] == []


# --------------------------------------------------------------------------------------------------
# Links

def anchors_of(text):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", text), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def dead_links(page, text):
    """The relative links of a page that lead to no file, or to no heading of that file."""
    dead = []
    for path, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        if re.match(r"[a-z]+:", path):
            continue
        target = page.parent / path if path else page
        heads = anchors_of(text if target == page else target.read_text()) if (
            anchor and target.is_file()) else {anchor}
        if not target.exists() or anchor not in heads:
            dead.append(f"{path}#{anchor}" if anchor else path)
    return dead


@every_page
def test_links_of_a_page_lead_somewhere(page):
    assert dead_links(page, page.read_text()) == []


def test_a_link_that_leads_nowhere_is_seen():
    """The test above can fail."""
    page = ROOT / "docs" / "spin.md"
    text = "[a](gone.md) [b](course.md#gone) [c](#here) [d](https://x.org) [e](../README.md)"
    text += "\n# Here"
    assert dead_links(page, text) == ["gone.md", "course.md#gone"]
    assert dead_links(page, "[a](#there)\n## Here it is!") == ["#there"]
    assert anchors_of("## What's new, in `model.py`? (5 minutes)") == {
        "whats-new-in-modelpy-5-minutes"}


def test_pages_are_reached_from_the_readme():
    """Whoever begins with README.md finds every page and every picture of docs/."""
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page in seen or not page.exists():
            continue
        seen.add(page)
        if page.suffix == ".md":
            ahead += [(page.parent / path).resolve() for path in re.findall(
                r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", page.read_text())]
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "docs"], cwd=ROOT,
                             capture_output=True, text=True).stdout.split()
    # docs/results/NAME/ holds figures, which recipes/claims.py draws pages from.
    tracked = [name for name in tracked if not name.endswith(".json")]
    assert {ROOT / name for name in tracked or ids_of((ROOT / "docs").glob("*"))} <= seen
