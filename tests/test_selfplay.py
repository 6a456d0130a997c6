"""LSP: each equation by hand, each trap, and the real command line."""
import argparse
import copy
import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, command, llama3_tokenizer, random_llama, read_lines

import selfplay
from model import generate, groups, load, logprobs, pack, save
from selfplay import AGGREGATE, PAY, Game, Player, advantages, gradients, player_loss
from support import data, learning, record, runs
from support.machine import Crew

R = torch.tensor([  # N = 3 queries, G = 4 answers; V = 1/4, 3/4, 0
    [1.0, 0.0, 0.0, 0.0],
    [1.0, 1.0, 1.0, 0.0],
    [0.0, 0.0, 0.0, 0.0],
])
ZERO = torch.zeros(3, 4)
TINY = ("--model", str(ROOT / "tiny"), "--device", "cpu")


def both(reward, quality, normalise="centre", pay="minimax"):
    """(A_Sol, A_Ch) of R and the weighted R_Q, as a step has them."""
    return advantages(reward + quality, PAY[pay]([], reward, quality), normalise)


# --------------------------------------------------------------------------------------------------
# Advantages (LSP section 2)

def test_advantages_by_hand():
    a_sol, a_ch = both(R, ZERO)
    assert torch.allclose(a_sol, torch.tensor([
        [0.75, -0.25, -0.25, -0.25], [0.25, 0.25, 0.25, -0.75], [0, 0, 0, 0]]))
    # The mean of V minus V; the mean is 1/3.
    assert torch.allclose(a_ch, torch.tensor([1 / 3 - 1 / 4, 1 / 3 - 3 / 4, 1 / 3 - 0]))


def test_the_example_of_the_docstring():
    """The first query has V = 1/2 and the second has V = 0: the unanswered query wins."""
    reward = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0]])
    a_sol, a_ch = both(reward, torch.zeros(2, 4))
    assert reward.mean(1).tolist() == [0.5, 0]
    assert a_ch.tolist() == [-0.25, 0.25]
    assert a_sol.tolist() == [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0]]


def test_advantages_with_quality_by_hand():
    """The Solver gets R + R_Q and the Challenger -V + V_Q. Then each is centred.

    The last query is nonsense: it has no reward and no quality.
    """
    quality = torch.tensor([[1.0, 0.5, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    a_sol, a_ch = both(R, quality)
    assert torch.allclose(a_sol[0], torch.tensor([2.0, 0.5, 0.5, 0.0]) - 0.75)
    # -1/4 + 1/2, -3/4 + 1, and -0 + 0, each minus their mean
    assert torch.allclose(a_ch, torch.tensor([0.25, 0.25, 0.0]) - 0.5 / 3)


@pytest.mark.parametrize("normalise", ["centre", "std"])
def test_advantages_sum_to_zero(normalise):
    torch.manual_seed(0)
    a_sol, a_ch = both(torch.rand(5, 8), torch.rand(5, 8), normalise)
    assert a_sol.sum(1).abs().max() < 1e-5
    assert a_ch.sum().abs() < 1e-5


def test_a_constant_quality_changes_no_advantage():
    plain, shifted = both(R, ZERO), both(R, ZERO + 3.0)
    for a, b in zip(plain, shifted):
        assert torch.allclose(a, b, atol=1e-6)


def test_std_normalisation():
    a_sol, _ = both(R, ZERO, "std")
    assert torch.allclose(a_sol[0], torch.tensor([3.0, -1, -1, -1]) / 3**0.5, atol=1e-3)
    assert a_sol[2].abs().max() == 0


@pytest.mark.parametrize("pay, at", [  # trap 7: at p = 0, 1/4, 1/2 and 1, the ends included
    ("minimax", [0, -0.25, -0.5, -1]),
    ("r-zero", [0, 0.5, 1, 0]),
    ("absolute-zero", [0, 0.75, 0.5, 0]),
    ("sqlm", [0, 1, 1, 0]),
    ("spice", [0.0439369, 0.8225775, 1, 0.0439369]),
])
def test_what_the_challenger_is_paid(pay, at):
    reward = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    none = torch.zeros(4, 4)
    at = torch.tensor(at, dtype=torch.float32)
    assert torch.allclose(PAY[pay](list("abcd"), reward, none), at, atol=1e-5)
    # Only LSP's own pay counts quality: the others are their papers'.
    paid = PAY[pay](list("abcd"), reward, none + 0.3)
    assert torch.allclose(paid, at + 0.3 * (pay == "minimax"), atol=1e-5)


# --------------------------------------------------------------------------------------------------
# The loss (LSP section 2)

LP = torch.tensor([-1.0, -2.0, -0.5])  # two completions, of two tokens and of one
REF = torch.tensor([-1.5, -1.0, -0.5])
OWNER = torch.tensor([0, 0, 1])
ADVANTAGE = torch.tensor([1.0, -1.0])


def loss_and_gradient(beta, kl="k3", aggregate="sum"):
    lp = LP.clone().requires_grad_()
    weight = AGGREGATE[aggregate](torch.tensor([2.0, 1.0]))  # by the completions' lengths
    terms = player_loss(lp, REF, OWNER, OWNER.unique(), ADVANTAGE, weight, beta, kl)
    terms["loss"].backward()
    return terms["loss"].item(), lp.grad, terms["kl"].item()


def test_loss_by_hand():
    """Trap 9: without KL the loss is 0, and its gradient is -A/M on every token of a completion."""
    loss, gradient, kl = loss_and_gradient(beta=0.0)
    assert loss == 0
    assert torch.allclose(gradient, torch.tensor([-0.5, -0.5, 0.5]))
    e = torch.tensor(1.0).exp().item()
    k3 = (e**-0.5 + 0.5 - 1) + (e - 1 - 1) + 0  # exp(d) - d - 1 at d = -1/2, 1, 0
    assert kl == pytest.approx(k3, rel=1e-5)
    loss, gradient, _ = loss_and_gradient(beta=0.1)
    assert loss == pytest.approx(0.1 * k3 / 2, rel=1e-5)
    d = torch.tensor([-0.5, 1.0, 0.0])
    expected = torch.tensor([-0.5, -0.5, 0.5]) + 0.05 * (1 - d.exp())
    assert torch.allclose(gradient, expected, atol=1e-6)
    # As printed in the paper: beta * log(pi / pi_Ref)
    loss, gradient, _ = loss_and_gradient(beta=0.1, kl="literal")
    assert loss == pytest.approx(0.1 * (0.5 - 1.0) / 2, rel=1e-5)
    assert torch.allclose(gradient, torch.tensor([-0.45, -0.45, 0.55]))


@pytest.mark.parametrize("aggregate, gradient", [
    ("sum", [-0.5, -0.5, 0.5]),
    ("mean", [-0.25, -0.25, 0.5]),
    ("token", [-1 / 3, -1 / 3, 1 / 3]),
])
def test_aggregation_by_hand(aggregate, gradient):
    found = loss_and_gradient(beta=0.0, aggregate=aggregate)[1]
    assert torch.allclose(found, torch.tensor(gradient))


def test_literal_kl_does_nothing_in_the_mean_and_k3_does():
    """Averaged over all samples of the policy, the printed KL has a gradient of exactly zero.

    The gradient of k3 is not zero: it pulls the policy towards the reference.
    """
    torch.manual_seed(0)
    logits, ref = torch.randn(6, requires_grad=True), torch.randn(6).log_softmax(-1)
    gradients = {}
    for kl in ("literal", "k3"):
        lp = logits.log_softmax(-1)
        every = []
        for t in range(6):
            terms = player_loss(lp[t:t + 1], ref[t:t + 1], torch.tensor([0]), torch.tensor([0]),
                                torch.zeros(1), torch.ones(1), 1.0, kl)
            every.append(terms["loss"])
        # The expectation over samples is computed from the probabilities; nothing is sampled.
        mean = (torch.stack(every) * lp.exp().detach()).sum()
        gradients[kl] = torch.autograd.grad(mean, logits)[0]
    assert gradients["literal"].abs().max() < 1e-6
    pull = -(ref.exp() - logits.softmax(-1).detach())  # the gradient of KL(pi_Ref || pi)
    assert torch.allclose(gradients["k3"], pull, atol=1e-5)
    assert pull.abs().max() > 0.1


def test_whose_kl_each_form_is_on_three_tokens():
    """pi = (1/2, 1/4, 1/4) and pi_Ref = (1/4, 1/4, 1/2), so d = log pi_Ref - log pi = (-h, 0, h).

    h = log 2, and KL(pi, pi_Ref) = h/2 - h/4 = h/4. Over the samples of pi, the gradient of k2 is
    that of KL(pi, pi_Ref): pi_i (-d_i - h/4). That of k3 is of KL(pi_Ref, pi): pi_i - pi_Ref_i.
    """
    h = math.log(2)
    logits = torch.tensor([0.5, 0.25, 0.25]).log().requires_grad_()
    ref = torch.tensor([0.25, 0.25, 0.5]).log()
    found = {}
    for kl in selfplay.KL:
        lp = logits.log_softmax(-1)
        mean = (lp.exp().detach() * selfplay.KL[kl](ref - lp)).sum()  # over samples of pi
        found[kl] = mean.item(), torch.autograd.grad(mean, logits)[0].tolist()
    assert found["k3"][0] == pytest.approx(h / 4) == found["literal"][0]  # their value is the KL
    assert found["k2"][0] == pytest.approx(3 / 8 * h * h)
    assert found["k2"][1] == pytest.approx([3 / 8 * h, -h / 16, -5 / 16 * h])
    assert found["k3"][1] == pytest.approx([1 / 4, 0, -1 / 4])
    assert found["literal"][1] == pytest.approx([0, 0, 0], abs=1e-7)
    lp = logits.log_softmax(-1)
    papers = torch.autograd.grad((lp.exp() * (lp - ref)).sum(), logits)[0]  # KL(pi, pi_Ref) itself
    assert found["k2"][1] == pytest.approx(papers.tolist())


@pytest.mark.parametrize("kl_form", list(selfplay.KL))
def test_the_terms_of_the_loss_add_up(kl_form):
    """L is its policy term plus beta times its KL over M.

    Where completions lie in two micro-batches, the terms of both add up to those of one.
    """
    advantage = torch.tensor([2.0, -1.0])  # M = 2

    def terms(tokens):
        found = player_loss(LP[tokens], REF[tokens], OWNER[tokens], OWNER[tokens].unique(),
                            advantage, torch.ones(2), 0.1, kl_form)
        return {name: term.item() for name, term in found.items()}
    whole = terms(OWNER >= 0)
    assert whole["policy"] == pytest.approx(-(2 - 1) / 2)
    assert whole["loss"] == pytest.approx(whole["policy"] + 0.1 * whole["kl"] / 2)
    assert abs(whole["kl"]) > 0.1
    first, second = terms(OWNER == 0), terms(OWNER == 1)
    assert first["policy"] == pytest.approx(-2 / 2)
    assert {name: first[name] + second[name] for name in first} == pytest.approx(whole)


# --------------------------------------------------------------------------------------------------
# The update

def settings(**changes):
    return argparse.Namespace(**vars(selfplay.parse_args(list(TINY))) | changes)


def game_of(model, reference, **fields):
    """A Game of these two models, as far as the update needs one."""
    others = dict.fromkeys(Game._fields) | {"crew": Crew()} | fields
    return Game(**others | {"model": model, "reference": reference})


def played(model, seed=0):
    prompts = [[1, 7, 9], [1, 30], [1, 4, 4, 8]]
    out = generate(model, prompts, 4, 10, generator=torch.Generator().manual_seed(seed))
    return Player(prompts, groups(out.ids, 4), out.finished, torch.cat(out.logprobs))


def copies(model):
    """A copy to train, and a reference that differs from it a little."""
    model, reference = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.05)
    return model, reference


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def gradient_of(model, player, advantage, beta=0.1, alpha=1.0, **changes):
    """One player's gradient, and the figures of its loss."""
    model, reference = copies(model)
    terms = gradients(game_of(model, reference), player, advantage, beta, settings(**changes),
                      alpha)
    return flat_gradient(model), terms


@pytest.mark.parametrize("aggregate", ["sum", "mean", "token"])
def test_gradient_and_logged_loss_do_not_depend_on_the_micro_batch_split(small, aggregate):
    """Trap 10, too: the logged loss is that of the whole batch."""
    advantage = both(torch.rand(3, 4), ZERO)[0]
    player = played(small)
    whole, terms = gradient_of(small, player, advantage, aggregate=aggregate, micro_batch=4096)
    split, others = gradient_of(small, player, advantage, aggregate=aggregate, micro_batch=8)
    assert torch.allclose(whole, split, atol=1e-5)
    assert terms == pytest.approx(others, rel=1e-4, abs=1e-7)  # the policy term is 0 here
    assert terms["loss"] > 1e-3


@pytest.mark.parametrize("aggregate", ["sum", "mean", "token"])
def test_answers_as_a_tree_give_the_plain_formulas_gradient(small, aggregate):
    """LSP's L_Sol with k3 is computed a second way: one answer at a time, with nothing shared."""
    prompts = [[1, 7, 9], [1, 30]]
    answers = [[[5, 6, 2], [5, 6, 2], [5, 9]], [[5, 6, 2], [2], [2]]]
    # Even equal answers have different advantages here.
    advantage = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    player = Player(prompts, answers, None, None)
    once, terms = gradient_of(small, player, advantage, aggregate=aggregate)
    model, reference = copies(small)
    T = torch.tensor([3.0, 3, 2, 3, 1, 1])
    loss = policy = kl = 0
    pairs = [(prompt, answer) for prompt, group in zip(prompts, answers) for answer in group]
    for m, (prompt, answer) in enumerate(pairs):
        packed = pack([prompt], [[answer]])[0]
        lp, ref = logprobs(model, packed), logprobs(reference, packed).detach()
        k3 = ((ref - lp).exp() - (ref - lp) - 1).sum()
        ratio = (lp.sum() - lp.sum().detach()).exp()
        weight = AGGREGATE[aggregate](T)[m] / 6
        loss = loss + weight * (0.1 * k3 - ratio * advantage.flatten()[m])
        policy = policy - weight * advantage.flatten()[m]
        kl = kl + k3 / T.sum()
    loss.backward()
    plain = flat_gradient(model)
    assert (once - plain).abs().max() < 1e-4 * plain.abs().max()
    expected = {"loss": loss.item(), "policy": policy.item(), "kl": kl.item()}
    assert terms == pytest.approx(expected, rel=1e-4)


def test_gradient_does_not_depend_on_the_order_of_queries(small):
    advantage = both(torch.rand(3, 4), ZERO)[0]
    player = played(small)
    order = [2, 0, 1]
    turned = Player([player.prompts[i] for i in order], [player.completions[i] for i in order],
                    None, None)
    a, _ = gradient_of(small, player, advantage)
    b, _ = gradient_of(small, turned, advantage[order])
    assert torch.allclose(a, b, atol=1e-5)


def test_the_challenger_learns_to_prefer_the_query_with_lower_value(small):
    """Two queries have V = 3/4 and V = 1/4.

    A step makes the first less likely than before, and the second more likely.
    """
    prompt, queries = [1, 7], [[5, 6, 2], [9, 10, 2]]
    value = torch.tensor([[1.0, 1, 1, 0], [1.0, 0, 0, 0]])
    a_ch = both(value, torch.zeros(2, 4))[1]

    def likely():
        return [logprobs(small, pack([prompt], [[q]])[0]).sum().item() for q in queries]
    before = likely()
    challenger = Player([prompt], [queries], None, None)
    gradients(game_of(small, copy.deepcopy(small)), challenger, a_ch, 0.0, settings())
    learning.take(torch.optim.SGD(small.parameters(), lr=0.01))
    after = likely()
    assert after[0] < before[0] and after[1] > before[1]


def test_alpha_scales_the_challenger_s_gradient_and_not_its_figures(small):
    """With alpha 0 it has no gradient at all."""
    player, advantage = played(small), torch.randn(3, 4)
    whole, terms = gradient_of(small, player, advantage)
    half, others = gradient_of(small, player, advantage, alpha=0.5)
    none, _ = gradient_of(small, player, advantage, alpha=0.0)
    assert torch.allclose(half, whole / 2, atol=1e-6)
    assert whole.norm() > 0.01 and none.norm() == 0
    assert terms == pytest.approx(others)


def test_the_sampled_ids_are_the_trained_ids(tiny):
    """play() returns the very ids that were sampled.

    Queries reach the Solver as text, which cannot hold a special token.
    """
    model, tokenizer = tiny
    args = settings(queries=6, answers=3)
    game = game_of(model, model, tokenizer=tokenizer, prompt=selfplay.challenger_prompt(tokenizer),
                   generator=torch.Generator().manual_seed(0))
    rows, answers, challenger, solver = selfplay.play(game, args)
    queries = [row.query for row in rows]
    assert [tokenizer.decode(ids) for ids in challenger.completions[0]] == queries
    assert [[tokenizer.decode(ids) for ids in group] for group in solver.completions] == answers
    assert solver.prompts == [tokenizer.chat([{"role": "user", "content": q}]) for q in queries]
    ended = [ids[-1] in model.end_ids for ids in challenger.completions[0]]
    assert ended == challenger.finished
    for player in (challenger, solver):  # as they were sampled, and as they are trained
        packs = pack(player.prompts, player.completions)
        lp = torch.cat([logprobs(model, packed) for packed in packs])
        order = torch.cat([packed.owner for packed in packs]).argsort(stable=True)
        assert torch.allclose(player.logprobs, lp[order], atol=1e-4)


@pytest.mark.parametrize("name", ["lsp", "lsp-zero", "grpo"])
def test_a_step_is_its_equations(name, monkeypatch):
    """What step() returns follows from its own texts, and what it trains from its own ids."""
    words = [*TINY, "--game", name, "--queries", "3", "--answers", "4", "--kl", "0.1"]
    words += ["--pay", "r-zero", "--alpha-ch", "0.3"] if name != "grpo" else []
    args = selfplay.parse_args(words + (["--quality", "0.5"] if name == "lsp" else []))
    game = selfplay.set_up(args, "cpu")
    for p in game.reference.parameters():  # else the KL would be 0
        p.mul_(1.02)
    taken = []

    def take(optimizer, crew):
        taken.append(flat_gradient(game.model))
        optimizer.zero_grad()
        return 7.0
    monkeypatch.setattr(learning, "take", take)
    played = selfplay.step(game, args)
    assert torch.equal(played.reward, game.referee(played.queries, played.answers))
    quality = torch.zeros(3, 4)
    if name == "lsp":
        quality = game.judge(played.queries, played.answers)
        assert torch.allclose(played.quality, quality, atol=1e-6) and quality.max() > 0
    else:
        assert played.quality is None
    a_sol, a_ch = both(played.reward, 0.5 * quality, pay=args.pay)
    assert torch.allclose(played.a_sol, a_sol, atol=1e-6)
    losses = {"solver": gradients(game, played.solver, a_sol, 0.1, args)}
    if name == "grpo":
        assert played.challenger is None and played.a_ch is None
    else:
        assert torch.allclose(played.a_ch, a_ch, atol=1e-6)
        losses["challenger"] = gradients(game, played.challenger, a_ch, args.kl_challenger, args,
                                         0.3)
    assert played.losses.keys() == losses.keys()
    for player, terms in losses.items():
        assert played.losses[player] == pytest.approx(terms, abs=1e-5)
        assert terms["kl"] > 0
    gradient, = taken
    assert torch.allclose(gradient, flat_gradient(game.model), atol=1e-6)
    assert gradient.norm() > 0.01 and played.norm == 7.0


# --------------------------------------------------------------------------------------------------
# The command line

def run(tmp_path, *flags, expect=0):
    done = command(selfplay, tmp_path, "--device", "cpu", "--eval-items", "20", *flags)
    assert done.returncode == expect, done.stderr
    return done


@pytest.mark.parametrize("game", ["lsp", "lsp-zero", "grpo"])
def test_two_steps_of_the_real_command(tmp_path, game):
    done = run(tmp_path, *TINY, "--steps", "2", "--queries", "4", "--answers", "3", "--game", game)
    folder = tmp_path / "runs" / f"{game}-1"
    rows, steps = read_lines(folder / "metrics.jsonl"), read_lines(folder / "games.jsonl")
    assert [r["step"] for r in rows] == [1, 2]
    assert len(steps) == 2 and len(steps[0]["games"]) == 4
    settings = json.loads((folder / "settings.json").read_text())
    means = []
    for step in steps:
        for one in step["games"]:  # equal answers are recorded once, with their number
            assert sum(a["times"] for a in one["answers"]) == settings["answers"]
        total = sum(a["times"] * a["reward"] for one in step["games"] for a in one["answers"])
        means.append(total / 4 / settings["answers"])
    assert means == pytest.approx([row["reward"] for row in rows], abs=1e-3)
    assert ("quality" in rows[0]) == (game == "lsp")
    assert ("loss_challenger" in rows[0]) == (game != "grpo")
    assert settings["game"] == game
    assert settings["command"] == "selfplay.py"
    assert "win rate" in done.stdout
    assert (folder / "curves.png").is_file()
    trained, _ = load(folder / "model")
    start, _ = load(ROOT / "tiny")
    pairs = zip(trained.parameters(), start.parameters())
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_dry_run_says_what_it_needs_and_saves_nothing(tmp_path):
    done = run(tmp_path, *TINY, "--queries", "2", "--answers", "2", "--dry-run")
    for text in ("756,224 parameters", "GiB free", "second step",
                 "checkpoints of 0.01 GiB, three while one is written, and 1 model"):
        assert text in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_pay_of_ones_own(tmp_path):
    """It sees the query texts, the rewards, and the quality as it is weighted."""
    (tmp_path / "mine.py").write_text(
        "def short(queries, R, R_Q):\n"
        "    assert R.shape == R_Q.shape == (len(queries), 3) and 0 < R_Q.max() <= 0.5\n"
        "    return [-len(query) for query in queries]\n"
        "def flat(queries, R, R_Q):\n"
        "    return R\n"
        "def fails(queries, R, R_Q):\n"
        "    return 1 / 0\n")
    small = [*TINY, "--steps", "1", "--queries", "4", "--answers", "3", "--quality", "0.5"]
    run(tmp_path, *small, "--pay", "mine.py:short", "--run", "a")
    games = read_lines(tmp_path / "runs" / "a" / "games.jsonl")[0]["games"]
    length = [len(game["query"]) for game in games]
    assert [game["challenger_advantage"] for game in games] == pytest.approx(
        [sum(length) / 4 - n for n in length], abs=1e-3)
    for name, says in (("flat", r"the pay mine.py:flat returned shape [4, 3]; expected [4]"),
                       ("fails", "the pay fails failed: ZeroDivisionError"),
                       ("gone", "has no function 'gone'")):
        assert says in run(tmp_path, *small, "--pay", f"mine.py:{name}", expect=2).stderr


def test_a_judge_of_ones_own(tmp_path):
    """It sees texts, and its grades are what the game records as quality."""
    (tmp_path / "mine.py").write_text(
        "def brief(queries, answers):\n"
        "    return [[1 / (1 + len(answer)) for answer in group] for group in answers]\n"
        "def flat(queries, answers):\n"
        "    return [0 for query in queries]\n")
    small = [*TINY, "--steps", "1", "--queries", "2", "--answers", "8"]
    run(tmp_path, *small, "--judge", "mine.py:brief", "--run", "a")
    for game in read_lines(tmp_path / "runs" / "a" / "games.jsonl")[0]["games"]:
        answers = [a for a in game["answers"] for _ in range(a["times"])]
        quality = [1 / (1 + len(a["answer"])) for a in answers]
        assert [a["quality"] for a in answers] == pytest.approx(quality, abs=1e-3)
    done = run(tmp_path, *small, "--judge", "mine.py:flat", expect=2)
    assert "the judge flat returned shape [2]; expected [2, 8]" in done.stderr


def test_models_that_are_kept_on_the_way(tmp_path):
    """--keep-every 2 of five steps: two of them, each as it stood then, and the last one.

    A run's folder still stands for its last model.
    """
    small = [*TINY, "--queries", "2", "--answers", "2", "--steps", "5", "--run", "a"]
    run(tmp_path, *small, "--keep-every", "2")
    folder = tmp_path / "runs" / "a"
    kept = runs.iterates(folder)
    assert [path.name for path in kept] == ["step-2", "step-4", "model"]
    assert runs.model_folder(folder) == folder / "model"
    assert len({(path / "model.safetensors").read_bytes() for path in kept}) == 3
    assert load(folder / "step-2")[0].config == load(folder / "model")[0].config


@pytest.mark.parametrize("flags, of_solver, of_challenger", [
    (["--quality", "0.5"], 0.5, 0.5), (["--quality", "0.5", "--quality-challenger", "0"], 0.5, 0),
    (["--quality", "0", "--quality-challenger", "2"], 0, 2)])
def test_each_player_has_its_own_weight_of_the_self_reward(tmp_path, flags, of_solver,
                                                           of_challenger):
    """LSP gives R_Q to both alike. --quality-challenger parts them."""
    args = selfplay.parse_args([*TINY, "--queries", "3", "--answers", "4", *flags])
    game = selfplay.set_up(args, "cpu")
    played = selfplay.step(game, args)
    R, R_Q = played.reward, played.quality
    a_sol, a_ch = advantages(R + of_solver * R_Q, of_challenger * R_Q.mean(1) - R.mean(1))
    assert torch.allclose(played.a_sol, a_sol) and torch.allclose(played.a_ch, a_ch)


def test_a_pay_for_rewards_of_0_to_1_refuses_others(tmp_path):
    """With a reward model's numbers R-Zero's pay would be nonsense. LSP's own takes any number."""
    (tmp_path / "mine.py").write_text("def scores(queries, answers):\n"
                                      "    return [[-3 for a in group] for group in answers]\n")
    small = [*TINY, "--steps", "1", "--queries", "2", "--answers", "2", "--reward",
             "mine.py:scores"]
    done = run(tmp_path, *small, "--pay", "r-zero", expect=2)
    assert ("--pay r-zero is for rewards between 0 and 1, and --reward mine.py:scores gave -3 to -3"
            in done.stderr)
    run(tmp_path, *small)


def test_bad_rows_are_found_before_the_first_step(tmp_path):
    """One row is too long for the model. It is named by its line; no run begins, or it is left out.
    """
    rows = [{"prompt": f"Add {i} and 2.", "answer": str(i + 2)} for i in range(3)]
    rows.insert(1, {"prompt": f"Add {600 * '1'} and 2.", "answer": "x"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = [*TINY, "--steps", "2", "--queries", "4", "--answers", "2", "--game", "grpo", "--data",
             "rows.jsonl", "--reward", "math"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)).replace('"x"', '"7"'))
    done = run(tmp_path, *small, expect=2)
    assert "--data rows.jsonl, line 2: 608 tokens and up to 32 of an answer" in done.stderr
    assert "--skip-bad-rows" in done.stderr and not (tmp_path / "runs").exists()
    done = run(tmp_path, *small, "--skip-bad-rows")
    assert "line 2: 608 tokens" in done.stderr and "left out: 1 row" in done.stderr
    lines = read_lines(tmp_path / "runs" / "grpo-1" / "games.jsonl")
    asked = {game["query"] for step in lines for game in step["games"]}
    assert asked <= {row["prompt"] for row in rows if len(row["prompt"]) < 20}


@pytest.mark.parametrize("flags", [
    ("--query-tokens", "500"), ("--query-tokens", "300", "--answer-tokens", "300")])
def test_what_may_be_written_must_fit_into_the_context(tmp_path, flags):
    """Found at step 100, such a text would end the run, and --resume would only find it again."""
    done = run(tmp_path, *TINY, "--queries", "2", "--answers", "2", *flags, expect=2)
    assert "and a model's context is 512: try a smaller --query-tokens" in done.stderr


def test_the_referee_gets_each_rows_conversation_and_answer(tiny):
    """Two conversations of the data have the same last message, and not the same answer.

    Thoughts are kept in the game, but not graded. One that was cut says nothing.
    """
    chats = [[{"role": "system", "content": base}, {"role": "user", "content": "Add 5 and 5."}]
             for base in "AB"]
    rows = [data.Row(chats[0], "10", 1), data.Row(chats[1], "1010", 2)]
    seen, graded = [], []

    def referee(queries, answers, messages, answer):
        seen.append((queries, messages, answer))
        graded.append(answers)
        return [[1.0] * len(group) for group in answers]
    game = game_of(None, None, referee=referee, tokenizer=tiny[1])
    selfplay.score(game, rows, [["a", "<think>5 + 5</think>\n\n10"], ["<think>5 + ", "d"]])
    assert seen == [(["Add 5 and 5."] * 2, chats, ["10", "1010"])]
    assert graded == [[["a", "10"], ["", "d"]]]


def test_every_run_ends_with_a_scoreboard(tmp_path):
    """Whatever the reward: on the data's held-out tenth, and on the way there, too."""
    rows = [{"prompt": f"Add {i} and 2.", "answer": str(i + 2)} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = run(tmp_path, *TINY, "--steps", "2", "--queries", "4", "--answers", "2", "--game",
               "grpo", "--data", "rows.jsonl", "--reward", "math", "--eval-every", "2", "--run",
               "a")
    rows = [data.Row([{"role": "user", "content": row["prompt"]}], row["answer"]) for row in rows]
    learnt, held = data.held_out(rows)
    assert f"all (n={len(held)})" in done.stdout and "gain over the start" in done.stdout
    lines = read_lines(tmp_path / "runs" / "a" / "metrics.jsonl")
    assert "held_greedy" not in lines[0] and 0 <= lines[1]["held_sampled"] <= 1
    games = read_lines(tmp_path / "runs" / "a" / "games.jsonl")
    asked = {game["query"] for step in games for game in step["games"]}
    assert asked <= {row.query for row in learnt}
    # Other held-out rows may be named, or none.
    (tmp_path / "eval.jsonl").write_text('{"prompt": "Add 1 and 1.", "answer": "2"}\n' * 3)
    words = [*TINY, "--steps", "1", "--queries", "2", "--answers", "2", "--game", "grpo", "--data",
             "rows.jsonl", "--reward", "math"]
    assert "all (n=3)" in run(tmp_path, *words, "--eval-data", "eval.jsonl").stdout
    done = run(tmp_path, *words, "--eval-data", "none")
    assert "no scoreboard: no questions are held out" in done.stdout
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Add 1 and 1.", "answer": "hi"}\n' * 3)
    done = run(tmp_path, *words, "--eval-data", "bad.jsonl", expect=2)
    assert "--eval-data bad.jsonl, line 1: its answer is neither a number nor" in done.stderr
    # In LSP, too. A majority is then scored by the rows' known answers.
    lsp = words[:words.index("--game")]
    done = run(tmp_path, *lsp, "--eval-data", "eval.jsonl", "--reward", "majority")
    assert "all (n=3)" in done.stdout and "win rate" in done.stdout


def test_what_held_out_rows_lack_is_found_before_the_first_step(tmp_path):
    """A reward asks for a column that only the rows to learn from have."""
    (tmp_path / "mine.py").write_text("def hard(queries, answers, level):\n"
                                      "    return [[float(n) for _ in a] for a, n in "
                                      "zip(answers, level)]\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "1", "level": 3}\n' * 2)
    (tmp_path / "eval.jsonl").write_text('{"prompt": "b", "answer": "1"}\n' * 2)
    words = [*TINY, "--steps", "1", "--queries", "2", "--answers", "2", "--game", "grpo", "--data",
             "rows.jsonl", "--reward", "mine.py:hard", "--eval-data"]
    done = run(tmp_path, *words, "eval.jsonl", expect=2)
    assert "the reward hard asks for 'level'" in done.stderr and not (tmp_path / "runs").exists()
    # Such a reward is no share of right answers, and the scoreboard does not call it one.
    (tmp_path / "eval.jsonl").write_text('{"prompt": "b", "answer": "1", "level": 3}\n' * 2)
    done = run(tmp_path, *words, "eval.jsonl")
    assert "mean reward" in done.stdout and "right answers" not in done.stdout
    assert "3 [3, 3]" in done.stdout and "the best of the 8" in done.stdout


def test_unclear_answers_are_left_out_with_the_other_bad_rows(tmp_path):
    rows = [{"prompt": f"Add {i} and 2.", "answer": "two" if i == 1 else str(i)} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [*TINY, "--steps", "1", "--queries", "2", "--answers", "2", "--game", "grpo", "--data",
             "rows.jsonl", "--reward", "math"]
    done = run(tmp_path, *words, expect=2)
    assert "--data rows.jsonl, line 2: its answer is neither a number nor" in done.stderr
    assert "left out: 1 row" in run(tmp_path, *words, "--skip-bad-rows").stderr


def test_the_majority_is_scored_by_the_truth(tmp_path):
    done = run(tmp_path, *TINY, "--steps", "1", "--queries", "3", "--answers", "4", "--reward",
               "majority", "--reward", "exact:0.5", "--run", "a")
    row, = read_lines(tmp_path / "runs" / "a" / "metrics.jsonl")
    assert row["reward"] == pytest.approx(row["reward_majority"] + row["reward_exact"] / 2)
    assert 0.25 <= row["agreeing"] <= 1 and "win rate" in done.stdout
    settings = json.loads((tmp_path / "runs" / "a" / "settings.json").read_text())
    assert settings["reward"] == "majority,exact:0.5"


def test_a_run_made_to_fail_says_so(tmp_path, monkeypatch):
    """The learning rate is far too large, so the KL grows without bound.

    The terminal then says once which flag to try, and the folder keeps the warning. A window of 5
    steps is enough to see it.
    """
    monkeypatch.setattr(record, "WINDOW", 5)
    out = run(tmp_path, *TINY, "--lr", "0.04", "--kl", "0", "--steps", "8", "--queries", "4",
              "--answers", "4", "--aggregate", "token", "--answer-tokens", "8",
              "--query-tokens", "24", "--run", "a").stdout
    assert out.count("the Solver runs away from its start: try a smaller --lr") == 1
    warnings = (tmp_path / "runs" / "a" / "warnings.txt").read_text().splitlines()
    assert sum("the Solver runs away" in line for line in warnings) == 1
    assert all(line in out for line in warnings)


def test_same_seed_same_run(tmp_path):
    for name in "ab":
        run(tmp_path, *TINY, "--steps", "2", "--queries", "3", "--answers", "2",
            "--seed", "5", "--run", name)
    a, b = ((tmp_path / "runs" / name / "games.jsonl").read_text() for name in "ab")
    assert a == b


def test_ctrl_c_saves_what_there_is(tmp_path):
    """A run in a process of its own, as a person types it: with scores, and with curves."""
    words = [*TINY, "--steps", "10000", "--queries", "3", "--answers", "2", "--eval-items", "20",
             "--run", "cut"]

    def heed_ctrl_c():  # a shell's background jobs ignore it, and their children inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([sys.executable, str(ROOT / "selfplay.py"), *words], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=heed_ctrl_c)
    games = tmp_path / "runs" / "cut" / "games.jsonl"

    def begun():
        return games.is_file() and games.stat().st_size > 0
    try:
        deadline = time.time() + 60
        while time.time() < deadline and not begun():
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "stopping after this step" in err
    assert "--resume runs/cut goes on" in out
    assert "win rate" in out
    load(games.parent / "model")
    assert [step["step"] for step in read_lines(games)]
    assert (games.parent / "curves.png").stat().st_size > 10000


@pytest.fixture(scope="module")
def real_llama(tmp_path_factory):
    """A folder like that of a real Llama: its vocabulary, a chat template, small random weights.

    It does not speak the embedded language.
    """
    folder = tmp_path_factory.mktemp("llama")
    llama3_tokenizer(folder, (
        "{{ bos_token }}"
        "{% for m in messages %}"
        "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
        "{% endfor %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ))
    torch.manual_seed(0)
    model = random_llama(vocab_size=128256, eos_token_id=[128001, 128009],
                         max_position_embeddings=1024)
    model.folder = folder
    save(model, folder)
    return folder


def test_a_real_llama_plays(tmp_path, real_llama):
    """It plays with the paper's prompts, rubric and settings.

    The rewards are a function of the user's own, a written verdict, and mathematics from a file.
    """
    (tmp_path / "mine.py").write_text(
        "def short(queries, answers):\n"
        "    return [[-len(a) / 10 for a in group] for group in answers]\n")
    (tmp_path / "sums.jsonl").write_text(
        '{"question": "What is 1 + 1?", "answer": "#### 2"}\n'
        '{"question": "And 2 + 3?", "answer": "#### 5"}\n')
    small = ["--model", str(real_llama), "--steps", "1", "--queries", "2", "--answers", "2",
             "--answer-tokens", "6"]
    mine = ["--reward", "mine.py:short"]
    run(tmp_path, *small, *mine, "--query-tokens", "6", "--task", "a sum",
        "--template", "What is {a} + {b}?", "--run", "lsp")
    run(tmp_path, *small, *mine, "--query-tokens", "6", "--judge", "written", "--run", "written")
    run(tmp_path, *small, "--game", "grpo", "--data", "sums.jsonl", "--reward", "math",
        "--run", "grpo")

    def read(name):
        return read_lines(tmp_path / "runs" / name / "metrics.jsonl")[0]
    settings = json.loads((tmp_path / "runs" / "lsp" / "settings.json").read_text())
    assert settings["lr"] == 3e-6
    assert settings["kl"] == settings["kl_challenger"] == 0.05
    assert settings["quality"] == 7  # the paper's R_Q counts points
    assert settings["queries"] == 2
    assert 0 < read("lsp")["quality"] < 1
    assert read("written")["malformed"] == 1 and read("written")["quality"] == 0
    assert read("grpo")["reward"] == 0
    assert (tmp_path / "runs" / "grpo" / "model" / "model.safetensors").is_file()
    scores = json.loads((tmp_path / "runs" / "lsp" / "evaluation.json").read_text())["scores"]
    assert scores["now"]["all"]["n"] == 2  # the Challenger's last queries
    grpo = json.loads((tmp_path / "runs" / "grpo" / "settings.json").read_text())
    assert grpo["lr"] == 1e-6
    for flags, says in (
        ([], "does not speak the embedded language"),
        (["--reward", "exact"], "cannot judge it"),
        (["--game", "lsp", *mine, "--data", "sums.jsonl"], "--data is for"),
        (["--game", "grpo", "--reward", "math"], "name --data"),
    ):
        done = run(tmp_path, *small, *flags, expect=2)
        assert says in done.stderr and "Traceback" not in done.stderr


def test_challenger_prompt_has_its_two_variables(real_llama):
    tokenizer = load(real_llama)[1]
    prompt = selfplay.challenger_prompt(tokenizer, "a sum", "What is {a} + {b}?")
    text = tokenizer.decode(prompt)
    for part in ("Task: a sum\n", "What is {a} + {b}?", "input for this task"):
        assert part in text
    assert "Task" not in tokenizer.decode(selfplay.challenger_prompt(tokenizer))


@pytest.mark.parametrize("flags, message", [
    (["--steps", "0"], "not above zero"), (["--steps", "-3"], "not above zero"),
    (["--lr", "nan"], "not above zero"), (["--queries", "many"], "not a whole number"),
    (["--kl", "-1"], "not zero or more"), (["--game", "chess"], "invalid choice"),
    (["--step", "3"], "unrecognized"), (["--model", "nowhere"], "no such model folder"),
    (["--reward", "gone.py:f"], "no file or folder 'gone.py'"),
    (["--reward", "mine.py:absent"], "has no function"),
    (["--reward", "mine.py:nan"], "NaN"), (["--reward", "mine.py:flat"], "shape"),
    (["--run", "taken"], "exists already"), (["--judge", "written"], "can only say a digit"),
    (["--judge", "strict"], "expected written, expected or file.py:function"),
    (["--task", "x"], "has its own"), (["--game", "grpo", "--pay", "sqlm"], "--pay means"),
    (["--reward", "math"], "from --data alone"), (["--run", "../away"], "not a plain folder name"),
    (["--device", "abacus"], "no such device"),
    (["--quality", "0"], "that is --game lsp-zero"),
    (["--reward", "mine.py:known"], "asks for 'answer', which is not at hand here"),
    (["--game", "lsp-zero", "--quality=2"], "--quality means nothing with --game lsp-zero"),
    (["--answers", "1"], "teaches nothing"), (["--queries", "1"], "the Challenger nothing"),
    (["--kl", "0", "--kl-challenger", "0", "--kl-form", "literal"], "leave out"),
    (["--template-args", "a"], "expected name=value"), (["--pay", "mine.py:flat"], "would get 3"),
    (["--alpha-ch", "0", "--pay", "r-zero"], "--pay means nothing with --alpha-ch 0"),
    (["--alpha-ch", "0", "--kl-challenger=1"], "--kl-challenger means nothing with --alpha-ch 0"),
    (["--skip-bad-rows"], "is about --data"), (["--pay", "fair"], "expected minimax, r-zero"),
])
def test_bad_input_is_one_line_and_exit_2(tmp_path, flags, message):
    (tmp_path / "mine.py").write_text(
        "def nan(q, a):\n"
        "    return [[float('nan')] * len(g) for g in a]\n"
        "def flat(q, a):\n"
        "    return [0.0]\n"
        "def known(q, a, answer):\n"
        "    return 0\n")
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "runs" / "taken" / "mine.txt").write_text("keep")
    done = run(tmp_path, *TINY, "--queries", "2", "--answers", "2", *flags, expect=2)
    last = done.stderr.strip().splitlines()[-1]
    assert message in last and "Traceback" not in done.stderr
    assert [p.name for p in (tmp_path / "runs" / "taken").iterdir()] == ["mine.txt"]
