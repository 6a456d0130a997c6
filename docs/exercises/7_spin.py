"""Exercise 7: the loss of SPIN (arXiv 2401.01335, eq. 4.7). `python docs/exercises/check.py 7`"""
import torch


def spin_loss(lp: torch.Tensor, ref: torch.Tensor, lam: float) -> torch.Tensor:
    """The loss of each pair, [n].

    lp, ref [n, 2]: log-probabilities of people's answer y (column 0) and of the opponent's y'
    (column 1), under the player p and under the opponent p_t.

        m = lam ( log p(y|x)/p_t(y|x) - log p(y'|x)/p_t(y'|x) )
        loss = log(1 + exp(-m))

    It must stay finite where m is -200: torch.nn.functional has a function for that.
    """
    ...
