"""A judge that draws its grade: one for each answer, as in the paper.

In LSP (arXiv 2509.07414) the reference writes a verdict on each answer: a reason, then a grade.
rewards.QualityReward takes the mean of all grades that it could give, weighted by how probable each
is: the expected grade. The embedded default gives no reason. Its verdict is one digit, which this
judge draws. On average both pay the same. But this one is noisy: equal answers may get different
grades.

    python selfplay.py --judge recipes/written_grade.py:writes

docs/claims.md says what comes of it.
"""
import sys
import zlib
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import load
from rewards import QualityReward

judge = QualityReward(*load(ROOT / "tiny"))  # the start, frozen: no step is ever taken on it


def writes(queries, answers):
    """Grades [N, G], 0 to 1, of N texts and N lists of G texts. The same games get the same."""
    luck = torch.Generator().manual_seed(zlib.crc32(repr((queries, answers)).encode()))
    different = [list(dict.fromkeys(group)) for group in answers]
    p = judge.chances(queries, different)  # [n, 8]
    # G verdicts on each different answer: one for each time that a group of G may give it.
    points = torch.multinomial(p, len(answers[0]), replacement=True, generator=luck)  # [n, G]
    rows = iter(points.tolist())
    left = [{answer: next(rows) for answer in group} for group in different]
    return [[own[answer].pop(0) / 7 for answer in group] for own, group in zip(left, answers)]
