"""Data that people bring: what is read, what is refused with its line, what is left out."""
import json
import re
import sys
from types import SimpleNamespace

import pytest

from support import data
from support.console import UserError
from support.data import read_data, read_instructions


def user(text):
    return {"role": "user", "content": text}


def test_both_forms_of_data(tmp_path):
    path = tmp_path / "data.jsonl"
    chat = [{"role": "system", "content": "s"}, user("u"), {"role": "assistant", "content": "a"},
            user("later")]
    lines = [json.dumps({"prompt": "p", "answer": "b"}), "", json.dumps({"messages": chat}),
             json.dumps({"question": "p", "answer": "c"})]
    path.write_text("\n".join(lines))
    assert [row[:3] for row in read_data(path)] == [
        ([user("p")], "b", 1), (chat[:2], "a", 3), ([user("p")], "c", 4)]
    assert [row.query for row in read_data(path)] == ["p", "u", "p"]
    path.write_text("\n".join(lines), encoding="utf-8-sig")  # a byte order mark does no harm
    assert len(read_data(path)) == 3


def test_a_line_may_hold_any_letter(tmp_path):
    """Some programs take U+2028 as the end of a line. In JSONL it is not."""
    path = tmp_path / "data.jsonl"
    line = json.dumps({"prompt": "a\u2028b", "answer": "c\u0085"}, ensure_ascii=False) + "\n"
    path.write_text(line * 2, encoding="utf-8")
    assert [row[:2] for row in read_data(path)] == 2 * [([user("a\u2028b")], "c\u0085")]


CHAT = [user("a?"), {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("text", [
    '\ufeff{"prompt":"a?","answer":"b"}\n{"prompt":"c?","answer":"d"}\n',  # a byte order mark
    '{"prompt":"a?","answer":"b"}\r\n{"prompt":"c?","answer":"d"}\r\n',
    '[\n {\n  "prompt": "a?",\n  "answer": "b"\n },\n {\n  "prompt": "c?",\n  "answer": "d"\n }\n]',
    '[{"instruction": "a?", "input": "", "output": "b"}, {"instruction": "c?", "output": "d"}]',
    '{"prompt":"a?","completion":"b"}\n{"prompt":"c?","completion":"d"}\n',
    '{"prompt": [{"role": "user", "content": "a?"}], "completion": [{"role": "assistant", '
    '"content": "b"}]}\n{"prompt":"c?","completion":"d"}\n',
    '{"real": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}], '
    '"generated": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "z"}]}\n'
    '{"prompt":"c?","answer":"d"}\n',
    '{"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]}\n'
    '{"conversations": [{"from": "user", "value": "c?"}, {"from": "assistant", "value": "d"}]}\n',
    '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", '
    '"text": "?"}]}, {"role": "assistant", "content": "b"}]}\n{"question":"c?","answer":"d"}\n',
    '{"problem":"a?","solution":"b"}\n{"query":"c?","response":"d"}\n',
    '{"prompt": "a?", "chosen": "b", "rejected": "x"}\n{"prompt": "c?", "chosen": [{"role": '
    '"user", "content": "c?"}, {"role": "assistant", "content": "d"}], "rejected": []}\n',
    '{"prompt": "later", "messages": [{"role": "user", "content": "a?"}, {"role": "assistant", '
    '"content": "b"}, {"role": "user", "content": "more"}]}\n{"question":"c?","response":"d"}\n',
    '{"messages": null, "prompt":"a?","answer":"b"}\n\n{"prompt":"c?","answer":"d"}',
])
def test_the_shapes_that_people_have(tmp_path, text):
    path = tmp_path / "data.json"
    path.write_bytes(text.encode())
    assert [(row.query, row.answer) for row in read_data(path)] == [("a?", "b"), ("c?", "d")]


def test_what_belongs_to_the_question():
    """An input, and a system message in a column of its own. Numbers are answers, too."""
    def read(**row):
        return data.read_row(row)[1:]
    assert read(instruction="Add.", input="1 and 2", output=3) == ([user("Add.\n\n1 and 2")], "3")
    assert read(question="q", input="text", answer=0.5) == ([user("q\n\ntext")], "0.5")
    system = {"role": "system", "content": "s"}
    assert read(system_prompt="s", question="q", response="r") == ([system, user("q")], "r")
    assert read(system="", prompt="q", answer="r") == ([user("q")], "r")
    assert read(system="t", messages=[system, *CHAT])[0][0] == system  # the chat has its own


def test_what_was_read_is_said(tmp_path, capsys):
    """File, shapes and rows in one line, and what will not do as it is."""
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": "c"}, {"messages": CHAT}]
    path.write_text("\n".join(map(json.dumps, rows)))
    read_data(path)
    said, = capsys.readouterr().err.splitlines()
    assert f"--data {path}: 3 rows of shape prompt and answer (2), messages (1)" in said
    assert "1 question has several different answers, and each row keeps its own" in said


def test_other_columns_are_for_rewards(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": "a", "answer": "b", "level": 1, "only": 2},
            {"prompt": "c", "answer": "d", "level": 3}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert data.columns(read_data(path)) == {
        "messages": [[user("a")], [user("c")]], "answer": ["b", "d"], "level": [1, 3]}


def test_csv_and_parquet(tmp_path, monkeypatch):
    (tmp_path / "data.csv").write_text('question,answer\n"a, with ""b""",1\n"two\nlines",2\n')
    assert [(row.query, row.answer, row.line) for row in read_data(tmp_path / "data.csv")] == [
        ('a, with "b"', "1", 2), ("two\nlines", "2", 4)]  # the line that it ends in
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="reading .parquet needs pyarrow: pip install pyarrow"):
        read_data(tmp_path / "data.parquet")
    monkeypatch.undo()
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is an optional extra")
    import pyarrow
    table = pyarrow.Table.from_pylist([{"prompt": "a", "answer": "b"}] * 2)
    parquet.write_table(table, tmp_path / "data.parquet")
    assert [row.query for row in read_data(tmp_path / "data.parquet")] == ["a", "a"]
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not readable as Parquet"):
        read_data(tmp_path / "data.parquet")


def test_a_dataset_on_the_hub(tmp_path, monkeypatch, capsys):
    """Its files of one split, and of no other: test rows never get among those to learn from."""
    for name in ("main/train-00000-of-00002.jsonl", "main/train-00001-of-00002.jsonl",
                 "main/test-00000-of-00001.jsonl", "other/train.jsonl", "sft/train_sft.jsonl",
                 "sft/train_gen-00000-of-00001-0a1b2c3d4e.jsonl", "converted/dev/0000.jsonl"):
        (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
        row = json.dumps({"prompt": name, "answer": "b"}) + "\n"
        (tmp_path / "hub" / name).write_text(row * 2)
    asked = []

    def fetch(name, patterns, kind):
        asked.append((name, kind))
        return tmp_path / "hub"
    monkeypatch.setattr(data.files, "fetch", fetch)
    monkeypatch.chdir(tmp_path)
    rows = read_data("org/sums", split="main/train")
    first, second = ("main/train-0000%d-of-00002.jsonl" % i for i in (0, 1))
    assert [(row.query, row.line) for row in rows] == [(first, 1), (first, 2), (second, 3),
                                                       (second, 4)]
    assert asked == [("org/sums", "dataset")]
    assert "--data org/sums: split main/train, 2 files" in capsys.readouterr().err
    for split, name in (("test", "main/test-00000-of-00001.jsonl"),
                        ("dev", "converted/dev/0000.jsonl"),
                        ("train_gen", "sft/train_gen-00000-of-00001-0a1b2c3d4e.jsonl")):
        assert {row.query for row in read_data("org/sums", split=split)} == {name}
    with pytest.raises(UserError, match="--data org/sums: 2 splits of the name train; there are "
                                        "converted/dev, main/test, main/train, other/train, "):
        read_data("org/sums")
    for split in ("main", "tra", "train_"):
        with pytest.raises(UserError, match=f"no split of the name {split}; there are"):
            read_data("org/sums", split=split)


def test_splits_are_refused_beside_files():
    def args(**changes):
        usual = {"data": "a.json", "split": "train", "eval_data": None, "eval_split": "test"}
        return SimpleNamespace(**usual | changes)
    data.refuse_splits(args())
    data.refuse_splits(args(data="org/sums", split="main/train", eval_data="org/sums",
                            eval_split="main/test"))
    for changes, flag in (({"split": "main/test"}, "--split"),
                          ({"eval_split": "dev"}, "--eval-split")):
        with pytest.raises(UserError, match=f"^{flag} is for datasets on the hub"):
            data.refuse_splits(args(**changes))


def test_questions_on_both_sides_are_counted(tmp_path, capsys):
    """Scores on rows that were learnt from say nothing about new ones."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n')
    args = SimpleNamespace(data=str(path), split="train", eval_data=str(path), eval_split="test",
                           skip_bad_rows=False)
    rows, held = data.read_both(args)
    assert [row.query for row in rows] == [row.query for row in held] == ["a", "c"]
    assert held[0].source == f"--eval-data {path}, line"
    assert "2 of the 2 questions of --eval-data are in --data, too" in capsys.readouterr().err


def test_csv_as_programs_write_it(tmp_path):
    """Long cells, cells over several lines, a comma too many, and a name in capitals."""
    path = tmp_path / "UP.CSV"
    path.write_text('question,answer\n"two\nlines",1\n' + 200000 * "x" + ',2\na,\n')
    with pytest.raises(UserError, match="UP.CSV, line 5: an empty prompt or answer"):
        read_data(path)
    rows = read_data(path, skip_bad=True)
    assert [(len(row.query), row.line) for row in rows] == [(9, 3), (200000, 4)]
    path.write_text("question,answer\na,1,\nb,2\nc\n")
    with pytest.raises(UserError, match="line 2: it has more cells than the header has names"):
        read_data(path)
    path.write_text("question,answer\nb,2\nc\n")
    with pytest.raises(UserError, match="line 3: its columns are question, answer .empty: answer"):
        read_data(path)
    with pytest.raises(UserError, match="known endings of files are .jsonl, .json, .ndjson, .csv"):
        read_data("table.tsv")


GOOD = '{"prompt": "p", "answer": "a"}'


@pytest.mark.parametrize("second, says", [
    ("not json", "line 2: not JSON"),
    ("[1]", "line 2: expected an object"),
    ('{"prompt": "p"}', "line 2: its columns are prompt; known are: messages; .*question . answer"),
    ('{"prompt": "p", "answer": ""}', "line 2: an empty"),
    ('{"prompt": "p", "answer": true}', "line 2: every message needs a text"),
    ('{"messages": []}', "line 2: the first turn"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 2: the first turn"),
    ('{"messages": 5}', "line 2: a conversation must be a list of messages"),
    ("[" * 100000, "line 2: not JSON"),
    ('{"prompt": "a\\ud800", "answer": "b"}', "line 2: half of a surrogate pair"),
    ('{"prompt": "a", "answer": "b\\udfff"}', "line 2: half of a surrogate pair"),
    ("", "1 row of data"),
])
def test_bad_data_is_one_line_with_its_number(tmp_path, second, says):
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD + "\n" + second + "\n")
    with pytest.raises(UserError, match=says) as error:
        read_data(path)
    assert "\n" not in str(error.value)


def test_data_that_is_no_text_is_one_line(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe")
    for name in ("data.jsonl", "missing.jsonl"):
        with pytest.raises(UserError, match=f"{name}: not readable as text") as error:
            read_data(tmp_path / name)
        assert "\n" not in str(error.value)


def test_instructions_in_alpaca_evals_format(tmp_path):
    path = tmp_path / "set.json"
    path.write_text(json.dumps([{"instruction": "Add.", "dataset": "sums", "output": "3"},
                                {"instruction": "Say."}]))
    assert read_instructions(path) == [
        ("Add.", {"instruction": "Add.", "dataset": "sums"}),
        ("Say.", {"instruction": "Say.", "dataset": "all"})]


def test_an_alpaca_row_is_asked_with_its_input(tmp_path):
    """What the task is about is part of the query. Both stand apart in the file of outputs."""
    path = tmp_path / "set.json"
    path.write_text(json.dumps([{"instruction": "Reverse this.", "input": "abc", "output": "cba"},
                                {"instruction": "Say.", "input": ""}]))
    assert read_instructions(path) == [
        ("Reverse this.\n\nabc",
         {"instruction": "Reverse this.", "dataset": "all", "input": "abc"}),
        ("Say.", {"instruction": "Say.", "dataset": "all"})]


def test_other_files_of_instructions(tmp_path, capsys):
    """JSONL, a byte order mark, other names of the question, and MT-Bench's turns."""
    path = tmp_path / "set.jsonl"
    rows = [{"prompt": "a"}, {"question": "b"},
            {"question_id": 81, "category": "writing", "turns": ["c", "and then?"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8-sig")
    found = read_instructions(path)
    assert [query for query, _ in found] == ["a", "b", "c"]
    assert found[2][1] == {"instruction": "c", "dataset": "writing"}
    assert "only the first turn of each entry is asked" in capsys.readouterr().err


@pytest.mark.parametrize("text, says", [
    ("{", "entry 1: not JSON; a list of objects, or one object a line, is expected"),
    ("[" * 100000, "entry 1: not JSON"),
    ("[]", "expected a list of objects, or one object a line"),
    ('{"text": "a", "id": 3}', 'entry 1 has no "instruction"; its keys are: text, id; known are'),
    ('[{"turns": []}]', 'entry 1 has no "instruction"'),
    ('[{"instruction": "a", "input": 3}]', "entry 1 has no"),
    ("3", 'entry 1 has no "instruction"; its keys are: none'),
    ('[{"instruction": "a"}, 3]', 'entry 2 has no "instruction"'),
    ('[{"instruction": "a"}, {"instruction": 3}]', 'entry 2 has no "instruction"'),
    ('[{"instruction": " "}]', 'entry 1 has no "instruction"'),
    ('[{"instruction": "a\\ud800"}]', "entry 1: half of a surrogate pair"),
])
def test_bad_instructions_are_one_line(tmp_path, text, says):
    (tmp_path / "set.json").write_text(text)
    with pytest.raises(UserError, match=says) as error:
        read_instructions(tmp_path / "set.json")
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# Bad rows are found before anything is played

def write(path, *texts):
    path.write_text("\n".join(texts) + "\n")
    return path


def test_bad_lines_are_named_or_left_out(tmp_path, capsys):
    path = write(tmp_path / "data.jsonl", GOOD, "no json", GOOD, '{"prompt": " ", "answer": "a"}')
    with pytest.raises(UserError, match="line 2: not JSON.*; also bad: 4; .*--skip-bad-rows"):
        read_data(path)
    assert [row.line for row in read_data(path, skip_bad=True)] == [1, 3]
    assert "line 2: not JSON" in (said := capsys.readouterr().err) and "left out: 2 rows" in said


def reader(row):
    """Ids of a row for a model that reads letters, and refuses system messages."""
    if row.messages[0]["role"] == "system":
        raise UserError("the chat template failed: no system messages here")
    return list(row.query)


@pytest.mark.parametrize("bad, why", [
    ([user("x" * 9)], "9 tokens and up to 2 of an answer .* than the model's context of 10"),
    ([{"role": "system", "content": "s"}, user("y")], "no system messages here"),
    ([user("")], "the chat template writes nothing for it"),
])
def test_every_row_is_measured_before_the_first_step(bad, why, capsys):
    """What is too long, refused by the template or empty is named by its line, or left out."""
    rows = [data.Row(messages, "a", i, {}, "--data f, line")
            for i, messages in ((1, [user("x" * 8)]), (2, bad), (5, [user("z")]))]
    with pytest.raises(UserError, match=f"^--data f, line 2: .*{why}; mend it, or leave"):
        data.measured(rows, [(reader, 10)], 2, False)
    found = data.measured(rows, [(reader, 10)], 2, True)
    assert found == [(rows[0], [list("x" * 8)]), (rows[2], [["z"]])]
    assert re.search(why, capsys.readouterr().err)
    with pytest.raises(UserError, match="no row is left"):
        data.measured(rows[1:2], [(reader, 10)], 2, True)


def test_a_row_must_fit_into_each_model_that_reads_it():
    """The referee's context is smaller than the player's here."""
    rows = [data.Row([user("abcd")], "a", 7, {}, "--data f, line")]
    reads = [(reader, 100), (lambda row: reader(row) + [0], 6), (lambda row: [0] * 99, None)]
    with pytest.raises(UserError, match="line 7: 5 tokens and up to 2 .* context of 6"):
        data.measured(rows, reads, 2, False)
    (row, (ids, *_)), = data.measured(rows, reads, 1, False)
    assert row is rows[0] and ids == list("abcd")


def test_what_a_reward_may_ask_for():
    asked, known = [user("a")], [user("b")]
    assert data.columns([data.Row(asked), data.Row(known, "3", 1)]) == {"messages": [asked, known]}
    assert data.columns([data.Row(known, "3")]) == {"messages": [known], "answer": ["3"]}


def test_a_tenth_is_held_out_by_the_question():
    """The same question never stands on both sides, and the same rows give the same tenth."""
    rows = [data.Row([user(f"Add {i % 500} and 1.")], str(i)) for i in range(1000)]
    learnt, held = data.held_out(rows)
    assert len(learnt) + len(held) == 1000 and 60 < len(held) < 140
    assert not {row.query for row in learnt} & {row.query for row in held}
    assert data.held_out(rows) == (learnt, held)
    assert data.held_out(rows[:19]) == (rows[:19], [])  # too few
    # One question, however often, stands on one side alone, and that is the one to learn from.
    for i in range(40):
        same = [data.Row([user(f"Add {i} and 1.")], "1")] * 30
        assert data.held_out(same) == (same, [])
