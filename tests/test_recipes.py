"""The recipes of neighbouring papers: two steps of each, and their equations by hand."""
import argparse
import importlib.util
import json
import math
import random
import re
import sys
import zlib

import pytest
import torch
from conftest import ROOT, command, copy_tokenizer, random_llama, read_lines

import evaluate
import model as llama
import selfplay
import spin
from recipes import (
    lance,
    multiagent,
    neighbours,
    own_answer,
    r_zero,
    reverse_gen,
    self_training,
    written_grade,
)
from support import console, forks, learning, report, trials
from tiny import language

RECIPES = {"self_training": self_training, "reverse_gen": reverse_gen, "multiagent": multiagent,
           "lance": lance, "r_zero": r_zero}
SMALL = ["--steps", "2", "--queries", "12", "--answers", "4", "--eval-items", "8", "--device",
         "cpu"]
MORE = {"reverse_gen": ["--proposals", "24"], "multiagent": ["--agents", "2"],
        "r_zero": ["--updates", "1", "--questions", "24", "--low", "0.1"]}
FIGURES = {"self_training": {"kept", "loss"}, "reverse_gen": {"failing", "valid", "distinct"},
           "multiagent": {"alone", "critic", "vote", "diversity"},
           "lance": {"quality", "agreement", "examples", "pairs"},
           "r_zero": {"paid", "share", "label_right", "matches", "valid"}}


def play(name, folder, *flags, expect=0):
    """Run a recipe in a folder. Returns what it said."""
    done = command(RECIPES[name], folder, *SMALL, *MORE.get(name, []), *flags)
    assert done.returncode == expect, done.stderr
    return done


# --------------------------------------------------------------------------------------------------
# Runs

@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """{name: the folder of a run of two steps}."""
    folder = tmp_path_factory.mktemp("recipes")
    found = {}
    for name in RECIPES:
        out = play(name, folder).stdout
        assert "gain over the start" in out and "step 2 of 2" in out
        found[name] = folder / "runs" / f"{name.replace('_', '-')}-1"
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_leave_a_run_like_any_other(name, played):
    """Settings, figures, games, scores, and a model that has moved and can be loaded."""
    folder = played[name]
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["command"] == f"recipes/{name}.py" and settings["steps"] == 2
    rows = read_lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["tokens"] > 0 and row["seconds"] > 0 for row in rows)
    assert FIGURES[name] <= set().union(*rows)
    games = read_lines(folder / "games.jsonl")
    assert [line["step"] for line in games] == [1, 2] and games[0]["games"][0]["answers"]
    assert json.loads((folder / "evaluation.json").read_text())["scores"]["now"]["all"]["n"] == 8
    trained, _ = llama.load(folder / "model")
    start, _ = llama.load(ROOT / "tiny")
    assert any((p != q).any() for p, q in zip(trained.parameters(), start.parameters()))
    assert len(report.read_metrics(folder)["tokens"]) == 2


def test_all_runs_fit_on_one_page(played, tmp_path):
    """Each figure that one of them has is drawn."""
    report.write_page(played.values(), tmp_path / "page.html")
    figures = report.present({name: report.read_metrics(run) for name, run in played.items()})
    assert (tmp_path / "page.html").read_text().count("<svg") == len(list(figures)) > 10


@pytest.mark.parametrize("name, other", [("reverse_gen", "proposer"), ("r_zero", "challenger"),
                                         ("multiagent", "critic-2")])
def test_the_second_model_is_another_one(name, other, played):
    """It learns, too, and something else than the first."""
    start, first, second = (torch.cat([p.flatten() for p in llama.load(path)[0].parameters()])
                            for path in (ROOT / "tiny", played[name] / "model",
                                         played[name] / other))
    assert (second != start).any() and (second != first).any()


def test_a_seed_repeats_a_run(tmp_path, played):
    play("r_zero", tmp_path)
    again = (tmp_path / "runs" / "r-zero-1" / "games.jsonl").read_text()
    assert again == (played["r_zero"] / "games.jsonl").read_text()


def test_variants_run(tmp_path):
    """DPO and restarts in self-training, the target's own labels, one agent alone."""
    play("self_training", tmp_path, "--learn", "dpo", "--run", "dpo")
    rows = read_lines(tmp_path / "runs" / "dpo" / "metrics.jsonl")
    # Of one update an epoch, the first is the reference itself.
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=0.02)
    play("self_training", tmp_path, "--restart")
    play("reverse_gen", tmp_path, "--labels", "own", "--beta", "0")
    play("multiagent", tmp_path, "--agents", "1")


@pytest.mark.parametrize("name", RECIPES)
def test_bad_input_is_one_line(name, tmp_path, played):
    done = play(name, tmp_path, "--stepz", "3", expect=2)
    assert "unrecognized arguments" in done.stderr
    done = command(RECIPES[name], tmp_path, "-h")
    assert done.returncode == 0 and "default:" in done.stdout
    taken = played[name]
    done = command(RECIPES[name], taken.parent.parent, "--run", taken.name)
    assert done.returncode == 2 and "exists already" in done.stderr
    done = play(name, tmp_path, "--task", "a sum", expect=2)
    assert "Traceback" not in done.stderr and not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A folder with a random model that does not speak the embedded language: other names."""
    folder = tmp_path_factory.mktemp("foreign")
    copy_tokenizer(folder)
    text = (folder / "tokenizer.json").read_text()
    said = json.dumps(language.CHALLENGER_PROMPT)[1:-1]
    (folder / "tokenizer.json").write_text(text.replace(said, "Zz" + said))
    torch.manual_seed(0)
    small = random_llama(vocab_size=len(json.loads(text)["model"]["vocab"]) + 64,
                         max_position_embeddings=2048)
    small.folder, small.end_ids = folder, {*range(2, 130)}  # else nothing would ever end
    llama.save(small, folder)
    assert not language.spoken_by(folder)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_a_real_model_plays(name, tmp_path, foreign):
    """Its defaults are others, it needs its own referee, and nothing of the language is asked."""
    (tmp_path / "mine.py").write_text(
        "def short(queries, answers):\n"
        "    return [[float(len(a) % 2) for a in group] for group in answers]\n")
    (tmp_path / "sums.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n'
                                         '{"question": "2 + 3?", "answer": "5"}\n')
    flags = ["--model", str(foreign), "--reward", "mine.py:short", "--answer-tokens", "4"]
    if name in ("self_training", "multiagent"):
        done = play(name, tmp_path, *flags, expect=2)
        assert "name --data" in done.stderr
        flags += ["--data", "sums.jsonl"]
    else:
        flags += ["--query-tokens", "9", "--task", "a sum"]
        done = play(name, tmp_path, "--task", "a sum", expect=2)
        assert "has its own Challenger's prompt" in done.stderr
    play(name, tmp_path, *flags)
    settings = json.loads(next((tmp_path / "runs").glob("*/settings.json")).read_text())
    assert settings["lr"] < 1e-4  # the default on a real model
    done = play(name, tmp_path, *flags, "--reward", "exact", expect=2)
    assert "cannot judge" in done.stderr


def test_a_real_model_needs_no_reward_where_nothing_is_learnt_from_it(tmp_path, foreign):
    """R-Zero asks nobody. Then nobody knows how right its answers are, and it says so."""
    done = play("r_zero", tmp_path, "--model", str(foreign), "--answer-tokens", "4",
                "--query-tokens", "9")
    assert "no scoreboard" in done.stdout


# --------------------------------------------------------------------------------------------------
# Equations by hand

def asked(prompts, ids, texts=None):
    return evaluate.Asked(prompts, ids, texts)


def test_self_training_keeps_what_is_right():
    """Two queries; 9 ends an answer. Copies count once, a cut answer never."""
    said = asked([[1], [2]], [[[5, 9], [5, 9], [6, 9], [7, 7]], [[5, 9], [6, 9], [8, 9], [8, 9]]])
    reward = torch.tensor([[1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0]])
    right, pairs = self_training.kept(said, reward, {9}, 4)
    assert right == [([1], [5, 9], []), ([2], [5, 9], []), ([2], [8, 9], [])]
    assert pairs == [([1], [5, 9], [6, 9]), ([2], [5, 9], [6, 9]), ([2], [8, 9], [6, 9])]
    right, pairs = self_training.kept(said, reward, {9}, 1)
    assert [p.answer for p in right] == [[5, 9], [5, 9]] and len(pairs) == 2
    assert self_training.kept(said, torch.zeros(2, 4), {9}, 4) == ([], [])


def log_p(model, prompt, answer):
    """log p(answer | prompt), a sum over tokens, with the plainest of softmaxes."""
    with torch.no_grad():
        p = model.logits(torch.tensor([prompt + answer]))[0].softmax(-1)
    return sum(math.log(p[len(prompt) + i - 1, token]) for i, token in enumerate(answer))


def test_self_training_m_step(small):
    """L = - E[R log p(y|x)]: a mean over the tokens of what was kept, and of nothing else."""
    said = asked([[3, 4]], [[[5, 2], [6, 7, 2], [8, 2]]])
    right, _ = self_training.kept(said, torch.tensor([[1.0, 1.0, 0.0]]), {2}, 4)
    args = argparse.Namespace(micro_batch=64)
    loss = spin.sft_gradients(small, right, args)["loss"]
    by_hand = -(log_p(small, [3, 4], [5, 2]) + log_p(small, [3, 4], [6, 7, 2])) / 5
    assert loss == pytest.approx(by_hand, abs=1e-5)


def test_dpo_is_spin_with_a_fixed_reference(small):
    """L = log(1 + exp(-beta (h+ - h-))) of two pairs, h = log p/p_ref, by hand."""
    pairs = [spin.Pair([3, 4], [5, 2], [6, 7, 2]), spin.Pair([4], [8, 2], [5, 2])]
    ref = torch.tensor([[-9.0, -14.0], [-8.5, -9.5]])
    args = argparse.Namespace(micro_batch=64, loss="logistic")
    loss = spin.spin_gradients(small, pairs, ref, 0.1, args)["loss"]
    by_hand = 0
    for pair, (r, s) in zip(pairs, ref.tolist()):
        h = [log_p(small, pair.prompt, y) - x for y, x in ((pair.answer, r), (pair.rival, s))]
        by_hand += math.log(1 + math.exp(-0.1 * (h[0] - h[1]))) / 2
    assert loss == pytest.approx(by_hand, abs=1e-5)


def test_reverse_gen_prefers_failing_queries():
    """V = 0, 1/4, 1/2, 1: the first two fail. A pair has one of each side, and no query twice."""
    proposed = {"a": [1], "b": [2], "c": [3], "d": [4]}
    value = torch.tensor([0.0, 0.25, 0.5, 1.0])
    pairs = reverse_gen.preferences([0], proposed, value, random.Random(0))
    assert sorted(p.answer for p in pairs) == [[1], [2]]
    assert sorted(p.rival for p in pairs) == [[3], [4]]
    assert reverse_gen.preferences([0], proposed, torch.ones(4), random.Random(0)) == []


def test_reverse_gen_raises_what_fails(tiny):
    """One update of the proposer makes a failing query likelier, compared with a solved one."""
    model, tokenizer = llama.load(ROOT / "tiny")
    prompt = selfplay.challenger_prompt(tokenizer)
    end = next(iter(model.end_ids))
    pairs = [spin.Pair(prompt, [*tokenizer.encode("Add 7 and 8."), end],
                       [*tokenizer.encode("Sort the numbers 3, 1, 2."), end])]
    ref = spin.all_logprobs(model, pairs, 512)
    optimizer = forks.adamw(model)
    learning.set_rate(optimizer, 1e-4)
    args = argparse.Namespace(epochs=1, batch=8, micro_batch=512, loss="logistic")
    forks.learn(optimizer, [0], lambda batch: spin.spin_gradients(
        model, [pairs[i] for i in batch], ref[batch], 0.1, args), args, random.Random(0))
    assert spin.spin_margin(spin.all_logprobs(model, pairs, 512), ref, 0.1).item() > 0


def test_multiagent_vote_and_lessons():
    """Three generators, one answer each, to one query: x, y, x; critic 1 says z, critic 2 says x.

    y^ = x. Generators 1 and 3 learn their own x; generator 2 has nothing to learn. Critic 2, whose
    generator was wrong, always learns, and in its own words; critic 1 learns half the time.
    """
    first = [asked([[1]], [[[5, 9]]], [["x"]]), asked([[1]], [[[6, 9]]], [["y"]]),
             asked([[1]], [[[5, 5, 9]]], [["x"]])]
    final = [asked([[1, 1]], [[[7, 9]]], [["z"]]), asked([[1, 2]], [[[8, 9]]], [["x"]])]
    ends = [multiagent.vote(["x", "y", "x", "z", "x"])]
    assert ends == ["x"] and multiagent.vote(["", " "]) is None
    assert [multiagent.generator_data(said, ends) for said in first] == [
        [([1], [5, 9], [])], [], [([1], [5, 5, 9], [])]]
    assert multiagent.generator_data(first[0], [None]) == []
    rng = random.Random(0)
    for _ in range(20):
        assert multiagent.critic_data(1, first, final[1], ends, rng) == [([1, 2], [8, 9], [])]
    # Critic 1 did not come to x itself: it learns its generator's words.
    taken = [multiagent.critic_data(0, first, final[0], ends, rng) for _ in range(400)]
    assert all(lessons in ([], [([1, 1], [5, 9], [])]) for lessons in taken)
    assert 160 < sum(map(bool, taken)) < 240  # half of 400, within four deviations
    assert multiagent.critic_data(0, first, final[0], [None], rng) == []


def test_multiagent_diversity():
    """Of x, x, y one pair of three is equal; of x, x, x all are."""
    assert multiagent.diversity([["x", "x", "y"], ["x", "x", "x"]]) == pytest.approx(2 / 6)
    assert multiagent.diversity([["x"]]) == 0


def test_multiagent_debate():
    """A critic reads the query and all answers; its own generator's comes last."""
    row = selfplay.data.Row([{"role": "user", "content": "Add 1 and 2."}])
    text = multiagent.debate(row, ["3", "4", "5"], 0, True).query
    assert text == "Query: Add 1 and 2.\nAnswer: 4\nAnswer: 5\nAnswer: 3"
    text = multiagent.debate(row, ["3", "4"], 1, False).query
    assert text.index("3") < text.index("\n\n4\n\n") and text.startswith("Add 1 and 2.")


def test_lance_labels():
    """The example of its docstring; a query with a low mean goes; a small gap makes no pair."""
    args = argparse.Namespace(clean=0.5, good=0.6, gap=0.1)
    said = asked([[1], [2], [3]], [[[5], [6], [7]]] * 3)
    grades = torch.tensor([[0.3, 0.7, 0.9], [0.1, 0.2, 0.9], [0.55, 0.6, 0.58]])
    examples, pairs = lance.label(said, grades, args)
    assert examples == [([1], [6], []), ([3], [6], [])]
    assert pairs == [([1], [7], [5])]


def test_r_zero_uncertainty():
    """max(0, 1 - 2|s - 1/2| - repetition), of hand-sized groups."""
    half = torch.full((4,), 0.5)
    pay = r_zero.uncertainty(half, ["a", "a", "b", "c"], [True] * 4, 1.0)
    assert pay.tolist() == [0.5, 0.5, 0.75, 0.75]
    share = torch.tensor([0.5, 0.75, 1.0, 0.25])  # 1, 1/2, 0, 1/2, each minus 1/4
    pay = r_zero.uncertainty(share, ["a", "b", "c", "d"], [True, True, True, False], 1.0)
    assert pay.tolist() == [0.75, 0.25, 0.0, 0.0]  # never negative; a cut query gets nothing
    assert r_zero.uncertainty(share, ["a"] * 4, [True] * 4, 0.0).tolist() == [1, 0.5, 0, 0.5]


def test_r_zero_majority():
    """Labels and shares; nothing has no vote, and of equal ones the first counts."""
    labels, share = r_zero.majority([["7", "7", "8", "7"], ["1", "2", "", "3"], ["", "", "", ""]])
    assert labels == ["7", "1", None] and share.tolist() == [0.75, 0.25, 0.0]
    assert r_zero.matches(labels[:2], [["7", "8"], ["2", "1"]]).tolist() == [[1, 0], [0, 1]]


def test_r_zero_updates_with_grpo(monkeypatch):
    """A = (r - mean)/std of each group: rewards 1, 0, 0, 1 give 1, -1, -1, 1 and equal ones 0."""
    given = []
    monkeypatch.setattr(selfplay, "gradients", lambda player, played, advantage, beta, args:
                        given.append((played.completions, advantage, beta)))
    w = torch.nn.Parameter(torch.zeros(1))
    w.grad = torch.ones(1)
    player = selfplay.Game(**dict.fromkeys(selfplay.Game._fields) | {
        "optimizer": torch.optim.SGD([w], lr=1.0)})
    reward = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    r_zero.update(player, [[1], [2]], "completions", reward, argparse.Namespace(kl=0.25))
    (completions, advantage, beta), = given
    assert completions == "completions" and beta == 0.25 and w.item() == pytest.approx(-1)
    assert torch.allclose(advantage, torch.tensor([[1.0, -1, -1, 1], [0, 0, 0, 0]]), atol=1e-3)


# --------------------------------------------------------------------------------------------------
# What they share

def test_learning_takes_every_example_once_an_epoch():
    """5 examples, 2 a batch, 3 epochs: 9 updates, each example 3 times; figures are means."""
    w = torch.nn.Parameter(torch.zeros(1))
    seen = []

    def gradient(batch):
        seen.append(batch)
        w.grad = torch.ones(1)
        return {"loss": len(batch)}
    args = argparse.Namespace(epochs=3, batch=2)
    found = forks.learn(torch.optim.SGD([w], lr=1.0), range(5), gradient, args, random.Random(0))
    assert len(seen) == 9 and sorted(sum(seen, [])) == sorted([*range(5)] * 3)
    assert found == {"loss": pytest.approx(15 / 9)} and w.item() == pytest.approx(-9)
    assert forks.learn(None, [], gradient, args, random.Random(0)) == {}
    w.grad = None
    with pytest.raises(console.UserError, match="gradient's norm is inf"):
        forks.check(math.inf)


def test_games_are_written_once_with_their_count():
    found = forks.games(["q"], [["a", "b", "a"]], torch.tensor([[1.0, 0.0, 1.0]]))
    assert found == [{"query": "q", "answers": [
        {"answer": "a", "times": 2, "reward": 1.0, "quality": None},
        {"answer": "b", "times": 1, "reward": 0.0, "quality": None}]}]


def test_figures_of_a_step():
    """One of two groups has spread; six tokens in four answers."""
    found = forks.figures(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), [[[1], [1, 2]], [[1], [1, 2]]])
    assert found == {"reward": 0.75, "answer_tokens": 1.5, "spread": 0.5}
    assert forks.tokens([[[1], [1, 2]], [[1]]], [[[4, 5]]]) == 6


# --------------------------------------------------------------------------------------------------
# The exercises of docs/fork.md: each diff is applied and played

DIFFS = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "fork.md").read_text(), re.DOTALL)
TWO = ("--steps", "2", "--queries", "4", "--answers", "4", "--eval-items", "10", "--device", "cpu")


def applied(diff, folder):
    """Apply a diff to the project's file, written into a folder. Returns its path."""
    _, head, _, *lines = diff.splitlines()  # ---, +++, @@
    name = head.removeprefix("+++ b/")
    old = "".join(line[1:] + "\n" for line in lines if line[:1] in (" ", "-"))
    new = "".join(line[1:] + "\n" for line in lines if line[:1] in (" ", "+"))
    text = (ROOT / name).read_text() if old else ""
    assert text.count(old) == 1 if old else not (ROOT / name).exists()
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace(old, new) if old else new)
    return path


def imported(path):
    """The module of a file that is not on the import path."""
    spec = importlib.util.spec_from_file_location(f"fork_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fork_a_new_pay(tmp_path):
    """p (1 - p): 3/16 where three of four are right, 0 where all are. It plays two steps."""
    fork = imported(applied(DIFFS[0], tmp_path))
    R = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert fork.PAY["variance"](None, R, None).tolist() == [0.1875, 0.0]
    assert command(selfplay, tmp_path, "--pay", "variance").returncode == 2
    done = command(fork, tmp_path, *TWO, "--pay", "variance")
    assert done.returncode == 0 and "gain over the start" in done.stdout


def test_fork_a_new_reward(tmp_path):
    """The right answer has 1; of four letters three are right: half of 3/4; no task, no pay."""
    fork = imported(applied(DIFFS[1], tmp_path))
    asked = ['Take "abcd", repeat it, then keep its first 4 letters.', "Take 3."]
    assert fork.nearly(asked, [["abcd", "abcx"], ["", "3"]]) == [[1, 0.375], [0, 0]]
    done = command(selfplay, tmp_path, *TWO, "--game", "grpo", "--reward", "nearly.py:nearly")
    assert done.returncode == 0 and "gain over the start" in done.stdout


def test_fork_a_new_game(tmp_path, monkeypatch):
    """Advantages are -1 for wrong answers and 0 for right ones; it plays two steps."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = applied(DIFFS[2], tmp_path)
    given, real = [], selfplay.gradients

    def gradients(game, player, advantage, *others):
        given.append(advantage)
        return real(game, player, advantage, *others)
    monkeypatch.setattr(selfplay, "gradients", gradients)
    done = command(imported(path), tmp_path, *TWO)
    assert done.returncode == 0 and "gain over the start" in done.stdout, done.stderr
    rows = read_lines(tmp_path / "runs" / "negative-1" / "metrics.jsonl")
    assert [1 + a.mean().item() for a in given] == pytest.approx([row["reward"] for row in rows])
    assert set(torch.cat(given).flatten().tolist()) == {-1.0, 0.0}


# --------------------------------------------------------------------------------------------------
# The table of all methods

def made_up(gain, tokens, command="", n=40):
    """A result in which `gain` more of n instructions are right than 20, in all 8 answers."""
    right = [8] * (20 + gain) + [0] * (n - 20 - gain)
    items = {"sampled": [k / 8 for k in right], "greedy": [float(k > 0) for k in right]}
    return {"tokens": tokens, "minutes": 1.5, "command": command, "models": [
        {"name": "model", "scores": {neighbours.SET: trials.counted(items, 8)}}]}


def test_the_table_of_made_up_results(tmp_path):
    """10 of 40 more are 25 points, and 12.5 for each 100,000 of 200,000 tokens. Best first."""
    found = {(neighbours.START.slug, seed): made_up(0, 0) for seed in (10, 11)}
    grpo, lsp, *_ = neighbours.METHODS
    found |= {(grpo.slug, 10): made_up(4, 200_000), (lsp.slug, 10): made_up(10, 200_000),
              (lsp.slug, 11): made_up(10, 200_000)}
    r = trials.Results(found, neighbours.SET)
    head, _, start, first, second = neighbours.table(r).splitlines()
    assert start.startswith("| start |  | 2 |  | 50.0 [")
    assert first.startswith("| LSP | R | 2 | 200,000 | 75.0 [") and "| +25.0 [" in first
    assert "| +12.5 [" in first and first.endswith("| 1.5 |")
    assert second.startswith("| GRPO | queries; R | 1 |")
    page = tmp_path / "recipes.md"
    for old in ("", "old\n"):
        page.write_text(f"before\n<!-- table -->\n{old}<!-- end of the table -->\nafter\n")
        neighbours.draw(r, page)
        assert page.read_text() == (f"before\n<!-- table -->\n{neighbours.table(r)}\n"
                                    "<!-- end of the table -->\nafter\n")
    assert (tmp_path / "recipes.png").stat().st_size > 5000
    page.write_text("no marks")
    with pytest.raises(console.UserError, match="no place for the table"):
        neighbours.draw(r, page)


def test_every_method_of_the_table_takes_its_flags(tmp_path, monkeypatch):
    """No flag is unknown, and each run's file has a name of its own."""
    monkeypatch.chdir(tmp_path)
    for run in neighbours.METHODS:
        script, *flags = run.command.split()
        name = script.removeprefix("recipes/").removesuffix(".py")
        if name in RECIPES:
            args = forks.parse(RECIPES[name].SETTINGS, selfplay.SETTINGS, flags, name, "About.",
                               language.spoken_by)
        else:
            args = {"selfplay": selfplay, "spin": spin}[name].parse_args(flags)
        assert args.command == script
    assert len({run.slug for run in neighbours.METHODS}) == len(neighbours.METHODS) == 9


def test_the_page_shows_the_results_that_are_kept():
    """The table in docs/recipes.md is drawn from docs/results/recipes/."""
    r = trials.Results(trials.read_results(neighbours.RESULTS), neighbours.SET)
    assert neighbours.table(r) in (ROOT / "docs" / "recipes.md").read_text()


def test_a_judge_that_answers_itself(tiny):
    """An answer's quality is how many of the start's own 16 answers are the same.

    The same queries get the same grades, so a resumed run goes on to the same bits.
    """
    queries = ["Add 2 and 3.", 'Take "kobani", reverse it.']
    grades, again = (own_answer.agrees(queries, [["5", "6", "5"], ["inabok", "kobani", ""]])
                     for _ in range(2))
    assert grades == again and grades[0][0] == grades[0][2] > grades[0][1]
    assert grades[1][0] > grades[1][1]
    luck = torch.Generator().manual_seed(zlib.crc32("Add 2 and 3.".encode()))
    prompt = tiny[1].chat([{"role": "user", "content": "Add 2 and 3."}])
    ids = llama.generate(tiny[0], [prompt], 16, 24, generator=luck).ids
    texts = [tiny[1].decode(answer) for answer in ids]
    different = [*dict.fromkeys(texts), "of nobody"]
    assert own_answer.agrees(["Add 2 and 3."], [different]) == [
        [texts.count(text) / 16 for text in different]]


def test_a_judge_that_writes_its_grade():
    """400 verdicts on each answer: on average they are the expected grade, each is a whole digit.

    Equal answers are graded apart, so they may differ. The same games get the same grades, so a
    resumed run goes on to the same bits. Other games draw other grades of the same exchange.
    """
    queries = ["Add 2 and 3.", 'Take "kobani", reverse it.', "Take of take."]
    different = [["5", "6"], ["inabok", "ko"], ["x", "y"]]
    answers = [400 * group for group in different]
    grades, again = (torch.tensor(written_grade.writes(queries, answers)) for _ in range(2))
    assert torch.equal(grades, again) and torch.equal((7 * grades).round() / 7, grades)
    grades = grades.view(3, 400, 2)
    p = written_grade.judge.chances(queries, different).view(3, 2, 8)
    expected = written_grade.judge(queries, different)
    points = torch.arange(8.0) / 7
    assert torch.allclose(p @ points, expected)
    deviation = (p @ points ** 2 - expected ** 2).sqrt()  # of one verdict; of the mean, / 20
    assert ((grades.mean(1) - expected).abs() <= 4 * deviation / 20).all()
    other = torch.tensor(written_grade.writes(queries[:1], answers[:1])).view(400, 2)
    assert not torch.equal(other, grades[0])
    assert deviation[0, 0] > 0.1 and torch.allclose(grades.std(1), deviation, rtol=0.2, atol=0.03)
