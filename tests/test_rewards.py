"""The referees: the exact reward, the judge, reward models, and a function of the user's own."""
import random

import pytest
import torch
from conftest import ROOT, SHARED, copy_tokenizer, llama3_tokenizer, random_llama, small_config

import rewards
from rewards import (
    ExactReward,
    MathReward,
    QualityReward,
    RewardModel,
    WrittenQuality,
    load_referee,
)
from support import console, data, files, referees, worked
from support.console import UserError
from support.referees import judged
from support.worked import final_answer
from tiny import language

QUERIES = ['Take "kobani", reverse it.', "Add 2 and 3.", 'Take "kobani", fly it.']
ANSWERS = [["inabok", "kobani"], ["5", "6"], ["inabok", ""]]


def test_exact_reward():
    assert ExactReward()(QUERIES, ANSWERS).tolist() == [[1, 0], [1, 0], [0, 0]]
    assert ExactReward().valid(QUERIES) == [True, True, False]


def test_quality_is_the_expected_digit_of_a_plain_forward_pass(tiny):
    """R_Q is the sum over the digits d of d * p(d | rubric, exchange) / 7.

    The score must not change because a group's texts share their beginning.
    """
    model, tokenizer = tiny
    score = QualityReward(model, tokenizer)(QUERIES, ANSWERS)
    digits = [tokenizer.encode(str(d))[0] for d in range(8)]
    for i, (query, group) in enumerate(zip(QUERIES, ANSWERS)):
        for j, answer in enumerate(group):
            exchange = language.JUDGE_EXCHANGE.format(query=query, answer=answer)
            ids = tokenizer.chat([{"role": "system", "content": language.JUDGE_PROMPT},
                                  {"role": "user", "content": exchange}])
            with torch.no_grad():
                p = model.logits(torch.tensor([ids]))[0, -1, digits].softmax(-1)
            assert torch.isclose(score[i, j], (p * torch.arange(8)).sum() / 7, atol=1e-5)


def test_last_states_are_those_of_whole_texts(small):
    """Whatever texts share: nothing, the first id, all but the last, a whole text, all of it."""
    texts = [[1, 5, 6], [1, 7], [1, 8, 9, 4], [1, 8, 9, 4], [1, 8, 9, 3], [1, 5], [1, 5, 6, 7],
             [1, 5, 6], [1, 2, 3], [4], [3, 7], [3, 7, 5], [4]]
    with torch.no_grad():
        for some in (texts, texts[:9], texts[9:]):
            found = rewards.last_states(small, some, tokens=16)
            for state, ids in zip(found, some, strict=True):
                assert torch.allclose(state, small(torch.tensor([ids]))[0, -1], atol=1e-5)


def test_equal_answers_are_graded_once():
    asked = []

    def grade(different):
        asked.append(different)
        return torch.tensor([float(len(text)) for group in different for text in group])
    grades = rewards.each_once(grade, [["a", "bb", "a"], ["bb", "bb", "ccc"]])
    assert grades.tolist() == [[1, 2, 1], [2, 2, 3]]
    assert asked == [[["a", "bb"], ["bb", "ccc"]]]


def test_quality_of_equal_answers_and_single_groups(tiny):
    model, tokenizer = tiny
    judge = QualityReward(model, tokenizer)
    same = judge(["Add 2 and 3."], [["5", "5", "5"]])
    assert torch.allclose(same, judge(["Add 2 and 3."], [["5"]]).expand(1, 3), atol=1e-6)


def test_the_committed_judge_tells_good_from_bad(tiny):
    """The self-reward keeps the game sane only if the judge can do two things.

    It must grade right answers above wrong ones, and real tasks above nonsense.
    """
    model, tokenizer = tiny
    rng = random.Random(5)
    queries = [language.draw(rng, held_out=True) for _ in range(100)]
    judge = QualityReward(model, tokenizer)
    right = judge(queries, [[language.solve(q)] for q in queries]).mean()
    wrong = judge(queries, [[language.misanswer(q, rng)] for q in queries]).mean()
    spoiled = [language.spoil(q, rng) for q in queries]
    nonsense = judge(spoiled, [[language.solve(q)] for q in queries]).mean()
    assert right > wrong + 0.15 and wrong > nonsense + 0.1


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_reward_model_equals_transformers(tmp_path, tiny, transformers, family):
    """The score at the last real token is within 1e-4, in a batch of texts of unequal length."""
    torch.manual_seed(0)
    tokenizer = tiny[1]
    settings = small_config(model_type=family, vocab_size=200, max_position_embeddings=128,
                            initializer_range=0.3, num_labels=1)
    settings.pop("architectures")
    config = transformers.AutoConfig.for_model(**settings)
    peer = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    peer.save_pretrained(tmp_path)
    copy_tokenizer(tmp_path)
    scores = RewardModel(tmp_path)(QUERIES, ANSWERS)
    assert scores.shape == (3, 2) and scores.std() > 0.01
    for query, group, row in zip(QUERIES, ANSWERS, scores):
        for answer, score in zip(group, row):
            messages = [{"role": "user", "content": query},
                        {"role": "assistant", "content": answer}]
            ids = tokenizer.chat(messages, add_generation_prompt=False)
            with torch.no_grad():
                theirs = peer(torch.tensor([ids])).logits.item()
            assert theirs == pytest.approx(score.item(), abs=1e-4)
    referee = load_referee(str(tmp_path))
    assert judged(referee, QUERIES, ANSWERS).tolist() == scores.tolist()
    # In a chat it reads the whole conversation, and not its last message alone.
    system = {"role": "system", "content": "Add "}
    chats = [[system, {"role": "user", "content": query}] for query in QUERIES]
    scores = judged(referee, QUERIES, ANSWERS, {"messages": chats})
    ids = tokenizer.chat([*chats[0], {"role": "assistant", "content": ANSWERS[0][1]}], False)
    with torch.no_grad():
        assert scores[0, 1].item() == pytest.approx(
            peer(torch.tensor([ids])).logits.item(), abs=1e-4)


def test_the_reward_is_read_before_the_padding(tmp_path, transformers):
    """Where the pad token ends a turn, too, transformers reads the last token that is no pad."""
    torch.manual_seed(0)
    settings = small_config(vocab_size=200, max_position_embeddings=128, initializer_range=0.3,
                            num_labels=1, pad_token_id=3)  # 3: the end of a turn
    config = transformers.AutoConfig.for_model(**settings)
    peer = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    peer.save_pretrained(tmp_path)
    copy_tokenizer(tmp_path)
    referee = RewardModel(tmp_path)
    ids = referee.tokenizer.chat([{"role": "user", "content": "Add 2 and 3."},
                                  {"role": "assistant", "content": "5"}], False)
    with torch.no_grad():
        theirs = peer(torch.tensor([ids])).logits.item()
    assert ids[-1] == 3
    assert referee(["Add 2 and 3."], [["5"]]).item() == pytest.approx(theirs, abs=1e-4)


def test_a_model_without_a_score_head_is_refused():
    with pytest.raises(UserError, match="no reward model"):
        load_referee(str(ROOT / "tiny"))


@pytest.mark.parametrize("text, value", [
    ("It is 3 + 4 = 7.", "7"), ("So she makes $1,234.50", "2469/2"),
    ("#### 18", "18"), ("1 and 2\n#### -1,000\n", "-1000"),
    ("\\boxed{12} or 13", "12"), ("\\boxed{1} \\boxed{\\frac{1}{2}}", "1/2"),
    ("\\boxed{ \\$5.0 }", "5"), ("\\boxed{3/4}", "3/4"),
    ("I do not know", None), ("", None),
    ("7.0", "7"), ("\\boxed{3", None),
    ("#### 18 dollars", "18"), ("#### **18**", "18"),
    ("#### 42\nLet me know!", "42"), ("it is .5", "1/2"),
    ("9" * 5000, "9" * 5000),
    ("#### 1e5", "100000"), ("#### 1/2", "1/2"), ("#### 1/3", "1/3"), ("#### 6/4", "3/2"),
    ("#### 1/0", "1/0"), ("#### none", "none"), ("**5**", "5"), ("2**3", None),
    ("#### (1, 2)", "(1,2)"), ("between 5-7", None), ("-$5", "-5"),
    ("it is \u22123", "-3"), ("\uff11\uff12", "12"), ("2^10", None), ("1.000,5", "2001/2"),
    ("\\boxed{x+5}", "x+5"), ("\\boxed{x = 5}", "5"), ("\\boxed{5\\text{ cm}}", "5"),
    ("\\boxed{50\\%}", "50"), ("\\boxed{1,234}", "1234"), ("\\boxed{-3}", "-3"),
])
def test_final_answer(text, value):
    assert final_answer(text) == value


@pytest.mark.parametrize("known, answer", [
    ("#### 3", "the result is \u22123"), ("#### 3/4", "3"), ("#### 1/2", "#### 1/3"),
    ("\\boxed{(1,2)}", "\\boxed{12}"), ("#### 1000", "1.000,5"), ("#### 1", "#### 1e5"),
    ("\\boxed{2\\sqrt{3}}", "\\boxed{23}"), ("\\boxed{[0,1)}", "\\boxed{01}"),
    ("\\boxed{10^3}", "\\boxed{103}"), ("#### 5", "\\boxed{x+5}"), ("#### 5", "\\boxed{5x}"),
    ("#### 2", "\\boxed{2\\pi}"), ("#### 3", "\\boxed{(3, 4)}"), ("#### 10", "#### 10 of 20"),
    ("#### 5", "#### 5/0"), ("#### 12", "#### 1,2"), ("#### 5", "\\boxed{-5}")])
def test_two_unequal_answers_are_never_called_equal(known, answer):
    """That would pay for a wrong answer: the worse of the two faults."""
    assert MathReward()(["q"], [[answer, known]], [known]).tolist() == [[0, 1]]


def test_every_row_is_graded_by_its_own_answer():
    """Two rows ask the same question, in two conversations."""
    turn = {"role": "user", "content": "Add 5 and 5."}
    rows = [data.Row([{"role": "system", "content": f"Count in base {base}."}, turn], known, i)
            for i, (base, known) in enumerate([(10, "10"), (2, "1010")], 1)]
    scores = judged(MathReward(), [row.query for row in rows], [["10", "1010"]] * 2,
                    data.columns(rows))
    assert scores.tolist() == [[1, 0], [0, 1]]


def test_a_referee_cannot_change_what_is_played():
    """It gets copies: neither queries and answers nor the data's columns change under its hands."""
    queries, answers, columns = ["q"], [["b", "a"]], {"messages": [[{"role": "user"}]]}

    def sorts(queries, answers, messages):
        for group in answers:
            group.sort()
        queries.clear()
        messages[0][0].clear()
        return [[0.0, 1.0]]
    judged(sorts, queries, answers, columns)
    assert (queries, answers, columns) == (["q"], [["b", "a"]], {"messages": [[{"role": "user"}]]})


def test_a_reward_that_wants_the_known_answer(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def right(prompts, completions, answer, **others):\n"
                    "    return [[float(c == a) for c in group]\n"
                    "            for group, a in zip(completions, answer)]\n")
    reward = load_referee(f"{file}:right")
    scores = judged(reward, ["q", "p"], [["3", "4"]] * 2, {"answer": ["3", "4"], "messages": []})
    assert scores.tolist() == [[1, 0], [0, 1]]
    with pytest.raises(UserError, match="the reward right asks for 'answer'"):
        judged(reward, ["q"], [["3"]], {"messages": [[]]})


def test_which_queries_have_an_answer():
    class Mine:
        def valid(self, queries):
            return self.found
    mine = Mine()
    mine.found = torch.tensor([1, 0])
    assert referees.which_valid(mine, ["q", "p"]) == [True, False]
    assert referees.which_valid(max, ["q"]) is None
    for mine.found in ([True], True, None):
        with pytest.raises(UserError, match="`valid` must return one truth value a query"):
            referees.which_valid(mine, ["q", "p"])


def test_math_reward():
    question = [{"role": "user", "content": "How many?"}]
    row = data.Row(question, "6 * 3 = <<6*3=18>>18\n#### 18", 1)
    reward = MathReward()
    answers = ["18", "there are 18.00 of them", "17", "18 eggs, no: 19"]
    assert reward(["How many?"], [answers], [row.answer]).tolist() == [[1, 1, 0, 0]]
    # Data without a clear answer is refused: a wrong truth would be worse than none.
    for unclear in ("many", "3/4 of them", "first 3, then 4", "so ####"):
        rows = [row, data.Row(question, unclear, 3, {}, "--data f, line")]
        with pytest.raises(UserError, match=f"--data f, line 3: its answer is neither.*{unclear}"):
            data.measured(rows[1:], [], 1, False, worked.unclear)
        assert data.measured(rows[:1], [], 1, False, worked.unclear) == [(row, [])]
    with pytest.raises(UserError, match="a known answer is not clear: 'so ####'"):
        reward(["q"], [["3"]], ["so ####"])


def test_math_reward_on_gsm8k():
    """Every published answer is right for its own question, and nearly always wrong for another."""
    path = SHARED / "gsm8k" / "test.jsonl"
    if not path.is_file():
        pytest.skip("GSM8K is not at hand (../shared/data)")
    rows = data.read_data(path)
    queries, known = [row.query for row in rows], [row.answer for row in rows]
    reward = MathReward()
    assert reward(queries, [[a] for a in known], known).mean() == 1
    assert reward(queries, [[a] for a in known[1:] + known[:1]], known).mean() < 0.05


def test_written_verdicts(tiny, monkeypatch):
    """The last score in tags counts.

    A verdict without such a score gets the lowest score and is counted as malformed.
    """
    judge = WrittenQuality(*tiny)
    verdicts = ("Good. <score>6</score>", "<score>2</score> no, <score> 3 </score>", "six",
                "<score>8</score>", "")
    assert [judge.parse(v) for v in verdicts] == [6, 3, None, None, None]
    verdicts, asked = iter(["<score>7</score>", "it is fine", "<score>3</score>"]), []

    def sample_all(model, prompts, group, max_new_tokens, temperature):
        assert (model, group, max_new_tokens, temperature) == (judge.model, 1, 160, 0)
        asked.extend(prompts)
        return [[next(verdicts)] for _ in prompts]
    with monkeypatch.context() as patch:
        patch.setattr(rewards, "sample_all", sample_all)
        patch.setattr(judge.tokenizer, "decode", lambda ids: ids)
        scores = judge(["q", "p"], [["a", "b"], ["c", "c"]])
    text = f"{rewards.RUBRIC} {rewards.WRITTEN}\n\nQuery:\np\n\nAnswer:\nc"
    # What does not fit the judge's context with its verdict is cut from behind, as here.
    message = [{"role": "user", "content": text}]
    assert asked[2:] == [judge.tokenizer.chat(message, room=512 - 160)]
    assert len(judge.tokenizer.chat(message)) > 512 - 160 == len(asked[2])
    assert torch.allclose(scores, torch.tensor([[1.0, 0.0], [3 / 7, 3 / 7]]))
    assert judge.figures == {"malformed": pytest.approx(1 / 3)}


def test_the_real_rubric_on_another_tokenizer(tmp_path):
    """A model that does not speak the embedded language is asked in plain words, in one user turn.

    Its score is the expected digit, too.
    """
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}"
    tokenizer = llama3_tokenizer(tmp_path, template)
    torch.manual_seed(0)
    model = random_llama(vocab_size=128256, max_position_embeddings=512)
    score = QualityReward(model, tokenizer)(["What is 2 + 2?"], [["4", "five"]])
    text = (f"{rewards.RUBRIC} {rewards.EXPECTED}\n\n"
            "Query:\nWhat is 2 + 2?\n\nAnswer:\nfive")
    ids = tokenizer.chat([{"role": "user", "content": text}])
    digits = [tokenizer.encode(str(d))[0] for d in range(8)]
    with torch.no_grad():
        p = model.logits(torch.tensor([ids]))[0, -1, digits].softmax(-1)
    expected = ((p * torch.arange(8)).sum() / 7).item()
    assert score[0, 1].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("spec, is_one", [
    ("org/model", True), ("org/model@v1", True), (str(ROOT / "tiny"), True),
    ("exact", False), ("math", False), ("mine.py:f", False), ("models/mine.py:f", False),
    ("nowhere", False), (str(ROOT / "model.py"), False),
])
def test_what_names_a_reward_model(spec, is_one):
    assert bool(files.reward_models(spec)) == is_one


def test_a_users_referee(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def short(queries, answers):\n"
                    "    return [[-len(a) for a in group] for group in answers]\n")
    scores = judged(load_referee(f"{file}:short"), QUERIES, ANSWERS)
    assert scores.tolist() == [[-6, -6], [-1, -1], [-6, 0]]
    for spec, message in (
        (f"{file}:long", "has no function 'long'"),
        ("none.py:f", "no file or folder 'none.py'"),
        ("exactly", "file.py:function"),
        (str(file), "which function of it"),
    ):
        with pytest.raises(UserError, match=message):
            load_referee(spec)
    file.write_text("def short(:\n")
    with pytest.raises(UserError, match="does not load"):
        load_referee(f"{file}:short")


def test_a_users_referee_is_guarded(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text("import time\ndef f(queries, answers):\n    time.sleep(9)\n"
                    "def g(queries, answers):\n    return 1 / 0\n")
    monkeypatch.setattr(console, "REWARD_SECONDS", 0.05)
    for name, message in (("f", "took longer than 0.05 seconds"), ("g", "mine.py, line 5")):
        with pytest.raises(UserError, match=message):
            judged(load_referee(f"{file}:{name}"), QUERIES, ANSWERS)


@pytest.mark.parametrize("value, message", [
    (torch.zeros(3), r"shape \[3\]"),
    (torch.full((3, 2), float("nan")), "NaN"),
    (torch.full((3, 2), float("inf")), "infinity"),
    ("good", "not numbers"), (None, "not numbers"), ([[1, 2], [3]], "not numbers"),
])
def test_bad_rewards_are_one_line(value, message):
    def referee(queries, answers):
        return value
    with pytest.raises(UserError, match=message):
        judged(referee, QUERIES, ANSWERS)


# --------------------------------------------------------------------------------------------------
# What the group says, and several referees as one

def test_the_majority_of_a_group_is_right():
    """A tie pays nobody. Worked answers are compared by the number that they come to."""
    answers = [["abc", "abd", "abc", ""], ["1 2", "1 3", "1 2", "1 3"],
               ["so it is 7", "7.0 of them", "it is 8", "#### 7"], ["", "", "a", ""]]
    reward = rewards.Majority()
    assert reward(list("qrst"), answers).tolist() == [
        [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 1], [0, 0, 1, 0]]
    # The largest part: 2 of 4, 2 of 4, 3 of 4, 1 of 4.
    assert reward.figures == {"agreeing": 0.5}
    assert reward(["q"], [["x"] * 3]).tolist() == [[1, 1, 1]]
    # Lists of numbers are compared whole, and not by their last number.
    assert reward(["q"], [["1 9", "2 9", "3 9"]]).tolist() == [[0, 0, 0]]


def test_several_rewards_are_summed_with_their_weights(tmp_path):
    (tmp_path / "mine.py").write_text("def short(queries, answers):\n"
                                      "    return [[-len(a) for a in group] for group in answers]\n"
                                      "def known(queries, answers, answer):\n"
                                      "    return [[float(a == k) for a in g]\n"
                                      "            for g, k in zip(answers, answer)]\n")
    both = load_referee(f"exact,{tmp_path}/mine.py:short:0.5")
    assert judged(both, QUERIES, ANSWERS).tolist() == [[1 - 3, -3], [1 - 0.5, -0.5], [-3, 0]]
    assert both.figures == {"reward_exact": pytest.approx(2 / 6),
                            "reward_short": pytest.approx(-20 / 6)}
    assert both.valid(QUERIES) == [True, True, False]
    assert judged(load_referee("exact:2"), QUERIES, ANSWERS)[0].tolist() == [2, 0]
    three = load_referee(f"majority:1e-1,{tmp_path}/mine.py:known")
    scores = judged(three, ["q"], [["3", "3", "4"]], {"answer": ["4"]})
    assert torch.allclose(scores, torch.tensor([[0.1, 0.1, 1.0]]))
    assert three.figures["agreeing"] == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="asks for 'answer'"):
        judged(three, ["q"], [["3"]])
    with pytest.raises(UserError, match="two are called exact"):
        load_referee("exact,exact:2")


def test_how_a_reward_is_spelled():
    assert console.specs("exact") == [("exact", 1.0)]
    assert console.specs("math,a/b.py:f:0.5,org/model:2") == [
        ("math", 1.0), ("a/b.py:f", 0.5), ("org/model", 2.0)]
    assert console.specs("b.py:f") == [("b.py:f", 1.0)]
    assert console.specs("math:1E-1,a.py:f:+1.") == [("math", 0.1), ("a.py:f", 1.0)]
    assert console.specs("a.py:nan") == [("a.py:nan", 1.0)]  # a function of that name
    assert console.specs(None) == []
    for bad in ("math:abc", "math:", "exact:nan", "f.py:f:0", "majority:1e400", "", "math,"):
        with pytest.raises(UserError, match="expected a reward, or reward:weight with a number"):
            console.specs(bad)


def test_held_out_scores_never_ask_the_majority():
    """It would call right whatever it would call right."""
    exact, majority = ExactReward(), rewards.Majority()
    assert rewards.truth_of(exact, True) is exact
    assert isinstance(rewards.truth_of(majority, True), ExactReward)
    assert rewards.truth_of(majority, False) is None
    both = referees.Sum({"majority": (majority, 1.0), "exact": (exact, 0.5)})
    assert rewards.truth_of(both, False) is exact
