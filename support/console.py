"""The command line: one-line errors, exit codes, flags from a table, time limits, users' code."""
import argparse
import errno
import functools
import importlib.util
import inspect
import json
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

REWARD_SECONDS = 600.0  # a user's reward function is given up after this long, for one step


class UserError(Exception):
    """An error that the user can mend. Every command prints it as one line and exits with 2."""


def one_line(error):
    """An error's message on one line, cut at 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def progress(what, total, unit="answer"):
    """A bar for what takes longer than two seconds, in a terminal. It is gone at the end.

    Of several processes the first shows it.
    """
    hidden = None if os.environ.get("RANK", "0") == "0" else True  # None: outside a terminal
    return tqdm(total=total, desc=what, unit=unit, delay=2, leave=False, disable=hidden,
                dynamic_ncols=True)


def note(text):
    """Tell the user something that is no error, on stderr. Of several processes the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------
# Running a command

def run_command(main):
    """Run a command's `main`. Returns the exit code: 0, 2 after an error, 130 after Ctrl-C.

    A UserError and a full disk become one line on stderr. Any other exception is a defect of ours
    and keeps its traceback.

    One of several processes ends here, with os._exit. Threads of gloo may still hold tensors then,
    and freeing one without an interpreter aborts the process (PyTorch pull request 179291).
    """
    code = _run(main)
    if "RANK" in os.environ:  # started by torchrun
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(main):
    try:
        main()
        return 0
    except (UserError, TimeUp) as error:  # TimeUp: a time limit that ended while it was lifted
        return _complain(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        what = error.filename or "what was to be written"
        return _complain(f"no room left for {what} ({error.strerror}); "
                         "what was saved before is whole")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _complain(message):
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    return 2


# --------------------------------------------------------------------------------------------------
# Flags

def positive(kind, zero=False):
    """An argparse type: a number of `kind` (int or float) above zero. zero: zero is allowed too."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {name}") from None
        if not (0 < value < 2**63 or zero and value == 0):
            bound = "zero or more" if zero else "above zero"
            large = ", or too large" if value > 0 else ""
            raise argparse.ArgumentTypeError(f"{text} is not {bound}{large}")
        return value
    return parse


def parse(table, argv, command, description, real=False, **defaults):
    """The settings (argparse.Namespace) of a command line. Exits with 2 where a flag is refused.

    table: one row a flag, (flag, kind, default on the embedded model, default on a real one, help).
        A row that is only a text begins a new group in `-h`.
        kind: a function of the text (int, str, positive(float), ..); a tuple of choices; bool for a
        switch; a list with one of these, for a flag that takes several values; {str} for a flag
        that may be given several times, whose texts are joined by commas.
    argv: list of words, None for the process's own.
    real: take the column of real models. defaults: other defaults for single flags.
    The namespace also has `command` and `date`, which are written into a run's settings. A chat
    template may write today's date: a run keeps that of its beginning.
    """
    parser = argparse.ArgumentParser(prog=command, description=description, allow_abbrev=False)
    group = parser
    for row in table:
        if isinstance(row, str):
            group = parser.add_argument_group(row)
            continue
        flag, kind, tiny, other, words = row
        default = None if isinstance(kind, set) else other if real else tiny
        group.add_argument(flag, default=default,
                           help=words + _defaults(tiny, other), **_how_to_parse(kind))
    today = datetime.now().isoformat(timespec="seconds")
    parser.set_defaults(command=command, date=today, **defaults)
    args = parser.parse_args(argv)
    for row in table:
        if not isinstance(row, str) and isinstance(row[1], set):
            name = row[0].removeprefix("--").replace("-", "_")
            given = getattr(args, name)
            setattr(args, name, ",".join(given) if given else row[3 if real else 2])
    return args


NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"


def specs(rewards):
    """[(spec, weight)] of --reward: several are joined by commas, and each may end in :weight.

    Raises UserError for an empty name, and for a weight that is none.
    """
    found = []
    for part in rewards.split(",") if rewards is not None else []:
        spec, colon, weight = part.rpartition(":")
        number = re.fullmatch(NUMBER, weight)
        if not part or colon and (number and not 0 < abs(float(weight)) < math.inf
                                  or not number and spec in ("exact", "math", "majority")):
            raise UserError(f"--reward {part}: expected a reward, or reward:weight with a number "
                            "that is not 0")
        found.append((spec, float(weight)) if colon and number else (part, 1.0))
    return found


def refuse_idle(argv, setting, idle):
    """Raise UserError for a flag that means nothing beside a setting, such as --game grpo.

    argv: list of words, None for the process's own. idle: those flags.
    """
    for word in sys.argv[1:] if argv is None else argv:
        if (flag := word.partition("=")[0]) in idle:
            raise UserError(f"{flag} means nothing with {setting}: leave it out")


def assignments(words, flag="--template-args"):
    """{name: value} of words name=value, with values in JSON. Raises UserError."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        try:
            if not (equals and name.isidentifier()):
                raise ValueError("expected name=value")
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            raise UserError(f"{flag} {word}: expected name=value with a value in JSON, such as "
                            'enable_thinking=false or style="short"') from None
    return found


def _how_to_parse(kind):
    if kind is bool:
        return {"action": "store_true"}
    if isinstance(kind, tuple):
        return {"choices": kind}
    if isinstance(kind, set):
        return {"action": "append"}
    if isinstance(kind, list):
        names = {"metavar": "NAME"} if isinstance(kind[0], tuple) else {}  # a short usage line
        return _how_to_parse(kind[0]) | {"nargs": "+"} | names
    return {"type": kind}


def _defaults(tiny, real):
    """The end of a flag's help: its default, or its two defaults."""
    if tiny == real and (tiny is None or tiny is False or tiny == []):
        return ""
    if tiny == real:
        return f" (default: {_shown(tiny)})"
    other = "it must be given" if real is None else _shown(real)
    return f" (default: {_shown(tiny)}; with a real model: {other})"


def _shown(value):
    return " ".join(map(str, value)) if isinstance(value, list) else value


# --------------------------------------------------------------------------------------------------
# Time limits, and code that users bring

class TimeUp(BaseException):
    """What `time_limit` raises inside its `with`. No Exception: `except Exception` misses it."""


@contextmanager
def time_limit(seconds, complaint):
    """Raise UserError(complaint) once `seconds` have passed inside this `with`.

    Of nested limits the first to end counts. Only the main thread can be stopped in this way, and
    only between two lines of Python.
    """
    outer, _ = signal.getitimer(signal.ITIMER_REAL)
    if threading.current_thread() is not threading.main_thread() or 0 < outer < seconds:
        yield
        return
    up = TimeUp(complaint)

    def late(*_):
        raise up
    began, before = time.monotonic(), signal.signal(signal.SIGALRM, late)
    # Again every second, because a bare `except` may swallow the first.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    except TimeUp as error:
        raise UserError(complaint) if error is up else error from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:
            left = outer - (time.monotonic() - began)
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, left))


def load_function(path, name, flag):
    """The function `name` of a user's Python file. The file is run: name only files you trust.

    flag: the flag and its value, for the error. Raises UserError where the file does not load or
    has no such function.
    """
    spec = importlib.util.spec_from_file_location("users_file", path)
    if spec is None:
        raise UserError(f"{flag}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code may raise
        raise UserError(f"{flag}: {path} does not load: {_where(error)}") from None
    if not callable(getattr(module, name, None)):
        raise UserError(f"{flag}: {path} has no function {name!r}")
    return getattr(module, name)


def users_function(spec, flag, what, expected, given=2):
    """The function that "file.py:function" names, guarded. The other words are for the errors.

    given: how many arguments it will get by their place. Raises UserError.
    """
    path, _, name = spec.rpartition(":")
    if not path and Path(spec).is_file():
        raise UserError(f"{flag} {spec}: which function of it? Write {spec}:function")
    if not path or not Path(path).is_file():
        raise UserError(f"{flag} {spec}: expected {expected}, and no file or folder "
                                f"{(path or spec)!r} is here")
    function = load_function(path, name, f"{flag} {spec}")
    try:
        wanted = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-in functions do not tell
        return guarded(function, what)
    by_place = [p for p in wanted if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(by_place) < given and not any(p.kind is p.VAR_POSITIONAL for p in wanted):
        raise UserError(f"{flag} {spec}: it takes {len(by_place)} arguments, and would get {given}")
    names = [p.name for p in by_place[:2]]
    if names and (names[0] in ("answers", "completions") or set(names) & {"answer", "messages"}):
        raise UserError(f"{flag} {spec}: its first two arguments are the queries and the answers, "
                        f"by their place, and it calls them {' and '.join(names)}")
    return guarded(function, what)


def guarded(function, what="reward"):
    """A user's function whose exceptions, and whose taking too long, become a UserError.

    what: its part in the game, for the errors. A method `valid` of it is kept, and guarded, too.
    """
    name = getattr(function, "__name__", type(function).__name__)

    @functools.wraps(function)
    def call(*args, **columns):
        late = f"the {what} {name} took longer than {REWARD_SECONDS:g} seconds for one step"
        try:
            with time_limit(REWARD_SECONDS, late):
                return function(*args, **columns)
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # whatever the user's code may raise
            raise UserError(f"the {what} {name} failed: {_where(error)}") from error
    if hasattr(function, "valid"):
        call.valid = guarded(function.valid, f"{what} {name}'s")
    return call


def asked_for(function, columns, given=2):
    """Those of the columns {name: values} that a function takes by name. **others takes all.

    given: how many arguments it gets by their place. Raises UserError where it needs another one.
    """
    try:
        wanted = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-in functions do not tell
        return {}
    named = [p for i, p in enumerate(wanted) if p.kind is p.KEYWORD_ONLY
             or p.kind is p.POSITIONAL_OR_KEYWORD and i >= given]
    missing = [p.name for p in named if p.default is p.empty and p.name not in columns]
    if missing:
        name = getattr(function, "__name__", type(function).__name__)
        raise UserError(f"the reward {name} asks for {missing[0]!r}, which is not at hand here; "
                        f"there is: {', '.join(columns) or 'nothing'}")
    if any(p.kind is p.VAR_KEYWORD for p in wanted):
        return columns
    return {p.name: columns[p.name] for p in named if p.name in columns}


def _where(error):
    """What went wrong in a user's code, on one line: the error, and where it was raised."""
    if isinstance(error, SyntaxError):  # its text names the file and the line
        return f"SyntaxError: {one_line(error)}"
    frames = traceback.extract_tb(error.__traceback__)
    last = [frame for frame in frames if "site-packages" not in frame.filename][-1]
    return (f"{type(error).__name__}: {one_line(error)} "
            f"({Path(last.filename).name}, line {last.lineno})")
