"""A judge that answers itself: an answer is as good as it is frequent among the start's own.

LSP's judge reads a query with its answer, and grades both. This one is asked the query alone,
ANSWERS times. An answer's grade is the share of its answers that are the same (self-consistency,
arXiv 2203.11171). So it says nothing of how a query is written, only how sure the start is of an
answer. It can be the judge, beside a referee that knows the truth. Or it can be the referee itself:
then nobody knows the truth, and the start votes, which is frozen and cannot be talked round.

    python selfplay.py --judge recipes/own_answer.py:agrees
    python selfplay.py --reward recipes/own_answer.py:agrees

docs/claims.md says what comes of both.
"""
import sys
import zlib
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import generate, groups, load

ANSWERS, TOKENS = 16, 24
start, tokenizer = load(ROOT / "tiny")  # frozen: no step is ever taken on it


@torch.no_grad()
def agrees(queries, answers):
    """Grades [N, G], 0 to 1, of N texts and N lists of G texts. The same queries get the same."""
    luck = torch.Generator().manual_seed(zlib.crc32("\n".join(queries).encode()))
    room = start.config.context - TOKENS
    prompts = [tokenizer.chat([{"role": "user", "content": q}], room=room) for q in queries]
    ids = generate(start, prompts, ANSWERS, TOKENS, generator=luck).ids  # N x ANSWERS lists
    own = [tokenizer.spoken(tokenizer.decode(answer)) for answer in ids]
    return [[votes.count(answer) / ANSWERS for answer in group]
            for votes, group in zip(groups(own, ANSWERS), answers)]
