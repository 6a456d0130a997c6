"""The lessons of recipes/explain.py: what they print is the real step, and follows from itself."""
import math
import re

import pytest
from conftest import ROOT, command

import selfplay
import spin
from recipes import explain

TINY = ("--model", str(ROOT / "tiny"), "--device", "cpu")
NUMBER = r"([+-]?\d+\.?\d*(?:e[+-]\d+)?)"
# A strong KL and a large learning rate: the KL terms then count, and the step changes something.
STRONG = ("--lr", "2e-3", "--kl", "3", "--kl-challenger", "5")
# Rewards whose gradient is too large for float32.
HUGE = """
def huge(queries, answers):
    return [[3e38 * (-1) ** i for i, _ in enumerate(group)] for group in answers]
"""


def lesson(folder, *words):
    """What the command prints. It must fit 100 columns and leave nothing in the folder."""
    done = command(explain, folder, *words)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert list(folder.iterdir()) == []
    return done.stdout


def numbers(pattern, text):
    """All matches of a pattern as numbers: a list of lists. N in the pattern is a number."""
    found = re.findall(re.sub(r"\bN\b", lambda _: NUMBER, pattern), text, re.M)
    return [[float(x) for x in ([row] if isinstance(row, str) else row)] for row in found]


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """The selfplay lesson with a strong KL."""
    return lesson(tmp_path_factory.mktemp("step"), "selfplay", *TINY, *STRONG)


def test_both_losses_follow_from_the_printed_advantages_and_kl(step):
    """LSP section 2: L = 1/M sum (beta KL sum - A), policy + beta KL, and L_Sol + alpha_Ch L_Ch."""
    # R, R_Q, A_Sol, log pi and KL sum. In a token's row the third number has no sign.
    answers = numbers(r"^      \S.*? N +N +(?=[+-])N +N +N$", step)
    queries = numbers(r"A_Ch = N .*\n.*KL sum = N", step)
    assert len(answers) == 12 and len(queries) == 3
    l_sol = sum(3 * kl - a for _, _, a, _, kl in answers) / 12
    l_ch = sum(5 * kl - a for a, kl in queries) / 3
    (policy, beta, kl, sol), (policy_ch, beta_ch, kl_ch, ch) = numbers(
        r"policy \+ beta KL = N \+ N x N = N;", step)
    assert sol == pytest.approx(l_sol, rel=0.02, abs=1e-4) and l_sol > 0.01
    assert ch == pytest.approx(l_ch, rel=0.02, abs=1e-4)
    assert (beta, beta_ch) == (3, 5)
    assert sol == pytest.approx(policy + beta * kl, abs=1e-5)
    assert ch == pytest.approx(policy_ch + beta_ch * kl_ch, abs=1e-5)
    [[total]] = numbers("of the step itself: N;", step)
    assert total == pytest.approx(sol + 0.005 * ch, abs=1e-5)


def test_the_printed_step_is_the_sixth_of_the_game(step):
    """The same game, played by selfplay.step: the same losses, KL and gradient norm."""
    args = selfplay.parse_args([*TINY, *STRONG, "--queries", "3", "--answers", "4"])
    game = selfplay.set_up(args, "cpu")
    for group in game.optimizer.param_groups:
        group["lr"] = args.lr
    for _ in range(6):
        played = selfplay.step(game, args)
    losses = [row[-1] for row in numbers(r"policy \+ beta KL = N \+ N x N = N;", step)]
    assert losses == pytest.approx([row["loss"] for row in played.losses.values()], abs=1e-6)
    kl = [row[0] for row in numbers("KL of a token N on average", step)]
    assert kl == pytest.approx([row["kl"] for row in played.losses.values()], rel=0.01)
    assert numbers("gradient norm N,", step) == [[pytest.approx(played.norm, abs=1e-3)]]
    assert all(query[:88] in step for query in played.queries)


def test_the_step_changed_something(step):
    """An answer of positive advantage has another log-probability after the step."""
    changed = numbers(r"A N   log pi +N -> +N ", step)
    assert any(a > 0 and new != old for a, old, new in changed)
    assert any(a < 0 and new < old for a, old, new in changed)


@pytest.mark.parametrize("flags", [
    ("--game", "grpo"),
    ("--game", "lsp-zero", "--aggregate", "mean", "--kl-form", "literal", "--pay", "absolute-zero"),
    ("--aggregate", "token", "--advantage", "std", "--dtype", "bfloat16")])
def test_the_parts_make_the_loss_with_other_settings(tmp_path, flags):
    """policy + beta KL is the loss that selfplay.gradients returns, however texts are weighted."""
    strong = STRONG[:4] if "grpo" in flags else STRONG  # grpo has no Challenger
    out = lesson(tmp_path, "selfplay", *TINY, *strong, *flags)
    rows = numbers(r"policy \+ beta KL = N \+ N x N = N;", out)
    assert len(rows) == (1 if "grpo" in flags else 2) and ("L_Ch" in out) == (len(rows) == 2)
    for policy, beta, kl, loss in rows:
        assert loss == pytest.approx(policy + beta * kl, rel=0.02, abs=1e-5)


def test_the_pair_is_real(tmp_path):
    """SPIN eq. 4.7: margin and loss follow from the printed sums; training widens the margin."""
    out = lesson(tmp_path, "spin", *TINY, "--lam", "2")
    (answer,), (rival,) = numbers(r"^      sum .* N$", out)
    [[margin]] = numbers(r"\) = N   \(spin\.spin_margin\)", out)
    [[loss]] = numbers(r"= N   \(spin\.spin_loss\)", out)
    assert margin == pytest.approx(2 * (answer - rival), abs=1e-3)
    assert loss == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-3)
    [slopes] = numbers(r"by log p\(y\|x\) is N, by log p\(y'\|x\) N:", out)
    slope = 2 / (1 + math.exp(margin))
    assert slopes == pytest.approx([-slope, slope], abs=1e-3)
    [[old, new]] = numbers("^  margin N -> N ", out)
    assert old == margin and new > old and margin != 0


def test_the_pair_is_trained_as_in_the_game(tmp_path):
    """The same pair, trained by spin.player_trains: the same margin before and after."""
    out = lesson(tmp_path, "spin", *TINY)
    args = spin.parse_args([*TINY, "--pairs", "128", "--iterations", "1", "--lam", "1"])
    game = spin.set_up(args)
    it = spin.opponent_plays(game, args, spin.new_iteration(game, args, 0, [], 0))
    i = next(i for i in range(64, 128) if it.pairs[i].answer != it.pairs[i].rival)
    margins = []
    for part in (slice(64), slice(64, None)):
        some = it._replace(pairs=it.pairs[part], ref=it.ref[part])
        list(spin.player_trains(game, args, some, spin.rmsprop(game.player)))
        lp = spin.all_logprobs(game.player, [it.pairs[i]], args.micro_batch)
        margins.append(spin.spin_margin(lp, it.ref[i:i + 1], 1.0).item())
    assert numbers("^  margin N -> N ", out) == [pytest.approx(margins, abs=1e-3)]
    assert game.data[it.chosen[i]].query in out


def test_the_margin_is_0_before_any_training(tmp_path):
    """With a single pair nothing is trained unseen: the player still is its opponent."""
    out = lesson(tmp_path, "spin", *TINY, "--pairs", "1", "--seed", "1")
    assert "margin = 1 (+0.0000 - +0.0000) = +0.0000" in out and "= 0.69315   (spin" in out


def test_a_gradient_that_is_not_finite_is_one_line(tmp_path):
    (tmp_path / "mine.py").write_text(HUGE)
    done = command(explain, tmp_path, "selfplay", *TINY, "--game", "lsp-zero",
                   "--reward", "mine.py:huge")
    assert done.returncode == 2 and "the gradient's norm is" in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words, says", [
    ((), "selfplay or spin"),
    (("chess",), "selfplay or spin"),
    (("--lr", "1", "spin"), "selfplay or spin"),
    (("selfplay", "--resume=runs/cut"), "--resume=runs/cut: a lesson is no run"),
    (("selfplay", "--dry-run"), "--dry-run: a lesson is no run"),
    (("spin", "--run", "a"), "--run: a lesson is no run"),
    (("spin", *TINY, "--dtype", "bfloat16"), "--dtype float32"),
    (("spin", *TINY, "--game", "sft"), "--game spin"),
    (("selfplay", "--model", "nowhere"), "no such model folder"),
    (("spin", *TINY, "--device", "nowhere"), "no such device")])
def test_bad_input_is_one_line(tmp_path, words, says):
    done = command(explain, tmp_path, *words)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = command(explain, tmp_path, "selfplay", *TINY)
    assert done.returncode == 2 and done.stderr.endswith("start it without torchrun\n")


def test_pairs_that_teach_nothing_are_one_line(tmp_path, monkeypatch):
    """Where the opponent answers as people do there is no pair to show."""
    def like_people(*args):
        it = real(*args)
        return it._replace(pairs=[pair._replace(rival=pair.answer) for pair in it.pairs])
    real = explain.spin.opponent_plays
    monkeypatch.setattr(explain.spin, "opponent_plays", like_people)
    done = command(explain, tmp_path, "spin", *TINY, "--pairs", "4")
    assert done.returncode == 2 and "try more --pairs" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_says_what_it_is(tmp_path, word):
    out = lesson(tmp_path, word)
    assert out.startswith("usage: explain.py") and "as a lesson" in out
