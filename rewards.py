"""The referees: who says what an answer is worth.

A referee is any callable (queries, answers) -> Tensor [N, G]:
    queries: list of N texts; answers: N lists of G texts; result: a finite number for each answer, higher is better.

    ExactReward     the embedded language's own solver: 1 for the right answer, else 0
    MathReward      the same for questions whose answers are known numbers
    RewardModel     a trained reward model, any folder or hub name in Hugging Face layout
    QualityReward   LSP's self-reward: the frozen reference model as a judge, on the rubric's scale of 0 to 7
    WrittenQuality  the same as the paper asks for it: a verdict in words, with a score in tags
    load_referee    yours: `--reward file.py:function`

PairJudge, which compares two answers, is for evaluation alone.
"""
import copy
import functools
import importlib.util
import re
import traceback
from fractions import Fraction
from os.path import commonprefix
from pathlib import Path

import torch
import torch.nn.functional as F

from model import KVCache, UserError, generate, is_hub_name, load, one_line, pack, resident, states, time_limit
from tiny import language


# The judge's rubric for a model that does not speak the embedded language: LSP's seven additive points, in our words.
RUBRIC = """Grade an exchange between a user and an assistant from 0 to 7. Give one point for each of these that holds:
1. It can be told from the query what task is asked for.
2. The query is clear, specific and well formed.
3. The answer can be understood.
4. The answer covers a significant part of what was asked.
5. The answer gives the user what is at the core of the query, in a useful way.
6. The answer is clear, concise and well organised.
7. The answer is likely to please the user."""
EXPECTED = "Reply with the number of points alone, one digit."
WRITTEN = "Justify your grade in at most three sentences, then end with the number of points as <score>n</score>."
EXCHANGE = "Query:\n{query}\n\nAnswer:\n{answer}"


class ExactReward:
    """1 for the right answer to a well-formed instruction of the embedded language, else 0.

    A query with no right answer pays 0, whatever is answered.
    """

    def __init__(self, longest=3):
        """longest: steps that a chain may have."""
        self.longest = longest

    def __call__(self, queries, answers):
        right = [language.solve(q, self.longest) for q in queries]
        return torch.tensor([[float(r is not None and a == r) for a in group] for r, group in zip(right, answers)])

    def valid(self, queries):
        """Which queries have a right answer, [N] of bool. A referee without this method leaves that figure out."""
        return [language.solve(q, self.longest) is not None for q in queries]


def last_states(model, rows, prefix=None, length=0):
    """The hidden state at the end of every text, [texts, D]. rows: N groups of lists of ids; what a group shares is computed once.

    prefix, length: a KVCache of one row whose first `length` positions are the first ids of every text.
    """
    prompts, rests = [], []
    for group in rows:
        # The texts' common part is their prompt; a stand-in id after each makes the last state a scored one.
        shared = min(len(commonprefix(group)), min(map(len, group)) - 1)
        prompts.append(group[0][length:shared])
        rests.append([row[shared:] + [0] for row in group])
    if prefix is not None:
        prefix = copy.copy(prefix)
        prefix.length = length
    out = model.embed.weight.new_zeros(sum(map(len, rows)), model.config.hidden_size)
    for packed in pack(prompts, rests, device=out.device):
        last = F.pad(packed.owner[1:] != packed.owner[:-1], (0, 1), value=True)  # each text's stand-in
        out[packed.owner[last]] = states(model, packed, prefix)[last]
    return out


def each_once(score, answers):
    """score([different answers of each group]) -> their scores, one after the other; here for all, equal ones alike: [N, G]."""
    different = [list(dict.fromkeys(group)) for group in answers]
    scores = iter(score(different).tolist())
    of = [{answer: next(scores) for answer in group} for group in different]
    return torch.tensor([[known[answer] for answer in group] for known, group in zip(of, answers)])


def final_answer(text):
    """What a worked answer comes to: its last boxed expression, or what follows its last ####, or else its last number; or None.

    Meant for numbers, as in GSM8K: $1,234.50 and 1234.5 are the same, and words beside a marked number do not count. An
    expression that is more than a number is compared as it stands, without spaces.
    """
    number = r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
    if "\\boxed{" in text:
        text = text[text.rindex("\\boxed{") + len("\\boxed{"):]
        depth, end = 1, 0
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        text = "".join(text[:end - (depth == 0)].replace("\\$", "$").split())
        if re.fullmatch(rf"[^\\\d.-]*{number}[^\\\d/^]*", text):  # a number, perhaps with a sign of money or a unit
            text = re.search(number, text)[0]
    else:
        marked = "####" in text
        text = text.rpartition("####")[2].strip().split("\n")[0] if marked else text
        text = (re.findall(number, text) or [""])[0 if marked else -1]
    plain = text.replace(",", "")
    return str(Fraction(plain)) if re.fullmatch(number, text) and len(plain) < 100 else text or None


class MathReward:
    """1 where an answer comes to the same as the known one, else 0: for GRPO on questions with answers, as in GSM8K."""

    def __init__(self, data):
        """data: [(messages, answer)]. Raises UserError for a known answer of which it is not plain what it comes to."""
        self.known = {messages[-1]["content"]: final_answer(answer) for messages, answer in data}
        for messages, answer in data:
            plain = "####" in answer or "\\boxed{" in answer or re.fullmatch(r"\$?-?[\d,]*\.?\d+", answer.strip())
            if not plain or self.known[messages[-1]["content"]] is None:
                raise UserError(f"--reward math: the known answer to {messages[-1]['content'][:60]!r} is neither a number nor marked by #### or \\boxed{{}}")

    def __call__(self, queries, answers):
        return torch.tensor([[float(final_answer(a) == self.known[q]) for a in group] for q, group in zip(queries, answers)])


class RewardModel:
    """A trained reward model: a sequence classifier with one label, in Hugging Face layout, such as Skywork-Reward-V2.

    The score is read at the last token of the conversation, as its own chat template writes it.
    """

    def __init__(self, name, device="cpu", dtype=torch.float32):
        """name: folder or hub name. Raises UserError for a model that has no score head."""
        self.model, self.tokenizer = load(name, device, dtype)
        if not self.model.config.score_head:
            raise UserError(f"{name} is no reward model: its architecture is not ..ForSequenceClassification")

    @torch.no_grad()
    def __call__(self, queries, answers):
        turns = lambda q, a: [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        ids = lambda q, a: self.tokenizer.chat(turns(q, a), add_generation_prompt=False)
        with resident(self.model):
            return each_once(lambda different: self.model.score(last_states(self.model, [
                [ids(q, a) for a in group] for q, group in zip(queries, different)]))[:, 0].float(), answers)


class QualityReward:
    """The quality self-reward R_Q of LSP (arXiv 2509.07414): the reference model grades an exchange by a 7-point rubric.

    Returned as a share of the seven points, 0 to 1, so that weight 1 puts it beside a reward of 0 to 1. Instead of
    sampling one score, its expectation over the digits 0 to 7 is taken from one forward pass: no noise, nothing to parse,
    and no malformed score. The rubric stands first in the prompt and is computed once for good; the query once for its
    group.
    """

    def __init__(self, reference, tokenizer):
        """reference: the frozen judge. It is asked with the embedded language's rubric if it speaks that, else with RUBRIC."""
        self.model, self.tokenizer, self.speaks = reference, tokenizer, language.spoken_by(tokenizer)
        digits = [tokenizer.encode(str(d)) for d in range(8)]
        if any(len(d) != 1 for d in digits):
            raise UserError("this model's tokenizer has no single token for each digit 0 to 7, which the judge needs")
        device = reference.cos.device
        self.digits = torch.tensor([d[0] for d in digits], device=device)  # [8]
        self.rubric = commonprefix([self._ids("a", "a"), self._ids("b", "b")])
        with torch.no_grad(), resident(reference):
            self.cache = KVCache(reference.config, 1, len(self.rubric), reference.embed.weight)
            reference(torch.tensor([self.rubric], device=device), cache=self.cache)

    def _ids(self, query, answer):
        if self.speaks:
            exchange = language.JUDGE_EXCHANGE.format(query=query, answer=answer)
            return self.tokenizer.chat([{"role": "system", "content": language.JUDGE_PROMPT}, {"role": "user", "content": exchange}])
        # One user turn: not every template knows a system message.
        return self.tokenizer.chat([{"role": "user", "content": f"{RUBRIC} {EXPECTED}\n\n" + EXCHANGE.format(query=query, answer=answer)}])

    @torch.no_grad()
    def __call__(self, queries, answers):
        with resident(self.model):
            return each_once(lambda different: self._grade(queries, different), answers) / 7

    def _grade(self, queries, answers):
        rows = [[self._ids(q, a) for a in group] for q, group in zip(queries, answers)]
        rubric = len(commonprefix([self.rubric, *(row for group in rows for row in group)]))  # all, unless an odd text changed its last token
        hidden = last_states(self.model, rows, self.cache, rubric)  # [different answers, D]
        p = F.linear(hidden, self.model.head[self.digits]).float().softmax(-1)  # [.., 8], among the digits alone
        return p @ torch.arange(8.0, device=p.device)


class WrittenQuality:
    """The quality self-reward as the paper asks for it: the reference writes a short justification, then its score in tags.

    A verdict without a score counts as 0 points; `malformed` is the share of those in the last call.
    """

    def __init__(self, reference, tokenizer, max_new_tokens=160):
        """reference: the frozen judge, which answers greedily."""
        self.model, self.tokenizer, self.max_new_tokens, self.malformed = reference, tokenizer, max_new_tokens, 0.0

    def __call__(self, queries, answers):
        with resident(self.model):
            return each_once(lambda different: self._grade(queries, different), answers) / 7

    def _grade(self, queries, answers):
        exchanges = [EXCHANGE.format(query=q, answer=a) for q, group in zip(queries, answers) for a in group]
        prompts = [self.tokenizer.chat([{"role": "user", "content": f"{RUBRIC} {WRITTEN}\n\n{text}"}]) for text in exchanges]
        rows = [ids for start in range(0, len(prompts), 32) for ids in generate(self.model, prompts[start:start + 32], 1, self.max_new_tokens, 0).ids]
        verdicts = [self.tokenizer.decode(ids) for ids in rows]
        scores = [self.parse(verdict) for verdict in verdicts]
        self.malformed = scores.count(None) / len(scores)
        return torch.tensor([float(score or 0) for score in scores])

    @staticmethod
    def parse(verdict):
        """The last score between tags, 0 to 7; None for a verdict without one."""
        scores = re.findall(r"<score>\s*([0-7])\s*</score>", verdict)
        return int(scores[-1]) if scores else None


class PairJudge:
    """A chat model that says which of two answers is better, asked in both orders: 1, 0, or 1/2 where the orders disagree."""

    QUESTION = ("Which answer to the query is better?\n\nQuery:\n{query}\n\nAnswer A:\n{a}\n\nAnswer B:\n{b}\n\n"
                "Reply with one letter, A or B.")

    def __init__(self, model, tokenizer):
        """Raises UserError where the two letters are not single tokens."""
        self.model, self.tokenizer, letters = model, tokenizer, [tokenizer.encode(letter) for letter in "AB"]
        if any(len(ids) != 1 for ids in letters):
            raise UserError("this judge's tokenizer has no single tokens for A and B")
        self.letters = torch.tensor([ids[0] for ids in letters], device=model.embed.weight.device)

    @torch.no_grad()
    def __call__(self, queries, ours, theirs):
        """[n] of 1 (ours is better), 0 and 1/2, for n queries and two answers to each."""
        ask = lambda q, a, b: self.tokenizer.chat([{"role": "user", "content": self.QUESTION.format(query=q, a=a, b=b)}])
        rows = [[ask(q, x, y), ask(q, y, x)] for q, x, y in zip(queries, ours, theirs)]
        first = F.linear(last_states(self.model, rows), self.model.head[self.letters]).argmax(-1).view(-1, 2) == 0  # does A win? [n, 2]
        return (first[:, 0].float() + (~first[:, 1]).float()).cpu() / 2


def names_model(spec):
    """Does --reward name a reward model, a folder or a hub name?"""
    return ":" not in spec and (Path(spec).is_dir() or is_hub_name(spec))


def _where(error):
    """What went wrong in a user's code, on one line: the error, and the last line of theirs that led to it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    return f"{type(error).__name__}: {one_line(error)} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def guarded(function, seconds):
    """A user's reward, whose own errors, and whose taking longer than `seconds`, become a UserError of one line."""
    name = getattr(function, "__name__", type(function).__name__)

    @functools.wraps(function)
    def reward(queries, answers):
        try:
            with time_limit(seconds, f"the reward {name} took longer than {seconds:g} seconds: mend it, or give it a larger --reward-timeout (for --resume: reward_timeout in the run's settings.json)"):
                return function(queries, answers)
        except UserError:
            raise
        except Exception as error:  # whatever the user's code may raise
            raise UserError(f"the reward {name} failed: {_where(error)}") from error
    return reward


def load_referee(spec, device="cpu", data=None, dtype=torch.float32, timeout=600.0):
    """The referee that --reward names: "exact", "math" (against data's known answers), "file.py:function", or a reward model's
    folder or hub name. Raises UserError. A file's code is run: name only files you trust; it has `timeout` seconds for a step.
    """
    if spec == "exact":
        return ExactReward()
    if spec == "math":
        return MathReward(data)
    path, _, name = spec.rpartition(":")
    if names_model(spec):
        return RewardModel(spec, device, dtype)
    if not path and Path(spec).is_file():
        raise UserError(f"--reward {spec}: which function of it? Write {spec}:function")
    if not path or not Path(path).is_file():
        raise UserError(f"--reward {spec}: expected exact, file.py:function or a reward model, and no file or folder {(path or spec)!r} is here")
    module_spec = importlib.util.spec_from_file_location("user_reward", path)
    if module_spec is None:
        raise UserError(f"--reward {spec}: {path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code may raise
        raise UserError(f"--reward {spec}: {path} does not load: {_where(error)}") from None
    if not callable(getattr(module, name, None)):
        raise UserError(f"--reward {spec}: {path} has no function {name!r}")
    return guarded(getattr(module, name), timeout)


def judged(referee, queries, answers):
    """The referee's rewards as float32 [N, G] on the CPU. Raises UserError for a wrong shape, NaN or infinity."""
    name = getattr(referee, "__name__", type(referee).__name__)
    rewards, shape = referee(queries, answers), [len(queries), len(answers[0])]
    try:
        rewards = torch.as_tensor(rewards, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"the reward {name} returned {type(rewards).__name__}, not numbers of shape {shape}") from None
    if list(rewards.shape) != shape:
        raise UserError(f"the reward {name} returned shape {list(rewards.shape)}; expected one number an answer, {shape}")
    if not rewards.isfinite().all():
        raise UserError(f"the reward {name} returned NaN or infinity")
    return rewards
