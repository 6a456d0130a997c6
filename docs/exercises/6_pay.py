"""Exercise 6: a Challenger's pay, Absolute Zero's (2505.03335). `python docs/exercises/check.py 6`
"""
import torch


def absolute_zero_pay(reward: torch.Tensor) -> torch.Tensor:
    """What the Challenger is paid for each query, [N], of rewards R [N, G] of 0 and 1.

    p is the share of right answers to a query. The pay is 1 - p: the harder, the better. But a
    query that nobody answers rightly pays 0: the Solver learns nothing from it.
    """
    ...
