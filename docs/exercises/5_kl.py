"""Exercise 5: the KL term of a token, in the form k3. `python docs/exercises/check.py 5`"""
import torch


def k3(log_pi: torch.Tensor, log_ref: torch.Tensor) -> torch.Tensor:
    """The KL term of each token [n], of its log-probabilities under policy and reference, both [n].

        exp(d) - d - 1,    d = log pi_Ref - log pi

    It is never negative. Its mean over tokens that pi sampled is KL(pi, pi_Ref).
    """
    ...
