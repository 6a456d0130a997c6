"""Mark the exercises: `python docs/exercises/check.py 5` marks the fifth, without a number all.

Each exercise is a file beside this one, with a function to write in place of the three dots. It is
tried on small inputs, the smallest first. The right values are those of the project's own
functions. Exit code: 0 if all is right, 1 if not.

In a notebook: `check(5)` marks the file, and `check(5, function)` a function from a cell.
"""
import sys
from pathlib import Path
from typing import Callable, NamedTuple
from unittest import mock

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

import model
import rewards
import selfplay
import spin
from support import console


class Exercise(NamedTuple):
    """What is to be written, and what it is tried on."""
    file: str
    function: str
    names: str  # of its arguments
    right: Callable  # the project's own function, with these arguments
    cases: list  # tuples of arguments, the smallest first


# --------------------------------------------------------------------------------------------------
# The right values, by the project's own functions

def grpo_advantage(reward):
    """selfplay.advantages with --advantage std, of the Solver alone."""
    return selfplay.advantages(reward, reward.mean(1), "std")[0]


def lsp_advantages(reward, quality):
    """selfplay.advantages of what selfplay.PAY gives the Challenger."""
    paid = selfplay.PAY["minimax"]([""] * len(reward), reward, quality)
    return selfplay.advantages(reward + quality, paid)


def k3(log_pi, log_ref):
    """selfplay.KL takes the difference."""
    return selfplay.KL["k3"](log_ref - log_pi)


def packed_mask(last):
    """The mask that model.states hands to a model; here the model only looks at it."""
    seen = []

    def look(ids, positions, mask):
        seen.append(mask[:, 0])
        return torch.zeros(*ids.shape, 1)
    nothing = torch.zeros(0, dtype=torch.long)
    model.states(look, model.Packed(last, last, last, nothing, nothing, nothing, nothing))
    return seen[0]


def expected_score(logits, digits):
    """rewards.QualityReward, with a model whose output matrix is the identity.

    Such a model's logits are its hidden states, and these are given.
    """
    judge = object.__new__(rewards.QualityReward)
    judge.model = torch.nn.Module()  # without weights
    judge.model.head, judge.model.cos = torch.eye(logits.shape[1]), logits
    judge.digits, judge.micro_batch, judge.ids = digits, 512, lambda query, answer: [0]
    each = [str(i) for i in range(len(logits))]  # n different exchanges
    with mock.patch.object(rewards, "last_states", lambda *_: logits):
        return judge(each, [[text] for text in each])[:, 0]


def absolute_zero_pay(reward):
    """A row of selfplay.PAY, which takes the queries and the quality, too."""
    return selfplay.PAY["absolute-zero"]([""] * len(reward), reward, torch.zeros_like(reward))


# --------------------------------------------------------------------------------------------------
# The exercises

def tensors(*values):
    """Nested lists as tensors."""
    return tuple(torch.tensor(value) for value in values)


EIGHT = list(range(8))
EXERCISES = {
    1: Exercise("1_mask.py", "packed_mask", "last", packed_mask, [
        tensors([[0]]),
        tensors([[1, 1]]),
        tensors([[2, 1, 2]]),
        tensors([[3, 3, 2, 3]]),
        tensors([[5, 5, 4, 3, 4, 5]]),
        tensors([[5, 5, 4, 3, 4, 5], [3, 1, 3, 3, 6, 6]])]),
    2: Exercise("2_judge.py", "expected_score", "logits, digits", expected_score, [
        tensors([[0.0] * 8], EIGHT),
        tensors([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 2.5]], EIGHT),
        tensors([[3.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 9.0]], [8, 7, 6, 5, 4, 3, 2, 1]),
        tensors([[0.0] * 9 + [9.0], [1.0] * 7 + [2.0] * 3], EIGHT)]),
    3: Exercise("3_grpo.py", "grpo_advantage", "reward", grpo_advantage, [
        tensors([[1.0, 0.0]]),
        tensors([[1.0, 1.0]]),
        tensors([[1.0, 0.0, 0.0]]),
        tensors([[1.0, 0.0], [3.0, 1.0]]),
        tensors([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [2.0, 1.5, 1.0, 0.0]])]),
    4: Exercise("4_lsp.py", "lsp_advantages", "reward, quality", lsp_advantages, [
        tensors([[1.0, 0.0]], [[0.0, 0.0]]),
        tensors([[0.0, 0.0]], [[0.8, 0.4]]),
        tensors([[1.0], [0.0]], [[0.0], [0.0]]),
        tensors([[0.0], [0.0]], [[0.9], [0.1]]),
        tensors([[1.0, 0.0], [0.0, 0.0]], [[0.9, 0.7], [0.1, 0.1]]),
        tensors([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]],
                [[0.9, 0.8, 0.7, 0.9], [0.1, 0.0, 0.1, 0.2]])]),
    5: Exercise("5_kl.py", "k3", "log_pi, log_ref", k3, [
        tensors([-1.0], [-1.0]),
        tensors([-1.0], [-2.0]),
        tensors([-2.0], [-1.0]),
        tensors([-1.0, -2.0, -0.5], [-1.5, -1.0, -0.5])]),
    6: Exercise("6_pay.py", "absolute_zero_pay", "reward", absolute_zero_pay, [
        tensors([[1.0]]),
        tensors([[0.0]]),
        tensors([[1.0, 0.0]]),
        tensors([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]),
        tensors([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])]),
    7: Exercise("7_spin.py", "spin_loss", "lp, ref, lam", spin.spin_loss, [
        (*tensors([[-1.0, -1.0]], [[-1.0, -1.0]]), 1.0),
        (*tensors([[-1.0, -3.0]], [[-2.0, -2.0]]), 1.0),
        (*tensors([[-1.0, -3.0]], [[-1.0, -1.0]]), 0.1),
        (*tensors([[-201.0, -1.0]], [[-1.0, -1.0]]), 1.0),
        (*tensors([[-1.0, -3.0], [-2.0, -1.0]], [[-2.0, -2.5], [-1.0, -1.0]]), 2.0)]),
}


# --------------------------------------------------------------------------------------------------
# Marking

def parts_of(value):
    """A value as a tuple of its parts: a function may return one tensor or several."""
    return value if isinstance(value, tuple) else (value,)


def same(yours, expected):
    """Are two results the same, in number, shape and values (to a thousandth)?"""
    yours, expected = parts_of(yours), parts_of(expected)
    return len(yours) == len(expected) and all(
        isinstance(x, torch.Tensor) and x.shape == y.shape and x.dtype.is_complex is False
        and torch.allclose(x.float(), y.float(), rtol=1e-3, atol=1e-4)
        for x, y in zip(yours, expected))


def shown(name, value):
    """A name and a value, as indented lines."""
    lines = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"    {name:<10}" + lines.replace("\n", "\n" + " " * 14)


def mark(number, function=None):
    """(is it right?, what to say), of an exercise's function; without one, of that in its file.

    Raises UserError for an unknown number, and for a file that cannot be read.
    """
    if number not in EXERCISES:
        raise console.UserError(f"there is no exercise {number}: they are 1 to {len(EXERCISES)}")
    exercise = EXERCISES[number]
    if function is None:
        path = HERE / exercise.file
        function = console.load_function(path, exercise.function, f"exercise {number}")
    title = f"exercise {number}, {exercise.function}:"
    for case in exercise.cases:
        expected, failed = exercise.right(*copies(case)), None
        try:
            yours = console.guarded(function, "function")(*copies(case))
        except console.UserError as error:
            yours, failed = None, str(error)
        if yours is None and not failed:
            return False, f"{title} still to be done, it returns nothing"
        if failed or not same(yours, expected):
            given = [shown(name, value) for name, value in zip(exercise.names.split(", "), case)]
            return False, "\n".join([
                f"{title} not right yet. The smallest input on which it is wrong:", *given,
                shown("expected", expected), shown("yours", failed or yours)])
    return True, f"{title} right, on {len(exercise.cases)} inputs"


def copies(case):
    """The arguments of a case, for a function that may change them in place."""
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in case]


def check(number, function=None):
    """Mark an exercise, and print what is to be said. For a notebook: see mark."""
    print(mark(number, function)[1])


def main(argv=None):
    """Mark the exercise of a number, or all. Exits with 1 where something is not right."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] in (["-h"], ["--help"]):
        print(f"usage: check.py [1 .. {len(EXERCISES)}]\n\n{__doc__.strip()}")
        return
    if len(words) > 1 or not all(word.isdecimal() for word in words):
        raise console.UserError(f"expected the number of one exercise, 1 to {len(EXERCISES)}, or "
                                "nothing")
    marks = [mark(number) for number in map(int, words or EXERCISES)]
    print("\n".join(text for _, text in marks))
    if not all(right for right, _ in marks):
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(console.run_command(main))
