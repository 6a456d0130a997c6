"""Exercise 2: the expected grade of the judge, R_Q. `python docs/exercises/check.py 2`"""
import torch


def expected_score(logits: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
    """R_Q [n], 0 to 1: the grade that the judge expects, as a share of the full 7 points.

    logits [n, vocab]: of the token that would come next. digits [8]: the ids of the tokens
    "0" to "7". Probabilities are taken among these eight alone.
    """
    ...
