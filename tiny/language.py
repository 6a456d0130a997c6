"""The little instruction language of the embedded default, and the truth about it.

    Take "kobani", reverse it, then double every letter.   ->  iinnaabbookk
    Subtract 17 from 64.                                   ->  47

An instruction is well formed when `solve` finds its one right answer. So there is a truth about
whether a query is good and whether an answer is right. Real self-play lacks such a truth: here a
game can be played and its referees can be checked.

    draw(rng)            an instruction
    solve(query)         its right answer, or None if it has none
    kind(query)          one of KINDS
    grade(query, answer) 0 to 7, by the judge's rubric
    spoil(query, rng)    the query gone wrong
    is_held_out(query)   True for the tenth kept for evaluation
"""
import json
import random
import re
import zlib
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path

from support.files import base_of

LETTERS = "abcdefghijklmnopqrstuvwxyz"
KINDS = ("1 operation", "2 operations", "3 operations", "numbers")
CARELESS = 0.12  # share of careless answers in the fine-tuning set, as in data that people wrote
DRAWINGS = 4  # sets of held-out instructions that share none
MAX_ANSWER = 24  # letters; a longer result is no answer, so that texts cannot grow without end

# What the model is told for its three parts. The Solver gets the bare query as a user turn.
CHALLENGER_PROMPT = "Write one instruction for another model to follow."
JUDGE_PROMPT = (
    "Grade an exchange from 0 to 7, one point for each that holds:"
    " the task can be identified;"
    " the query is clear, specific and well formed;"
    " the answer is understandable;"
    " it covers a significant part of the query;"
    " it answers the core of the query;"
    " it is clear, concise and organised;"
    " it is likely to please."
    " Reply with one digit."
)
JUDGE_EXCHANGE = "Query: {query}\nAnswer: {answer}"

# --------------------------------------------------------------------------------------------------
# Operations on a word. Each takes (word, *arguments) and returns the new word. It returns None
# where an argument does not fit.

def _keep(word, n, cut):
    return cut(word, int(n)) if 1 <= int(n) < len(word) else None


OPERATIONS = {  # phrase, with a place for each argument -> function
    "reverse it": lambda w: w[::-1],
    "sort its letters": lambda w: "".join(sorted(w)),
    "write it in capitals": lambda w: w.upper() if w != w.upper() else None,
    "double every letter": lambda w: "".join(c + c for c in w),
    "repeat it": lambda w: w + w,
    "move its first letter to the end": lambda w: w[1:] + w[0],
    "count its letters": lambda w: str(len(w)),  # a number ends the chain
    "keep its first {n} letters": lambda w, n: _keep(w, n, lambda w, n: w[:n]),
    "keep its last {n} letters": lambda w, n: _keep(w, n, lambda w, n: w[-n:]),
    'remove every "{a}"': lambda w, a: w.replace(a, "") or None if a in w else None,
    'replace every "{a}" with "{b}"':
        lambda w, a, b: w.replace(a, b) if a in w and a != b else None,
}
_ARGUMENT = {"n": "([1-9])", "a": "([a-z])", "b": "([a-z])"}


def _pattern(phrase):
    """The regular expression of a phrase, with a group for each argument."""
    return re.compile(re.sub(r"\\{(\w)\\}", lambda m: _ARGUMENT[m[1]], re.escape(phrase)))


_PATTERNS = [(_pattern(phrase), phrase) for phrase in OPERATIONS]
_NUMBER = "(0|[1-9][0-9]{0,2})"  # one to three digits, no leading zero
_LIST = f"({_NUMBER}(?:, {_NUMBER}){{2,4}})"  # three to five numbers


def _solve_chain(word, steps):
    for i, step in enumerate(steps):
        for pattern, phrase in _PATTERNS:
            if match := pattern.fullmatch(step):
                break
        else:
            return None
        if phrase == "count its letters" and i < len(steps) - 1:
            return None
        word = OPERATIONS[phrase](word, *match.groups())
        if word is None or len(word) > MAX_ANSWER:
            return None
    return word


def solve(query, longest=3):
    """The one right answer (str) of a well-formed instruction; None for anything else.

    longest: the number of operations that a chain may have.
    """
    if m := re.fullmatch(r'Take "([a-z]{3,8})", (.+)\.', query):
        steps = m[2].split(", then ")
        return _solve_chain(m[1], steps) if len(steps) <= longest else None
    if m := re.fullmatch(f"Add {_NUMBER} and {_NUMBER}\\.", query):
        return str(int(m[1]) + int(m[2]))
    if m := re.fullmatch(f"Subtract {_NUMBER} from {_NUMBER}\\.", query):
        return str(int(m[2]) - int(m[1])) if int(m[1]) <= int(m[2]) else None
    if m := re.fullmatch(f"Which is (largest|smallest): {_LIST}\\?", query):
        return str((max if m[1] == "largest" else min)(map(int, m[2].split(", "))))
    if m := re.fullmatch(f"Sort the numbers {_LIST}\\.", query):
        return " ".join(sorted(m[1].split(", "), key=int))
    return None


def kind(query):
    """One of KINDS for a well-formed instruction; None for anything else."""
    if solve(query) is None:
        return None
    return KINDS[query.count(", then ")] if query.startswith("Take") else "numbers"


def is_held_out(query):
    """True for one instruction in ten. `draw` gives these instructions for evaluation only.

    The checksum of the text decides. A Challenger does not know it, so a tenth of what it writes
    is held out, too. The 16,000 queries of a run of seed 0 met 7 of the first 1,000 items of each
    of drawings 0 and 1.
    """
    return zlib.crc32(query.encode()) % 10 == 0


# --------------------------------------------------------------------------------------------------
# Drawing instructions, and ways for them to go wrong

def _word(rng):
    """A pseudo-word of 3 to 8 letters, consonants and vowels in turn."""
    start, length = rng.random() < 0.3, rng.randint(3, 8)
    letters = ("bcdfghjklmnpqrstvwxyz", "aeiou")
    return "".join(rng.choice(letters[(i + start) % 2]) for i in range(length))


def _fill(phrase, word, rng):
    """A phrase with arguments that mostly fit the word it will be applied to."""
    letters = [c for c in word if c in LETTERS] or LETTERS
    values = {
        "n": rng.randint(1, max(1, min(9, len(word) - 1))),
        "a": rng.choice(letters),
        "b": rng.choice(LETTERS),
    }
    return re.sub(r"{(\w)}", lambda m: str(values[m[1]]), phrase)


def _chain(rng, length):
    word = start = _word(rng)
    steps = []
    while len(steps) < length:
        step = _fill(rng.choice(list(OPERATIONS)), word, rng)
        result = _solve_chain(word, [step])
        if result is None or (step.startswith("count") and len(steps) < length - 1):
            continue
        word, steps = result, steps + [step]
    return f'Take "{start}", ' + ", then ".join(steps) + "."


def _number(rng):
    return rng.randint(0, 10 ** rng.randint(1, 3) - 1)


def _numbers(rng):
    form = rng.choice(["Add", "Subtract", "largest", "smallest", "Sort"])
    a, b = _number(rng), _number(rng)
    if form == "Add":
        return f"Add {a} and {b}."
    if form == "Subtract":
        return f"Subtract {min(a, b)} from {max(a, b)}."
    many = ", ".join(str(_number(rng)) for _ in range(rng.randint(3, 5)))
    return f"Sort the numbers {many}." if form == "Sort" else f"Which is {form}: {many}?"


def draw(rng, held_out=False):
    """An instruction: 30 % numbers, 20/25/25 % chains of one/two/three operations.

    rng: random.Random. held_out: draw from the tenth kept for evaluation, not from the rest.
    """
    while True:
        u = rng.random()
        query = _numbers(rng) if u < 0.3 else _chain(rng, 1 if u < 0.5 else 2 if u < 0.75 else 3)
        if is_held_out(query) == held_out and solve(query) is not None:
            return query


def drawing_of(query):
    """Which of the DRAWINGS a held-out instruction belongs to. The checksum of the text decides."""
    return zlib.crc32(query.encode()) // 10 % DRAWINGS


def evaluation_set(n, drawing=0):
    """n held-out instructions, all different, the same ones for everyone.

    drawing: 0 to DRAWINGS - 1. No two drawings share an instruction: settings may be chosen by one,
    and results reported on another.
    """
    return list(_drawn(n, drawing))


@lru_cache
def _drawn(n, drawing):
    rng, queries = random.Random(f"held out {drawing}"), {}
    while len(queries) < n:
        query = draw(rng, held_out=True)
        if drawing_of(query) == drawing:
            queries[query] = None
    return tuple(queries)


def longer_set(n, seed=0):
    """n chains of four operations.

    The model was trained on three operations at most, and in a game four are not well formed.
    """
    rng, queries = random.Random(f"longer {seed}"), {}
    while len(queries) < n:
        queries[_chain(rng, 4)] = None
    return list(queries)


def spoil(query, rng):
    """The query gone wrong, in one of the ways a Challenger finds. It has no right answer.

    It is cut short, two queries are spliced into one, words are shuffled, an argument is wrong, an
    operation is out of place, or a chain is endless. If the result has a right answer after all,
    another one is drawn.
    """
    while True:
        other = draw(rng)
        tokens = phrases(query)
        way = rng.choice(
            ["cut", "splice", "shuffle", "argument", "argument", "place", "endless", "noise"])
        if way == "cut":
            bad = "".join(tokens[: rng.randrange(len(tokens))])
        elif way == "splice":
            rest = phrases(other)
            head = tokens[: rng.randint(1, len(tokens) - 1)]
            bad = "".join(head + rest[rng.randint(1, len(rest) - 1):])
        elif way == "shuffle":
            i, j = sorted(rng.sample(range(len(tokens) + 1), 2))
            middle = tokens[i:j]
            rng.shuffle(middle)
            bad = "".join(tokens[:i] + middle + tokens[j:])
        elif way == "argument":  # it looks good but is wrong, such as keeping too many letters
            spots = [i for i, t in enumerate(tokens) if len(t) == 1 and t in LETTERS + "0123456789"]
            i = rng.choice(spots)
            tokens[i] = rng.choice(LETTERS if tokens[i] in LETTERS else "123456789")
            bad = "".join(tokens)
            if query.startswith("Subtract"):
                a, b = re.findall("[0-9]+", query)
                bad = f"Subtract {b} from {a}."
        elif way == "place":  # a step of another instruction where it cannot work
            step = _fill(rng.choice(list(OPERATIONS)), _word(rng), rng)
            parts = query.split(", ")
            parts.insert(rng.randrange(len(parts) + 1), rng.choice(["", "then "]) + step)
            bad = ", ".join(parts)
        elif way == "endless":
            steps = [_fill(rng.choice(list(OPERATIONS)), _word(rng), rng)
                     for _ in range(rng.randint(4, 7))]
            bad = f'Take "{_word(rng)}", ' + ", then ".join(steps) + "."
            if rng.random() < 0.5:
                more = "".join(f", {_number(rng)}" for _ in range(rng.randint(1, 5)))
                bad = query[:-1] + more + query[-1]
        else:
            bad = "".join(rng.choice(PHRASES + list(LETTERS)) for _ in range(rng.randint(1, 12)))
        if solve(bad) is None:
            return bad


def slip(answer, rng):
    """The answer with one or two letters wrong. It is never the same as the answer.

    Half the time a letter is left out as well. Else two letters may be swapped.
    """
    while True:
        letters = list(answer)
        for _ in range(rng.randint(1, 2)):
            i = rng.randrange(len(letters))
            letters[i] = rng.choice("0123456789" if letters[i].isdigit() else LETTERS)
        if rng.random() < 0.5:
            del letters[rng.randrange(len(letters))]
        elif rng.random() < 0.5 and len(letters) > 1:
            i = rng.randrange(len(letters) - 1)
            letters[i], letters[i + 1] = letters[i + 1], letters[i]
        if letters and "".join(letters) != answer:
            return "".join(letters)


def careless(query, rng):
    """A wrong answer as a hasty person gives it. It is never the right one.

    A step of a chain is overlooked, or else there is a slip.
    """
    right, steps = solve(query), query[:-1].split(", then ")
    if len(steps) > 1:
        start, steps[0] = steps[0].split(", ", 1)
        steps.pop(rng.randrange(len(steps)))
        wrong = solve(f"{start}, {', then '.join(steps)}.")
        if wrong not in (None, right):
            return wrong
    return slip(right, rng)


def misanswer(query, rng):
    """A wrong answer as a Solver gives it.

    It has a slip, lacks a step, belongs to another instruction, is too long or short, or is noise.
    """
    right = solve(query) or solve(draw(rng))
    while True:
        way = rng.choice(["slip", "slip", "half", "half", "other", "noise", "long", "short"])
        if way == "slip":
            wrong = slip(right, rng)
        elif way == "half":  # as if one step had been overlooked
            parts = query[:-1].split(", then ")
            parts.pop(rng.randrange(len(parts)))
            wrong = solve(", then ".join(parts) + ".") or right[:-1]
        elif way == "other":
            wrong = solve(draw(rng))
        elif way == "noise":
            wrong = [rng.choice(PHRASES + list(LETTERS)) for _ in range(rng.randint(1, 10))]
        elif way == "long":
            wrong = right + rng.choice([right, rng.choice(LETTERS) * 4, " and " + right])
        else:
            wrong = right[: rng.randrange(len(right))]
        if "".join(wrong) != right or solve(query) is None:
            return "".join(wrong)


# --------------------------------------------------------------------------------------------------
# The rubric's truth

def similarity(answer, right):
    """Share of matching letters, 0 to 1, as difflib aligns them."""
    return SequenceMatcher(None, answer, right, autojunk=False).ratio()


def grade(query, answer):
    """The truth of JUDGE_PROMPT's seven points, 0 to 7.

    If a query has no right answer, no answer to it earns a point.
    """
    identified = re.match(
        r'(Take "[a-z]+", |Add \d|Subtract \d|Which is (largest|smallest): \d|Sort the numbers \d)',
        query)
    right = solve(query)
    if right is None:
        return int(bool(identified))
    readable = re.fullmatch("[a-zA-Z]+|[0-9 ]+", answer) is not None
    close = similarity(answer, right)
    complete = readable and len(answer) == len(right)
    return 2 + readable + (close >= 0.5) + (close >= 0.8) + complete + (answer == right)


# --------------------------------------------------------------------------------------------------
# The finite set that the embedded default was fine-tuned on

def conversation(part, rng):
    """One conversation of a part ("solver", "judge", "challenger"): its messages, and the reply.

    The model learns to write the reply.
    """
    def user(text):
        return {"role": "user", "content": text}

    query = draw(rng)
    if part == "challenger":
        return [user(CHALLENGER_PROMPT)], query
    if part == "solver":
        return [user(query)], careless(query, rng) if rng.random() < CARELESS else solve(query)
    # The judge sees right answers to good queries, wrong ones, and any answer to a spoiled query.
    u = rng.random()
    if u < 0.4:
        query = spoil(query, rng)
    answer = solve(query) if 0.4 <= u < 0.65 else misanswer(query, rng)
    exchange = JUDGE_EXCHANGE.format(query=query, answer=answer)
    return [{"role": "system", "content": JUDGE_PROMPT}, user(exchange)], str(grade(query, answer))


def fine_tuning_set(size, seed=0):
    """The first `size` conversations of the set: [(part, messages, reply)].

    The same seed gives the same conversations.
    """
    rng, parts = random.Random(f"fine-tuning {seed}"), {"solver": 70, "judge": 18, "challenger": 12}
    drawn = (rng.choices(list(parts), parts.values())[0] for _ in range(size))
    return [(part, *conversation(part, rng)) for part in drawn]


# --------------------------------------------------------------------------------------------------
# The vocabulary: each fixed phrase of the language is one token. Everything else is spelled letter
# by letter.

# They are sorted: a set has another order in each process, but the vocabulary must not.
PHRASES = sorted({
    'Take "', '", ', ", then ", '"', ".", "?", ", ", " ", "Add ", " and ", "Subtract ", " from ",
    "Which is largest: ", "Which is smallest: ", "Sort the numbers ",
    *(piece for phrase in OPERATIONS for piece in re.split(r"{\w}", phrase) if piece),
}, key=lambda piece: (-len(piece), piece))
PROMPT_PHRASES = [
    CHALLENGER_PROMPT, *re.findall(r"[^:;.]+[:;.]", JUDGE_PROMPT), "Query: ", "\nAnswer: "]
CHARACTERS = [chr(i) for i in range(33, 127)] + ["\n"]  # so that any plain text keeps its letters


def spoken_by(model):
    """Does a model speak this language, so that its prompts mean something to it?

    model: the name of its folder, or its tokenizer. Its vocabulary tells, because the Challenger's
    prompt is one token of it.
    """
    if not isinstance(model, (str, Path)):
        return len(model.encode(CHALLENGER_PROMPT)) == 1
    file = Path(base_of(model)) / "tokenizer.json"  # of an adapter: its base's
    return file.is_file() and json.dumps(CHALLENGER_PROMPT) in file.read_text(
        encoding="utf-8", errors="replace")


def phrases(text):
    """Split a text as the tokenizer does: phrases where they stand, single characters elsewhere."""
    return re.findall("|".join(map(re.escape, PHRASES)) + "|.", text, re.DOTALL)
