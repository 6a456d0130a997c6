"""Are two mathematical expressions equal? Ask the math-verify library, within bounds of our own.

The library is optional: pip install math-verify. It is made to be lenient: to it (1,2) equals
{1,2}, X equals x, and 10^{-20} equals 10^{-21}. A reward must not be. So it is shown single terms
alone:
    brackets, lists, unions, matrices, relations and +- are taken apart here, as text
    only known signs pass: a word, or an unknown command, has no equal but itself
    decimals become fractions, and the two terms must also agree in 40 digits, at three points

It judges in a process of its own, which SIGPROF ends after SECONDS of computing. That also works in
a thread, in each process of torchrun, and inside a power of two huge numbers, where no signal
handler of Python would run. Such a pair counts as unequal.
"""
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

from support import console

SECONDS = 3.0     # of computing for one pair; not of waiting, so a busy machine judges the same
MEMORY = 4 << 30  # bytes
LONGEST = 300     # characters of an expression

# What may stand in a term, beside letters, digits and + - * / ^ _ ( ) { } ! |
COMMANDS = set("""frac sqrt pi cdot times div sin cos tan cot sec csc arcsin arccos arctan sinh cosh
    tanh log ln exp infty binom alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi
    varphi omega""".split())
RELATIONS = r"(\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|[<>=])"
TURNED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
OPENING, CLOSING = ("\\{", "(", "[", "{"), ("\\}", ")", "]", "}")
ONE_WAY = [  # (pattern, how it is written here)
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", ""),
    (r"(?<!\\)\\[!,;: ]|\\q?quad(?![a-z])|~", " "),
    (r"\\[dtc]frac", r"\\frac"), ("\u03c0", r"\\pi "), ("\u221e", r"\\infty "),
    ("\u222a", r"\\cup "), ("[\u2264\u2a7d]|\\\\leq(?:slant)?|<=", r"\\le "),
    ("[\u2265\u2a7e]|\\\\geq(?:slant)?|>=", r"\\ge "), ("\u2260|\\\\neq|!=", r"\\ne "),
    ("\u00b1", r"\\pm "), ("\u00d7", r"\\times "),
    (r"[\u00b7\u22c5]|(?<!\*)\*(?!\*)", r"\\cdot "),
    (r"\u221a|\bsqrt(?=[({])", r"\\sqrt"), (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt\s*(\d+|[a-z])", r"\\sqrt{\1}"), (r"\*\*", "^"), (r"\\lbrace", r"\\{"),
    (r"\\rbrace", r"\\}"), (r"\\[bp]matrix", r"\\pmatrix"), (r"\{[bp]matrix\}", "{pmatrix}"),
    (r"\\frac\s*(\d)", r"\\frac{\1}"), (r"(\\frac\{[^{}]*\})\s*(\d)", r"\1{\2}"),
    (r"([\^_])\s*(-?\d+(?:\.\d+)?|[a-zA-Z])", r"\1{\2}"),
    # A whole number before a fraction is a mixed one, as at school.
    (r"(?<![\d.}^])(\d+)(\\frac\{\d+\}\{\d+\})", r"(\1+\2)"),
    (r"\s+", " "), (r"(?<![\w}]) | (?![\w])", ""), (r"(?<!\d) (?=\d)", ""), (r"(?<=\d) (?!\d)", ""),
]


@functools.cache
def version():
    """Of math-verify; None where it is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        return None
    return importlib.metadata.version("math-verify")


@functools.lru_cache(maxsize=1 << 16)  # training meets the same pairs thousands of times
def equal(known, text):
    """Are two expressions in LaTeX equal? False where that cannot be told. Symmetric."""
    if max(len(known), len(text)) > LONGEST:
        return known == text
    # In one order, so that it is one question and one entry of the cache, whoever is the known one.
    return _same(*sorted((_one_way(known), _one_way(text))))


def _one_way(text):
    for pattern, sign in ONE_WAY:
        text = re.sub(pattern, sign, text)
    return text


def _same(a, b):
    """As `equal`, for expressions that are written one way."""
    if a == b:
        return True
    if "\\pm" in a + b:
        return a.count("\\pm") < 2 > b.count("\\pm") and _in_any_order(
            *([x.replace("\\pm", sign).lstrip("+") for sign in "+-"] if "\\pm" in x
              else _split(",")(x) for x in (a, b)))
    for split, alike in ((_split(r"\\cup(?![a-z])"), _in_any_order), (_split(","), _in_order)):
        parts, others = split(a), split(b)
        if len(parts) > 1 or len(others) > 1:
            return alike(parts, others)
    (first, inside), (second, other) = _unwrap(a), _unwrap(b)
    if (first, second) == ("\\{\\}", "\\{\\}"):
        return _in_any_order(_split(",")(inside), _split(",")(other))
    if first == second and first:
        return _same(inside, other)
    for kind, content, whole in ((first, inside, b), (second, other, a)):
        if kind == "()" and len(_split(",")(content)) == 1:  # (x+1) is x+1, (1,2) is not 1,2
            return _same(content, whole)
    if first or second:
        return False
    if re.search(RELATIONS, a + b):
        return _relations_agree(a, b)
    return _terms_agree(a, b)


def _split(pattern):
    """A function that splits a text where the pattern stands outside all brackets."""
    def split(text):
        parts, depth = [""], 0
        for piece in re.findall(rf"{pattern}|\\[a-zA-Z]+|\\.|.", text, re.S):
            depth += (piece in OPENING) - (piece in CLOSING)
            if depth == 0 and re.fullmatch(pattern, piece):
                parts.append("")
            else:
                parts[-1] += piece
        return [part.strip() for part in parts]
    return split


def _unwrap(text):
    """(the two brackets around a whole text, what they hold); ("", text) where there are none."""
    if matrix := re.fullmatch(r"\\begin\{(pmatrix|vmatrix)\}(.*)\\end\{\1\}", text, re.S):
        return matrix[1], re.sub(r"\\\\|&", lambda sign: {"&": ",", "\\\\": "),("}[sign[0]],
                                 f"({matrix[2]})")
    pieces, depth = re.findall(r"\\[a-zA-Z]+|\\.|.", text, re.S), 0
    for i, piece in enumerate(pieces):
        depth += (piece in OPENING) - (piece in CLOSING)
        if depth == 0 and i < len(pieces) - 1:
            return "", text
    if len(pieces) > 1 and depth == 0 and pieces[0] in OPENING:
        return pieces[0] + pieces[-1], "".join(pieces[1:-1])
    return "", text


def _in_order(parts, others):
    return len(parts) == len(others) and all(map(_same, parts, others))


def _in_any_order(parts, others):
    """Each part has an equal of its own among the others."""
    if len(parts) != len(others) or len(parts) > 20:
        return False
    left = list(others)
    for part in parts:
        match = next((i for i, other in enumerate(left) if _same(*sorted((part, other)))), None)
        if match is None:
            return False
        del left[match]
    return True


def _relations_agree(a, b):
    """x<5 and 5>x, 1<x<2 and 2>x>1, y=2x and y-2x=0. Not 2x=10 and x=5: nothing is solved."""
    (sides, signs), (others, theirs) = _chain(a), _chain(b)
    if signs != theirs or len(sides) != len(others) or "" in sides + others:
        return False
    if _in_order(sides, others):
        return True
    if set(signs) <= {"=", "\\ne"} and _in_order(sides, others[::-1]):
        return True
    if len(signs) != 1:
        return False
    differences = [f"({x})-({y})" for x, y in (sides, others, others[::-1])]
    return _terms_agree(*differences[:2]) or (
        signs[0] in ("=", "\\ne") and _terms_agree(differences[0], differences[2]))


def _chain(text):
    """1<x<2: its sides, 1 x 2, and its signs, < <. One that falls is turned round."""
    pieces = [piece.strip() for piece in re.split(RELATIONS, text)]
    sides, signs = pieces[::2], pieces[1::2]
    if signs and set(signs) <= {">", "\\ge"}:
        sides, signs = sides[::-1], [TURNED[sign] for sign in signs[::-1]]
    return sides, signs


# --------------------------------------------------------------------------------------------------
# Single terms

def _terms_agree(a, b):
    if a == b:
        return True
    try:
        return Fraction(a) == Fraction(b)  # plain numbers are never left to the library
    except (ValueError, ZeroDivisionError):
        pass
    letters = set(re.sub(r"\\[a-zA-Z]+", "", a + b))
    if any(letter.isalpha() and letter.swapcase() in letters for letter in letters):
        return False  # the library takes X for x
    return _is_term(a) and _is_term(b) and _helper.ask(_exact(a), _exact(b))


def _is_term(text):
    """May the library see it? Nothing that it could take for something else."""
    commands = re.findall(r"\\([a-zA-Z]+)", text)
    signs = re.sub(r"\\sqrt\[\d\]|\\[a-zA-Z]+", r" \\ ", text)
    depth, pieces = 0, re.findall(r"[(){}]", text)
    for piece in pieces:
        depth += 1 if piece in "({" else -1
        if depth < 0:
            return False
    return (depth == 0 and set(commands) <= COMMANDS
            and re.fullmatch(r"[0-9a-zA-Z+\-/^_(){}!|. \\]+", signs) is not None
            and not re.search(r"\d \d|\.\D|\.$|\.\d+\.|[+\-/^]$|[\d)}]_", text)
            # 1/2x: is x above the line or below?
            and not re.search(r"/\s*(?:\d++|[a-zA-Z])\s*[a-zA-Z(\\]", text)
            # xy is x times y; a word is none.
            and all(set(run) <= set("abckmnpqrstuvxyz") and len(run) < 4
                    and run not in ("by", "at", "as", "an", "am")
                    for run in re.findall("[a-zA-Z]{2,}", signs)))


def _exact(text):
    """With fractions for decimals: the library rounds what it takes for a floating number."""
    def fraction(number):
        whole, _, rest = number[0].partition(".")
        return rf"\frac{{{int(whole + rest)}}}{{{10 ** len(rest)}}}"
    return re.sub(r"\d*\.\d+", fraction, text)


class _Helper:
    """The process that runs the library. It is started when it is first asked."""

    def __init__(self):
        self.process, self.lock = None, threading.Lock()

    @functools.lru_cache(maxsize=1 << 16)
    def ask(self, a, b):
        """Are two terms equal? False where the library fails, or takes too long."""
        with self.lock:
            if self.process is None:
                self.start()
            try:
                self.process.stdin.write(json.dumps([a, b]) + "\n")
                self.process.stdin.flush()
                # SIGPROF ends it long before this, if it computes at all.
                ready, _, _ = select.select([self.process.stdout], [], [], 60)
                reply = self.process.stdout.readline() if ready else ""
            except BrokenPipeError:
                reply = ""
            except BaseException:  # stopped while it waited: the reply would be taken for the next
                self.close()
                raise
            if not reply:  # it has ended
                self.close()
            return reply == "true\n"

    def start(self):
        """Start the process, and wait until it is ready. Raises UserError where it does not start.
        """
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.mathematics"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
            cwd=Path(__file__).parent.parent, start_new_session=True)  # Ctrl-C is not for it
        if self.process.stdout.readline() != "ready\n":
            self.close()
            raise console.UserError("--reward math: math-verify is installed but does not run; "
                                    "python -m support.mathematics says why")

    def close(self):
        """End the process; the next question starts another one."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


_helper = _Helper()


def serve():
    """The helper: a question a line on stdin, a verdict a line on stdout, to the end of stdin."""
    import resource
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    bound = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (bound, most))
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout = sys.stderr  # what the library prints is no verdict
    _verdict("x", "x")  # what must be imported is not counted
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            verdict = _verdict(*json.loads(line))
        except Exception:  # whatever the library may raise
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps(verdict) + "\n")
        replies.flush()


@functools.lru_cache(maxsize=1 << 12)
def _parsed(text):
    """A term as the library reads it, a SymPy expression; None where it is none."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse
    plain = NormalizationConfig(basic_latex=True, units=False, malformed_operators=False,
                                nits=False, boxed="last", equations=False)
    config = LatexExtractionConfig(boxed_match_priority=0, normalization_config=plain)
    found = parse(f"\\boxed{{{text}}}", [config], fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found and isinstance(found[0], sympy.Expr) else None


def _verdict(a, b):
    from math_verify import verify
    x, y = _parsed(a), _parsed(b)
    return (x is not None and y is not None and _agree(x, y)
            and verify(x, y, timeout_seconds=None) and verify(y, x, timeout_seconds=None))


def _agree(x, y):
    """Are they the same in 40 digits, at three points?"""
    import sympy
    names = sorted({symbol.name for symbol in x.free_symbols | y.free_symbols})
    for point in range(3):
        values = {name: sympy.Rational((-1) ** (i * point) * (7 + 12 * i + 5 * point), 11 + 3 * i)
                  for i, name in enumerate(names)}
        here, there = (z.subs({symbol: values[symbol.name] for symbol in z.free_symbols})
                       for z in (x, y))
        if here == there:
            continue
        size = abs(here.evalf(50)) + abs(there.evalf(50))
        if (abs((here - there).evalf(50)) < size * sympy.Float("1e-40", 50)) != sympy.true:
            return False  # or it cannot be told
    return True


if __name__ == "__main__":
    serve()
