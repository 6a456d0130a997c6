"""One step of LSP without a single trick: begin here.

    python recipes/plain.py              one step of 4 queries x 4 answers, number by number

Every tensor is rectangular, and every equation of selfplay.py is written out once. There is one
loop for sampling, a full log_softmax, no tree of answers, and one process.
tests/test_plain.py shows that from the same texts this step and the fast one of selfplay.py give
the same advantages, losses and gradients. What the fast one does instead:

    sample       model.generate: a prompt is computed once for its group, with a KV cache
    log_probs    model.pack, model.logprobs: a group is a tree, the vocabulary comes in chunks
    losses       selfplay.gradients: micro-batches, several processes

Shapes: M completions, P positions of the longest prompt, T of the longest completion, vocab words;
N queries, G answers to each.
"""
import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import load
from rewards import ExactReward, QualityReward
from tiny import language

N, G = 4, 4  # queries, answers to each
QUERY_TOKENS, ANSWER_TOKENS = 48, 32  # the longest
LR, ALPHA_CH, KL_SOLVER, KL_CHALLENGER = 1.5e-4, 0.005, 0.005, 0.1  # the defaults of selfplay.py
PAD = 0  # stands where a text has ended; it is never looked at and never trained


def sample(model, prompts, longest, generator):
    """One completion of each of M prompts, at temperature 1. Both are M lists of ids.

    A completion ends with an end token, or is cut at `longest` tokens.
    """
    completions = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + longest:
            with torch.no_grad():
                logits = model.logits(torch.tensor([ids]))[0, -1]  # [vocab]: of the next token
            probabilities = logits.softmax(-1)
            token = torch.multinomial(probabilities, 1, generator=generator).item()
            ids.append(token)
            if token in model.end_ids:
                break
        completions.append(ids[len(prompt):])
    return completions


def log_probs(model, prompts, completions):
    """(log pi of every completion token [M, T], where there is a token [M, T]), with a gradient.

    Row m holds prompt m and completion m, padded on the right. Attention is causal, so padding
    behind a text changes nothing in it.
    """
    texts = [p + c for p, c in zip(prompts, completions)]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [PAD] * (longest - len(text)) for text in texts])  # [M, P + T]
    log_pi = model.logits(ids).float().log_softmax(-1)  # [M, P + T, vocab]
    # The logits at position t are about the token at position t + 1.
    log_pi = log_pi[:, :-1].gather(2, ids[:, 1:, None])[..., 0]  # [M, P + T - 1]
    place = torch.arange(1, longest)[None]  # of the token that each entry is about
    begin = torch.tensor([len(p) for p in prompts])[:, None]
    end = torch.tensor([len(text) for text in texts])[:, None]
    return log_pi, (begin <= place) & (place < end)


def player_loss(model, reference, prompts, completions, advantage, beta):
    """L_Sol or L_Ch: a mean over M completions. advantage [M].

        L = 1/M sum_m [ -pi/sg(pi) A_m + beta KL_m ],   KL_m = sum over tokens of exp(d) - d - 1
    """
    log_pi, is_token = log_probs(model, prompts, completions)  # [M, ..]
    with torch.no_grad():
        log_ref, _ = log_probs(reference, prompts, completions)
    text = (log_pi * is_token).sum(1)  # [M]: a text's log-probability is the sum over its tokens
    ratio = (text - text.detach()).exp()  # [M]: pi/sg(pi) is 1, with the gradient of log pi
    d = log_ref - log_pi
    kl = ((d.exp() - d - 1) * is_token).sum(1)  # [M]
    return (-ratio * advantage + beta * kl).mean()


def advantages(reward, quality):
    """(A_Sol [N, G], A_Ch [N]) from R and R_Q [N, G]."""
    value, value_q = reward.mean(1), quality.mean(1)  # V, V_Q [N]
    a_sol = reward + quality - (value + value_q)[:, None]  # the group's mean is the baseline
    paid = -value + value_q  # [N]: the Challenger is paid for what is hard and good
    return a_sol, paid - paid.mean()


def play(model, tokenizer, generator):
    """(the Challenger's prompt and N queries as ids, the Solver's N prompts and N * G answers)."""
    asked = tokenizer.chat([{"role": "user", "content": language.CHALLENGER_PROMPT}])
    queries = sample(model, [asked] * N, QUERY_TOKENS, generator)
    prompts = [tokenizer.chat([{"role": "user", "content": tokenizer.decode(ids)}])
               for ids in queries]
    each = [prompt for prompt in prompts for _ in range(G)]
    return asked, queries, prompts, sample(model, each, ANSWER_TOKENS, generator)


def losses(model, reference, asked, queries, prompts, answers, a_sol, a_ch):
    """(L_Sol, L_Ch), each a number with a gradient."""
    each = [prompt for prompt in prompts for _ in range(G)]
    return (player_loss(model, reference, each, answers, a_sol.flatten(), KL_SOLVER),
            player_loss(model, reference, [asked] * N, queries, a_ch, KL_CHALLENGER))


def main():
    """One step on the embedded default, printed."""
    model, tokenizer = load(Path(__file__).resolve().parent.parent / "tiny")
    reference = copy.deepcopy(model).requires_grad_(False)  # pi_Ref: the start, frozen
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)

    # Play.
    asked, queries, prompts, answers = play(model, tokenizer, generator)
    query_texts = [tokenizer.decode(ids) for ids in queries]
    texts = [tokenizer.decode(ids) for ids in answers]
    answer_texts = [texts[i * G:(i + 1) * G] for i in range(N)]
    # Score.
    reward = ExactReward()(query_texts, answer_texts)  # R [N, G]
    quality = QualityReward(reference, tokenizer)(query_texts, answer_texts)  # R_Q [N, G]
    a_sol, a_ch = advantages(reward, quality)
    # Update.
    l_sol, l_ch = losses(model, reference, asked, queries, prompts, answers, a_sol, a_ch)
    (l_sol + ALPHA_CH * l_ch).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

    for i in range(N):
        print(f"\n{query_texts[i]}   A_Ch {a_ch[i]:+.3f}")
        for j in range(G):
            print(f"    {answer_texts[i][j]:<26} R {reward[i, j]:.0f}   R_Q {quality[i, j]:.3f}   "
                  f"A_Sol {a_sol[i, j]:+.3f}")
    print(f"\nL_Sol {l_sol:.6f}   L_Ch {l_ch:.6f}   gradient norm {norm:.3f}")


if __name__ == "__main__":
    main()
