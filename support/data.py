"""Data that people bring: questions with answers, chats, instructions."""
import json
from pathlib import Path
from typing import NamedTuple

from support.console import UserError, note, progress

# Where an instruction file has the question: of several, the first that a row has.
QUESTION = ("instruction", "prompt", "question", "turns")


class Row(NamedTuple):
    """A question of the data, with the answer that people gave."""
    messages: list  # the conversation up to the question: [{"role": .., "content": ..}, ..]
    answer: str | None = None  # None where the Challenger asked
    line: int | None = None  # of its file, from 1

    @property
    def query(self):
        """The question alone: the conversation's last message."""
        return self.messages[-1]["content"]


def columns(rows):
    """{"messages": [N], "answer": [N]}: what a reward may ask for by name, where it is known."""
    found = {"messages": [row.messages for row in rows], "answer": [row.answer for row in rows]}
    return {name: values for name, values in found.items() if None not in values}


def read_data(path, skip_bad=False):
    """The Rows of a JSONL file.

    A line holds "prompt" (or "question") and "answer", or a chat's "messages". Of a chat the first
    turn is used, as in SPIN's paper, with the system message before it if there is one.
    Raises UserError with the number of the first bad line, or leaves bad lines out, with a note.
    """
    rows, bad = [], []
    for i, line in enumerate(read_lines(path, f"--data {path}"), 1):
        if line.strip():
            try:
                rows.append(Row(*read_line(line), i))
            except UserError as error:
                bad.append((i, str(error)))
    sort_out(f"--data {path}, line", bad, skip_bad)
    if len(rows) < 2:
        raise UserError(f"--data {path}: {len(rows)} line{'s' * (len(rows) != 1)} of data; at "
                        "least 2 are needed, each an object on its own line")
    return rows


def read_lines(path, where):
    """The lines of a text file in UTF-8, with or without a byte order mark. Raises UserError."""
    try:
        # splitlines() would also cut at U+2028, inside a text.
        return Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not readable as text ({error})") from None


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


def measured(rows, reads, longest, where, skip_bad=None):
    """[(Row, its prompt as ids)]: each row as a model will read it, before anything is played.

    reads: [(ids_of(messages), context)], one for each model that reads it; the first one answers.
    longest: tokens that an answer may have. where, skip_bad: see sort_out. Raises UserError for
    rows that a chat template refuses, or that do not fit, or leaves them out, with a note.
    """
    good, bad = [], []
    bar = progress("reading the data", len(rows), "row")
    for row in rows:
        bar.update()
        try:
            found = [(ids_of(row.messages), most) for ids_of, most in reads]
            why = [f"{len(ids)} tokens and up to {longest} of an answer (--answer-tokens) are more "
                   f"than the model's context of {most}"
                   for ids, most in found if len(ids) + longest > most]
            if not found[0][0]:
                why.append("the chat template writes nothing for it")
        except UserError as error:
            why = [str(error)]
        if why:
            bad.append((row.line, why[0]))
        else:
            good.append((row, found[0][0]))
    bar.close()
    sort_out(where, bad, skip_bad)
    if not good:
        raise UserError(f"{where} ..: no row is left")
    return good


def check_longest(args, prompt, reads, judge):
    """Raise UserError if the Challenger's longest query, or an answer to it, might not fit.

    prompt: the Challenger's, as ids. reads: see `measured`. judge: its `ids` say what it reads.
    (Decoded and encoded again, a text may be longer still. Then it is cut.)
    """
    nothing, both = [{"role": "user", "content": ""}], args.query_tokens + args.answer_tokens
    context = reads[0][1]
    needs = [(len(prompt) + args.query_tokens, context)]
    needs += [(len(ids_of(nothing)) + both, most) for ids_of, most in reads]
    if hasattr(judge, "ids"):  # one that writes also needs room for its verdict
        verdict = getattr(judge, "max_new_tokens", 0)
        needs.append((len(judge.ids("", "")) + both + verdict, context))
    for tokens, most in needs:
        if tokens > most:
            raise UserError(f"a query of {args.query_tokens} tokens and an answer of "
                            f"{args.answer_tokens} make a text of {tokens}, and a model's context "
                            f"is {most}: try a smaller --query-tokens or --answer-tokens")


def read_line(line):
    """(messages, answer) of one line of a JSONL file. Raises UserError."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError("not JSON; one object a line is expected") from None
    if not isinstance(row, dict):
        row = {}
    prompt = "prompt" if "prompt" in row else "question"
    if "messages" in row:
        messages = row["messages"]
    elif prompt in row and "answer" in row:
        messages = [{"role": "user", "content": row[prompt]},
                    {"role": "assistant", "content": row["answer"]}]
    else:
        raise UserError('expected an object with "prompt" and "answer", or with "messages"')
    if not isinstance(messages, list) or not all(
            isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        raise UserError("every message needs a text")
    if not all(is_text(m["content"]) for m in messages):
        raise UserError("half of a surrogate pair, which is no text")
    roles = [m.get("role") for m in messages]
    turn = 3 if roles[:1] == ["system"] else 2
    if roles[:turn] != ["system", "user", "assistant"][-turn:]:
        raise UserError("the first turn must be a user's message and the assistant's answer")
    *prompt, answer = messages[:turn]
    if not prompt[-1]["content"].strip() or not answer["content"].strip():
        raise UserError("an empty prompt or answer")
    return [{"role": m["role"], "content": m["content"]} for m in prompt], answer["content"]


# --------------------------------------------------------------------------------------------------
# Open instructions

def read_instructions(path):
    """[(query, row)] of a file of open instructions: a JSON list, or JSONL. Raises UserError.

    A row has its question under one of QUESTION, as AlpacaEval and MT-Bench have it. An Alpaca
    row's "input" is part of the query. Of "turns" the first is asked, with a note about the others.
    row: {"instruction", "dataset"}, and "input" where there is one, for the file of outputs.
    """
    where = f"--instructions {path}"
    lines = [line for line in read_lines(path, where) if line.strip()]
    try:
        rows = json.loads("\n".join(lines))
    except (ValueError, RecursionError):
        try:
            rows = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            raise UserError(f"{where}: not readable as JSON, nor as one object a line") from None
    rows = [rows] if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not rows:
        raise UserError(f'{where}: expected a list of objects with "instruction" and "dataset"')
    turns = [row.get("turns") for row in rows if isinstance(row, dict)]
    if any(isinstance(texts, list) and len(texts) > 1 for texts in turns):
        note(f"{where}: only the first turn of each entry is asked")
    return [_instruction(row, f"{where}: entry {i}") for i, row in enumerate(rows)]


def _instruction(row, where):
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
