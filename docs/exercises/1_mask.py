"""Exercise 1: who sees whom in a packed row. `python docs/exercises/check.py 1`"""
import torch


def packed_mask(segment: torch.Tensor) -> torch.Tensor:
    """True where a position may look: [B, T, T] of bool, of segment [B, T].

    A row holds a prompt and several of its completions, side by side. segment says which part a
    position belongs to: 0 the prompt, 1 the first completion, 2 the second, ..
    mask[b, i, j]: may position i of row b look at position j? Nobody looks ahead. A completion sees
    the prompt and itself, and never another completion. See model.Packed.
    """
    ...
