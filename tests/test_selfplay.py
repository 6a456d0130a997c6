"""LSP: each equation by hand, each trap, and the real command line."""
import argparse
import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SHARED, command, small_config

import selfplay
from model import Config, Llama, generate, groups, load, logprobs, pack, save
from selfplay import AGGREGATE, PAY, Player, advantages, player_loss, update

R = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])  # N = 3, G = 4; V = 1/4, 3/4, 0
ZERO = torch.zeros(3, 4)
MINIMAX = PAY["minimax"]


# ---------------------------------------------------------------------------------------------------------------------
# Advantages (LSP section 2)

def test_advantages_by_hand():
    a_sol, a_ch = advantages(R, ZERO, MINIMAX)
    assert torch.allclose(a_sol, torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.25, 0.25, 0.25, -0.75], [0, 0, 0, 0]]))
    assert torch.allclose(a_ch, torch.tensor([1 / 3 - 1 / 4, 1 / 3 - 3 / 4, 1 / 3 - 0]))  # Vbar - V, Vbar = 1/3


def test_advantages_with_quality_by_hand():
    """Solver R + R_Q; Challenger -V + V_Q; then centred. Here query 2 is nonsense: no reward, no quality."""
    quality = torch.tensor([[1.0, 0.5, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    a_sol, a_ch = advantages(R, quality, MINIMAX)
    assert torch.allclose(a_sol[0], torch.tensor([2.0, 0.5, 0.5, 0.0]) - 0.75)
    assert torch.allclose(a_ch, torch.tensor([0.25, 0.25, 0.0]) - 0.5 / 3)  # -1/4 + 1/2, -3/4 + 1, -0 + 0


@pytest.mark.parametrize("normalise", ["centre", "std"])
def test_advantages_sum_to_zero(normalise):
    torch.manual_seed(0)
    a_sol, a_ch = advantages(torch.rand(5, 8), torch.rand(5, 8), MINIMAX, normalise)
    assert a_sol.sum(1).abs().max() < 1e-5 and a_ch.sum().abs() < 1e-5


def test_a_constant_quality_changes_no_advantage():
    for plain, shifted in zip(advantages(R, ZERO, MINIMAX), advantages(R, ZERO + 3.0, MINIMAX)):
        assert torch.allclose(plain, shifted, atol=1e-6)


def test_std_normalisation():
    a_sol, _ = advantages(R, ZERO, MINIMAX, "std")
    assert torch.allclose(a_sol[0], torch.tensor([3.0, -1, -1, -1]) / 3**0.5, atol=1e-3) and a_sol[2].abs().max() == 0


@pytest.mark.parametrize("pay, at", [  # trap 7: also at p = 0 and p = 1; p = 0, 1/4, 1/2, 1
    ("minimax", [0, -0.25, -0.5, -1]), ("r-zero", [0, 0.5, 1, 0]), ("absolute-zero", [0, 0.75, 0.5, 0]), ("sqlm", [0, 1, 1, 0]),
    ("spice", [0.0439369, 0.8225775, 1, 0.0439369])])
def test_what_the_challenger_is_paid(pay, at):
    assert torch.allclose(PAY[pay](torch.tensor([0, 0.25, 0.5, 1])), torch.tensor(at, dtype=torch.float32), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The loss (LSP section 2)

LP = torch.tensor([-1.0, -2.0, -0.5])  # two completions, of two tokens and of one
REF = torch.tensor([-1.5, -1.0, -0.5])
OWNER = torch.tensor([0, 0, 1])
ADVANTAGE = torch.tensor([1.0, -1.0])


def loss_and_gradient(beta, kl="k3", aggregate="sum"):
    lp = LP.clone().requires_grad_()
    weight = AGGREGATE[aggregate](torch.tensor([2.0, 1.0]))  # by the completions' lengths
    loss, kl = player_loss(lp, REF, OWNER, ADVANTAGE, torch.ones(2), weight, beta, kl)
    loss.backward()
    return loss.item(), lp.grad, kl.item()


def test_loss_by_hand():
    """Trap 9: without KL the loss is 0 and its gradient is -A/M on every token of a completion."""
    loss, gradient, kl = loss_and_gradient(beta=0.0)
    assert loss == 0 and torch.allclose(gradient, torch.tensor([-0.5, -0.5, 0.5]))
    e = torch.tensor(1.0).exp().item()
    k3 = (e**-0.5 + 0.5 - 1) + (e - 1 - 1) + 0  # exp(d) - d - 1 at d = -1/2, 1, 0
    assert kl == pytest.approx(k3, rel=1e-5)
    loss, gradient, _ = loss_and_gradient(beta=0.1)
    assert loss == pytest.approx(0.1 * k3 / 2, rel=1e-5)
    d = torch.tensor([-0.5, 1.0, 0.0])
    assert torch.allclose(gradient, torch.tensor([-0.5, -0.5, 0.5]) + 0.05 * (1 - d.exp()), atol=1e-6)
    loss, gradient, _ = loss_and_gradient(beta=0.1, kl="literal")  # as printed: beta * log(pi / pi_Ref)
    assert loss == pytest.approx(0.1 * (0.5 - 1.0) / 2, rel=1e-5) and torch.allclose(gradient, torch.tensor([-0.45, -0.45, 0.55]))


@pytest.mark.parametrize("aggregate, gradient", [
    ("sum", [-0.5, -0.5, 0.5]), ("mean", [-0.25, -0.25, 0.5]), ("token", [-1 / 3, -1 / 3, 1 / 3])])
def test_aggregation_by_hand(aggregate, gradient):
    assert torch.allclose(loss_and_gradient(beta=0.0, aggregate=aggregate)[1], torch.tensor(gradient))


def test_literal_kl_does_nothing_in_the_mean_and_k3_does():
    """The trap of PAPERS.md: over all of pi's own samples the printed KL's gradient is exactly zero; k3's is not."""
    torch.manual_seed(0)
    logits, ref = torch.randn(6, requires_grad=True), torch.randn(6).log_softmax(-1)
    gradients = {}
    for kl in ("literal", "k3"):
        lp = logits.log_softmax(-1)
        every = [player_loss(lp[t:t + 1], ref[t:t + 1], torch.tensor([0]), torch.zeros(1), torch.ones(1), torch.ones(1), 1.0, kl)[0] for t in range(6)]
        mean = (torch.stack(every) * lp.exp().detach()).sum()  # the expectation over samples, computed and not sampled
        gradients[kl] = torch.autograd.grad(mean, logits)[0]
    assert gradients["literal"].abs().max() < 1e-6
    pull = -(ref.exp() - logits.softmax(-1).detach())  # k3's: the gradient of KL(pi_Ref || pi)
    assert torch.allclose(gradients["k3"], pull, atol=1e-5) and pull.abs().max() > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# The update

def settings(**changes):
    return argparse.Namespace(**vars(selfplay.parse_args([])) | changes)


def played(model, seed=0):
    prompts = [[1, 7, 9], [1, 30], [1, 4, 4, 8]]
    out = generate(model, prompts, 4, 10, generator=torch.Generator().manual_seed(seed))
    return Player(prompts, groups(out.ids, 4), out.finished)


def gradient_of(model, player, beta=0.1, **changes):
    model, reference = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.05)
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    still.zero_grad = lambda: None  # keep the gradient, to look at it
    report, _ = update(model, reference, still, {"solver": (player, 1.0, beta)}, settings(clip=1e9, **changes))
    return torch.cat([p.grad.flatten() for p in model.parameters()]), report["solver"]


@pytest.mark.parametrize("aggregate", ["sum", "mean", "token"])
def test_gradient_and_logged_loss_do_not_depend_on_the_micro_batch_split(small, aggregate):
    """Also trap 10: the logged loss is the whole batch's."""
    player = played(small)._replace(advantage=advantages(torch.rand(3, 4), ZERO, MINIMAX)[0].flatten())
    (whole, report), (split, split_report) = (gradient_of(small, player, aggregate=aggregate, micro_batch=n) for n in (4096, 8))
    assert torch.allclose(whole, split, atol=1e-5) and report == pytest.approx(split_report, rel=1e-4)


@pytest.mark.parametrize("aggregate", ["sum", "mean", "token"])
def test_equal_answers_computed_once_give_the_plain_formulas_gradient(small, aggregate):
    """The whole loss again, one answer at a time and with nothing shared: LSP's L_Sol with k3."""
    prompts, answers = [[1, 7, 9], [1, 30]], [[[5, 6, 2], [5, 6, 2], [9, 2]], [[5, 6, 2], [2], [2]]]
    advantage = torch.randn(6, generator=torch.Generator().manual_seed(0))  # unequal even for equal answers
    once, report = gradient_of(small, Player(prompts, answers, None, advantage), aggregate=aggregate)
    model, reference = copy.deepcopy(small), copy.deepcopy(small)
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.05)
    T = torch.tensor([3.0, 3, 2, 3, 1, 1])
    loss = 0
    for m, (prompt, answer) in enumerate((p, a) for p, group in zip(prompts, answers) for a in group):
        packed = pack([prompt], [[answer]])[0]
        lp, ref = logprobs(model, packed), logprobs(reference, packed).detach()
        k3 = ((ref - lp).exp() - (ref - lp) - 1).sum()
        loss = loss + AGGREGATE[aggregate](T)[m] * (0.1 * k3 - (lp.sum() - lp.sum().detach()).exp() * advantage[m]) / 6
    loss.backward()
    plain = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (once - plain).abs().max() < 1e-4 * plain.abs().max() and report[0] == pytest.approx(loss.item(), rel=1e-4)


def test_gradient_does_not_depend_on_the_order_of_queries(small):
    advantage = advantages(torch.rand(3, 4), ZERO, MINIMAX)[0]
    player = played(small)
    order = [2, 0, 1]
    turned = Player([player.prompts[i] for i in order], [player.completions[i] for i in order], None, advantage[order].flatten())
    a, b = gradient_of(small, player._replace(advantage=advantage.flatten()))[0], gradient_of(small, turned)[0]
    assert torch.allclose(a, b, atol=1e-5)


def test_the_challenger_learns_to_prefer_the_query_with_lower_value(small):
    """Two queries, V = 3/4 and V = 1/4: a step makes the second likelier than the first, against before."""
    prompt, queries = [1, 7], [[5, 6, 2], [9, 10, 2]]
    value = torch.tensor([[1.0, 1, 1, 0], [1.0, 0, 0, 0]])
    a_ch = advantages(value, torch.zeros(2, 4), MINIMAX)[1]
    score = lambda: [logprobs(small, pack([prompt], [[q]])[0]).sum().item() for q in queries]
    before = score()
    update(small, copy.deepcopy(small), torch.optim.SGD(small.parameters(), lr=0.01),
           {"challenger": (Player([prompt], [queries], None, a_ch), 1.0, 0.0)}, settings())
    after = score()
    assert after[0] < before[0] and after[1] > before[1]


def test_alpha_zero_gives_the_challenger_no_gradient(small):
    player = played(small)._replace(advantage=torch.randn(12))
    report, norm = update(small, copy.deepcopy(small), torch.optim.SGD(small.parameters(), lr=0.0), {"challenger": (player, 0.0, 0.1)}, settings())
    assert norm == 0


def test_the_sampled_ids_are_the_trained_ids(tiny):
    """play() hands on the very ids that were sampled; queries reach the Solver as text that can hold no special token."""
    model, tokenizer = tiny
    args = settings(queries=6, answers=3)
    queries, answers, challenger, solver = selfplay.play(model, tokenizer, selfplay.challenger_prompt(tokenizer), None, args, torch.Generator().manual_seed(0))
    assert [tokenizer.decode(ids) for ids in challenger.completions[0]] == queries
    assert [[tokenizer.decode(ids) for ids in group] for group in solver.completions] == answers
    assert solver.prompts == [tokenizer.chat([{"role": "user", "content": q}]) for q in queries]
    assert [c[-1] in model.end_ids for c in challenger.completions[0]] == challenger.finished
    for player in (challenger, solver):  # what each is said to be unsure by
        lp = torch.cat([logprobs(model, packed) for packed in pack(player.prompts, player.completions)])
        assert player.entropy == pytest.approx(-lp.mean().item(), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def run(tmp_path, *flags, expect=0):
    done = command(selfplay, tmp_path, "--eval-items", "20", "--device", "cpu", *flags)
    assert done.returncode == expect, done.stderr
    return done


@pytest.mark.parametrize("game", ["lsp", "lsp-zero", "grpo"])
def test_two_steps_of_the_real_command(tmp_path, game):
    words = ["--model", str(ROOT / "tiny"), "--steps", "2", "--queries", "4", "--answers", "3", "--eval-items", "20", "--device", "cpu", "--game", game]
    if game == "lsp":  # once as a person types it, curves and all
        done = subprocess.run([sys.executable, str(ROOT / "selfplay.py"), *words], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    else:
        done = command(selfplay, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / f"{game}-1"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    games = [json.loads(line) for line in (folder / "games.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2] and len(games) == 2 and len(games[0]["games"]) == 4
    settings = json.loads((folder / "settings.json").read_text())
    assert all(sum(a["times"] for a in game["answers"]) == settings["answers"] for line in games for game in line["games"])  # equal ones stand once
    means = [sum(a["times"] * a["reward"] for game in line["games"] for a in game["answers"]) / 4 / settings["answers"] for line in games]
    assert means == pytest.approx([row["reward"] for row in rows], abs=1e-3)
    assert ("quality" in rows[0]) == (game == "lsp") and ("loss_challenger" in rows[0]) == (game != "grpo")
    assert settings["game"] == game
    assert "win rate" in done.stdout and (game != "lsp" or (folder / "curves.png").stat().st_size > 10000)
    trained, _ = load(folder / "model")
    start, _ = load(ROOT / "tiny")
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters()))


def test_dry_run_says_what_it_needs_and_saves_nothing(tmp_path):
    done = run(tmp_path, "--model", str(ROOT / "tiny"), "--queries", "2", "--answers", "2", "--dry-run")
    assert "756,224 parameters" in done.stdout and "GiB free" in done.stdout and "second step" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_the_lesson_is_the_real_step(tmp_path):
    """--explain fits 100 columns, and both losses follow from the printed advantages and KL sums; a strong KL makes them speak."""
    import re
    out = run(tmp_path, "--model", str(ROOT / "tiny"), "--explain", "--lr", "2e-3", "--kl", "3", "--kl-challenger", "5").stdout
    assert max(map(len, out.splitlines())) <= 100 and not (tmp_path / "runs").exists()
    number = r"([+-]?\d+\.?\d*(?:e[+-]\d+)?)"
    answers = re.findall(rf"^      \S.*? {number} +{number} +([+-]\d\.\d+) +-{number} +{number}$", out, re.M)
    queries = re.findall(rf"A_Ch = {number} .*KL sum = {number}", out)
    assert len(answers) == 12 and len(queries) == 3
    l_sol = sum(3 * float(kl) - float(a) for *_, a, _, kl in answers) / 12
    l_ch = sum(5 * float(kl) - float(a) for a, kl in queries) / 3
    printed = [float(x) for x in re.findall(rf"KL sum - A\) = {number}", out)]
    assert printed == [pytest.approx(l_sol, rel=0.02, abs=1e-4), pytest.approx(l_ch, rel=0.02, abs=1e-4)] and l_sol > 0.01
    total, = re.findall(rf"of the step itself: {number}", out)
    assert float(total) == pytest.approx(printed[0] + 0.005 * printed[1], abs=1e-4)
    assert re.search(r"A \+\d.*log pi +(\S+) -> +(?!\1)", out)  # the step changed something


def test_similarity_and_agreement_by_hand():
    """Three-letter pieces in common; and right before wrong, within a group alone."""
    assert selfplay.similarity(["abcd", "abce"]) == pytest.approx(1 / 3)  # abc; bcd; bce
    assert selfplay.similarity(["abcd", "abce", "x"]) == pytest.approx(1 / 9)
    assert selfplay.similarity(["", "", ""]) == 1 and selfplay.similarity(["alone"]) == 0
    reward, quality = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 0]]), torch.tensor([[0.5, 0.2, 0.9], [0.4, 0.1, 0.1], [1, 2, 3]])
    assert selfplay.agreement(reward, quality) == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert selfplay.agreement(reward[2:], quality[2:]) is None


@pytest.mark.parametrize("key", list(selfplay.WATCH))
def test_each_trouble_is_said_once(key):
    """Each is said when its own figure turns bad, over a whole window, and never again."""
    good = {"distinct": 1.0, "valid": 0.9, "spread": 0.4, "kl_solver": 0.05, "kl_challenger": 0.01, "answer_cut": 0.0, "query_cut": 0.0, "malformed": 0.0, "agreement": 0.8}
    bad = good | {key: 0.0 if key in ("distinct", "valid", "spread", "agreement") else 2.0}
    rows = lambda row, n: [{"step": i} | row for i in range(n)]
    said = {}
    assert selfplay.watch(rows(good, selfplay.WINDOW), said) == [] and selfplay.watch(rows(bad, selfplay.WINDOW - 1), said) == []
    sentence, = selfplay.watch(rows(bad, selfplay.WINDOW), said)
    assert "try" in sentence or "keeps them apart" in sentence
    assert selfplay.watch(rows(bad, selfplay.WINDOW), said) == []


def test_a_run_made_to_fail_says_so(tmp_path):
    """A learning rate a thousand times too large: KL runs away, and the terminal says which flag to try."""
    out = run(tmp_path, "--model", str(ROOT / "tiny"), "--lr", "0.01", "--kl", "0", "--steps", "26", "--queries", "4", "--answers", "4", "--aggregate", "token",
              "--answer-tokens", "8", "--query-tokens", "24")
    assert "the Solver runs away" in out.stdout + out.stderr and out.stdout.count("runs away from its start: try a smaller --lr") == 1


def test_same_seed_same_run(tmp_path):
    for name in "ab":
        run(tmp_path, "--model", str(ROOT / "tiny"), "--steps", "2", "--queries", "3", "--answers", "2", "--eval-items", "20", "--seed", "5", "--run", name)
    a, b = ((tmp_path / "runs" / name / "games.jsonl").read_text() for name in "ab")
    assert a == b


def test_ctrl_c_saves_what_there_is(tmp_path):
    import signal
    import time
    process = subprocess.Popen([sys.executable, str(ROOT / "selfplay.py"), "--model", str(ROOT / "tiny"), "--steps", "10000", "--queries", "3",
                                "--answers", "2", "--eval-items", "20", "--run", "cut", "--device", "cpu"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background jobs ignore it, and their children inherit that
    games = tmp_path / "runs" / "cut" / "games.jsonl"
    try:
        deadline = time.time() + 60
        while time.time() < deadline and not (games.is_file() and games.stat().st_size > 0):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "stopping after this step" in err and "--resume runs/cut goes on" in out
    load(games.parent / "model")
    assert [json.loads(line)["step"] for line in games.read_text().splitlines()]


@pytest.fixture(scope="module")
def real_llama(tmp_path_factory):
    """A folder as a real Llama's: its vocabulary, a chat template, and small random weights. It speaks no embedded language."""
    if not (SHARED / "llama3_tokenizer").is_dir():
        pytest.skip("Llama 3's vocabulary is not at hand (../shared/data)")
    folder = tmp_path_factory.mktemp("llama")
    shutil.copy(SHARED / "llama3_tokenizer" / "tokenizer.json", folder)
    template = "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}))
    raw = small_config(vocab_size=128256, eos_token_id=[128001, 128009], max_position_embeddings=1024)
    torch.manual_seed(0)
    model = Llama(Config.from_json(raw), raw)
    model.folder = folder
    save(model, folder)
    return folder


def test_a_real_llama_plays(tmp_path, real_llama):
    """The paper's prompts, rubric and settings; a reward of one's own; a written verdict; mathematics from a file."""
    (tmp_path / "mine.py").write_text("def short(queries, answers):\n    return [[-len(a) / 10 for a in group] for group in answers]\n")
    (tmp_path / "sums.jsonl").write_text('{"question": "What is 1 + 1?", "answer": "#### 2"}\n{"question": "And 2 + 3?", "answer": "#### 5"}\n')
    small = ["--model", str(real_llama), "--steps", "1", "--queries", "2", "--answers", "2", "--answer-tokens", "6"]
    run(tmp_path, *small, "--reward", "mine.py:short", "--query-tokens", "6", "--task", "a sum", "--template", "What is {a} + {b}?", "--run", "lsp")
    run(tmp_path, *small, "--reward", "mine.py:short", "--query-tokens", "6", "--judge", "written", "--run", "written")
    run(tmp_path, *small, "--game", "grpo", "--data", "sums.jsonl", "--reward", "math", "--run", "grpo")
    read = lambda name: json.loads((tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()[0])
    settings = json.loads((tmp_path / "runs" / "lsp" / "settings.json").read_text())
    assert settings["lr"] == 3e-6 and settings["kl"] == settings["kl_challenger"] == 0.05 and settings["queries"] == 2
    assert 0 < read("lsp")["quality"] < 1 and read("written")["malformed"] == 1 and read("written")["quality"] == 0
    assert read("grpo")["reward"] == 0 and (tmp_path / "runs" / "grpo" / "model" / "model.safetensors").is_file()
    for flags, says in (([], "does not speak the embedded language"), (["--game", "lsp", "--reward", "mine.py:short", "--data", "sums.jsonl"], "--data is for"), (["--game", "grpo", "--reward", "math"], "name --data")):
        done = run(tmp_path, *small, *flags, expect=2)
        assert says in done.stderr and "Traceback" not in done.stderr


def test_challenger_prompt_has_its_two_variables(real_llama):
    tokenizer = load(real_llama)[1]
    text = tokenizer.decode(selfplay.challenger_prompt(tokenizer, "a sum", "What is {a} + {b}?"))
    assert "Task: a sum\n" in text and "What is {a} + {b}?" in text and "input for this task" in text
    assert "Task" not in tokenizer.decode(selfplay.challenger_prompt(tokenizer))


@pytest.mark.parametrize("flags, message", [
    (["--steps", "0"], "not above zero"), (["--steps", "-3"], "not above zero"), (["--lr", "nan"], "not above zero"), (["--queries", "many"], "not a whole number"),
    (["--kl", "-1"], "not zero or more"), (["--game", "chess"], "invalid choice"), (["--step", "3"], "unrecognized"), (["--model", "nowhere"], "no such model folder"),
    (["--reward", "gone.py:f"], "no file or folder 'gone.py'"), (["--reward", "mine.py:absent"], "has no function"), (["--reward", "mine.py:nan"], "NaN"),
    (["--reward", "mine.py:flat"], "shape"), (["--run", "taken"], "exists already"), (["--judge", "written"], "can only say a digit"), (["--task", "x"], "has its own"), (["--game", "grpo", "--pay", "sqlm"], "has none"), (["--reward", "math"], "from --data alone"), (["--run", "../away"], "not a plain folder name"), (["--device", "abacus"], "no such device"),
    (["--cuda-graphs", "--device", "cpu"], "needs a GPU"), (["--offload", "--device", "cpu"], "nothing to free")])
def test_bad_input_is_one_line_and_exit_2(tmp_path, flags, message):
    (tmp_path / "mine.py").write_text("def nan(q, a):\n    return [[float('nan')] * len(g) for g in a]\ndef flat(q, a):\n    return [0.0]\n")
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "runs" / "taken" / "mine.txt").write_text("keep")
    flags = flags if "--model" in flags else ["--model", str(ROOT / "tiny"), *flags]
    done = run(tmp_path, *flags, expect=2)
    last = done.stderr.strip().splitlines()[-1]
    assert message in last and "Traceback" not in done.stderr
    assert [p.name for p in (tmp_path / "runs" / "taken").iterdir()] == ["mine.txt"]


def test_help_names_every_default(tmp_path):
    text = command(selfplay, tmp_path, "-h").stdout
    assert text.count("(default:") == text.count("\n  --") - 2  # --run and --resume have none


def test_a_game_as_text_and_as_record():
    """Equal answers once, best first; what no judge graded has no quality."""
    reward, advantage = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([-0.67, 0.33, 0.33])
    text = selfplay.game_text(3, "Add 1 and 1.", ["3", "2", "2"], reward, None, advantage, -0.1, True)
    assert [line.split() for line in text.splitlines()[1:3]] == [["2", "x2", "reward", "1.00", "advantage", "+0.33"], ["3", "reward", "0.00", "advantage", "-0.67"]]
    judged = selfplay.game_text(3, "Add 1 or 1.", ["3", "2", ""], reward, torch.tensor([0.5, 0.5, 0.25]), advantage, -0.1, False)
    assert "no such task" in judged and "2                                reward 1.00  quality 0.50" in judged and "(nothing)" in judged
    assert "Challenger" in judged and "Challenger" not in selfplay.game_text(3, "Add 1 and 1.", ["3", "2", "2"], reward, None, advantage, None, True)
    record = selfplay.game_records(["Add 1 and 1."], [["3", "2", "2"]], reward[None], None, None, [True])[0]
    assert record["challenger_advantage"] is None
    assert [(a["answer"], a["times"], a["quality"]) for a in record["answers"]] == [("3", 1, None), ("2", 2, None)]
