"""The referees: who says what an answer is worth.

A referee is any callable (queries, answers) -> rewards:
    queries    N texts
    answers    N lists of G texts
    rewards    [N, G], a finite number for each answer; higher is better

    ExactReward     1 for the right answer in the embedded language, else 0
    MathReward      the same for questions whose answers are known numbers
    RewardModel     a trained reward model, in Hugging Face layout
    QualityReward   LSP's self-reward R_Q: the frozen reference model as a judge
    WrittenQuality  the same as the paper asks for it: a verdict in words, with a score in tags
    your own        one function in one file: --reward file.py:function

The judge grades on a rubric of 7 points. Both quality rewards return its grade divided by 7, so
they lie between 0 and 1.
"""
import re
from fractions import Fraction
from os.path import commonprefix
from pathlib import Path

import torch
import torch.nn.functional as F

from model import load, pack, sample_all, states
from support import console, files, machine
from tiny import language

# The rubric for a model that does not speak the embedded language: LSP's seven additive points.
RUBRIC = """Grade an exchange between a user and an assistant from 0 to 7. \
Give one point for each of these that holds:
1. It can be told from the query what task is asked for.
2. The query is clear, specific and well formed.
3. The answer can be understood.
4. The answer covers a significant part of what was asked.
5. The answer gives the user what is at the core of the query, in a useful way.
6. The answer is clear, concise and well organised.
7. The answer is likely to please the user."""
EXPECTED = "Reply with the number of points alone, one digit."
WRITTEN = ("Justify your grade in at most three sentences, then end with the number of points as "
           "<score>n</score>.")
EXCHANGE = "Query:\n{query}\n\nAnswer:\n{answer}"
NUMBER = r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"


# --------------------------------------------------------------------------------------------------
# Known answers

class ExactReward:
    """1 for the right answer to a well-formed instruction of the embedded language, else 0.

    A query that has no right answer gives 0, whatever is answered.
    """

    def __init__(self, longest=3):
        """longest: how many operations a chain may have."""
        self.longest = longest

    def __call__(self, queries, answers):
        """R [N, G] of N texts and N lists of G texts."""
        right = [language.solve(query, self.longest) for query in queries]
        return torch.tensor([[float(known is not None and answer == known) for answer in group]
                             for known, group in zip(right, answers)])

    def valid(self, queries):
        """Which queries have a right answer, [N] of bool. A referee may lack this method."""
        return [language.solve(query, self.longest) is not None for query in queries]


class MathReward:
    """1 where an answer comes to the same as the known one, else 0. For questions as in GSM8K."""

    def __init__(self, data):
        """data: [(messages, answer)]. Raises UserError where a known answer is not clear."""
        self.known = {}
        for messages, answer in data:
            question = messages[-1]["content"]
            self.known[question] = final_answer(answer)
            marked = "####" in answer or "\\boxed{" in answer
            plain = marked or re.fullmatch(r"\$?-?[\d,]*\.?\d+", answer.strip())
            if not plain or self.known[question] is None:
                raise console.UserError(f"--reward math: the known answer to {question[:60]!r} is "
                                        "neither a number nor marked by #### or \\boxed{}")

    def __call__(self, queries, answers):
        """R [N, G] of N texts and N lists of G texts."""
        return torch.tensor([[float(final_answer(answer) == self.known[query]) for answer in group]
                             for query, group in zip(queries, answers)])


def final_answer(text):
    """What a worked answer comes to, as a text, or None.

    That is its last boxed expression, or what follows its last ####, or else its last number.
    It is meant for numbers, as in GSM8K: $1,234.50 and 1234.5 are the same, and words beside a
    marked number do not count. A longer expression is compared as it stands, without spaces.
    """
    if "\\boxed{" in text:
        text = "".join(boxed(text).replace("\\$", "$").split())
        # A number, perhaps with a sign of money or a unit.
        if re.fullmatch(rf"[^\\\d.-]*{NUMBER}[^\\\d/^]*", text):
            text = re.search(NUMBER, text)[0]
    elif "####" in text:
        marked = text.rpartition("####")[2].strip().split("\n")[0]
        text = (re.findall(NUMBER, marked) or [""])[0]
    else:
        text = (re.findall(NUMBER, text) or [""])[-1]
    plain = text.replace(",", "")
    if re.fullmatch(NUMBER, text) and len(plain) < 100:
        return str(Fraction(plain))
    return text or None


def boxed(text):
    """What the last \\boxed{..} of a text holds; up to the text's end where it is not closed."""
    inside = text[text.rindex("\\boxed{") + len("\\boxed{"):]
    depth = 1
    for i, letter in enumerate(inside):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return inside[:i]
    return inside


# --------------------------------------------------------------------------------------------------
# Models as referees

def last_states(model, rows):
    """The hidden state at the end of every text, [texts, D].

    rows: N groups of texts, as lists of ids. What a group's texts begin with is computed once.
    """
    prompts, rests = [], []
    for group in rows:
        shared = min(len(commonprefix(group)), min(map(len, group)) - 1)
        prompts.append(group[0][:shared])
        # `states` gives the state before each token: an id added at the end makes it the last one.
        rests.append([row[shared:] + [0] for row in group])
    out = model.embed.weight.new_zeros(sum(map(len, rows)), model.config.hidden_size)
    for packed in pack(prompts, rests, device=out.device):
        last = F.pad(packed.owner[1:] != packed.owner[:-1], (0, 1), value=True)  # the added ids
        out[packed.owner[last]] = states(model, packed)[last]
    return out


def each_once(grade, answers):
    """Grades [N, G] of all answers, where equal answers of a group are graded once.

    grade: a function of the different answers of each group, N lists; its grades stand in one row.
    """
    different = [list(dict.fromkeys(group)) for group in answers]
    grades = iter(grade(different).tolist())
    known = [{answer: next(grades) for answer in group} for group in different]
    return torch.tensor([[own[answer] for answer in group] for own, group in zip(known, answers)])


class RewardModel:
    """A trained reward model: a sequence classifier with one label, such as Skywork-Reward-V2.

    The reward is read at the last token of the conversation, as its own chat template writes it.
    """

    def __init__(self, name, device="cpu", dtype=torch.float32):
        """name: folder or hub name. Raises UserError for a model without a score head."""
        self.model, self.tokenizer = load(name, device, dtype)
        if not self.model.config.score_head:
            raise console.UserError(f"{name} is no reward model: its architecture is not "
                                    "..ForSequenceClassification")

    @torch.no_grad()
    def __call__(self, queries, answers):
        """R [N, G] of N texts and N lists of G texts."""
        def grade(different):
            rows = [[self._ids(query, answer) for answer in group]
                    for query, group in zip(queries, different)]
            return self.model.score_head(last_states(self.model, rows))[:, 0].float()
        with machine.resident(self.model):
            return each_once(grade, answers)

    def _ids(self, query, answer):
        messages = [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]
        return self.tokenizer.chat(messages, add_generation_prompt=False)


class QualityReward:
    """The quality self-reward R_Q of LSP (arXiv 2509.07414): the reference grades an exchange.

    The paper samples one written verdict. Here R_Q is the expected grade over the digits 0 to 7,
    from one forward pass: no noise, nothing to parse, no malformed score.
    """

    def __init__(self, reference, tokenizer):
        """reference: the frozen judge. Raises UserError where a digit is not a single token."""
        self.model, self.tokenizer = reference, tokenizer
        self.speaks = language.spoken_by(tokenizer)  # then it learnt the embedded language's rubric
        digits = [tokenizer.encode(str(d)) for d in range(8)]
        if any(len(ids) != 1 for ids in digits):
            raise console.UserError("this model's tokenizer has no single token for each digit 0 "
                                    "to 7, which the judge needs")
        self.digits = torch.tensor([ids[0] for ids in digits], device=reference.cos.device)  # [8]

    @torch.no_grad()
    def __call__(self, queries, answers):
        """R_Q [N, G], 0 to 1, of N texts and N lists of G texts."""
        def grade(different):
            rows = [[self._ids(query, answer) for answer in group]
                    for query, group in zip(queries, different)]
            hidden = last_states(self.model, rows)  # [different answers, D]
            # Among the digits alone, [different answers, 8].
            p = F.linear(hidden, self.model.head[self.digits]).float().softmax(-1)
            return p @ torch.arange(8.0, device=p.device)
        with machine.resident(self.model):
            return each_once(grade, answers) / 7

    def _ids(self, query, answer):
        if self.speaks:
            exchange = language.JUDGE_EXCHANGE.format(query=query, answer=answer)
            return self.tokenizer.chat([{"role": "system", "content": language.JUDGE_PROMPT},
                                        {"role": "user", "content": exchange}])
        # One user turn: not every template knows a system message.
        exchange = EXCHANGE.format(query=query, answer=answer)
        return self.tokenizer.chat([
            {"role": "user", "content": f"{RUBRIC} {EXPECTED}\n\n{exchange}"}])


class WrittenQuality:
    """R_Q as the paper asks for it: the reference justifies its grade, then writes it in tags.

    A verdict without a grade counts as 0 points. malformed: the share of those in the last call.
    """

    def __init__(self, reference, tokenizer, max_new_tokens=160):
        """reference: the frozen judge, which answers greedily."""
        self.model, self.tokenizer, self.max_new_tokens = reference, tokenizer, max_new_tokens
        self.malformed = 0.0

    def __call__(self, queries, answers):
        """R_Q [N, G], 0 to 1, of N texts and N lists of G texts."""
        def grade(different):
            exchanges = [EXCHANGE.format(query=query, answer=answer)
                         for query, group in zip(queries, different) for answer in group]
            grades = [self.parse(verdict) for verdict in self._verdicts(exchanges)]
            self.malformed = grades.count(None) / len(grades)
            return torch.tensor([float(grade or 0) for grade in grades])
        with machine.resident(self.model):
            return each_once(grade, answers) / 7

    def _verdicts(self, exchanges):
        prompts = [self.tokenizer.chat([
            {"role": "user", "content": f"{RUBRIC} {WRITTEN}\n\n{text}"}]) for text in exchanges]
        found = sample_all(self.model, prompts, 1, self.max_new_tokens, 0)
        return [self.tokenizer.decode(ids) for ids, in found]

    @staticmethod
    def parse(verdict):
        """The last grade between tags, 0 to 7; None for a verdict without one."""
        grades = re.findall(r"<score>\s*([0-7])\s*</score>", verdict)
        return int(grades[-1]) if grades else None


# --------------------------------------------------------------------------------------------------
# Which referee

def names_model(spec):
    """Does --reward name a reward model, a folder or a hub name?"""
    return ":" not in spec and (Path(spec).is_dir() or files.is_hub_name(spec))


def load_referee(spec, device="cpu", data=None, dtype=torch.float32):
    """The referee that --reward names. Raises UserError.

    spec: "exact", "math" (against data's known answers), "file.py:function", or a reward model's
    folder or hub name. A file's code is run: name only files that you trust.
    """
    if spec == "exact":
        return ExactReward()
    if spec == "math":
        return MathReward(data)
    if names_model(spec):
        return RewardModel(spec, device, dtype)
    path, _, name = spec.rpartition(":")
    if not path and Path(spec).is_file():
        raise console.UserError(f"--reward {spec}: which function of it? Write {spec}:function")
    if not path or not Path(path).is_file():
        raise console.UserError(f"--reward {spec}: expected exact, file.py:function or a reward "
                                f"model, and no file or folder {(path or spec)!r} is here")
    return console.guarded(console.load_function(path, name, f"--reward {spec}"))


def judged(referee, queries, answers):
    """A referee's rewards as float32 [N, G] on the CPU.

    Raises UserError for a wrong shape, NaN or infinity.
    """
    name = getattr(referee, "__name__", type(referee).__name__)
    rewards, shape = referee(queries, answers), [len(queries), len(answers[0])]
    try:
        rewards = torch.as_tensor(rewards, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise console.UserError(f"the reward {name} returned {type(rewards).__name__}, not "
                                f"numbers of shape {shape}") from None
    if list(rewards.shape) != shape:
        raise console.UserError(f"the reward {name} returned shape {list(rewards.shape)}; expected "
                                f"one number an answer, {shape}")
    if not rewards.isfinite().all():
        raise console.UserError(f"the reward {name} returned NaN or infinity")
    return rewards
