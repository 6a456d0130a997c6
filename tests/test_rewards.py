"""The referees: the exact one, the judge, and a user's own."""
import shutil

import pytest
import torch
from conftest import ROOT, small_config

from model import UserError, load
from rewards import ExactReward, QualityReward, RewardModel, judged, load_referee
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


def test_a_users_referee(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def short(queries, answers):\n    return [[-len(a) for a in group] for group in answers]\n")
    assert judged(load_referee(f"{file}:short"), QUERIES, ANSWERS).tolist() == [[-6, -6], [-1, -1], [-6, 0]]
    for spec, message in ((f"{file}:long", "has no function 'long'"), ("none.py:f", "no file or folder 'none.py'"), ("exactly", "file.py:function")):
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
