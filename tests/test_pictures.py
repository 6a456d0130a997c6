"""The pictures of the course show what the project computes."""
import re

import pytest
import torch
from conftest import ROOT, command

from model import pack
from recipes import pictures


@pytest.fixture(scope="module")
def group(tiny):
    """The tokenizer, and the ids that the pictures are drawn of."""
    model, tokenizer = tiny
    return tokenizer, *pictures.encoded(model, tokenizer, pictures.QUERY, pictures.ANSWERS)


def texts_of(svg):
    """The texts of a picture, in order."""
    return re.findall(r"<text [^>]*>([^<]*)</text>", svg)


def test_the_pictures_are_up_to_date(tiny):
    """If not: python recipes/pictures.py"""
    for name, text in pictures.drawn().items():
        assert (ROOT / "docs" / name).read_text() == text, name
        assert f"]({name})" in (ROOT / "docs" / "course.md").read_text() and len(text) < 30_000


def test_the_mask_is_that_of_the_docstring():
    """The row that model.Packed draws: prompt p q, completions a b e, a c e and d e."""
    packed, = pack([[10, 11]], [[[5, 6, 2], [5, 7, 2], [8, 2]]])
    rows = ["".join(" x"[cell] for cell in row).rstrip() for row in pictures.mask_of(packed)[0]]
    assert rows == ["x", "xx", "xxx", "xxxx", "xxx x", "xx   x"]
    assert pictures.owners_of(packed, 2) == [None, None, {0, 1}, {0}, {1}, {2}]


def test_the_mask_picture_fills_what_the_mask_allows(group):
    tokenizer, prompt, completions = group
    svg = pictures.mask_picture(tokenizer, prompt, completions)
    packed, = pack([prompt], [list(dict.fromkeys(map(tuple, completions)))])
    mask = pictures.mask_of(packed)[0]
    drawn = torch.zeros_like(mask)
    for x, y, width in re.findall(r'<rect x="(\d+)" y="(\d+)" width="(\d+)" height="26"', svg):
        i, j = (int(y) - 124) // 26, (int(x) - 108) // 26
        drawn[i, j:j + int(width) // 26] = True
    assert torch.equal(drawn, mask) and 0 < mask.sum() < mask.numel()


def test_the_cache_picture_counts_the_rows_of_the_cache(group):
    """8, 8, 9, 81: two beginnings; then 8 and 9 end, and 81 goes on; then it ends."""
    tokenizer, prompt, completions = group
    texts = texts_of(pictures.cache_picture(tokenizer, prompt, completions))
    assert [text for text in texts if re.fullmatch(r"\d+ rows?", text)] == [
        "2 rows", "3 rows", "1 row"]
    # The packed row: 8 and 81 without their ends, as one branch behind the prompt, then 9.
    after = texts[texts.index(f"the prompt, {len(prompt)} tokens") + 1:]
    P = len(prompt)
    assert after[0::3] == ["8", "1", "9"]
    assert after[1::3] == [f"position {p}" for p in (P, P + 1, P)]
    assert after[2::3] == [f"{P}, last {P + 1}", f"{P + 1}, last {P + 1}", f"{P + 2}, last {P + 2}"]


def test_the_flow_picture_has_the_advantages():
    """By hand: V = .5 and 0, V_Q = .6 and .2; -V + V_Q = .1 and .2, less .15."""
    reward = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    quality = torch.tensor([[0.8, 0.4], [0.2, 0.2]])
    texts = texts_of(pictures.flow_picture(["q", "r"], [["a", "b"], ["c", ""]], reward, quality))
    at = texts.index("q")
    assert texts[at:at + 14] == ["q", "a", "1", "0.80", "+0.70", "b", "0", "0.40", "-0.70",
                                 "means:", "0.50", "0.60", "+0.10", "-0.05"]
    assert texts[at + 14:] == ["r", "c", "0", "0.20", "0.00", "(nothing)", "0", "0.20", "0.00",
                               "means:", "0.00", "0.20", "+0.20", "+0.05"]


def test_the_command_draws_them(tmp_path):
    done = command(pictures, tmp_path, "--out", ".")
    assert done.returncode == 0 and done.stdout.count("drawn:") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.svg", "flow.svg", "mask.svg"]


def test_bad_input_is_one_line(tmp_path):
    done = command(pictures, tmp_path, "--out", "nowhere")
    assert done.returncode == 2 and "--out nowhere: no such folder" in done.stderr
    assert done.stderr.count("\n") == 1
