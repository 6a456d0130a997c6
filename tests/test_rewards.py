"""The referees: the exact one, the judge, and a user's own."""
import shutil

import pytest
import torch
from conftest import ROOT, SHARED, small_config

import rewards
from evaluate import read_data
from model import Config, Llama, Rollout, Tokenizer, UserError, load
from rewards import ExactReward, MathReward, QualityReward, RewardModel, WrittenQuality, final_answer, judged, load_referee
from tiny import language

QUERIES = ['Take "kobani", reverse it.', "Add 2 and 3.", 'Take "kobani", fly it.']
ANSWERS = [["inabok", "kobani"], ["5", "6"], ["inabok", ""]]


def test_exact_reward():
    assert ExactReward()(QUERIES, ANSWERS).tolist() == [[1, 0], [1, 0], [0, 0]]
    assert ExactReward().valid(QUERIES) == [True, True, False]


def test_quality_is_the_expected_digit_of_a_plain_forward_pass(tiny):
    """R_Q = sum over d of d * p(d | rubric, exchange) / 7: cached rubric and shared query change nothing."""
    model, tokenizer = tiny
    score = QualityReward(model, tokenizer)(QUERIES, ANSWERS)
    digits = [tokenizer.encode(str(d))[0] for d in range(8)]
    for i, (query, group) in enumerate(zip(QUERIES, ANSWERS)):
        for j, answer in enumerate(group):
            ids = tokenizer.chat([{"role": "system", "content": language.JUDGE_PROMPT},
                                  {"role": "user", "content": language.JUDGE_EXCHANGE.format(query=query, answer=answer)}])
            with torch.no_grad():
                p = model.logits(torch.tensor([ids]))[0, -1, digits].softmax(-1)
            assert torch.isclose(score[i, j], (p * torch.arange(8)).sum() / 7, atol=1e-5)


def test_quality_of_equal_answers_and_single_groups(tiny):
    model, tokenizer = tiny
    judge = QualityReward(model, tokenizer)
    same = judge(["Add 2 and 3."], [["5", "5", "5"]])
    assert torch.allclose(same, judge(["Add 2 and 3."], [["5"]]).expand(1, 3), atol=1e-6)


def test_the_committed_judge_tells_good_from_bad(tiny):
    """Right answers over wrong ones, and tasks over nonsense: what the self-reward must do to keep the game sane."""
    model, tokenizer = tiny
    import random
    rng = random.Random(5)
    queries = [language.draw(rng, held_out=True) for _ in range(100)]
    judge = QualityReward(model, tokenizer)
    right = judge(queries, [[language.solve(q)] for q in queries]).mean()
    wrong = judge(queries, [[language.misanswer(q, rng)] for q in queries]).mean()
    nonsense = judge([language.spoil(q, rng) for q in queries], [[language.solve(q)] for q in queries]).mean()
    assert right > wrong + 0.15 and wrong > nonsense + 0.1


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_reward_model_equals_transformers(tmp_path, family):
    """The score at the last real token, for a batch of unequal texts, within 1e-4."""
    transformers = pytest.importorskip("transformers", reason="the peer library transformers is not installed")
    torch.manual_seed(0)
    tokenizer = load(ROOT / "tiny")[1]
    settings = small_config(model_type=family, vocab_size=200, max_position_embeddings=128, initializer_range=0.3, num_labels=1)
    settings.pop("architectures")
    peer = transformers.AutoModelForSequenceClassification.from_config(transformers.AutoConfig.for_model(**settings)).eval()
    peer.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "tiny" / name, tmp_path)
    scores = RewardModel(tmp_path)(QUERIES, ANSWERS)
    assert scores.shape == (3, 2) and scores.std() > 0.01
    for query, group, row in zip(QUERIES, ANSWERS, scores):
        for answer, score in zip(group, row):
            ids = tokenizer.chat([{"role": "user", "content": query}, {"role": "assistant", "content": answer}], add_generation_prompt=False)
            with torch.no_grad():
                assert peer(torch.tensor([ids])).logits.item() == pytest.approx(score.item(), abs=1e-4)
    assert judged(load_referee(str(tmp_path)), QUERIES, ANSWERS).tolist() == scores.tolist()


def test_a_model_without_a_score_head_is_refused():
    with pytest.raises(UserError, match="no reward model"):
        load_referee(str(ROOT / "tiny"))


@pytest.mark.parametrize("text, value", [
    ("It is 3 + 4 = 7.", "7"), ("So she makes $1,234.50", "2469/2"), ("#### 18", "18"), ("1 and 2\n#### -1,000\n", "-1000"), ("\\boxed{12} or 13", "12"),
    ("\\boxed{1} \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), ("\\boxed{ \\$5.0 }", "5"), ("\\boxed{3/4}", "3/4"), ("I do not know", None), ("", None), ("7.0", "7"),
    ("\\boxed{3", "3"), ("#### 18 dollars", "18"), ("#### **18**", "18"), ("#### 42\nLet me know!", "42"), ("it is .5", "1/2"), ("9" * 5000, "9" * 5000)])
def test_final_answer(text, value):
    assert final_answer(text) == value


def test_math_reward():
    question = [{"role": "user", "content": "How many?"}]
    reward = MathReward([(question, "6 * 3 = <<6*3=18>>18\n#### 18")])
    assert reward(["How many?"], [["18", "there are 18.00 of them", "17", "18 eggs, no: 19"]]).tolist() == [[1, 1, 0, 0]]
    for unclear in ("many", "3/4 of them", "first 3, then 4", "#### none"):  # a wrong truth would be worse than none
        with pytest.raises(UserError, match="known answer to 'How many"):
            MathReward([(question, unclear)])


def test_math_reward_on_gsm8k():
    """Every published answer is right against itself, and wrong against its neighbour's, nearly always."""
    path = SHARED / "gsm8k" / "test.jsonl"
    if not path.is_file():
        pytest.skip("GSM8K is not at hand (../shared/data)")
    data = read_data(path)
    queries, answers = [m[-1]["content"] for m, _ in data], [a for _, a in data]
    reward = MathReward(data)
    assert reward(queries, [[a] for a in answers]).mean() == 1
    assert reward(queries, [[a] for a in answers[1:] + answers[:1]]).mean() < 0.05


def test_written_verdicts(tiny, monkeypatch):
    """The last score in tags counts; a verdict without one gets the lowest score, and is counted."""
    judge = WrittenQuality(*tiny)
    assert [judge.parse(v) for v in ("Good. <score>6</score>", "<score>2</score> no, <score> 3 </score>", "six", "<score>8</score>", "")] == [6, 3, None, None, None]
    verdicts = iter(["<score>7</score>", "it is fine", "<score>3</score>"])
    monkeypatch.setattr(rewards, "generate", lambda model, prompts, *rest: Rollout([next(verdicts) for _ in prompts], None, None))
    monkeypatch.setattr(judge.tokenizer, "decode", lambda ids: ids)
    assert torch.allclose(judge(["q", "p"], [["a", "b"], ["c", "c"]]), torch.tensor([[1.0, 0.0], [3 / 7, 3 / 7]]))
    assert judge.malformed == pytest.approx(1 / 3)


def test_the_real_rubric_on_another_tokenizer(tmp_path):
    """A model that does not speak the embedded language is asked in plain words, in one user turn: the expected digit again."""
    if not (SHARED / "llama3_tokenizer").is_dir():
        pytest.skip("Llama 3's vocabulary is not at hand (../shared/data)")
    shutil.copy(SHARED / "llama3_tokenizer" / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}", "bos_token": "<|begin_of_text|>"}')
    tokenizer = Tokenizer(tmp_path)
    raw = small_config(vocab_size=128256, max_position_embeddings=512)
    torch.manual_seed(0)
    model = Llama(Config.from_json(raw), raw)
    score = QualityReward(model, tokenizer)(["What is 2 + 2?"], [["4", "five"]])
    ids = tokenizer.chat([{"role": "user", "content": f"{rewards.RUBRIC} {rewards.EXPECTED}\n\nQuery:\nWhat is 2 + 2?\n\nAnswer:\nfive"}])
    with torch.no_grad():
        p = model.logits(torch.tensor([ids]))[0, -1, [tokenizer.encode(str(d))[0] for d in range(8)]].softmax(-1)
    assert score[0, 1].item() == pytest.approx(((p * torch.arange(8)).sum() / 7).item(), abs=1e-5)


def test_a_users_referee(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def short(queries, answers):\n    return [[-len(a) for a in group] for group in answers]\n")
    assert judged(load_referee(f"{file}:short"), QUERIES, ANSWERS).tolist() == [[-6, -6], [-1, -1], [-6, 0]]
    for spec, message in ((f"{file}:long", "has no function 'long'"), ("none.py:f", "no file or folder 'none.py'"), ("exactly", "file.py:function"), (str(file), "which function of it")):
        with pytest.raises(UserError, match=message):
            load_referee(spec)
    file.write_text("def short(:\n")
    with pytest.raises(UserError, match="does not load"):
        load_referee(f"{file}:short")


@pytest.mark.parametrize("value, message", [
    (torch.zeros(3), r"shape \[3\]"), (torch.full((3, 2), float("nan")), "NaN"), (torch.full((3, 2), float("inf")), "infinity"),
    ("good", "not numbers"), (None, "not numbers"), ([[1, 2], [3]], "not numbers")])
def test_bad_rewards_are_one_line(value, message):
    def referee(queries, answers):
        return value
    with pytest.raises(UserError, match=message):
        judged(referee, QUERIES, ANSWERS)
