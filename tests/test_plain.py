"""The fast step of selfplay.py gives the numbers of the plain step, from the same texts."""
import copy

import pytest
import torch
from conftest import ROOT

import selfplay
from model import generate, groups, load
from recipes import plain
from rewards import ExactReward, QualityReward
from selfplay import PAY, Player
from support.machine import Crew


@pytest.fixture(scope="module")
def texts():
    """One step's texts, by the plain sampler, with a reference that differs from the policy."""
    model, tokenizer = load(ROOT / "tiny")
    asked, queries, prompts, answers = plain.play(model, tokenizer,
                                                  torch.Generator().manual_seed(4))
    answers[1] = answers[0]  # at least one answer that its group gave twice
    reference = copy.deepcopy(model).requires_grad_(False)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.1 * p.std(correction=0) * torch.randn_like(p)
    return model, reference, tokenizer, asked, queries, prompts, answers


def test_the_fast_step_is_the_plain_step(texts):
    """Advantages, both losses, and the gradient of L_Sol + alpha_Ch L_Ch."""
    model, reference, tokenizer, asked, queries, prompts, answers = texts
    query_texts = [tokenizer.decode(ids) for ids in queries]
    answer_texts = groups([tokenizer.decode(ids) for ids in answers], plain.G)
    reward = ExactReward()(query_texts, answer_texts)
    quality = QualityReward(reference, tokenizer)(query_texts, answer_texts)
    a_sol, a_ch = plain.advantages(reward, quality)
    assert 0 < reward.mean() < 1 and a_ch.abs().max() > 0.01
    paid = PAY["minimax"](query_texts, reward, quality)
    fast_sol, fast_ch = selfplay.advantages(reward + quality, paid)
    assert torch.allclose(fast_sol, a_sol, atol=1e-6) and torch.allclose(fast_ch, a_ch, atol=1e-6)

    l_sol, l_ch = plain.losses(model, reference, asked, queries, prompts, answers, a_sol, a_ch)
    (l_sol + plain.ALPHA_CH * l_ch).backward()
    plain_gradient = gradient_of(model)

    args = selfplay.parse_args(["--model", str(ROOT / "tiny"), "--micro-batch", "128"])
    game = selfplay.Game(model, reference, *[None] * 12, Crew())
    solver = Player(prompts, groups(answers, plain.G), [], torch.zeros(0))
    challenger = Player([asked], [queries], [], torch.zeros(0))
    fast = {"solver": selfplay.gradients(game, solver, a_sol, args.kl, args),
            "challenger": selfplay.gradients(game, challenger, a_ch, args.kl_challenger, args,
                                             args.alpha_ch)}
    assert l_sol.item() > 1e-4  # the references differ, so the KL speaks
    assert fast["solver"]["loss"] == pytest.approx(l_sol.item(), rel=1e-3)
    assert fast["challenger"]["loss"] == pytest.approx(l_ch.item(), rel=1e-3)
    difference = (gradient_of(model) - plain_gradient).abs().max()
    assert difference < 1e-4 * plain_gradient.abs().max()


def gradient_of(model):
    """All gradients in one row. They are gone afterwards."""
    row = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return row


def test_the_plain_sampler_follows_the_fast_one_where_nothing_is_random(texts):
    """The plain sampler's texts have the log-probabilities that the fast sampler would report."""
    model, _, tokenizer, *_ = texts
    prompts = [tokenizer.chat([{"role": "user", "content": query}])
               for query in ("Add 1 and 2.", 'Take "kobani", reverse it.')]
    fast = generate(model, prompts, 1, 32, 0)
    log_pi, is_token = plain.log_probs(model, prompts, fast.ids)
    for row, here, lp in zip(log_pi, is_token, fast.logprobs):
        assert torch.allclose(row[here], lp, atol=1e-4)


def test_the_plain_sampler_follows_the_distribution(small):
    """Its first tokens are distributed as the softmax says, and an end token ends a text."""
    small.end_ids = {2}
    completions = plain.sample(small, [[1, 7]] * 1000, 1, torch.Generator().manual_seed(0))
    share = torch.bincount(torch.tensor([c[0] for c in completions]), minlength=50) / 1000
    with torch.no_grad():
        p = small.logits(torch.tensor([[1, 7]]))[0, -1].softmax(-1)
    assert (share - p).abs().max() < 4 * (0.25 / 1000) ** 0.5
    for text in plain.sample(small, [[1, 7]] * 20, 30, torch.Generator().manual_seed(1)):
        assert 2 not in text[:-1] and (text[-1] == 2 or len(text) == 30)


def test_it_runs(capsys):
    """The printed step has its N queries and their answers."""
    plain.main()
    out = capsys.readouterr().out
    assert out.count("A_Ch") == plain.N and out.count("A_Sol") == plain.N * plain.G
    assert "L_Sol" in out
