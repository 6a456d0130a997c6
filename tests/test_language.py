"""The little language: its solver, its kinds, its ways to go wrong, its rubric."""
import os
import random
import subprocess
import sys

import pytest
from conftest import ROOT

from tiny import language as L


@pytest.mark.parametrize("query, answer", [
    ('Take "kobani", reverse it, then double every letter.', "iinnaabbookk"),
    ('Take "kobani", sort its letters.', "abikno"),
    ('Take "kobani", write it in capitals, then keep its first 3 letters.', "KOB"),
    ('Take "bob", repeat it, then move its first letter to the end.', "obbobb"),
    ('Take "bobo", remove every "o", then count its letters.', "2"),
    ('Take "bobo", replace every "o" with "a", then keep its last 1 letters.', "a"),
    ("Add 999 and 1.", "1000"),
    ("Subtract 17 from 64.", "47"),
    ("Which is largest: 4, 17, 9?", "17"),
    ("Which is smallest: 40, 17, 109, 20?", "17"),
    ("Sort the numbers 30, 4, 200.", "4 30 200"),
])
def test_solver(query, answer):
    assert L.solve(query) == answer
    assert L.grade(query, answer) == 7


@pytest.mark.parametrize("query", [
    "", "Hello", 'Take "ko", reverse it.',
    'Take "kobani", reverse it', 'Take "kobani".', 'Take "kobani", then reverse it.',
    'Take "kobani", keep its first 6 letters.', 'Take "kobani", remove every "z".',
    'Take "kobani", replace every "o" with "o".', 'Take "aaa", remove every "a".',
    'Take "kobani", count its letters, then reverse it.', 'Take "Kobani", reverse it.',
    'Take "kobani", reverse it, then reverse it, then reverse it, then reverse it.',  # four steps
    'Take "kobanilo", double every letter, then repeat it.',  # 32 letters
    'Take "kobani", write it in capitals, then remove every "o".',  # no small o left
    "Subtract 64 from 17.", "Subtract 394 from 737 597.", "Add 01 and 2.", "Add 1000 and 2.",
    "Which is largest: 4, 17?", "Which is largest: 1, 2, 3, 4, 5, 6?",
    "Sort the numbers 1, 2, 3?", 'Take "kobani", reverse it.\n',
])
def test_malformed_has_no_answer(query):
    assert L.solve(query) is None
    assert L.kind(query) is None
    assert L.grade(query, "x") <= 1


def test_drawings_are_disjoint():
    """What a setting was chosen by is never what it is scored on."""
    drawings = [L.evaluation_set(250, k) for k in range(L.DRAWINGS)]
    assert len({query for drawing in drawings for query in drawing}) == 250 * L.DRAWINGS
    assert [L.drawing_of(drawing[7]) for drawing in drawings] == list(range(L.DRAWINGS))
    assert L.evaluation_set(10, 1) == drawings[1][:10]


def test_drawn_instructions_are_well_formed_and_apart_from_the_held_out():
    rng = random.Random(0)
    drawn = [L.draw(rng) for _ in range(2000)]
    assert not any(map(L.is_held_out, drawn))
    assert set(map(L.kind, drawn)) == set(L.KINDS)
    held = L.evaluation_set(300)
    assert all(map(L.is_held_out, held))
    assert len(set(held)) == 300 and held == L.evaluation_set(300)
    assert abs(sum(L.kind(q) == "numbers" for q in drawn) / 2000 - 0.3) < 0.05
    assert max(len(L.solve(q)) for q in drawn) <= L.MAX_ANSWER


def test_spoiled_queries_have_no_answer_and_wrong_answers_are_wrong():
    rng = random.Random(0)
    for _ in range(500):
        query = L.draw(rng)
        assert L.solve(L.spoil(query, rng)) is None
        assert L.misanswer(query, rng) != L.solve(query)


def test_careless_answers_are_wrong_and_of_two_sorts():
    rng = random.Random(0)
    for _ in range(300):
        query = L.draw(rng)
        assert L.careless(query, rng) != L.solve(query)
    query = 'Take "kobani", reverse it, then write it in capitals.'
    overlooked = [L.careless(query, rng) for _ in range(20)]
    # One step is left out. An instruction with a single step has none that could be left out.
    assert set(overlooked) == {"inabok", "KOBANI"}
    assert len(L.careless("Add 27 and 58.", rng)) in (1, 2)


def test_the_fine_tuning_set_is_the_same_in_every_process():
    """The model is rebuilt from this set, and SPIN learns from it.

    So it must not depend on the order in which Python stores the elements of a set.
    """
    code = (
        "import sys, types, zlib\n"
        # It imports PyTorch, and has no part in the set.
        "sys.modules['support.files'] = types.SimpleNamespace(base_of=None)\n"
        "from tiny import language as L\n"
        "print(zlib.crc32(repr((L.PHRASES, L.fine_tuning_set(300))).encode()))"
    )
    sums = set()
    for seed in "123":
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment,
                              capture_output=True)
        sums.add(done.stdout)
    assert len(sums) == 1 and sums != {b""}
    parts = [part for part, _, _ in L.fine_tuning_set(1000)]
    assert abs(parts.count("solver") / 1000 - 0.70) < 0.05
    assert abs(parts.count("judge") / 1000 - 0.18) < 0.05


def test_grade_is_additive():
    query = 'Take "kobani", reverse it.'  # inabok
    answers = ("", "7 7", "xxxx", "inxyok", "inabo", "inabko", "inabok")
    assert [L.grade(query, answer) for answer in answers] == [2, 3, 3, 5, 5, 6, 7]
    assert L.grade('Take "kobani", fly it.', "inabok") == 1
    assert L.grade("fly", "inabok") == 0


def test_the_tokenizer_splits_as_phrases_does(tiny):
    model, tokenizer = tiny
    rng = random.Random(1)
    for _ in range(200):
        query = L.draw(rng)
        ids = tokenizer.encode(query)
        assert tokenizer.decode(ids) == query
        assert len(ids) == len(L.phrases(query))
