"""SPIN: the loss by hand and against TRL's, each iteration's opponent, each stumbling stone, and the real command line."""
import argparse
import json
import logging
import math
import os
import random
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, command

import evaluate
import spin
from model import Tokenizer, load
from spin import LOSS, Pair, encode, opponent_answers, opponent_logprobs, sft_gradients, spin_gradients, spin_loss, spin_margin, train
from tiny import language

ARGS = argparse.Namespace(loss="logistic", micro_batch=2048, clip=1.0, batch=4, epochs=1)


@pytest.fixture(scope="module")
def pairs(tiny):
    """Eight pairs of the embedded language whose two answers differ, and two whose answers are the same."""
    model, tokenizer = tiny
    rng = random.Random(1)
    data = [([{"role": "user", "content": q}], language.solve(q)) for q in (language.draw(rng) for _ in range(10))]
    prompts, answers = encode(tokenizer, data, model.end_ids, 32)
    wrong = [tokenizer.encode(language.slip(text, rng)) + answer[-1:] for (_, text), answer in zip(data, answers)]
    return [Pair(p, a, a if i in (2, 5) else w) for i, (p, a, w) in enumerate(zip(prompts, answers, wrong))]


def gradients(work):
    """The tiny model moved a little from its opponent, so that margins are not 0, and its gradients after work(model)."""
    model, _ = load(ROOT / "tiny")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * p.std(correction=0) * torch.randn_like(p)
    figures = work(model)
    return figures, [p.grad for p in model.parameters()]


# ---------------------------------------------------------------------------------------------------------------------
# The loss (SPIN eq. 4.7)

def test_loss_by_hand():
    """log p/p_t is 1 for the answer and -1 for the rival: with lambda 1/2 the margin is 1."""
    lp, ref = torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -2.0]])
    assert spin_margin(lp, ref, 0.5).item() == pytest.approx(1)
    assert spin_loss(lp, ref, 0.5).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert spin_loss(lp, ref, 0.25, "hinge").item() == pytest.approx(0.5)
    assert spin_loss(lp, ref, 0.5, "exponential").item() == pytest.approx(math.exp(-1))


@pytest.mark.parametrize("form", list(LOSS))
def test_every_loss_is_convex_and_falls(form):
    """SPIN section 4.1 asks for no more than this."""
    m = torch.linspace(-3, 3, 61)
    slope = LOSS[form](m).diff()
    assert (slope <= 0).all() and (slope.diff() >= -1e-6).all() and slope[25] < 0


def test_gradient_by_hand():
    """dL/d log p(y|x) = -lambda sigmoid(-m), and its opposite for the rival: at m = 0 that is -+ lambda / 2."""
    lp = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    spin_loss(lp, lp.detach(), 0.5).sum().backward()
    assert torch.allclose(lp.grad, torch.tensor([[-0.25, 0.25]]))


def test_first_gradient_is_that_of_fine_tuning_on_average():
    """Over all the opponent might answer, its part of the first gradient has mean 0: what is left is lambda/2 of fine-tuning's.

    So an iteration begins as fine-tuning with noise added, and only later, as margins grow, becomes a game of its own.
    """
    logits = torch.tensor([0.3, -1.0, 2.0, 0.5], requires_grad=True)  # a model of one-token answers
    lp, people = logits.log_softmax(-1), 1
    expected = sum(p * spin_loss(torch.stack([lp[people], lp[rival]])[None], torch.stack([lp[people], lp[rival]])[None].detach(), 0.7)[0]
                   for rival, p in enumerate(lp.exp().tolist()))
    spin_gradient, = torch.autograd.grad(expected, logits, retain_graph=True)
    sft_gradient, = torch.autograd.grad(-lp[people], logits)
    assert torch.allclose(spin_gradient, 0.35 * sft_gradient, atol=1e-6)


def test_first_loss_is_log_2(tiny, pairs):
    """"Isn't the loss 0?" It is log 2, and its gradient is not 0."""
    model, _ = load(ROOT / "tiny")
    ref = opponent_logprobs(tiny[0], pairs, 2048)
    row = spin_gradients(model, pairs, ref, 1.0, ARGS)
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-5) and row["margin"] == pytest.approx(0, abs=1e-4)
    assert max(p.grad.abs().max() for p in model.parameters()) > 1e-3


def test_identical_pairs_teach_nothing(tiny, pairs):
    """They count in the mean as a constant, and leave no gradient: skipping them changes neither."""
    same = [pairs[2], pairs[5]]
    row, grads = gradients(lambda m: spin_gradients(m, same, opponent_logprobs(tiny[0], same, 2048), 1.0, ARGS))
    assert row["loss"] == pytest.approx(math.log(2)) and grads == [None] * len(grads)

    def computed(model):
        lp = torch.cat([lp for _, lp in spin.pair_logprobs(model, same, 2048)])
        spin_loss(lp, opponent_logprobs(tiny[0], same, 2048), 1.0).sum().backward()
        return lp
    _, grads = gradients(computed)
    assert max(g.abs().max() for g in grads) < 1e-5

    ref = opponent_logprobs(tiny[0], pairs, 2048)
    row, _ = gradients(lambda m: spin_gradients(m, pairs, ref, 1.0, ARGS))
    lp, _ = gradients(lambda m: opponent_logprobs(m, pairs, 2048))
    assert row["loss"] == pytest.approx(spin_loss(lp, ref, 1.0).mean().item(), abs=1e-5)


def test_no_result_depends_on_padding_or_split(tiny, pairs):
    ref = opponent_logprobs(tiny[0], pairs, 2048)
    assert torch.allclose(ref, torch.cat([opponent_logprobs(tiny[0], [p], 1) for p in pairs]), atol=1e-4)
    small = argparse.Namespace(**vars(ARGS) | {"micro_batch": 1})
    a, grads_a = gradients(lambda m: spin_gradients(m, pairs, ref, 1.0, ARGS))
    b, grads_b = gradients(lambda m: spin_gradients(m, pairs, ref, 1.0, small))
    assert a == pytest.approx(b, abs=1e-4)
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(grads_a, grads_b))


def test_log_probabilities_are_those_of_the_whole_texts(tiny, pairs):
    """Sums over the reply's tokens, the end token among them, from plain logits of the plain sequence."""
    model, ref = tiny[0], opponent_logprobs(tiny[0], pairs, 2048)
    for pair, row in zip(pairs, ref):
        for reply, lp in zip((pair.answer, pair.rival), row):
            logits = model.logits(torch.tensor([pair.prompt + reply])).log_softmax(-1)[0, len(pair.prompt) - 1:-1]
            assert logits.gather(1, torch.tensor(reply)[:, None]).sum().item() == pytest.approx(lp.item(), abs=1e-3)


def test_loss_equals_trl(tiny, pairs, tmp_path, monkeypatch):
    """TRL's DPO with a sigmoid loss is the same function: one step of its whole trainer on the same texts."""
    pytest.importorskip("trl", reason="TRL is a peer: pip install -r tests/requirements.txt")
    pytest.importorskip("datasets", reason="comes with TRL")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    logging.disable(logging.WARNING)
    from model import save
    _, tokenizer = tiny
    different = [p for p in pairs if p.answer != p.rival]
    ours, _ = gradients(lambda m: (save(m, tmp_path / "player"), spin_gradients(m, different, opponent_logprobs(tiny[0], different, 2048), 0.3, ARGS))[1])
    turn = lambda role, ids: [{"role": role, "content": tokenizer.decode(ids)}]
    data = Dataset.from_list([{"prompt": turn("user", p.prompt[:-1]), "chosen": turn("assistant", p.answer), "rejected": turn("assistant", p.rival)} for p in different])
    config = DPOConfig(output_dir=str(tmp_path / "trl"), use_cpu=True, per_device_train_batch_size=len(different), beta=0.3, max_steps=1, learning_rate=1e-9,
                       report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True, bf16=False, gradient_checkpointing=False)
    peer = lambda folder: AutoModelForCausalLM.from_pretrained(folder)
    trainer = DPOTrainer(peer(tmp_path / "player"), peer(ROOT / "tiny"), args=config, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(ROOT / "tiny"))
    trainer.train()
    logged = trainer.state.log_history[0]
    assert abs(ours["margin"]) > 0.01 and logged["loss"] == pytest.approx(ours["loss"], abs=2e-4)
    assert logged["logps/chosen"] == pytest.approx(ours["logprob_answer"], abs=2e-3)
    assert logged["rewards/margins"] == pytest.approx(ours["margin"], abs=2e-3)


def test_training_widens_the_margin(tiny, pairs):
    model, _ = load(ROOT / "tiny")
    args = argparse.Namespace(**vars(ARGS) | {"epochs": 6})
    ref = opponent_logprobs(tiny[0], pairs, 2048)
    rows = list(train(model, pairs, ref, 1.0, 1e-4, spin.rmsprop(model, 1e-4), args, random.Random(0)))
    assert len(rows) == 6 * 3  # 10 pairs in batches of 4
    after = spin_gradients(model, pairs, ref, 1.0, args)
    assert after["margin"] > 0.5 and after["loss"] < 0.6


def test_sft_is_the_mean_negative_logprob_of_the_answers_tokens(tiny, pairs):
    row, grads = gradients(lambda m: sft_gradients(m, pairs, ARGS))
    lp, _ = gradients(lambda m: opponent_logprobs(m, pairs, 2048)[:, 0])
    assert row["loss"] == pytest.approx(-lp.sum().item() / sum(len(p.answer) for p in pairs), abs=1e-4)
    small = argparse.Namespace(**vars(ARGS) | {"micro_batch": 1})
    _, other = gradients(lambda m: sft_gradients(m, pairs, small))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(grads, other))


# ---------------------------------------------------------------------------------------------------------------------
# Stumbling stones

def test_answers_cut_at_the_limit_have_no_end_token(tiny):
    """Neither people's nor the opponent's: an end where a text was cut would give it away."""
    model, tokenizer = tiny
    data = [([{"role": "user", "content": 'Take "kobani", reverse it.'}], "inabok"), ([{"role": "user", "content": "Add 1 and 2."}], "3")]
    prompts, answers = encode(tokenizer, data, model.end_ids, 4)
    assert answers[0] == tokenizer.encode("inab") and answers[1] == tokenizer.encode("3") + [min(model.end_ids)]
    rivals = opponent_answers(model, prompts, 4, torch.Generator().manual_seed(0))
    assert len(rivals[0]) == 4 and not model.end_ids & set(rivals[0])
    assert rivals[1][-1] in model.end_ids


def test_generation_prompt_is_the_training_prompt(tiny, monkeypatch):
    """Token by token; and prompt and answer together are the conversation as the template writes it."""
    model, tokenizer = tiny
    data = [([{"role": "user", "content": "Add 1 and 2."}], "3"), ([{"role": "user", "content": 'Take "abc", repeat it.'}], "abcabc")]
    prompts, answers = encode(tokenizer, data, model.end_ids, 32)
    for (messages, text), prompt, answer in zip(data, prompts, answers):
        assert prompt + answer == tokenizer.chat([*messages, {"role": "assistant", "content": text}], add_generation_prompt=False)
    asked, real = [], spin.generate
    monkeypatch.setattr(spin, "generate", lambda model, prompts, *rest: asked.extend(prompts) or real(model, prompts, *rest))
    rivals = opponent_answers(model, prompts, 32, torch.Generator().manual_seed(0))
    trained, real_pack = [], spin.pack
    monkeypatch.setattr(spin, "pack", lambda prompts, *rest, **more: trained.extend(prompts) or real_pack(prompts, *rest, **more))
    opponent_logprobs(model, [Pair(*row) for row in zip(prompts, answers, rivals)], 2048)
    assert sorted(asked) == sorted(trained) == sorted(prompts)


def test_answers_are_written_as_the_template_writes_them(tmp_path, tiny):
    """A template that trims its texts trims people's answers too: the opponent, which answers in place, could never write the rest."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((ROOT / "tiny" / name).read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": settings["chat_template"].replace("m['content']", "m['content'] | trim")}))
    tokenizer = Tokenizer(tmp_path)
    prompts, answers = encode(tokenizer, [([{"role": "user", "content": "Add 1 and 2."}], " 3 \n")], tiny[0].end_ids, 32)
    assert answers == [tokenizer.encode("3") + [min(tiny[0].end_ids)]]


def test_opponent_answers_keep_their_order(tiny, monkeypatch):
    """They are sampled by length of prompt, and must come back each to its own."""
    model, tokenizer = tiny
    queries = ["Add 1 and 1.", 'Take "kobani", write it in capitals, then repeat it, then reverse it.', 'Take "zu", x.', 'Take "kobani", write it in capitals.']
    prompts = [tokenizer.chat([{"role": "user", "content": q}]) for q in queries]
    monkeypatch.setattr(spin, "ROOM", 2 * (max(map(len, prompts)) + 32))  # two at a time
    out = opponent_answers(model, prompts, 32, torch.Generator().manual_seed(0))
    assert tokenizer.decode(out[3]).isupper() and tokenizer.decode(out[0]).isdigit()


def test_text_in_the_data_stays_text(tiny):
    model, tokenizer = tiny
    prompts, answers = encode(tokenizer, [([{"role": "user", "content": "<|end|>"}], "a<|end|>b")], model.end_ids, 32)
    assert prompts[0].count(min(model.end_ids)) == 1 and answers[0].count(min(model.end_ids)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Data

def test_the_default_data_is_the_start_s_own(tiny):
    """The Solver's part of the very set that tiny/train.py trains on: nothing held out is in it."""
    data = spin.language_data(200)
    assert len(data) == 200 and data == spin.language_data(300)[:200]
    assert not any(language.is_held_out(messages[0]["content"]) for messages, _ in data)
    assert all(language.solve(messages[0]["content"]) == text for messages, text in data)
    assert [messages for part, messages, _ in language.fine_tuning_set(400) if part == "solver"][:200] == [messages for messages, _ in data]


# ---------------------------------------------------------------------------------------------------------------------
# The command

def run(folder, *flags):
    return command(spin, folder, "--model", str(ROOT / "tiny"), "--device", "cpu", *flags)


SHORT = ("--pairs", "40", "--batch", "16", "--epochs", "1", "--eval-items", "20", "--lr", "3e-4")


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spin")
    done = subprocess.run([sys.executable, str(ROOT / "spin.py"), "--model", str(ROOT / "tiny"), "--device", "cpu", *SHORT, "--iterations", "3", "--run", "a"],
                          cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_command_line_plays_and_keeps_every_iterate(played):
    folder, out = played
    assert {f"iteration-{i}" for i in range(3)} <= {p.name for p in (folder / "runs" / "a").iterdir()}
    assert "teach nothing" in out and "normal" in out and "win rate" in out and (folder / "runs" / "a" / "curves.png").stat().st_size > 10000
    done = command(evaluate, folder, "runs/a", "--items", "20")
    assert done.returncode == 0 and "sampled" in done.stdout, done.stderr


def test_reference_of_iteration_t_is_iterate_t_minus_1(played, tiny):
    """The first loss of every iteration is log 2; measured against the start instead, it would not be."""
    folder, _ = played
    rows = [json.loads(line) for line in (folder / "runs" / "a" / "metrics.jsonl").read_text().splitlines()]
    first = {r["iteration"]: r for r in reversed(rows)}
    assert all(first[i]["loss"] == pytest.approx(math.log(2), abs=1e-4) for i in range(3))
    assert rows[1]["loss"] != pytest.approx(math.log(2), abs=1e-4)
    games = [json.loads(line)["games"] for line in (folder / "runs" / "a" / "games.jsonl").read_text().splitlines()]
    _, tokenizer = tiny
    pairs = [Pair(tokenizer.chat([{"role": "user", "content": g["prompt"]}]), tokenizer.encode(g["answer"]), tokenizer.encode(g["rival"])) for g in games[1]]
    before, start = load(folder / "runs" / "a" / "iteration-0")[0], tiny[0]
    assert (opponent_logprobs(before, pairs, 2048) - opponent_logprobs(start, pairs, 2048)).abs().max() > 0.1


def test_the_last_iteration_s_pairs_are_mixed_in(played):
    """40 new pairs in iteration 0; in the later ones, also the 40 of the iteration before: 3, 5 and 5 updates of 16."""
    folder, out = played
    rows = [json.loads(line)["iteration"] for line in (folder / "runs" / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [rows.count(i) for i in range(3)] == [3, 5, 5] and "80 pairs, 40 of them new" in out


def test_what_each_iteration_is_played_with():
    """New pairs each, round and round the data; the paper's schedule: a lower rate from iteration 2 on, a larger lambda in the last of several."""
    game = spin.Game(None, None, list("abcde"), None, None, None, None, None)
    args = spin.parse_args(["--device", "cpu", "--pairs", "3", "--iterations", "4", "--lam", "1", "--lam-last", "2", "--lr", "0.3", "--lr-late", "0.1"])
    assert [spin.choose(game, args, t) for t in range(4)] == [([0, 1, 2], 1, 0.3), ([3, 4, 0], 1, 0.3), ([1, 2, 3], 1, 0.1), ([4, 0, 1], 2, 0.1)]
    args.iterations = 1
    assert spin.choose(game, args, 0)[1] == 1


def test_the_lesson_is_a_real_pair(played):
    """--explain: the margin is lambda times the difference of the printed sums, the loss follows from it, and training widens it."""
    folder, _ = played
    before = sorted(p.name for p in (folder / "runs").iterdir())
    out = run(folder, "--explain", "--lam", "2").stdout
    sums = [float(x) for x in re.findall(r"^      sum .* ([+-][\d.]+)$", out, re.M)]
    margin, = re.findall(r"\) = ([+-][\d.]+)   \(spin_margin\)", out)
    loss, = re.findall(r"= ([\d.]+)   \(spin_loss\)", out)
    assert float(margin) == pytest.approx(2 * (sums[0] - sums[1]), abs=1e-3) and float(loss) == pytest.approx(math.log1p(math.exp(-float(margin))), abs=1e-3)
    old, new = map(float, re.findall(r"  margin ([+-][\d.]+) -> ([+-][\d.]+)", out)[0])
    assert new > old and max(map(len, out.splitlines())) <= 100
    assert sorted(p.name for p in (folder / "runs").iterdir()) == before


def test_same_seed_same_run(played):
    folder, _ = played
    done = run(folder, *SHORT, "--iterations", "1", "--run", "b"), run(folder, *SHORT, "--iterations", "1", "--run", "c")
    text = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()] for name in "bc"]
    assert not any(d.returncode for d in done) and text[0] == text[1]


def test_ctrl_c_keeps_the_player_as_it_is(played, monkeypatch):
    """Stopped in the middle of iteration 1: the whole iterate and the unfinished player are both there; the scoreboard takes the whole one."""
    folder, _ = played
    real, seen = spin.train, []

    def stopped(*args):
        seen.append(1)
        for i, row in enumerate(real(*args)):
            if len(seen) == 2 and i == 1:
                signal.raise_signal(signal.SIGINT)
            yield row
    monkeypatch.setattr(spin, "train", stopped)
    done = run(folder, *SHORT, "--iterations", "3", "--run", "stopped")
    names = {p.name for p in (folder / "runs" / "stopped").iterdir()}
    assert done.returncode == 0 and "stopped in iteration 1" in done.stdout and {"iteration-0", "iteration-1-unfinished"} <= names and "iteration-1" not in names
    assert evaluate.model_folder(folder / "runs" / "stopped").name == "iteration-0"


def test_sft_and_a_file_of_data(played):
    folder, _ = played
    (folder / "data.jsonl").write_text("".join(json.dumps({"prompt": f"Add {i} and 2.", "answer": str(i + 2)}) + "\n" for i in range(10)))
    done = run(folder, *SHORT, "--game", "sft", "--data", "data.jsonl", "--iterations", "2")
    assert done.returncode == 0 and (folder / "runs" / "sft-1" / "iteration-1" / "model.safetensors").is_file(), done.stderr


@pytest.mark.parametrize("flags, says", [
    (["--iterations", "0"], "above zero"), (["--lam", "-1"], "above zero"), (["--game", "dpo"], "invalid choice"), (["--wrong"], "unrecognized"),
    (["--cuda-graphs", "--device", "cpu"], "needs a GPU"), (["--data", "nowhere.jsonl"], "not readable"), (["--run", "a"], "exists already"), (["--pairs", "2.5"], "not a whole number")])
def test_bad_input_is_one_line(played, flags, says):
    folder, _ = played
    before = sorted(p.name for p in (folder / "runs").iterdir())
    done = run(folder, *flags)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert sorted(p.name for p in (folder / "runs").iterdir()) == before
