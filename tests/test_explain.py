"""The lessons of recipes/explain.py: what they print is the real step, and follows from itself."""
import html
import math
import re

import pytest
from conftest import ROOT, command

import selfplay
import spin
from recipes import explain
from support import lesson as pages

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


# A reward of another size, and rows of tables that are not the default's.
LARGE = """
def large(queries, answers):
    return [[1e6 * len(a) for a in group] for group in answers]

def pay(queries, reward, quality):
    return reward.mean(1)
"""


def page_of(path):
    """(the text of a page as it is shown, [(number, formula, place)])."""
    body = re.search("<pre>(.*)</pre>", path.read_text(), re.DOTALL)[1]
    spans = re.findall(
        r'<span tabindex="0" data-formula="([^"]*)" data-place="([^"]*)">([^<]*)</span>', body)
    return (html.unescape(re.sub("<[^>]*>", "", body)),
            [(n, html.unescape(formula), html.unescape(place)) for formula, place, n in spans])


@pytest.mark.parametrize("name", explain.MADE)
def test_what_made_a_number_is_one_line_of_the_code(name):
    place, line = explain.MADE[name].place()
    assert re.fullmatch(r"\w+\.py:\d+", place) and explain.MADE[name].line.strip() in line


def test_a_line_that_is_not_there_is_seen():
    """The test above can fail."""
    for line in ("no such line", "def "):
        with pytest.raises(ValueError, match=r"selfplay\.py has \d+ lines"):
            explain.MADE["A_Sol"]._replace(line=line).place()


def test_the_page_is_the_lesson_and_its_numbers_tell_what_made_them(tmp_path):
    done = command(explain, tmp_path, "selfplay", *TINY, "--html", "step.html")
    shown, numbers_there = page_of(tmp_path / "step.html")
    assert done.returncode == 0 and shown + "\nopen it in a browser: step.html\n" == done.stdout
    source = (ROOT / "selfplay.py").read_text().splitlines()
    made = {}
    for n, formula, place in numbers_there:
        made.setdefault(formula, []).append(float(n))
        file, line = place.split("    ", 1)
        if file.startswith("selfplay.py:"):
            assert source[int(file.split(":")[1]) - 1].strip() == line
    assert len(made) > 15 and len(numbers_there) > 100
    # 12 advantages of the answers, then that of the text that is shown, then those of AFTER.
    a_sol = made["A_Sol = R + R_Q - mean over the group"]
    printed = [row[2] for row in numbers(r"^      \S.*? N +N +(?=[+-])N +N +N$", done.stdout)]
    assert a_sol[:12] == printed and len(printed) == 12
    assert "<script" not in (tmp_path / "step.html").read_text()


def test_the_page_of_spin(tmp_path):
    done = command(explain, tmp_path, "spin", *TINY, "--html=pair.html")
    shown, numbers_there = page_of(tmp_path / "pair.html")
    assert done.returncode == 0 and shown + "\nopen it in a browser: pair.html\n" == done.stdout
    [[margin]] = numbers(r"\) = N   \(spin\.spin_margin\)", done.stdout)
    assert margin in [float(n) for n, formula, place in numbers_there
                      if formula.startswith("m = lambda") and place.startswith("spin.py:")]


def test_large_numbers_fit_and_other_settings_have_their_lines(tmp_path):
    (tmp_path / "mine.py").write_text(LARGE)
    done = command(explain, tmp_path, "selfplay", *TINY, "--game", "lsp-zero", "--kl-form", "k2",
                   "--reward", "mine.py:large", "--pay", "mine.py:pay", "--html", "step.html")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    formulas = {formula for _, formula, _ in page_of(tmp_path / "step.html")[1]}
    names = ("R, another", "R_Q, another", "paid, another", "KL, another")
    assert {explain.MADE[name].formula for name in names} <= formulas
    assert explain.MADE["KL"].formula not in formulas


@pytest.mark.parametrize("words, says", [
    (("--html", "nowhere/step.html"), "expected a file's path"), (("--html", "."), "expected a"),
    (("--html",), "expected a"), (("--html=",), "expected a"),
    (("--html", "there.html"), "there.html exists already")])
def test_a_page_that_cannot_be_written_is_one_line(tmp_path, words, says):
    (tmp_path / "there.html").write_text("mine")
    done = command(explain, tmp_path, "spin", *TINY, *words)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"] and not done.stdout


def test_texts_are_cut_and_filled_up_to_columns():
    """Letters of East Asia take two columns, so fewer of them fit."""
    assert pages.fit("abc", 5) == "abc  " and pages.fit("abcdef", 5) == "abcde"
    assert pages.fit("", 10) == "(nothing) " and pages.fit("a\nb", 4) == "a\\nb"
    assert pages.fit("\u4e2d\u6587\u5b57", 5) == "\u4e2d\u6587 "


def test_marks_are_not_printed(capsys):
    with pages.marked() as printed:
        print(f"V = {pages.number(0.75, '8.4f', 'V')} < 1")
    assert capsys.readouterr().out == "V =   0.7500 < 1\n"
    assert pages.plain(printed.text) == "V =   0.7500 < 1\n" != printed.text


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_says_what_it_is(tmp_path, word):
    out = lesson(tmp_path, word)
    assert out.startswith("usage: explain.py") and "as a lesson" in out
