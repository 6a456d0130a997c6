"""What every referee has in common: how it is asked, what it may answer, several as one.

A referee is a callable (queries, answers) -> rewards [N, G]. rewards.py has some.
"""
import copy

import torch

from support.console import UserError, asked_for


def judged(referee, queries, answers, columns={}, what="reward"):
    """A referee's rewards as float32 [N, G] on the CPU.

    columns: {name: N values} that a referee may ask for by name (data.columns). It gets copies, so
    it cannot change what is played. what: its part in the game, for the errors. Raises UserError
    for a wrong shape, NaN or infinity.
    """
    name = getattr(referee, "__name__", type(referee).__name__)
    asked = asked_for(referee, columns)
    rewards = referee([*queries], [[*group] for group in answers], **copy.deepcopy(asked))
    return numbers(rewards, [len(queries), len(answers[0])], f"the {what} {name}")


def numbers(values, shape, who):
    """What somebody's function returned, as float32 of this shape on the CPU. Raises UserError."""
    try:
        if isinstance(values, torch.Tensor) and values.is_complex():
            raise TypeError("complex numbers")
        values = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise UserError(f"{who} returned {type(values).__name__}, not numbers of shape "
                                f"{shape}") from None
    if list(values.shape) != shape:
        raise UserError(f"{who} returned shape {list(values.shape)}; expected {shape}, one "
                                "number each")
    if not values.isfinite().all():
        raise UserError(f"{who} returned NaN or infinity")
    return values


def which_valid(referee, queries):
    """Which queries have a right answer, [N] of bool; None where the referee cannot tell.

    Raises UserError for another number of them.
    """
    if not hasattr(referee, "valid"):
        return None
    found = referee.valid([*queries])
    if not isinstance(found, (list, tuple, torch.Tensor)) or len(found) != len(queries):
        raise UserError("the reward's `valid` must return one truth value a query")
    return [bool(x) for x in found]


class Sum:
    """Several referees as one: the sum of their rewards, each times its weight.

    figures: {"reward_NAME": the mean reward of each in the last call, not weighted}.
    """

    def __init__(self, parts):
        """parts: {name: (referee, weight)}."""
        self.parts, self.figures = parts, {}
        if able := [referee for referee, _ in parts.values() if hasattr(referee, "valid")]:
            self.valid = able[0].valid

    def __call__(self, queries, answers, **columns):
        """R [N, G] of N texts and N lists of G texts. columns: what the parts may ask for."""
        each = {name: judged(referee, queries, answers, columns)
                for name, (referee, _) in self.parts.items()}
        self.figures = {f"reward_{name}": R.mean().item() for name, R in each.items()}
        for referee, _ in self.parts.values():
            self.figures |= getattr(referee, "figures", {})
        return sum(weight * each[name] for name, (_, weight) in self.parts.items())


def parts_of(referee):
    """The referees of a Sum, or the one alone."""
    return [part for part, _ in referee.parts.values()] if isinstance(referee, Sum) else [referee]
