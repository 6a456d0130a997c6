"""Exercise 4: the two advantages of LSP (arXiv 2509.07414). `python docs/exercises/check.py 4`"""
import torch


def lsp_advantages(reward: torch.Tensor, quality: torch.Tensor):
    """(A_Sol [N, G], A_Ch [N]), of R and R_Q, both [N, G]. LSP section 2.

        A_Sol = R + R_Q, less its mean over the group
        A_Ch  = -V + V_Q, less its mean over the N queries;  V and V_Q are the means over a group

    Nothing is divided by a deviation.
    """
    ...
