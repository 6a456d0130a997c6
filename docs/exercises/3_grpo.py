"""Exercise 3: the advantage of GRPO (arXiv 2402.03300). `python docs/exercises/check.py 3`"""
import torch


def grpo_advantage(reward: torch.Tensor) -> torch.Tensor:
    """How much better an answer is than the others of its group: A [N, G], of rewards R [N, G].

        A_ij = (R_ij - mean_j R_ij) / (std_j R_ij + 1e-4)

    Mean and deviation are those of one group, the G answers to one query. The deviation is that of
    the group itself: the mean square is over G, not over G - 1. A group of equal rewards gives 0.
    """
    ...
