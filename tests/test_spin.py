"""SPIN: the loss by hand and against TRL, each iteration's opponent, and the real command line."""
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
from conftest import HALF, ROOT, command, copy_tokenizer, read_lines

import evaluate
import model as llama
import spin
from model import load, save
from spin import (
    LOSS,
    Game,
    Iteration,
    Pair,
    all_logprobs,
    chosen_data,
    of_iteration,
    player_trains,
    sft_gradients,
    spin_gradients,
    spin_loss,
    spin_margin,
)
from support import data, learning, machine, runs
from support.console import UserError
from support.text import Tokenizer
from tiny import language

TINY = ("--model", str(ROOT / "tiny"), "--device", "cpu")
ARGS = argparse.Namespace(game="spin", loss="logistic", lam=[1.0], lr=[1e-4], micro_batch=2048,
                          batch=4, epochs=1)


def changed(**settings):
    """ARGS with other settings."""
    return argparse.Namespace(**vars(ARGS) | settings)


def user(text):
    return {"role": "user", "content": text}


def encode(tokenizer, pairs, end_ids, limit):
    """(prompts, answers) as ids, of [(messages, answer)]."""
    rows = [data.Row(*pair) for pair in pairs]
    prompts = [tokenizer.chat(row.messages) for row in rows]
    replies = [tokenizer.reply(row.messages, row.answer, end_ids) for row in rows]
    return prompts, spin.cut_answers(replies, limit)[0]


def opponent_answers(model, prompts, limit, generator):
    """All answers of spin.opponent_answers, in order."""
    found = [None] * len(prompts)
    for part, answers in spin.opponent_answers(model, prompts, limit, generator):
        for i, ids in zip(part, answers):
            found[i] = ids
    return found


@pytest.fixture(scope="module")
def pairs(tiny):
    """Ten pairs of the embedded language. Two of them have equal answers."""
    model, tokenizer = tiny
    rng = random.Random(1)
    queries = [language.draw(rng) for _ in range(10)]
    rows = [([user(query)], language.solve(query)) for query in queries]
    prompts, answers = encode(tokenizer, rows, model.end_ids, 32)
    wrong = [tokenizer.encode(language.slip(text, rng)) + answer[-1:]
             for (_, text), answer in zip(rows, answers)]
    return [Pair(prompt, answer, answer if i in (2, 5) else rival)
            for i, (prompt, answer, rival) in enumerate(zip(prompts, answers, wrong))]


def gradients(work):
    """What work(model) returns, and the model's gradients after it.

    The model is the tiny one, moved a little from its opponent so that margins are not 0.
    """
    model, _ = load(ROOT / "tiny")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * p.std(correction=0) * torch.randn_like(p)
    figures = work(model)
    return figures, [p.grad for p in model.parameters()]


# --------------------------------------------------------------------------------------------------
# The loss (SPIN eq. 4.7)

def test_loss_by_hand():
    """log p/p_t is 1 for the answer and -1 for the rival. So with lambda = 1/2 the margin is 1."""
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
    assert (slope <= 0).all() and slope[25] < 0
    assert (slope.diff() >= -1e-6).all()


def test_gradient_by_hand():
    """dL/d log p(y|x) is -lambda * sigmoid(-m) for the answer, and the opposite for the rival.

    At m = 0 these are -lambda / 2 and lambda / 2.
    """
    lp = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    spin_loss(lp, lp.detach(), 0.5).sum().backward()
    assert torch.allclose(lp.grad, torch.tensor([[-0.25, 0.25]]))


def test_first_gradient_is_that_of_fine_tuning_on_average():
    """The rival's part of the first gradient has mean 0 over all answers of the opponent.

    What is left is lambda / 2 times the gradient of fine-tuning. So an iteration begins as
    fine-tuning with noise. It becomes a game of its own only later, as the margins grow.
    """
    logits = torch.tensor([0.3, -1.0, 2.0, 0.5], requires_grad=True)  # a model of one-token answers
    lp, people = logits.log_softmax(-1), 1
    expected = 0
    for rival, p in enumerate(lp.exp().tolist()):
        pair = torch.stack([lp[people], lp[rival]])[None]
        expected = expected + p * spin_loss(pair, pair.detach(), 0.7)[0]
    spin_gradient, = torch.autograd.grad(expected, logits, retain_graph=True)
    sft_gradient, = torch.autograd.grad(-lp[people], logits)
    assert torch.allclose(spin_gradient, 0.35 * sft_gradient, atol=1e-6)


def test_first_loss_is_log_2(tiny, pairs):
    """The first loss is not 0 but log 2, and its gradient is not 0."""
    model, _ = load(ROOT / "tiny")
    ref = all_logprobs(tiny[0], pairs, 2048)
    row = spin_gradients(model, pairs, ref, 1.0, ARGS)
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert row["margin"] == pytest.approx(0, abs=1e-4)
    assert max(p.grad.abs().max() for p in model.parameters()) > 1e-3


def test_identical_pairs_teach_nothing(tiny, pairs):
    """A pair of equal answers adds a constant to the mean loss, and has no gradient.

    So skipping its computation changes neither the loss nor the gradient.
    """
    same = [pairs[2], pairs[5]]
    ref = all_logprobs(tiny[0], same, 2048)
    row, grads = gradients(lambda m: spin_gradients(m, same, ref, 1.0, ARGS))
    assert row["loss"] == pytest.approx(math.log(2))
    assert grads == [None] * len(grads)

    def computed(model):
        lp = torch.cat([lp for _, lp in spin.pair_logprobs(model, same, 2048)])
        spin_loss(lp, ref, 1.0).sum().backward()
        return lp
    _, grads = gradients(computed)
    assert max(g.abs().max() for g in grads) < 1e-5

    ref = all_logprobs(tiny[0], pairs, 2048)
    row, _ = gradients(lambda m: spin_gradients(m, pairs, ref, 1.0, ARGS))
    lp, _ = gradients(lambda m: all_logprobs(m, pairs, 2048))
    assert row["loss"] == pytest.approx(spin_loss(lp, ref, 1.0).mean().item(), abs=1e-5)


def test_no_result_depends_on_padding_or_split(tiny, pairs):
    ref = all_logprobs(tiny[0], pairs, 2048)
    alone = torch.cat([all_logprobs(tiny[0], [p], 1) for p in pairs])
    assert torch.allclose(ref, alone, atol=1e-4)
    small = changed(micro_batch=1)
    a, grads_a = gradients(lambda m: spin_gradients(m, pairs, ref, 1.0, ARGS))
    b, grads_b = gradients(lambda m: spin_gradients(m, pairs, ref, 1.0, small))
    assert a == pytest.approx(b, abs=1e-4)
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(grads_a, grads_b))


def test_log_probabilities_are_those_of_the_whole_texts(tiny, pairs):
    """They are sums over the reply's tokens, the end token included.

    Here they are computed from plain logits of the whole sequence.
    """
    model = tiny[0]
    ref = all_logprobs(model, pairs, 2048)
    for pair, row in zip(pairs, ref):
        for reply, lp in zip((pair.answer, pair.rival), row):
            logits = model.logits(torch.tensor([pair.prompt + reply]))[0, len(pair.prompt) - 1:-1]
            plain = logits.log_softmax(-1).gather(1, torch.tensor(reply)[:, None]).sum()
            assert plain.item() == pytest.approx(lp.item(), abs=1e-3)


def test_loss_equals_trl(tiny, pairs, tmp_path, monkeypatch):
    """TRL's DPO with a sigmoid loss is the same function.

    One step of TRL's whole trainer on the same texts gives the same loss.
    """
    pytest.importorskip("trl", reason="TRL is a peer: pip install -r tests/requirements.txt")
    pytest.importorskip("datasets", reason="comes with TRL")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    logging.disable(logging.WARNING)
    _, tokenizer = tiny
    different = [p for p in pairs if p.answer != p.rival]
    ref = all_logprobs(tiny[0], different, 2048)

    def work(model):
        save(model, tmp_path / "player")
        return spin_gradients(model, different, ref, 0.3, ARGS)
    ours, _ = gradients(work)

    def turn(role, ids):
        return [{"role": role, "content": tokenizer.decode(ids)}]
    dataset = Dataset.from_list([
        {"prompt": turn("user", p.prompt[:-1]), "chosen": turn("assistant", p.answer),
         "rejected": turn("assistant", p.rival)}
        for p in different
    ])
    config = DPOConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=len(different), beta=0.3, max_steps=1, learning_rate=1e-9,
        report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True,
    )
    player = AutoModelForCausalLM.from_pretrained(tmp_path / "player")
    opponent = AutoModelForCausalLM.from_pretrained(ROOT / "tiny")
    trainer = DPOTrainer(player, opponent, args=config, train_dataset=dataset,
                         processing_class=AutoTokenizer.from_pretrained(ROOT / "tiny"))
    trainer.train()
    logged = trainer.state.log_history[0]
    assert abs(ours["margin"]) > 0.01
    assert logged["loss"] == pytest.approx(ours["loss"], abs=2e-4)
    assert logged["logps/chosen"] == pytest.approx(ours["logprob_answer"], abs=2e-3)
    assert logged["rewards/margins"] == pytest.approx(ours["margin"], abs=2e-3)


def game_of(player):
    """A Game of this player, as far as its training needs one."""
    return Game(**dict.fromkeys(Game._fields) | {"player": player, "rng": random.Random(0),
                                                 "crew": machine.Crew()})


def test_training_widens_the_margin(tiny, pairs):
    model, _ = load(ROOT / "tiny")
    args = changed(epochs=6)
    ref = all_logprobs(tiny[0], pairs, 2048)
    it = Iteration(0, 0, None, None, pairs, ref)
    rows = list(player_trains(game_of(model), args, it, spin.rmsprop(model)))
    assert len(rows) == 6 * 3  # 10 pairs in batches of 4
    after = spin_gradients(model, pairs, ref, 1.0, args)
    assert after["margin"] > 0.5 and after["loss"] < 0.6


def test_sft_is_the_mean_negative_logprob_of_the_answers_tokens(tiny, pairs):
    row, grads = gradients(lambda m: sft_gradients(m, pairs, ARGS))
    lp, _ = gradients(lambda m: all_logprobs(m, pairs, 2048)[:, 0])
    tokens = sum(len(p.answer) for p in pairs)
    assert row["loss"] == pytest.approx(-lp.sum().item() / tokens, abs=1e-4)
    small = changed(micro_batch=1)
    _, other = gradients(lambda m: sft_gradients(m, pairs, small))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(grads, other))


def test_the_learning_rate_rises_and_falls_in_each_iteration(tiny, pairs, monkeypatch):
    """It rises over the first tenth of the updates to the iteration's own peak, then falls to 0.

    An iteration that goes on after a stop does the updates that were left, and no others.
    """
    args, used, batches = changed(epochs=10, lr=[1.0, 0.5], lam=[1.0, 3.0]), [], []

    def gradients(player, pairs, ref, lam, args, crew):
        batches.append((pairs, lam))
        return {}
    monkeypatch.setattr(spin, "spin_gradients", gradients)
    monkeypatch.setattr(spin.learning, "take", lambda optimizer, crew: 1.0)
    monkeypatch.setattr(spin.learning, "set_rate", lambda optimizer, lr: used.append(lr))

    def trained(done):
        used.clear()
        batches.clear()
        it = Iteration(1, 0, None, None, pairs, torch.zeros(10, 2))
        list(player_trains(game_of(None), args, it, None, done))
        return list(used), list(batches)
    rates, seen = trained(0)
    assert len(rates) == 10 * 3
    assert rates[:4] == pytest.approx([0.5 / 3, 1 / 3, 0.5, 0.5])
    assert rates[-1] == pytest.approx(0.5 / 27)
    assert all(a > b for a, b in zip(rates[3:], rates[4:]))
    assert {lam for _, lam in seen} == {3.0}
    for epoch in (seen[:3], seen[3:6]):  # each pair once an epoch
        assert sorted(pair for part, _ in epoch for pair in part) == sorted(pairs)
    assert seen[:3] != seen[3:6]
    assert trained(17) == (rates[17:], seen[17:])


# --------------------------------------------------------------------------------------------------
# Stumbling stones

def test_answers_cut_at_the_limit_have_no_end_token(tiny):
    """Neither people's answers nor the opponent's have one: it would show where a text was cut."""
    model, tokenizer = tiny
    rows = [([user('Take "kobani", reverse it.')], "inabok"), ([user("Add 1 and 2.")], "3")]
    prompts, answers = encode(tokenizer, rows, model.end_ids, 4)
    assert answers[0] == tokenizer.encode("inab")
    assert answers[1] == tokenizer.encode("3") + [min(model.end_ids)]
    rivals = opponent_answers(model, prompts, 4, torch.Generator().manual_seed(0))
    assert len(rivals[0]) == 4 and not model.end_ids & set(rivals[0])
    assert rivals[1][-1] in model.end_ids


def test_a_batch_without_differing_pairs_has_a_loss_alone(tiny, pairs):
    """Its margin and log-probabilities are not 0: there are none."""
    same = [pair._replace(rival=pair.answer) for pair in pairs[:4]]
    ref = all_logprobs(tiny[0], same, 2048)
    row, _ = gradients(lambda m: spin_gradients(m, same, ref, 1.0, ARGS))
    assert row == {"loss": pytest.approx(math.log(2), abs=1e-6)}


def test_held_out_answers_are_scored(tmp_path):
    """A tenth of the data is held out. After each iteration it says how probable its answers are.
    """
    rng = random.Random(3)
    rows = [language.draw(rng) for _ in range(60)]
    text = "\n".join(json.dumps({"prompt": q, "answer": language.solve(q)}) for q in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    done = command(spin, tmp_path, *TINY, "--data", "rows.jsonl", "--game", "sft", "--iterations",
                   "2", "--epochs", "1", "--batch", "16", "--lr", "3e-4")
    assert done.returncode == 0, done.stderr
    kept, held = data.held_out(data.read_data(tmp_path / "rows.jsonl"))
    assert f"log p of people's held-out answers (n={len(held)}), nats a token" in done.stdout
    args = spin.parse_args([*TINY, "--data", str(tmp_path / "rows.jsonl"), "--iterations", "2"])
    game = spin.set_up(args)
    assert len(game.data) == len(kept) and not {r.query for r in game.data} & {
        r.query for r in held}
    start = spin.people_logprobs(game.player, game.held, 64)
    prompt, answer = game.held[0]
    lp = game.player.logits(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1].log_softmax(-1)
    plain = lp.gather(1, torch.tensor(answer)[:, None]).mean()
    assert start[0].item() == pytest.approx(plain.item(), abs=1e-4)
    assert f"of start: {start.mean():.4f} nats a token" in done.stdout
    assert len(re.findall(r"iteration \d +-\d\.\d+ +[+-]\d\.\d+ \[", done.stdout)) == 2


def test_a_run_says_how_many_of_peoples_answers_it_cuts(tmp_path):
    """They teach no end token, and so they are no give-away."""
    rows = [{"prompt": "Take \"abc\", repeat it.", "answer": "abcabc" * n} for n in (1, 2, 9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [*TINY, "--data", "rows.jsonl", "--iterations", "1", "--epochs", "1",
             "--answer-tokens", "13"]
    done = command(spin, tmp_path, *words)
    assert ("1 of 3 of people's answers are longer than --answer-tokens 13: they are cut there"
            in done.stdout), done.stderr
    args = spin.parse_args([*words[:4], "--answer-tokens", "13", "--data",
                            str(tmp_path / "rows.jsonl")])
    game = spin.set_up(args)
    assert sorted(len(ids) for ids in game.answers) == [7, 13, 13] and game.cut == 1
    ends = sorted(len(row.answer) for row, ids in zip(game.data, game.answers)
                  if ids[-1] in game.player.end_ids)
    assert ends == [6, 12]


THINKS = ("{{ bos_token }}{% for m in messages %}{% set c = m['content'] %}"
          "{% if m['role'] == 'assistant' %}{% set c = c.rpartition('</think>')[2] %}{% endif %}"
          "{{ '<|' + m['role'] + '|>' + c + '<|end|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}")


def test_a_template_that_opens_a_thought(tmp_path, folder):
    """The thought is people's to learn from: it goes on where the prompt has opened it."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": THINKS}))
    rows = [{"prompt": "Take \"abc\", reverse it.", "answer": "<think>Backwards.</think>cba"},
            {"prompt": "Take \"noto\", reverse it.", "answer": "oton"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--model", str(folder), "--device", "cpu", "--data", str(tmp_path / "rows.jsonl"),
             "--iterations", "1", "--epochs", "1", "--answer-tokens", "24"]
    done = command(spin, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert "opens a thought" in done.stdout
    game = spin.set_up(spin.parse_args(words))
    texts = {row.query[6:10]: game.tokenizer.decode(prompt[-9:] + ids) for row, prompt, ids
             in zip(game.data, game.prompts, game.answers)}
    assert texts["abc\""].endswith("<think>\nBackwards.</think>cba")
    assert texts["noto"].endswith("<think>\n\n</think>\n\noton")
    assert all(ids[-1] in game.player.end_ids for ids in game.answers)


def test_generation_prompt_is_the_training_prompt(tiny, monkeypatch):
    """The two are equal token by token.

    Prompt and answer together are the conversation as the template writes it.
    """
    model, tokenizer = tiny
    rows = [([user("Add 1 and 2.")], "3"), ([user('Take "abc", repeat it.')], "abcabc")]
    prompts, answers = encode(tokenizer, rows, model.end_ids, 32)
    for (messages, text), prompt, answer in zip(rows, prompts, answers):
        conversation = [*messages, {"role": "assistant", "content": text}]
        assert prompt + answer == tokenizer.chat(conversation, add_generation_prompt=False)
    asked, trained = [], []
    real_generate, real_pack = llama.generate, spin.pack

    def generate(model, prompts, *rest):
        asked.extend(prompts)
        return real_generate(model, prompts, *rest)

    def pack(prompts, *rest, **more):
        trained.extend(prompts)
        return real_pack(prompts, *rest, **more)
    monkeypatch.setattr(llama, "generate", generate)
    rivals = opponent_answers(model, prompts, 32, torch.Generator().manual_seed(0))
    monkeypatch.setattr(spin, "pack", pack)
    all_logprobs(model, [Pair(*row) for row in zip(prompts, answers, rivals)], 2048)
    assert sorted(asked) == sorted(trained) == sorted(prompts)


def test_answers_are_written_as_the_template_writes_them(tmp_path, tiny):
    """A template may trim its texts. Then people's answers are trimmed, too.

    The opponent's answers follow the prompt directly, so it could never write the spaces.
    """
    settings = json.loads((ROOT / "tiny" / "tokenizer_config.json").read_text())
    trims = settings["chat_template"].replace("m['content']", "m['content'] | trim")
    tokenizer = Tokenizer(copy_tokenizer(tmp_path, chat_template=trims))
    rows = [([user("Add 1 and 2.")], " 3 \n")]
    prompts, answers = encode(tokenizer, rows, tiny[0].end_ids, 32)
    assert answers == [tokenizer.encode("3") + [min(tiny[0].end_ids)]]


def test_opponent_answers_keep_their_order(tiny, monkeypatch):
    """Answers are sampled in the order of their prompts' lengths.

    Each must come back to its own prompt.
    """
    model, tokenizer = tiny
    queries = [
        "Add 1 and 1.",
        'Take "kobani", write it in capitals, then repeat it, then reverse it.',
        'Take "zu", x.',
        'Take "kobani", write it in capitals.',
    ]
    prompts = [tokenizer.chat([user(query)]) for query in queries]
    monkeypatch.setattr(llama, "ROOM", 2 * (max(map(len, prompts)) + 32))  # two at a time
    out = opponent_answers(model, prompts, 32, torch.Generator().manual_seed(0))
    assert tokenizer.decode(out[3]).isupper()
    assert tokenizer.decode(out[0]).isdigit()


def test_text_in_the_data_stays_text(tiny):
    model, tokenizer = tiny
    prompts, answers = encode(tokenizer, [([user("<|end|>")], "a<|end|>b")], model.end_ids, 32)
    end = min(model.end_ids)
    assert prompts[0].count(end) == 1 and answers[0].count(end) == 1


# --------------------------------------------------------------------------------------------------
# Data

def test_the_default_data_is_the_start_s_own(tiny):
    """It is the Solver's part of the set of recipes/train_tiny.py. Nothing in it is held out."""
    rows = spin.language_data(200)
    assert len(rows) == 200 and rows == spin.language_data(300)[:200]
    assert not any(language.is_held_out(row.query) for row in rows)
    assert all(language.solve(row.query) == row.answer for row in rows)
    drawn = [messages for part, messages, _ in language.fine_tuning_set(400) if part == "solver"]
    assert drawn[:200] == [row.messages for row in rows]


# --------------------------------------------------------------------------------------------------
# The command

def run(folder, *flags):
    return command(spin, folder, *TINY, *flags)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


SHORT = ("--pairs", "40", "--batch", "16", "--epochs", "1", "--eval-items", "6", "--lr", "3e-4")


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spin")
    words = [*TINY, *SHORT, "--iterations", "3", "--lam", "1", "0.5", "--lr", "3e-4", "2e-4",
             "--run", "a"]
    done = subprocess.run([sys.executable, str(ROOT / "spin.py"), *words], cwd=folder,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_command_line_plays_and_keeps_every_iterate(played):
    folder, out = played
    assert {f"iteration-{i}" for i in range(3)} <= set(names(folder / "runs" / "a"))
    for text in ("teach nothing", "normal", "win rate"):
        assert text in out
    assert (folder / "runs" / "a" / "curves.png").stat().st_size > 10000
    done = command(evaluate, folder, "score", "runs/a", "--items", "5", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "sampled" in done.stdout, done.stderr


def test_reference_of_iteration_t_is_iterate_t_minus_1(played, tiny):
    """The first loss of every iteration is log 2.

    With the start as the reference of every iteration, it would not be.
    """
    folder, _ = played
    rows = read_lines(folder / "runs" / "a" / "metrics.jsonl")
    first = {r["iteration"]: r for r in reversed(rows)}
    for i in range(3):
        assert first[i]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert rows[1]["loss"] != pytest.approx(math.log(2), abs=1e-4)
    games = [line["games"] for line in read_lines(folder / "runs" / "a" / "games.jsonl")]
    _, tokenizer = tiny
    pairs = [Pair(tokenizer.chat([user(game["prompt"])]), tokenizer.encode(game["answer"]),
                  tokenizer.encode(game["rival"])) for game in games[1]]
    before, start = load(folder / "runs" / "a" / "iteration-0")[0], tiny[0]
    difference = all_logprobs(before, pairs, 2048) - all_logprobs(start, pairs, 2048)
    assert difference.abs().max() > 0.1


def test_the_last_iteration_s_pairs_are_mixed_in(played):
    """Iteration 0 has 40 new pairs. The later ones also have the 40 of the iteration before.

    In batches of 16 these are 3, 5 and 5 updates.
    """
    folder, out = played
    rows = [row["iteration"] for row in read_lines(folder / "runs" / "a" / "metrics.jsonl")]
    assert [rows.count(i) for i in range(3)] == [3, 5, 5]
    assert "80 pairs, 40 of them new" in out


def test_what_each_iteration_is_played_with(tmp_path):
    """Each iteration takes new pairs, and begins again at the end of the data.

    Lambda and learning rate are one number an iteration, and the last one goes on. The defaults
    are the paper's schedule: from iteration 2 on the learning rate is lower, and the last of four
    iterations has a larger lambda.
    """
    found = [chosen_data("abcde", 3, t) for t in range(4)]
    assert found == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]
    assert [chosen_data("ab", 3, t) for t in range(2)] == [[0, 1], [0, 1]]  # less data than pairs

    def schedule(*flags):
        args = spin.parse_args([*TINY, *flags])
        return [[of_iteration(values, t) for t in range(args.iterations)]
                for values in (args.lam, args.lr)]
    assert schedule() == [[1, 1, 1, 2], [3e-5, 3e-5, 2e-5, 2e-5]]
    assert schedule("--iterations", "5", "--lam", "1", "2", "--lr", "0.3") == [
        [1, 2, 2, 2, 2], [0.3] * 5]
    assert schedule("--iterations", "1") == [[1], [3e-5]]
    copy_tokenizer(tmp_path / "real")
    tokenizer = tmp_path / "real" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace(language.CHALLENGER_PROMPT, "Another."))
    (tmp_path / "real" / "config.json").write_text("{}")
    real = ("--model", str(tmp_path / "real"), "--data", "people.jsonl")
    assert schedule(*real) == [[0.1, 0.1, 0.1, 5.0], [5e-7, 5e-7, 1e-7, 1e-7]]
    done = command(spin, tmp_path, *real[:2])
    assert done.returncode == 2 and "name --data" in done.stderr


def test_skipping_rows_needs_data():
    with pytest.raises(UserError, match="--skip-bad-rows is about --data"):
        spin.parse_args([*TINY, "--skip-bad-rows"])


def test_more_numbers_than_iterations_are_refused():
    """They would not be used. The default's four may stand beside fewer iterations."""
    few = [*TINY, "--iterations", "2"]
    for name in ("--lam", "--lr"):
        with pytest.raises(UserError, match=f"{name}: 3 numbers for 2 iterations"):
            spin.parse_args([*few, name, "1", "2", "3"])
    assert spin.parse_args([*few, "--lam", "1", "3"]).lam == [1, 3]
    assert spin.parse_args(few).lam == [1, 1, 1, 2]
    assert spin.parse_args([*few, "--lam", "1", "1", "1", "2"]).lam == [1, 1, 1, 2]


def test_the_schedule_reaches_the_updates(played):
    """From iteration 1 on, the command's second lambda and its second learning rate count."""
    _, out = played
    for t, lam, lr in ((0, "1", "0.0003"), (1, "0.5", "0.0002"), (2, "0.5", "0.0002")):
        lines = out[out.index(f"\niteration {t}: "):].splitlines()
        assert lines[1].endswith(f"learning rate {lr}") and lines[2].endswith(f"lambda {lam}")


def test_same_seed_same_run(played):
    folder, _ = played
    found = []
    for name in "bc":
        done = run(folder, *SHORT, "--iterations", "1", "--run", name)
        assert done.returncode == 0, done.stderr
        rows = read_lines(folder / "runs" / name / "metrics.jsonl")
        for row in rows:
            row.pop("seconds", None)
        found.append(rows)
    assert found[0] == found[1]


def test_ctrl_c_keeps_the_player_as_it_is(played, monkeypatch):
    """The run is stopped in the middle of iteration 1.

    It keeps the last whole iterate and the unfinished player. The scoreboard takes the whole one.
    """
    folder, _ = played
    real, seen = spin.player_trains, []

    def stopped(*args):
        seen.append(1)
        for i, row in enumerate(real(*args)):
            if len(seen) == 2 and i == 1:
                signal.raise_signal(signal.SIGINT)
            yield row
    monkeypatch.setattr(spin, "player_trains", stopped)
    done = run(folder, *SHORT, "--iterations", "3", "--run", "stopped")
    kept = names(folder / "runs" / "stopped")
    assert done.returncode == 0 and "stopped in iteration 1" in done.stdout
    assert {"iteration-0", "iteration-1-unfinished"} <= set(kept) and "iteration-1" not in kept
    assert runs.model_folder(folder / "runs" / "stopped").name == "iteration-0"


def test_a_gradient_that_is_not_finite_stops_the_run_in_one_line(played, monkeypatch):
    """No update is made of it. The updates before it stand in the record."""
    folder, _ = played
    real, weights = spin.spin_gradients, []

    def gradients(player, *rest):
        row, weight = real(player, *rest), player.norm
        weights.append((weight, weight.detach().clone()))
        if len(weights) == 2:
            weight.grad[0] = math.inf
        return row
    monkeypatch.setattr(spin, "spin_gradients", gradients)
    done = run(folder, *SHORT, "--run", "overflow")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "iteration 0, update 2: the gradient's norm is inf" in done.stderr
    assert "the update was not made" in done.stderr
    assert len(read_lines(folder / "runs" / "overflow" / "metrics.jsonl")) == 1
    (_, at_first), (weight, before) = weights
    assert torch.equal(weight, before) and not torch.equal(before, at_first)


def test_a_run_that_is_stopped_between_two_iterations_goes_on_to_the_same_bits(tmp_path):
    """The signal comes after the last update of an iteration.

    Then the checkpoint is of the next iteration, before its first update and with a new optimizer.
    """
    flags = [*SHORT, "--model", str(HALF), "--answer-tokens", "12", "--iterations", "3", "--lr",
             "3e-4", "2e-4"]
    real = spin.add_score

    def stopped(game, args, rates, name):
        real(game, args, rates, name)
        if name == "iteration 1":
            signal.raise_signal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spin, "add_score", stopped)
        done = run(tmp_path, *flags, "--run", "cut")
    assert done.returncode == 0 and "stopped after iteration 1: " in done.stdout, done.stderr
    cut, whole = tmp_path / "runs" / "cut", tmp_path / "runs" / "whole"
    assert "iteration-1" in names(cut) and "iteration-1-unfinished" not in names(cut)
    facts, tensors = learning.read_state(cut / runs.CHECKPOINT)
    assert (facts["iteration"], facts["done"], facts["update"]) == (2, 8, 0)
    answered = (tensors["lengths"] > 0).tolist()
    assert answered == 40 * [True] + 40 * [False]  # iteration 1's own pairs, and the new ones
    assert not [name for name in tensors if name.startswith("optimizer.")]
    done = command(spin, tmp_path, "--resume", "runs/cut")
    assert done.returncode == 0 and "on from update 8 of runs/cut" in done.stdout, done.stderr
    assert run(tmp_path, *flags, "--run", "whole").returncode == 0

    def left(folder):
        rows = [{**row, "seconds": 0} for row in read_lines(folder / "metrics.jsonl")]
        weights = [folder / f"iteration-{t}" / "model.safetensors" for t in range(3)]
        files = [*weights, folder / "games.jsonl", folder / "evaluation.json"]
        return rows, [file.read_bytes() for file in files]
    assert len(left(whole)[0]) == 3 + 5 + 5
    assert left(cut) == left(whole)


def test_sft_and_a_file_of_data(played):
    folder, _ = played
    rows = [{"prompt": f"Add {i} and 2.", "answer": str(i + 2)} for i in range(10)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(folder, *SHORT, "--game", "sft", "--data", "data.jsonl", "--iterations", "2")
    assert done.returncode == 0, done.stderr
    assert (folder / "runs" / "sft-1" / "iteration-1" / "model.safetensors").is_file(), done.stderr


@pytest.mark.parametrize("flags, says", [
    (["--iterations", "0"], "above zero"), (["--lam", "-1"], "above zero"),
    (["--game", "dpo"], "invalid choice"), (["--wrong"], "unrecognized"),
    (["--iterations", "1", "--lam", "1", "2"], "at most one an iteration"),
    (["--data", "nowhere.jsonl"], "not readable"), (["--run", "a"], "exists already"),
    (["--pairs", "2.5"], "not a whole number"),
])
def test_bad_input_is_one_line(played, flags, says):
    folder, _ = played
    before = names(folder / "runs")
    done = run(folder, *flags)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert names(folder / "runs") == before
