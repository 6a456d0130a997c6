"""The referees: who says what an answer is worth.

A referee is any callable (queries, answers) -> rewards:
    queries    N texts
    answers    N lists of G texts
    rewards    [N, G], a finite number for each answer; higher is better
It may ask for more by the names of its other parameters:
    messages   N conversations, each with its query as the last message
    answer     N known answers, those that --data has; no two questions are mixed up

    ExactReward     1 for the right answer in the embedded language, else 0
    MathReward      the same for questions whose answers are known numbers
    Majority        1 for what most answers of the group come to: no truth is needed
    RewardModel     a trained reward model, in Hugging Face layout
    QualityReward   LSP's self-reward R_Q: the frozen reference model as a judge
    WrittenQuality  the same as the paper asks for it: a verdict in words, with a score in tags
    your own        one function in one file: --reward file.py:function

The judge grades on a rubric of 7 points. Both quality rewards return its grade divided by 7, so
they lie between 0 and 1.
"""
import re
from collections import Counter
from itertools import groupby
from os.path import commonprefix
from pathlib import Path

import torch
import torch.nn.functional as F

from model import load, pack, sample_all, states
from support import console, files, machine, referees, worked
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
    """1 where an answer comes to the same as the known one, else 0. For questions as in GSM8K.

    Plain numbers are compared exactly, other answers by math-verify, where that is installed. See
    support/worked.py. figures["unreadable"]: the share of answers in the last call that came to
    nothing clear.
    """

    def __init__(self):
        """Says who judges."""
        self.figures = {}
        console.note(f"--reward math: {worked.judges()}")

    def __call__(self, queries, answers, answer):
        """R [N, G] of N texts and N lists of G texts. answer: the N known ones.

        Raises UserError for a known answer that is not clear. (data.measured finds them before.)
        """
        known = [worked.final_answer(text) for text in answer]
        if None in known:
            raise console.UserError("--reward math: a known answer is not clear: "
                                    f"{answer[known.index(None)][:60]!r}")
        found = [[worked.final_answer(text) for text in group] for group in answers]
        every = [given for group in found for given in group]
        self.figures = {"unreadable": every.count(None) / max(1, len(every))}
        return torch.tensor([[float(worked.same(right, given)) for given in group]
                             for right, group in zip(known, found)])


class Majority:
    """1 where an answer comes to the same as most of its group, else 0 (TTRL, arXiv 2504.16084).

    Where two are equally frequent, nobody is paid. It needs no truth and knows none: a group that
    is surely wrong is paid for it. figures["agreeing"]: the share of answers in the largest part.
    """

    def __init__(self):
        self.figures = {}

    def __call__(self, queries, answers):
        """R [N, G] of N texts and N lists of G texts."""
        rewards, largest = [], 0
        for group in answers:
            ends = [self.comes_to(text) for text in group]
            (first, n), *others = Counter(end for end in ends if end).most_common(2) or [(None, 0)]
            tie = bool(others) and others[0][1] == n
            rewards.append([float(end == first and not tie) if end else 0.0 for end in ends])
            largest += n / len(group)
        self.figures = {"agreeing": largest / len(answers)}
        return torch.tensor(rewards)

    @staticmethod
    def comes_to(text):
        """What two answers are compared by: the number that words come to, or the whole text."""
        words = re.search("[A-Za-z]{2}|####", text)
        return (words and worked.final_answer(text)) or " ".join(text.split())


# --------------------------------------------------------------------------------------------------
# Models as referees

def last_states(model, texts, tokens=4096):
    """The hidden state at the end of every text, [texts, D].

    texts: lists of ids. What they begin with alike is computed once. (A prompt must have a token,
    so it is for neighbours with the same first id. Mostly those are all.) tokens: of a micro-batch.
    """
    prompts, rests = [], []
    for group in ([*texts] for _, texts in groupby(texts, key=lambda text: text[0])):
        shared = len(commonprefix(group))
        prompts.append(group[0][:shared])
        # `states` gives the state before each token: an id added at the end makes it the last one.
        rests.append([text[shared:] + [0] for text in group])
    packs = pack(prompts, rests, tokens, model.embed.weight.device)
    out = model.embed.weight.new_zeros(len(texts) + 1, model.config.hidden_size)
    for packed in packs:
        last = F.pad(packed.owner[1:] != packed.owner[:-1], (0, 1), value=True)  # the added ids
        # All other states go into one row too many. To pick out the last ones with a boolean index
        # would be to wait for the device.
        out[packed.owner.where(last, len(texts))] = states(model, packed)
    return out[:-1]


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

    def __init__(self, name, device="cpu", dtype=torch.float32, template=(), micro_batch=4096):
        """name: folder or hub name. Raises UserError for a model without a score head.

        template: model.load's date and variables.
        """
        self.model, self.tokenizer = load(name, device, dtype, *template)
        self.micro_batch = micro_batch
        if not self.model.config.score_head:
            raise console.UserError(f"{name} is no reward model: its architecture is not "
                                    "..ForSequenceClassification")

    @torch.no_grad()
    def __call__(self, queries, answers, messages=None):
        """R [N, G] of N texts and N lists of G texts.

        messages: the N conversations that were answered, where there is more than the query.
        """
        asked = messages or [[{"role": "user", "content": query}] for query in queries]

        def grade(different):
            texts = [self.ids(conversation, answer)
                     for conversation, group in zip(asked, different) for answer in group]
            hidden = last_states(self.model, texts, self.micro_batch)
            return self.model.score_head(hidden)[:, 0].float()
        with machine.resident(self.model):
            return each_once(grade, answers)

    def ids(self, messages, answer):
        """A conversation and its answer. What is too long for the model is cut from behind."""
        ids = self.tokenizer.chat([*messages, {"role": "assistant", "content": answer}],
                                  add_generation_prompt=False, room=self.model.config.context)
        pad = self.model.raw.get("pad_token_id")  # transformers reads the last id that is no pad
        while len(ids) > 1 and ids[-1] == pad:
            ids.pop()
        return ids


class QualityReward:
    """The quality self-reward R_Q of LSP (arXiv 2509.07414): the reference grades an exchange.

    The paper samples one written verdict. Here R_Q is the expected grade over the digits 0 to 7,
    from one forward pass: no noise, nothing to parse, no malformed score.
    """

    def __init__(self, reference, tokenizer, micro_batch=512):
        """reference: the frozen judge. Raises UserError where a digit is not a single token."""
        self.model, self.tokenizer, self.micro_batch = reference, tokenizer, micro_batch
        self.speaks = language.spoken_by(tokenizer)  # then it learnt the embedded language's rubric
        question = [{"role": "user", "content": "How many points?"}]
        # lead: what a template or a tokenizer puts between a prompt and the digit; mostly nothing.
        self.lead, digits = tokenizer.choices(question, "01234567")
        self.digits = torch.tensor(digits, device=reference.cos.device)  # [8]

    def __call__(self, queries, answers):
        """R_Q [N, G], 0 to 1, of N texts and N lists of G texts."""
        def grade(different):
            p = self.chances(queries, different)
            return p @ torch.arange(8.0, device=p.device)
        return each_once(grade, answers) / 7

    @torch.no_grad()
    def chances(self, queries, answers):
        """p [n, 8] of n answers in all: how probable each grade is, among the digits alone.

        queries: N texts. answers: N lists of texts, of any lengths.
        """
        texts = [self.ids(query, answer)
                 for query, group in zip(queries, answers) for answer in group]
        with machine.resident(self.model):
            hidden = last_states(self.model, texts, self.micro_batch)  # [n, D]
            return F.linear(hidden, self.model.head[self.digits]).float().softmax(-1)

    def ids(self, query, answer):
        """What the judge is asked about an exchange. What is too long is cut from behind."""
        if self.speaks:
            exchange = language.JUDGE_EXCHANGE.format(query=query, answer=answer)
            asked = [{"role": "system", "content": language.JUDGE_PROMPT},
                     {"role": "user", "content": exchange}]
        else:  # one user turn: not every template knows a system message
            exchange = EXCHANGE.format(query=query, answer=answer)
            asked = [{"role": "user", "content": f"{RUBRIC} {EXPECTED}\n\n{exchange}"}]
        room = self.model.config.context - len(self.lead)
        return self.tokenizer.chat(asked, room=room) + self.lead


class WrittenQuality:
    """R_Q as the paper asks for it: the reference justifies its grade, then writes it in tags.

    A verdict without a grade counts as 0 points. figures["malformed"]: the share of those in the
    last call.
    """

    def __init__(self, reference, tokenizer, max_new_tokens=160):
        """reference: the frozen judge, which answers greedily."""
        self.model, self.tokenizer, self.max_new_tokens = reference, tokenizer, max_new_tokens
        self.figures = {}

    def __call__(self, queries, answers):
        """R_Q [N, G], 0 to 1, of N texts and N lists of G texts."""
        def grade(different):
            prompts = [self.ids(query, answer)
                       for query, group in zip(queries, different) for answer in group]
            found = sample_all(self.model, prompts, 1, self.max_new_tokens, 0)
            verdicts = [self.tokenizer.decode(ids) for ids, in found]
            grades = [self.parse(self.tokenizer.spoken(text)) for text in verdicts]
            self.figures = {"malformed": grades.count(None) / len(grades)}
            return torch.tensor([float(grade or 0) for grade in grades])
        with machine.resident(self.model):
            return each_once(grade, answers) / 7

    def ids(self, query, answer):
        """What the judge is asked about an exchange. What is too long is cut from behind."""
        text = f"{RUBRIC} {WRITTEN}\n\n" + EXCHANGE.format(query=query, answer=answer)
        room = self.model.config.context - self.max_new_tokens
        return self.tokenizer.chat([{"role": "user", "content": text}], room=room)

    @staticmethod
    def parse(verdict):
        """The last grade between tags, 0 to 7; None for a verdict without one."""
        grades = re.findall(r"<score>\s*([0-7])\s*</score>", verdict)
        return int(grades[-1]) if grades else None


# --------------------------------------------------------------------------------------------------
# Which referee

def truth_of(referee, embedded, rows=None):
    """The referee for held-out scores: without a Majority, which would call itself right.

    embedded: are the questions the embedded language's? rows: of the questions, with answers that
    may serve as the truth. None where nothing is left.
    """
    parts = getattr(referee, "parts", {"": (referee, 1.0)})
    left = {name: part for name, part in parts.items() if not isinstance(part[0], Majority)}
    if not left and embedded:
        return ExactReward()
    if not left:
        known = rows and all(row.answer and not worked.unclear(row.answer) for row in rows)
        return MathReward() if known else None
    (alone, _), *others = left.values()
    return referees.Sum(left) if others else alone


def load_referee(rewards, device="cpu", dtype=torch.float32, template=(), tokens=4096):
    """The referee that --reward names. Raises UserError.

    rewards: "exact", "math" (against known answers), "majority", "file.py:function", or a
    reward model's folder or hub name; or several, see console.specs. A file's code is run: name
    only files that you trust. template, tokens: a RewardModel's template and micro_batch.
    """
    def load_one(spec):
        if spec == "exact":
            return ExactReward()
        if spec == "math":
            return MathReward()
        if spec == "majority":
            return Majority()
        if files.reward_models(spec):
            return RewardModel(spec, device, dtype, template, tokens)
        return console.users_function(
            spec, "--reward", "reward", "exact, math, majority, file.py:function or a reward model")
    parts = {}
    for spec, weight in console.specs(rewards):
        name = Path(spec).name.rpartition(":")[2]
        if name in parts:
            raise console.UserError(f"--reward: two are called {name}")
        parts[name] = load_one(spec), weight
    (alone, weight), *others = parts.values()
    return referees.Sum(parts) if others or weight != 1 else alone
