"""The command line: exit codes, flags from a table, time limits, and functions that users bring."""
import argparse
import errno
import math
import threading
import time
from contextlib import contextmanager
from datetime import datetime, timedelta

import pytest

from support import console
from support.console import UserError, parse, positive, time_limit

# --------------------------------------------------------------------------------------------------
# Exit codes

def ends(monkeypatch, capsys, error=None):
    """(exit code, what was said on stderr) of a command that raises this error, or returns."""
    def main():
        if error is not None:
            raise error
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("sys.argv", ["/some/where/selfplay.py", "--steps", "3"])
    return console.run_command(main), capsys.readouterr().err


@pytest.mark.parametrize("error, code, said", [
    (None, 0, ""),
    (UserError("no luck"), 2, "selfplay.py: error: no luck\n"),
    (console.TimeUp("too late"), 2, "selfplay.py: error: too late\n"),
    (KeyboardInterrupt(), 130, "stopped\n"),
    *((OSError(number, "it is full", "runs/a/games.jsonl"), 2,
       "selfplay.py: error: no room left for runs/a/games.jsonl (it is full); "
       "what was saved before is whole\n")
      for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
    (OSError(errno.ENOSPC, "it is full"), 2,  # while a file is written, its name is not known
     "selfplay.py: error: no room left for what was to be written (it is full); "
     "what was saved before is whole\n"),
])
def test_what_the_user_can_mend_is_one_line(monkeypatch, capsys, error, code, said):
    assert ends(monkeypatch, capsys, error) == (code, said)


@pytest.mark.parametrize("error", [
    ValueError("ours"), PermissionError(errno.EACCES, "not allowed"), FloatingPointError("ours"),
])
def test_a_defect_of_ours_keeps_its_traceback(monkeypatch, capsys, error):
    with pytest.raises(type(error)):
        ends(monkeypatch, capsys, error)


def test_an_error_is_one_short_line():
    assert console.one_line(ValueError("a\n  b\tc ")) == "a b c"
    assert console.one_line(ValueError("x" * 999)) == "x" * 200
    assert console.one_line(ValueError("")) == "ValueError"  # some errors say nothing


# --------------------------------------------------------------------------------------------------
# Flags

@pytest.mark.parametrize("kind, zero, text, value", [
    (int, False, "3", 3), (int, True, "0", 0), (int, False, str(2**63 - 1), 2**63 - 1),
    (float, False, "1e-4", 1e-4), (float, True, "0", 0.0), (float, True, "-0.0", 0.0),
    (float, False, "3", 3.0),
])
def test_a_number_that_is_taken(kind, zero, text, value):
    found = positive(kind, zero)(text)
    assert found == value and type(found) is kind


@pytest.mark.parametrize("kind, zero, text, says", [
    (int, False, "0", "0 is not above zero"),
    (int, False, "-3", "-3 is not above zero"),
    (int, True, "-1", "-1 is not zero or more"),
    (int, False, "many", "'many' is not a whole number"),
    (int, False, "2.5", "'2.5' is not a whole number"),
    (int, False, "", "'' is not a whole number"),
    (int, False, str(2**63), f"{2**63} is not above zero, or too large"),
    (int, True, str(2**63), f"{2**63} is not zero or more, or too large"),
    (float, False, "many", "'many' is not a number"),
    (float, False, "0", "0 is not above zero"),
    (float, True, "-1e-9", "-1e-9 is not zero or more"),
    (float, False, "nan", "nan is not above zero"),
    (float, True, "nan", "nan is not zero or more"),
    (float, False, "inf", "inf is not above zero, or too large"),
])
def test_a_number_that_is_refused(kind, zero, text, says):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        positive(kind, zero)(text)
    assert str(error.value) == says


TABLE = [
    "the game",
    ("--game", ("chess", "go"), "chess", "chess", "which game"),
    ("--name", str, None, None, "name of the run"),
    ("--data", str, "embedded", None, "what is read"),
    "the loss",
    ("--lr", positive(float), 0.1, 0.001, "learning rate"),
    ("--lam", [positive(float)], [1.0, 2.0], [0.5], "lambda of each iteration"),
    ("--low-memory", bool, False, False, "use less"),
]


def settings(*words, **more):
    """The settings of a command line, as a dict. All have today's date, which is left out here."""
    found = vars(parse(TABLE, list(words), "play.py", "Plays.", **more))
    assert abs(datetime.now() - datetime.fromisoformat(found.pop("date"))) < timedelta(minutes=1)
    return found


def test_a_table_gives_the_defaults_of_either_model():
    tiny = {"game": "chess", "name": None, "data": "embedded", "lr": 0.1, "lam": [1.0, 2.0],
            "low_memory": False, "command": "play.py"}
    assert settings() == tiny
    assert settings(real=True) == tiny | {"data": None, "lr": 0.001, "lam": [0.5]}
    # A default for a single case stands before either column; a flag stands before all of them.
    assert settings(real=True, lr=1e-6)["lr"] == 1e-6
    assert settings("--lr", "3", real=True, lr=1e-6)["lr"] == 3.0


def test_flags_of_every_kind():
    found = settings("--game", "go", "--name", "a", "--lr", "2", "--lam", "1", "2", "3",
                     "--low-memory")
    assert found == {"game": "go", "name": "a", "data": "embedded", "lr": 2.0,
                     "lam": [1.0, 2.0, 3.0], "low_memory": True, "command": "play.py"}


@pytest.mark.parametrize("words, says", [
    (["--game", "poker"], "argument --game: invalid choice: 'poker'"),
    (["--lr", "0"], "argument --lr: 0 is not above zero"),
    (["--lam", "1", "x"], "argument --lam: 'x' is not a number"),
    (["--lam"], "argument --lam: expected at least one argument"),
    (["--nam", "a"], "unrecognized arguments: --nam a"),  # never taken for --name
    (["--low-memory", "yes"], "unrecognized arguments: yes"),
])
def test_a_flag_that_is_refused_exits_with_2(capsys, words, says):
    with pytest.raises(SystemExit) as stop:
        settings(*words)
    assert stop.value.code == 2
    assert f"play.py: error: {says}" in capsys.readouterr().err


def test_the_process_s_own_words_are_the_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["play.py", "--lr", "7"])
    assert parse(TABLE, None, "play.py", "Plays.").lr == 7.0


def test_help_shows_both_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        settings("-h")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert text.index("the game:") < text.index("--game {chess,go}  ") < text.index("the loss:")
    lines = {words[0]: " ".join(words) for words in map(str.split, text.splitlines())
             if words and words[0].startswith("--")}
    ends = {
        "--game": "which game (default: chess)",
        "--name": "name of the run",
        "--data": "what is read (default: embedded; with a real model: it must be given)",
        "--lr": "learning rate (default: 0.1; with a real model: 0.001)",
        "--lam": "lambda of each iteration (default: 1.0 2.0; with a real model: 0.5)",
        "--low-memory": "use less",
    }
    assert lines.keys() == ends.keys()
    assert all(lines[flag].endswith(end) for flag, end in ends.items())


# --------------------------------------------------------------------------------------------------
# Time limits

@contextmanager
def refused(says):
    """The block ends with a UserError that says this, long before the 9 seconds that it sleeps."""
    began = time.monotonic()
    with pytest.raises(UserError, match=f"^{says}$"):
        yield
    assert time.monotonic() - began < 5


def test_a_limit_ends_what_takes_too_long():
    with refused("too late"), time_limit(0.05, "too late"):
        time.sleep(9)
    with time_limit(0.05, "too late"):
        value = 3  # in time
    time.sleep(0.1)  # no limit is left running
    assert value == 3


def test_the_earlier_of_two_limits_counts():
    with refused("outer"), time_limit(0.05, "outer"), time_limit(9, "inner"):
        time.sleep(9)
    with refused("inner"), time_limit(9, "outer"), time_limit(0.05, "inner"):
        time.sleep(9)


def test_the_end_of_an_inner_limit_does_not_lift_the_outer_one():
    with refused("outer"), time_limit(0.2, "outer"):
        with time_limit(0.1, "inner"):  # the earlier one: the outer limit waits behind it
            time.sleep(0.02)
        time.sleep(9)
    with refused("outer"), time_limit(0.1, "outer"):
        with time_limit(9, "inner"):
            pass
        time.sleep(9)


def test_a_limit_cannot_be_swallowed():
    """Users' code may catch every Exception. A bare `except` catches the limit once, not twice."""
    with refused("late"), time_limit(0.05, "late"):
        for _ in range(100):
            try:
                time.sleep(0.1)
            except Exception:  # as a user's code may
                pass
    with refused("late"), time_limit(0.05, "late"):  # it comes again after a second
        try:
            time.sleep(9)
        except BaseException:
            pass
        time.sleep(9)


def test_an_error_inside_a_limit_is_itself():
    for error in (ValueError("own"), KeyboardInterrupt(), UserError("own")):
        with pytest.raises(type(error)) as found, time_limit(9, "late"):
            raise error
        assert found.value is error


def test_another_thread_has_no_limit():
    """Only the main thread can be stopped. Elsewhere the work goes on, rather than fail."""
    done = []

    def work():
        with time_limit(0.01, "late"):
            time.sleep(0.05)
            done.append("all of it")
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["all of it"]


# --------------------------------------------------------------------------------------------------
# Code that users bring

@pytest.fixture
def users(tmp_path):
    """users(code, name) loads the function of this name from a file of this code."""
    def load(code, name="f"):
        (tmp_path / "mine.py").write_text(code)
        return console.load_function(tmp_path / "mine.py", name, "--reward mine.py:f")
    return load


def test_a_users_function_is_loaded(users):
    assert users("y = 3\ndef f(x):\n    return x + y\n")(4) == 7


@pytest.mark.parametrize("code, name, says", [
    ("def f(:\n", "f", r"mine.py does not load: SyntaxError: .*\(mine.py, line 1\)$"),
    ("import sys\nsys.exit(0)\n", "f", r"does not load: SystemExit: 0 \(mine.py, line 2\)"),
    ("x = 1\ny = missing\n", "f",
     r"mine.py does not load: NameError: name 'missing' is not defined \(mine.py, line 2\)"),
    ("import no_such_module\n", "f", r"does not load: ModuleNotFoundError: .* \(mine.py, line 1\)"),
    ("def g():\n    pass\n", "f", "mine.py has no function 'f'"),
    ("f = 3\n", "f", "mine.py has no function 'f'"),
])
def test_what_does_not_load_is_one_line(users, code, name, says):
    with pytest.raises(UserError, match=says) as error:
        users(code, name)
    assert str(error.value).startswith("--reward mine.py:f: ") and "\n" not in str(error.value)


def test_a_file_that_is_no_python_is_one_line(tmp_path):
    (tmp_path / "mine.txt").write_text("def f():\n    pass\n")
    with pytest.raises(UserError, match="--reward x: .*mine.txt is not a Python file"):
        console.load_function(tmp_path / "mine.txt", "f", "--reward x")


def test_assignments():
    words = ["enable_thinking=false", 'style="a=b"', "n=3"]
    assert console.assignments(words) == {"enable_thinking": False, "style": "a=b", "n": 3}
    for bad in ("a", "a=", "a=b", "1=2", "=3"):
        with pytest.raises(UserError, match=f"--template-args {bad}: expected name=value"):
            console.assignments([bad])


def test_a_users_function_is_looked_at_before_it_is_needed(users, tmp_path):
    """How many arguments it takes, and whether it mistakes one for another."""
    for text, given, says in (
        ("def f(queries): pass", 2, "it takes 1 arguments, and would get 2"),
        ("def f(queries, R): pass", 3, "it takes 2 arguments, and would get 3"),
        ("def f(answers, queries): pass", 2, "the queries and the answers, by their place"),
        ("def f(answer, messages): pass", 2, "it calls them answer and messages"),
    ):
        (tmp_path / "users.py").write_text(text + "\n")
        with pytest.raises(UserError, match=says):
            console.users_function(f"{tmp_path}/users.py:f", "--pay", "pay", "a pay", given)
    (tmp_path / "users.py").write_text("def f(*all): return 1\n")
    function = console.users_function(f"{tmp_path}/users.py:f", "--pay", "pay", "a pay", 3)
    assert function(1, 2, 3) == 1


def test_a_guarded_reward_is_the_users_own():
    def mine(queries, answers):
        """Says so."""
        return [[len(x) for x in group] for group in answers]
    reward = console.guarded(mine)
    assert reward(["q"], [["a", "bb"]]) == [[1, 2]]
    assert (reward.__name__, reward.__doc__) == ("mine", "Says so.")
    assert not hasattr(reward, "valid")

    class Mine:
        def __call__(self, queries, answers):
            return 1 / 0

        def valid(self, queries):
            return [len(queries[0]) > 1, 1 / (len(queries) - 2)]
    with pytest.raises(UserError, match="^the reward Mine failed: ZeroDivisionError"):
        console.guarded(Mine())(["q"], [["a"]])
    # A method `valid` of an object is not lost on the way, and is guarded, too.
    assert console.guarded(Mine()).valid(["q"]) == [False, -1]
    with pytest.raises(UserError, match="reward Mine's valid failed: ZeroDivisionError"):
        console.guarded(Mine()).valid(["q", "p"])


def test_a_reward_gets_the_columns_that_it_asks_for():
    columns = {"messages": [1], "answer": [2]}

    class Mine:
        def __call__(self, queries, answers, *, answer, size=3):
            pass
    for function, gets in (
        (lambda q, a: 0, {}), (lambda q, a, answer: 0, {"answer": [2]}), (Mine(), {"answer": [2]}),
        (lambda q, a, size=3: 0, {}), (lambda q, a, answer, **others: 0, columns),
        (console.guarded(lambda q, a, messages: 0), {"messages": [1]}), (max, {}),
    ):
        assert console.asked_for(function, columns) == gets
    with pytest.raises(UserError, match="asks for 'solution', which is not at hand here; there is: "
                                        "messages, answer"):
        console.asked_for(lambda q, a, solution: 0, columns)


@pytest.mark.parametrize("body, says", [
    ("1 / 0", "the reward f failed: ZeroDivisionError: division by zero (mine.py, line 3)"),
    ("raise SystemExit(0)", "the reward f failed: SystemExit: 0 (mine.py, line 3)"),
    ("raise ValueError('one\\ntwo')", "the reward f failed: ValueError: one two (mine.py, line 3)"),
    ("import torch; torch.nn.Linear(2, 3)(torch.ones(5))",  # it fails inside a library
     "(mine.py, line 3)"),
    ("time.sleep(9)", "the reward f took longer than 0.05 seconds for one step"),
    ("[swallow() for _ in range(99)]",
     "the reward f took longer than 0.05 seconds for one step"),
])
def test_a_reward_gone_wrong_is_one_line(users, monkeypatch, body, says):
    if "took longer" in says:  # the others may take their time: an import is slow on a busy machine
        monkeypatch.setattr(console, "REWARD_SECONDS", 0.05)
    swallow = "def swallow():\n    try: time.sleep(0.1)\n    except Exception: pass\n"
    reward = console.guarded(users(f"import time\ndef f(q, a):\n    {body}\n{swallow}"))
    with pytest.raises(UserError) as error:
        reward(["q"], [["a"]])
    assert str(error.value).endswith(says) and "\n" not in str(error.value)


def test_a_refusal_of_the_users_own_passes(users):
    """A reward that uses our code may raise UserError: it is not wrapped a second time."""
    def mine(queries, answers):
        raise UserError("out of luck")
    with pytest.raises(UserError, match="^out of luck$"):
        console.guarded(mine)(["q"], [["a"]])


def test_a_reward_has_minutes_by_default():
    assert 60 <= console.REWARD_SECONDS < math.inf
