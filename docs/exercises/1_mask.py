"""Exercise 1: who sees whom in a packed row. `python docs/exercises/check.py 1`"""
import torch


def packed_mask(last: torch.Tensor) -> torch.Tensor:
    """True where a place may look: [B, T, T] of bool, of last [B, T].

    A row holds a prompt and its completions as a tree, each branch from its beginning to its end
    before the next. last[b, j] is the place of the last token that continues the token at j.
    mask[b, i, j]: may place i of row b look at place j? Nobody looks ahead, and a token sees the
    tokens that it continues, and itself. See model.Packed.
    """
    ...
