r"""--reward math: which answers are equal. No pair of unequal ones may ever be called so."""
import os
import random
import re
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT

from rewards import MathReward
from support import mathematics, worked
from support.console import UserError
from support.worked import final_answer, same

needs_library = pytest.mark.skipif(mathematics.version() is None,
                                   reason="math-verify is not installed")

# (known, answer, are they equal?) The first group needs no library, whichever way it is decided.
PLAIN = [
    ("#### 3", "the result is \u22123", False), ("#### -3", "the result is \u22123", True),
    ("#### 3/4", "0.75", True), ("#### 3/4", "3", False),
    (r"\boxed{\frac{1}{2}}", r"\boxed{\dfrac{1}{2}}", True),
    (r"\boxed{0.5}", r"\boxed{\frac{1}{2}}", True),
    (r"\boxed{\frac12}", r"\boxed{\frac{1}{2}}", True), (r"\boxed{\text{A}}", r"\boxed{A}", True),
    ("#### 18", "Answer: 18. She sells them every day from 10 am.", True),
    ("#### 10", "Answer: 10\n\nLet me know if you need step 2 again.", True),
    ("#### 1,000", "1000.", True), ("#### 70000", "$70,000", True), ("#### 5", "x = 5.00", True),
    ("#### 1000", "1.000,5", False), (r"\boxed{50\%}", r"\boxed{50}", True),
    # signs and digits
    ("#### 3", "the result is - 3", False), ("#### 3", "the result is minus 3", False),
    ("#### -3", "it is \u20133", True), ("#### 12", "\uff11\uff12", True),
    ("#### 3", "\\boxed{-3}", False), ("#### -5", "it costs -$5", True),
    ("#### 23", "\\boxed{2\u00b3}", False), ("#### 1012", "\\boxed{101\u2082}", False),
    ("#### 7/2", "3\u00bd", True), ("#### 15.5", "3 1/2", False), ("#### 1/2", "3 1/2", False),
    ("#### 2.5", r"\boxed{2\frac{1}{2}}", True), ("#### -1/2", r"\boxed{\frac{-1}{2}}", True),
    # fractions: a piece of one is no answer
    ("#### 2", r"so it is $\frac{1}{2}$.", False), ("#### 1/2", r"so it is $\frac{1}{2}$.", True),
    ("#### 0.3333", r"\boxed{\frac{1}{3}}", False), ("#### 1", r"\boxed{\frac{1}{0}}", False),
    # thousands
    ("#### 1000", "1 000", True), ("#### 0", "1 000", False),
    ("#### 1000", r"\boxed{1\,000}", True),
    ("#### 1000", r"\boxed{1{,}000}", True), ("#### 1000", "1'000", True),
    ("#### 1000000", "1.000.000", True), ("#### 1000.5", "1.000,5", True),
    ("#### 500", "0,500", False), ("#### 12", "#### 1 2", False), ("#### 12", "#### 1,2", False),
    ("#### 5", "she has 5 million", False), ("#### 5,000,000", "she has 5 million", True),
    # scientific notation
    ("#### 300000000", "about 3 \u00d7 10\u2078", True), ("#### 3", "it is 3 \u00d7 10^8", False),
    ("#### 8", "it is 3 \u00d7 10^8", False), ("#### 0.0015", r"\boxed{1.5 \times 10^{-3}}", True),
    ("#### 1e5", "100,000", True), ("#### 1", "#### 1e5", False), ("#### 1000", "10^3", True),
    ("#### 10", "it is 2^{10}", False), ("#### 103", r"\boxed{10^3}", False),
    # units, percent, money
    (r"\boxed{5\text{ cm}}", r"\boxed{5}", True), (r"\boxed{5\text{ cm}}", "5 centimeters", True),
    (r"\boxed{5\text{ cm}}", r"\boxed{5\text{ m}}", False),
    (r"\boxed{5\text{ cm}}", r"\boxed{5\text{ cm}^2}", False),
    (r"\boxed{5\text{ cm}^2}", r"\boxed{5\text{ square centimeters}}", True),
    (r"\boxed{60\text{ mph}}", "60 miles per hour", True), (r"\boxed{50\%}", "$50", False),
    (r"\boxed{50\%}", r"\boxed{0.5}", False), (r"\boxed{90^\circ}", "90 degrees", True),
    ("#### 5", r"\boxed{5m}", False), ("#### 5", r"\boxed{5 pi}", False),
    ("#### 18", "18 dollars", True), ("#### 24", "2 dozen", True),
    # names
    (r"\boxed{x = 5}", r"\boxed{5}", True), (r"\boxed{x = 5}", r"\boxed{y = 5}", False),
    ("#### 5", "it is 5x", False), ("#### 10", "The answer is 2x = 10", False),
    # choices and words
    ("#### B", "The answer is (B).", True), (r"\boxed{B}", r"\boxed{\textbf{(B)}}", True),
    ("#### B", "Answer: B) 12", True), ("#### B", "The answer is (A).", False),
    ("#### B", "The answer is (A) or (B).", False), ("#### B", "The answer is bad.", False),
    ("#### yes", r"\boxed{\text{Yes}}", True), ("#### yes", "The answer is no.", False),
    # where the answer stands
    (r"\boxed{7}", r"\boxed{5} no, \boxed{7}", True),
    (r"\boxed{5}", r"\boxed{5} no, \boxed{7}", False),
    ("#### 42", "#### 42\nLet me know if the answer is unclear.", True),
    ("#### 18", "**Answer:** 18", True),
    ("#### 18", "The answer to the question is 18 eggs.", True),
    ("#### 7", "The answer is 3 + 4 = 7.", True), ("#### 3", "The answer is 3 + 4 = 7.", False),
    ("#### 18", "**Final Answer**\n\n18", True), ("#### 5", "The answer is not 5.", False),
    ("#### 6", "The answer is 5 or 6.", False), ("#### 6", "x = 5 or x = 6", False),
    ("#### 3", "#### Step 3: add\n", False), ("#### 5", "between 3 and 5", False),
    ("#### 4", "the point is (3, 4)", False), ("#### 2", "so 20 - 2", False),
    ("#### 30", "at 5:30", False), ("#### 10", "half of 10", False),
    ("#### 5", "that is 5!", False),
    ("#### 6", "<think>5</think> 6", True), ("#### 5", "<think>it may be 5", False),
    ("#### 1", r"\boxed{1", False), ("#### 3", r"so $2\sqrt{3}$", False),
]
# (known, answer, equal?) The known answer is no plain number: without the library it is refused.
LIBRARY = [
    (r"\boxed{(1,2)}", r"\boxed{12}", False), (r"\boxed{(1,2)}", r"\boxed{(1, 2)}", True),
    (r"\boxed{x^2+1}", r"\boxed{x^{2} + 1}", True), (r"\boxed{2\sqrt{3}}", r"\boxed{23}", False),
    (r"\boxed{[0,1)}", r"\boxed{01}", False),
    (r"\boxed{2^{10}}", "1024", True), (r"\boxed{2^{10}}", "210", False),
    # tuples, lists, sets, intervals
    (r"\boxed{(1,2)}", r"\boxed{(2,1)}", False), (r"\boxed{(1,2)}", r"\boxed{[1,2)}", False),
    (r"\boxed{(1,2)}", r"\boxed{\{1,2\}}", False), (r"\boxed{(1,2)}", r"\boxed{1,2}", False),
    (r"\boxed{(0.5,1)}", r"\boxed{\left(\frac{1}{2}, 1\right)}", True),
    (r"\boxed{\{1,2\}}", r"\boxed{\{2,1\}}", True), (r"\boxed{\{1,2\}}", r"\boxed{\{1,3\}}", False),
    (r"\boxed{[0,1]}", r"\boxed{[0,1)}", False), (r"\boxed{[0,1)}", r"\boxed{(0,1]}", False),
    (r"\boxed{x \in [0,1)}", r"\boxed{[0,1)}", True),
    (r"\boxed{[0,1)\cup(2,3]}", r"\boxed{(2,3]\cup[0,1)}", True),
    (r"\boxed{(-\infty,0)}", r"\boxed{(\infty,0)}", False), (r"\boxed{1,2}", r"\boxed{1.2}", False),
    (r"\boxed{(1,234)}", r"\boxed{1234}", False), (r"\boxed{1,2}", r"\boxed{12}", False),
    # roots, powers, constants
    (r"\boxed{2\sqrt{3}}", r"\boxed{\sqrt{12}}", True),
    (r"\boxed{2\sqrt{3}}", "Answer: 2\u221a3", True),
    (r"\boxed{\sqrt{2}}", r"\boxed{1.414214}", False), (r"\boxed{\sqrt[3]{8}}", r"\boxed{2}", True),
    (r"\boxed{10^{-20}x}", r"\boxed{10^{-21}x}", False),
    (r"\boxed{\frac{\pi}{2}}", r"\boxed{0.5\pi}", True), (r"\boxed{2\pi}", r"\boxed{2}", False),
    (r"\boxed{\pi}", r"\boxed{3.14159265358979}", False),
    # terms
    (r"\boxed{(x+1)(x-1)}", r"\boxed{x^2-1}", True), (r"\boxed{x+1}", r"\boxed{y+1}", False),
    (r"\boxed{-(x-1)}", r"\boxed{1-x}", True), (r"\boxed{x-1}", r"\boxed{1-x}", False),
    (r"\boxed{\sqrt{x^2}}", r"\boxed{x}", False), (r"\boxed{X+1}", r"\boxed{x+1}", False),
    (r"\boxed{\frac{a}{b}}", r"\boxed{\frac{b}{a}}", False),
    (r"\boxed{3+4i}", r"\boxed{4i+3}", True),
    (r"\boxed{1\pm\sqrt{2}}", r"\boxed{1-\sqrt2, 1+\sqrt2}", True),
    (r"\boxed{1\pm\sqrt{2}}", r"\boxed{1+\sqrt{2}}", False),
    # relations
    (r"\boxed{x<5}", r"\boxed{5>x}", True), (r"\boxed{x<5}", r"\boxed{x>5}", False),
    (r"\boxed{x<5}", r"\boxed{x \le 5}", False), (r"\boxed{1<x<2}", r"\boxed{2>x>1}", True),
    (r"\boxed{x^2=-1}", r"\boxed{x^2=-2}", False), (r"\boxed{2x+y=1}", r"\boxed{y+2x=1}", True),
    (r"\boxed{x=1,y=2}", r"\boxed{x=2,y=1}", False),
    # matrices
    (r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}",
     r"\boxed{\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}}", True),
    (r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}",
     r"\boxed{\begin{pmatrix}1&3\\2&4\end{pmatrix}}", False),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\boxed{\begin{pmatrix}1&2\end{pmatrix}}",
    False),
    # words
    (r"\boxed{\text{east}}", r"\boxed{seat}", False), (r"\boxed{\emptyset}", r"\boxed{0}", False),
]
# Texts that name a number and do not answer with it.
PIECES = [
    ("3", ["3 squared", "3\u00b2", "3:2", "3!", "3 choose 2", "a_3", "x3", r"\sqrt{3}", r"\sqrt 3",
           "\u221a3", "sqrt(3)", r"\log 3", r"\sin 3", r"\frac{2}{3}", r"\frac{x}{3}", "x/3",
           "5 mod 3",
           "5 hours 3 minutes", "Answer: 5x + 3", "## Step 3", "#### 3. Add", "3 halves"]),
    ("2", ["x = \u00b12", r"$x = \pm 2$", r"x \neq 2", "3 : 2", "C(3, 2)", "[3, 2]", "{1, 2}",
           "1, 2",
           "1 and 2", "1; 2", "2 millions", "1e+2", r"\boxed{\pm 2}", r"\boxed{\sin 2}"]),
    ("5", ["x > 5", r"$x \ge 5$", r"\boxed{x>5}", "5 hundredths", "5th", "5M", "5-6", "5~6",
    "5/6", "f(5)",
           "2(5)", "(x-5)", "5\u03c0", r"5 \pi", "5 i", "5 + 2i", "-(5)", r"\boxed{-(5)}",
           "Negative 5",
           "not 5", "5 e", "5/5/2024", "0x5", r"\boxed{5 x}", r"\boxed{5^{2}}", r"\boxed{5_7}",
           r"\boxed{5\text{ or }6}", r"\boxed{5, 6}", r"\boxed{0.\overline{5}}", r"\boxed{5 ln 2}",
           "Answer: 5 or 6", "Answer: 5, 6", "Answer: 5 + x", "Answer: x > 5", "#### 5 (or 6)",
           "The answer isn't 5.", "Is the answer 5? No.", "The answer is less than 5.",
           "<think>5"]),
]
# Pairs of expressions in a box, all of them unequal.
UNEQUAL = [
    ("(1,2)", "(1,2,3)"), ("(1,2)", "(1,2"), (r"\{1\}", "1"), ("[5]", "5"), ("x=1", "x=-1"),
    ("x=1,x=2", "x=1"), ("f(x)=x", "g(x)=x"), (r"\frac{x}{y}", "x/(y+1)"), ("2^x", "x^2"),
    ("x_1", "x_2"), ("x_1", "x1"), ("3x^2", "(3x)^2"), ("-x^2", "(-x)^2"),
    (r"\sqrt{2}x", r"\sqrt{2x}"),
    (r"\sqrt{x+1}", r"\sqrt{x}+1"), ("1/x+1", "1/(x+1)"), ("2/3x", "2/(3x)"),
    (r"\sin x^2", r"(\sin x)^2"),
    (r"\log x", r"\ln x"), (r"\log_{2}3", r"\log_{3}2"), ("e^x", "x^e"), ("1:2", "2:1"),
    ("12:30", "1230"),
    ("101_2", "1012"), ("101_2", "101"), ("101_{2}", "101_{3}"), ("|3|", "-3"), (r"\vec{a}", "a"),
    (r"\lfloor 2.5\rfloor", "2.5"), ("x'", "x"), (r"\mathbb{R}", "R"), (r"A\cap B", r"A\cup B"),
    ("i", "1"), ("1+i", "1-i"), ("0.1", "0.10000000000000000001"), ("10^{50}", "10^{50}+1"),
    ("(x,y)", "(y,x)"), ("2<x<3", r"2<x\le 3"), ("1,000x", "1x"), ("12 3", "123"), ("S", "s"),
    (r"\sqrt[3]{2}", r"3\sqrt{2}"), (r"\binom{5}{2}", r"\frac{5}{2}"),
    (r"2^{\frac12}", r"2\frac12"),
    (r"\tan^{-1}x", r"\frac{1}{\tan x}"), (r"\Omega", r"\omega"), ("O", "0"), ("E", "e"),
    (r"(1,2)\cup[3,4)", r"(1,2)\cup(3,4)"), (r"5\text{ in}", r"5\text{ cm}"), (r"\pi", r"3.14"),
    (r"\text{no}", r"\text{on}"), (r"5\text{ apples}", r"6\text{ apples}"), ("x!", "x")]
# Ways to say 18 that must be paid.
EIGHTEEN = [
    "18", "18.", "She makes $18.", "Therefore, Janet makes **$18** every day.",
    "\\[\n\\boxed{18}\n\\]",
    "The answer is $18$.", r"\boxed{18 \text{ dollars}}", r"\boxed{\$18}", "####18",
    "### Answer\n18",
    "So, 9 \u00d7 2 = 18.", "So, 9 * 2 = $18 per day", r"\(9 \times 2 = 18\)", r"$$9\cdot 2=18$$",
    "It is 18 eggs in total.", "answer = 18", "Answer: \\( 18 \\) dollars", "18 (eighteen)",
    "= $18.00",
    "So she makes 9*2=<<9*2=18>>18.", "The answer is therefore 18.", "Hence the total is\n18",
    "1.8e1"]
# What either of them leaves unpaid, though it is right.
UNPAID = [("#### 18", "That makes 18!"), ("#### 18", "She has 18 on May 2, 2024."),
          (r"\boxed{1,2}", r"\boxed{2,1}"), (r"\boxed{2x=10}", r"\boxed{x=5}"),
          (r"\boxed{e^{i\pi}}", r"\boxed{-1}"), (r"\boxed{0.\overline{3}}", r"\boxed{\frac{1}{3}}")]


def paid(known, answer):
    """The reward, 0 or 1."""
    return MathReward()(["q"], [[answer]], [known]).item()


@pytest.mark.parametrize("number, texts", PIECES, ids=[number for number, _ in PIECES])
def test_a_piece_of_something_else_is_no_answer(number, texts):
    known = final_answer(f"#### {number}")
    wrongs = [text for text in texts
              if same(known, final_answer(text)) or same(final_answer(text), known)]
    assert wrongs == []


@needs_library
@pytest.mark.parametrize("one, other", UNEQUAL)
def test_unequal_expressions(one, other):
    one, other = (final_answer(rf"\boxed{{{text}}}") for text in (one, other))
    assert not same(one, other) and not same(other, one)
    assert one is None or same(one, one)


@pytest.mark.parametrize("text", EIGHTEEN)
def test_the_right_number_is_paid_however_it_is_said(text):
    assert paid("#### 18", text) == 1


def without(monkeypatch):
    """As if math-verify were not installed."""
    monkeypatch.setattr(mathematics, "version", lambda: None)


@pytest.mark.parametrize("known, answer, equal", PLAIN)
def test_plain_answers(monkeypatch, known, answer, equal):
    assert paid(known, answer) == equal == same(final_answer(answer), final_answer(known))
    without(monkeypatch)
    assert paid(known, answer) == equal


@needs_library
@pytest.mark.parametrize("known, answer, equal", LIBRARY)
def test_answers_for_math_verify(known, answer, equal):
    assert paid(known, answer) == equal == same(final_answer(answer), final_answer(known))
    assert paid(known, known) == 1


@pytest.mark.parametrize("known, answer", UNPAID)
def test_some_right_answers_are_not_paid(known, answer):
    """They are known: whoever mends one moves it to the cases above."""
    assert not same(final_answer(known), final_answer(answer))


@pytest.mark.parametrize("known", [
    known for known, _, _ in LIBRARY if "text" not in known])
def test_what_needs_math_verify_is_refused_without_it(monkeypatch, known):
    """Before anything is played: data.measured asks `unclear` of every row."""
    assert worked.unclear(known) is None or mathematics.version() is None
    without(monkeypatch)
    assert re.match("is no plain number .*pip install math-verify", worked.unclear(known))


def test_it_is_said_once_who_judges(monkeypatch, capsys):
    version = mathematics.version()
    referee = MathReward()
    referee(["q"], [["4", r"\boxed{x+1}"]], ["#### 3"])
    said = capsys.readouterr().err
    assert said.count("note:") == 1
    assert ("by math-verify " + version if version else "as they are written") in said
    without(monkeypatch)
    MathReward()
    assert "pip install math-verify" in capsys.readouterr().err


def test_a_python_without_the_library(tmp_path):
    """Not a changed function, but an import that fails."""
    code = ("import sys; sys.modules['math_verify'] = None\n"
            "from rewards import MathReward\nfrom support import worked\n"
            r"print(MathReward()(['q'], [['3', r'\\boxed{\\sqrt{9}}']], ['#### 3']).tolist())"
            "\nprint(worked.unclear(r'\\boxed{x+1}'))\n")
    done = subprocess.run([sys.executable, "-c", code.replace("\\\\", "\\")], cwd=ROOT,
                          capture_output=True, text=True)
    paid, unclear = done.stdout.splitlines()
    assert paid == "[[1.0, 0.0]]" and "pip install math-verify" in unclear, done.stderr


def test_the_share_of_unreadable_answers():
    referee = MathReward()
    assert referee.figures == {}
    answers = [["3", "I do not know", "", "4 or 5"], ["4", "3", r"\boxed{3", "-3"]]
    scores = referee(["q", "p"], answers, ["#### 3", "#### 3"])
    assert scores.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]] and scores.dtype == torch.float32
    assert referee.figures["unreadable"] == 4 / 8
    referee(["q"], [["3", "4"]], ["#### 3"])
    assert referee.figures["unreadable"] == 0


STYLES = [str, "{:,}".format, "{}.00".format, "${}".format, "it is {}.".format, "#### {}".format,
          r"\boxed{{{}}}".format, "The answer is {}.".format, "**{}**".format, "x = {}".format,
          "Answer: ${:,}".format, r"so \(7 + 1 = {}\)".format, r"$\boxed{{{}}}$".format]


def wrong(rng, number):
    """Another number: a digit changed, dropped or added, the sign, the place of the point."""
    digits = list(str(abs(number)))
    place = rng.randrange(len(digits))
    changed = digits[:]
    changed[place] = rng.choice([d for d in "123456789" if d != digits[place]])
    return rng.choice([-number, int("".join(changed)), number * 10, number + 1, number - 1,
                       int(str(abs(number)) + rng.choice("0123456789")), number / 10,
                       number + rng.choice([0.5, 0.25])])


def test_a_changed_number_is_never_paid_and_a_right_one_always():
    """Also: whoever is the known one, the verdict is the same."""
    rng = random.Random(0)
    for _ in range(2000):
        number = rng.choice([rng.randrange(1, 10), rng.randrange(1, 10**7), -rng.randrange(1, 999)])
        other = wrong(rng, number)
        first, second, third = (rng.choice(STYLES)(n) for n in (number, number, other))
        first, second, third = map(final_answer, (first, second, third))
        assert same(first, second) and same(second, first), (first, second)
        assert not same(first, third) and not same(third, first), (first, third)


@needs_library
def test_a_changed_tuple_is_never_paid():
    rng = random.Random(0)
    for _ in range(100):
        x, y = rng.sample([*"123456789", "-1", "0.5", r"\frac{1}{3}", r"\sqrt{2}", "x+1", "2x"], 2)
        first, last = rng.choice([("(", ")"), ("[", "]"), ("[", ")"), (r"\{", r"\}")])
        known = final_answer(rf"\boxed{{{first}{x},{y}{last}}}")
        assert same(known, final_answer(rf"\boxed{{ {first} {x} , {y} {last} }}"))
        wrongs = [rf"{first}{x},2{y}{last}", rf"{first}{x},-{y}{last}", rf"{first}{x}{y}{last}",
                  rf"{first}{x},{y},{y}{last}", f"{x},{y}", x, y, rf"({x},{y}]"]
        if first != r"\{":
            wrongs.append(rf"{first}{y},{x}{last}")
        for text in wrongs:
            given = final_answer(rf"\boxed{{{text}}}")
            assert not same(known, given) and not same(given, known), (known, given)


@pytest.mark.parametrize("text", [
    "9" * 50000, "1," * 20000, "1 " * 20000, "$" * 20000, r"\frac{" * 5000, "answer is " * 5000,
    r"\boxed{" + "(" * 5000 + "}", "####" * 5000, "**" * 20000, "- " * 20000, "1 or " * 10000,
    r"\boxed{" * 3000, r"\boxed{" + "{1,2}" * 3000 + "}", "answer" * 5000])
def test_hostile_texts_are_read_in_time(text):
    """Such a text costs less than a second, and equals no other."""
    began = time.process_time()
    assert not same(final_answer(text), final_answer("#### 3"))
    assert time.process_time() - began < 1


@needs_library
def test_what_takes_too_long_is_unequal_and_the_next_is_judged(monkeypatch):
    """The power is computed in one instruction of Python, where no handler of a signal would run.

    It works in a thread, too, and a library that is ended starts again.
    """
    found = []
    thread = threading.Thread(target=lambda: found.append(
        [mathematics.equal("9^{9^{9^{9}}}", "9^{9^{9^{9}}}+1"),
         mathematics.equal(r"\sqrt{18}", r"3\sqrt{2}")]))
    thread.start()
    thread.join(60)
    assert found == [[False, True]]


def test_a_library_that_does_not_run_is_one_line(monkeypatch):
    """Not a reward of 0 for every answer."""
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(UserError, match="is installed but does not run"):
        mathematics._Helper().ask("x+1", "1+x")


@needs_library
def test_the_helper_ends_with_the_process():
    """Also where that one ends by os._exit, as the processes of torchrun do."""
    code = ("import os\nfrom support import mathematics\n"
            "assert mathematics.equal('x+1', '1+x')\n"
            "print(mathematics._helper.process.pid, flush=True)\nos._exit(0)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    pid = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if open(f"/proc/{pid}/stat", encoding="utf-8").read().split()[2] == "Z":
            return  # ended, and nobody has asked how
        threading.Event().wait(0.05)
    raise AssertionError("it still runs")


def test_a_text_that_is_too_long_is_compared_as_it_stands():
    long = "+".join(f"x^{i}" for i in range(200))
    assert mathematics.equal(long, long) and not mathematics.equal(long, long + "+0")


def test_rewards_know_nothing_of_sympy():
    """It is imported by the helper alone."""
    code = "import sys, rewards; print('sympy' in sys.modules, 'math_verify' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split()[1] == "False", done.stderr
    assert worked.mathematics is mathematics
