"""Data that people bring: questions with answers, chats, instructions, as they come."""
import csv
import io
import json
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from support import files, worked
from support.console import UserError, note, one_line, progress, specs

# The shapes of a row that are known, by the columns that hold it: one with a whole conversation, or
# one with the question and one with the answer. Of several that fit, the first is taken.
SHAPES = {
    "messages": ["messages"],  # chats, as UltraChat has them
    "ShareGPT": ["conversations"],
    "SPIN": ["real"],  # the human side; "generated" is left out
    "preferences": ["chosen"],  # the better side; "rejected" is left out
    "Alpaca": ["instruction", "output"],  # and perhaps "input", which belongs to the question
    "prompt and completion": ["prompt", "completion"],  # TRL's: texts, or lists of messages
    "prompt and answer": ["prompt", "answer"],
    "question and answer": ["question", "answer"],  # GSM8K
    "problem and solution": ["problem", "solution"],  # MATH
    "query and response": ["query", "response"],
    "question and response": ["question", "response"],  # OpenOrca, with its "system_prompt"
}
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for them
ENDINGS = (".jsonl", ".json", ".ndjson", ".csv", ".parquet")  # of files
LEFT_OUT = {"generated", "rejected"}  # columns of the shapes above that are not people's answers

# Where a file of open instructions has the question: of several, the first that a row has.
QUESTION = ("instruction", "prompt", "question", "query", "problem", "turns")


class Row(NamedTuple):
    """A question of the data, with the answer that people gave."""
    messages: list  # the conversation up to the question: [{"role": .., "content": ..}, ..]
    answer: str | None = None  # None where the Challenger asked
    line: int | None = None  # its number in the file, from 1
    others: dict = {}  # its other columns, as they came
    source: str = ""  # for errors: "--data FILE, line"

    @property
    def query(self):
        """The question alone: the conversation's last message."""
        return self.messages[-1]["content"]


def columns(rows):
    """{name: N values}: what a reward may ask for by name. Without what not every row has.

    They are "messages", "answer", and the data's own columns.
    """
    names = [set(row.others) for row in rows]
    shared = set.intersection(*names) - {"messages", "answer"}
    found = {"messages": [row.messages for row in rows], "answer": [row.answer for row in rows]}
    found |= {name: [row.others[name] for row in rows] for name in sorted(shared)}
    return {name: values for name, values in found.items() if None not in values}


# --------------------------------------------------------------------------------------------------
# Rows

def read_data(name, skip_bad=False, split="train", flag="--data"):
    """The Rows of a file, or of a dataset on the hub (owner/name). Says what it has read.

    A row has one of SHAPES. Of a chat the first turn is used, as in SPIN's paper, with the system
    message before it if there is one. split: which part of a hub dataset. flag: for errors.
    Raises UserError with the number of the first bad row, or leaves bad rows out, with a note.
    """
    where = f"{flag} {name}"
    rows, bad, shapes = [], [], Counter()
    for i, values in read_rows(name, where, split):
        try:
            shape, messages, answer = read_row(values)
            used = {*SHAPES[shape], *LEFT_OUT}
            others = {key: value for key, value in values.items() if key not in used}
            rows.append(Row(messages, answer, i, others, f"{where}, line"))
            shapes[shape] += 1
        except UserError as error:
            bad.append((i, str(error)))
    sort_out(f"{where}, line", bad, skip_bad)
    if len(rows) < 2:
        raise UserError(f"{where}: {len(rows)} row{'s' * (len(rows) != 1)} of data; at least 2 are "
                        "needed")
    say_what_was_read(where, rows, shapes)
    return rows


def say_what_was_read(where, rows, shapes):
    """One line: shapes, rows, and questions that have several different answers."""
    answers = {}
    for row in rows:
        answers.setdefault(repr(row.messages), set()).add(row.answer)
    several = sum(len(found) > 1 for found in answers.values())
    more = (f"; {several:,} question{' has' if several == 1 else 's have'} several different "
            "answers, and each row keeps its own")
    names = ", ".join(f"{shape} ({count:,})" if len(shapes) > 1 else shape
                      for shape, count in shapes.items())
    note(f"{where}: {len(rows):,} rows of shape {names}{more if several else ''}")


def sort_out(where, bad, skip_bad):
    """Raise UserError for bad rows, [(number, why)], or say that they are left out.

    where: what they are rows of, such as "--data FILE, line". skip_bad: None where none may be left
    out.
    """
    if not bad:
        return
    others = [str(i) for i, _ in bad[1:]]
    more = f"; also bad: {', '.join(others[:8])}{', ..' * (len(others) > 8)}" if others else ""
    what = f"{where} {bad[0][0]}: {bad[0][1]}{more}"
    if not skip_bad:
        advice = "" if skip_bad is None else "; mend it, or leave bad rows out with --skip-bad-rows"
        raise UserError(what + advice)
    note(f"{what}; left out: {len(bad)} row{'s' * (len(bad) > 1)}")


def measured(rows, reads, longest, skip_bad=None, unclear=None):
    """[(Row, what each reader made of it)]: every row is read before anything is played.

    reads: [(ids_of(row), context)], one for each model that reads it, with context None where any
    length will do. longest: tokens that an answer may have. skip_bad: see sort_out. unclear: says
    why a known answer cannot be judged by, or None. Raises UserError for rows that a chat template
    refuses, that do not fit, or that are unclear, or leaves them out, with a note.
    """
    good, bad = [], []
    bar = progress("reading the data", len(rows), "row")
    for row in rows:
        bar.update()
        try:
            found = [(ids_of(row), most) for ids_of, most in reads]
            why = [f"{len(ids)} tokens and up to {longest} of an answer (--answer-tokens) are more "
                   f"than the model's context of {most}"
                   for ids, most in found if most and len(ids) + longest > most]
            if not all(ids for ids, _ in found):
                why.append("the chat template writes nothing for it")
            if unclear and (fault := unclear(row.answer)):
                why.append(f"its answer {fault}: {row.answer[:60]!r}")
        except UserError as error:
            why = [str(error)]
        if why:
            bad.append((row.line, why[0]))
        else:
            good.append((row, [ids for ids, _ in found]))
    bar.close()
    if bad:
        sort_out(rows[0].source, bad, skip_bad)
    if rows and not good:
        raise UserError(f"{rows[0].source} ..: no row is left")
    return good


def read_both(args):
    """(the Rows of --data, those for scores), as they stand in the files. Raises UserError.

    Without --data there are no Rows, and without rows for scores these are None: then others may
    serve. They are [] where --data has too few, or where --eval-data says none.
    """
    rows, held = None, [] if args.eval_data == "none" else None
    if args.data:
        rows = read_data(args.data, args.skip_bad_rows, args.split)
        rows, held = held_out(rows) if args.eval_data is None else (rows, held)
    if args.eval_data not in (None, "none"):
        held = read_data(args.eval_data, args.skip_bad_rows, args.eval_split, "--eval-data")
        learnt = {repr(row.messages) for row in rows or []}
        if both := sum(repr(row.messages) in learnt for row in held):
            note(f"{both:,} of the {len(held):,} questions of --eval-data are in --data, too: "
                 "their scores say nothing about new ones")
    return rows, held


def refuse_splits(args):
    """Raise UserError where a split is named and its data is a file."""
    for flag, split, usual, name in (("--split", args.split, "train", args.data),
                                     ("--eval-split", args.eval_split, "test", args.eval_data)):
        if split != usual and not files.is_hub_name(name or ""):
            raise UserError(f"{flag} is for datasets on the hub, owner/name: a file has no splits")


def held_out(rows):
    """(rows to learn from, rows for scores): a tenth is held out, by the question's checksum.

    So the same question never stands on both sides. Of fewer than twenty rows none is held out, nor
    where one side would be empty.
    """
    apart = [zlib.crc32(repr(row.messages).encode()) % 10 == 0 for row in rows]
    if len(rows) < 20 or all(apart):
        return rows, []
    return ([row for row, held in zip(rows, apart) if not held],
            [row for row, held in zip(rows, apart) if held])


def fitting(args, rows, reads):
    """(those of the rows that all readers can read, tokens of the longest text): see `measured`.

    With --reward math their answers must be clear, too. None stays None.
    """
    unclear = worked.unclear if "math" in dict(specs(args.reward)) else None
    found = measured(rows or [], reads, args.answer_tokens, args.skip_bad_rows, unclear)
    longest = max((len(ids) for _, every in found for ids in every), default=0)
    return rows and [row for row, _ in found], longest


def check_longest(args, prompt, reads, judge):
    """Raise UserError if the longest query, or an answer to it, might not fit.

    prompt: the Challenger's, as ids; None without one. reads: see `measured`. judge: its `ids` say
    what it reads.
    (Decoded and encoded again, a text may be longer still. Then it is cut.)
    """
    nothing, both = Row([{"role": "user", "content": ""}]), args.query_tokens + args.answer_tokens
    context = reads[0][1]
    needs = [(len(prompt or []) + args.query_tokens, context)]
    needs += [(len(ids_of(nothing)) + both, most) for ids_of, most in reads]
    if hasattr(judge, "ids"):  # one that writes also needs room for its verdict
        verdict = getattr(judge, "max_new_tokens", 0)
        needs.append((len(judge.ids("", "")) + both + verdict, context))
    for tokens, most in needs:
        if tokens > most:
            raise UserError(f"a query of {args.query_tokens} tokens and an answer of "
                            f"{args.answer_tokens} make a text of {tokens}, and a model's context "
                            f"is {most}: try a smaller --query-tokens or --answer-tokens")


def read_row(values):
    """(shape, messages, answer) of a row, a dict of its columns. Raises UserError."""
    if isinstance(values, NotJson):
        raise UserError("not JSON; a list of objects, or one object a line, is expected")
    if not isinstance(values, dict):
        raise UserError(f"expected an object with columns, not {type(values).__name__}")
    if None in values:  # of a CSV file
        raise UserError("it has more cells than the header has names")
    there = {key for key, value in values.items() if value is not None}
    shape = next((name for name, needed in SHAPES.items() if there >= set(needed)), None)
    if shape is None:
        known = "; ".join(" + ".join(needed) for needed in SHAPES.values())
        empty = [key for key in values if key not in there]
        raise UserError(f"its columns are {', '.join(map(str, values)) or 'none'}"
                        + (f" (empty: {', '.join(map(str, empty))})" if empty else "")
                        + f"; known are: {known}")
    question, answer = SHAPES[shape][0], values[SHAPES[shape][-1]]
    alone = len(SHAPES[shape]) == 1
    if alone and (isinstance(answer, list) or "prompt" not in there):
        turns = answer  # the whole conversation
    else:
        prompt = values["prompt" if alone else question]
        given = values.get("input")  # Alpaca's: what the question is about
        if isinstance(given, str) and given.strip():
            prompt = f"{prompt}\n\n{given}"
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        turns = turns + (answer if isinstance(answer, list)
                         else [{"role": "assistant", "content": answer}])
    messages = as_messages(turns)
    system = values.get("system") or values.get("system_prompt")
    if system and messages and messages[0]["role"] != "system":
        messages = as_messages([{"role": "system", "content": system}]) + messages
    roles = [m["role"] for m in messages]
    turn = 3 if roles[:1] == ["system"] else 2
    if roles[:turn] != ["system", "user", "assistant"][-turn:]:
        raise UserError("the first turn must be a user's message and the assistant's answer")
    *prompt, answer = messages[:turn]
    if not prompt[-1]["content"].strip() or not answer["content"].strip():
        raise UserError("an empty prompt or answer")
    return shape, prompt, answer["content"]


def as_messages(turns):
    """[{"role", "content"}] of a conversation as it comes. Raises UserError.

    ShareGPT says "from" and "value". A content may be a number, or a list of text parts.
    """
    if not isinstance(turns, list) or not all(isinstance(m, dict) for m in turns):
        raise UserError("a conversation must be a list of messages")
    found = []
    for m in turns:
        role, content = m.get("role", m.get("from")), m.get("content", m.get("value"))
        if isinstance(content, list) and all(
                isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            content = "".join(part["text"] for part in content)
        if isinstance(content, (int, float)) and not isinstance(content, bool):
            content = str(content)
        if not isinstance(content, str):
            raise UserError("every message needs a text")
        if not is_text(content):
            raise UserError("half of a surrogate pair, which is no text")
        found.append({"role": ROLES.get(role, role) if isinstance(role, str) else None,
                      "content": content})
    return found


# --------------------------------------------------------------------------------------------------
# Files

def read_rows(name, where, split="train"):
    """[(number, columns)] of all rows of a file or a hub dataset, from 1. Raises UserError.

    JSONL, a JSON list, .csv, or .parquet, which needs pyarrow.
    """
    if files.is_hub_name(name):
        found, paths = [], hub_files(name, where, split)
        note(f"{where}: split {split}, {len(paths)} file{'s' * (len(paths) > 1)}")
        for path in paths:
            found += [values for _, values in read_rows(path, f"{where}, {path.name}")]
        return list(enumerate(found, 1))
    path = Path(name)
    if path.suffix.lower() not in ("", *ENDINGS):
        raise UserError(f"{where}: known endings of files are {', '.join(ENDINGS)}")
    if path.suffix.lower() == ".parquet":
        return list(enumerate(_parquet(path, where), 1))
    text = text_of(path, where)
    if path.suffix.lower() == ".csv":
        return _csv(text, where)
    try:
        values = json.loads(text)
        return list(enumerate(values if isinstance(values, list) else [values], 1))
    except (ValueError, RecursionError):
        pass  # no single value: one object a line
    # splitlines() would also cut at U+2028, inside a text.
    return [(i, _json_line(line)) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def text_of(path, where):
    """A text file in UTF-8, with or without a byte order mark. Raises UserError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not readable as text ({error})") from None


class NotJson:
    """Stands for a line that is not JSON: `read_row` names it among the bad rows."""


def _json_line(line):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return NotJson()


def _csv(text, where):
    csv.field_size_limit(2**31 - 1)  # a cell may hold a whole text
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        return [(reader.line_num, row) for row in reader]  # a row may go over several lines
    except csv.Error as error:
        raise UserError(f"{where}: not readable as CSV ({one_line(error)})") from None


def _parquet(path, where):
    try:
        import pyarrow.parquet  # an optional extra
    except ImportError:
        raise UserError(f"{where}: reading .parquet needs pyarrow: pip install pyarrow") from None
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{where}: not readable as Parquet ({one_line(error)})") from None


def hub_files(name, where, split):
    """The data files of one split of a hub dataset, fetched into the hub's cache. UserError.

    split: its whole name, "train", with the folder where several have it: "main/train". The names
    of files say it: main/train-00000-of-00002.parquet, data/train.jsonl, or train/0000.parquet.
    """
    folder = files.fetch(str(name), [f"*{ending}" for ending in ENDINGS], "dataset")
    splits = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix in ENDINGS):
        *folders, stem = path.relative_to(folder).with_suffix("").parts
        own = re.sub(r"(^|-)\d+(-of-\d+)?(-[0-9a-f]{8,})?$", "", stem)
        splits.setdefault("/".join([*folders, own] if own else folders), []).append(path)
    found = [full for full in splits if split in (full, full.rpartition("/")[2])]
    if len(found) != 1:
        what = "no split" if not found else f"{len(found)} splits"
        raise UserError(f"{where}: {what} of the name {split}; there "
                        f"{'are' if splits else 'is'} {', '.join(splits) or 'no file to read'}")
    return splits[found[0]]


# --------------------------------------------------------------------------------------------------
# Open instructions

def read_instructions(path):
    """[(query, row)] of a file of open instructions, in any of `read_rows`' forms. UserError.

    A row has its question under one of QUESTION, as AlpacaEval and MT-Bench have it. An Alpaca
    row's "input" is part of the query. Of "turns" the first is asked, with a note about the others.
    row: {"instruction", "dataset"}, and "input" where there is one, for the file of outputs.
    """
    where = f"--instructions {path}"
    rows = read_rows(path, where)
    if not rows:
        raise UserError(f"{where}: expected a list of objects, or one object a line")
    turns = [row.get("turns") for _, row in rows if isinstance(row, dict)]
    if any(isinstance(texts, list) and len(texts) > 1 for texts in turns):
        note(f"{where}: only the first turn of each entry is asked")
    return [_instruction(row, f"{where}: entry {i}") for i, row in rows]


def _instruction(row, where):
    if isinstance(row, NotJson):
        raise UserError(f"{where}: not JSON; a list of objects, or one object a line, is expected")
    row = row if isinstance(row, dict) else {}
    key = next((key for key in QUESTION if key in row), None)
    text = row.get(key)
    if key == "turns" and isinstance(text, list) and text:
        text = text[0]
    given = row.get("input") or ""
    if not isinstance(text, str) or not text.strip() or not isinstance(given, str):
        raise UserError(f'{where} has no "instruction"; its keys are: '
                        f"{', '.join(map(str, row)) or 'none'}; known are {', '.join(QUESTION)}")
    if not is_text(text + given):
        raise UserError(f"{where}: half of a surrogate pair, which is no text")
    kept = {"instruction": text, "dataset": str(row.get("dataset", row.get("category", "all")))}
    if given.strip():
        return f"{text}\n\n{given}", kept | {"input": given}
    return text, kept


def is_text(string):
    """Can it be encoded? JSON can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        string.encode()
        return True
    except UnicodeEncodeError:
        return False
