"""Intervals of 95 %: what the figures of several seeds, on the same instructions, can say.

x [S, n] is one figure for each of S seeds and n instructions, such as 1 where an answer is right.
A gain is the difference of two of them: it is paired by instruction.
`outside`: the share of cases in which an interval may be wrong, 0.05. Of k comparisons each gets
0.05 / k, so that with 95 % all of them hold together (Bonferroni).
"""
import functools
import math
from statistics import NormalDist

import torch


@functools.cache
def student(df, outside=0.05):
    """Student's t: within so many standard errors lies all but `outside` of the distribution.

    df: degrees of freedom. Example: 2 of them, three seeds, give 4.303.
    """
    # With t = sqrt(df) tan(angle), the density of angle is proportional to cos(angle)^(df - 1).
    angle = torch.linspace(0, math.pi / 2, 1_000_001, dtype=torch.float64)
    inside = torch.cumulative_trapezoid(angle.cos() ** (df - 1), angle)
    i = torch.searchsorted(inside / inside[-1], 1 - outside)
    return math.sqrt(df) * math.tan(angle[i + 1])


def seeds_and_items(x, outside=0.05):
    """[mean, low, high] of x [S, n].

    Seeds and items are two sources of chance. The half-width of each is computed, and the two are
    added in squares. For seeds it is Student's t of their means. With one seed, the spread between
    seeds is unknown and left out. A single number has no finite interval.
    """
    S, n = x.shape
    if S == n == 1:
        return [x.item(), -math.inf, math.inf]
    seeds = items = 0.0
    if S > 1:
        seeds = student(S - 1, outside) * x.mean(1).std().item() / math.sqrt(S)
    if n > 1:
        items = NormalDist().inv_cdf(1 - outside / 2) * x.mean(0).std().item() / math.sqrt(n)
    mean, half = x.mean().item(), math.hypot(seeds, items)
    return [mean, mean - half, mean + half]


def verdict(interval, worse_by=0.0):
    """Is a figure above -worse_by? yes or no if its whole interval says so, else not decided."""
    if interval[1] > -worse_by:
        return "yes"
    return "no" if interval[2] < -worse_by else "not decided"


def negated(interval):
    """[mean, low, high] of the same figure with its sign changed."""
    mean, low, high = interval
    return [-mean, -high, -low]


def all_of(*verdicts):
    """The verdict on a claim of several parts: yes if all are yes, no if any is no."""
    if "no" in verdicts:
        return "no"
    return "yes" if set(verdicts) == {"yes"} else "not decided"


# --------------------------------------------------------------------------------------------------
# At which size does a curve reach a level?

def rising(values):
    """The nearest curve, in squares, that never falls: neighbours that fall get their mean.

    Example: 1, 3, 2, 4 -> 1, 2.5, 2.5, 4. (Pool adjacent violators: more data does not harm.)
    """
    blocks = []  # [mean, how many values]
    for value in values:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [[(m * a + n * b) / (m + n), m + n]]
    return [mean for mean, count in blocks for _ in range(count)]


def reached(sizes, curve, level):
    """The size at which a rising curve over sizes reaches a level, on a logarithmic axis.

    0 where it is above the level from the first size on, and inf where it never gets there.
    Example: sizes 1, 4, 16, curve .1, .2, .4, level .3: halfway from 4 to 16, which is 8.
    """
    if level < curve[0]:
        return 0.0
    for i, value in enumerate(curve):
        if value >= level:
            if value == level or i == 0:
                return float(sizes[i])
            part = (level - curve[i - 1]) / (value - curve[i - 1])
            return sizes[i - 1] * (sizes[i] / sizes[i - 1]) ** part
    return math.inf


def worth(sizes, by_size, ours, times=2000):
    """[n, low, high]: how much data is as good as a method, with a 95 % bootstrap interval.

    sizes: K numbers of instructions, rising. by_size: K tensors [seeds, n], right answers of models
    that learnt from so many. ours [seeds, n]: the method's. The curve of means over sizes is made
    to rise, and the size where it reaches ours is read off (see `reached`: 0 and inf are ends).
    Seeds and instructions are drawn anew, with replacement, `times` times. Of one seed nothing can
    be drawn: the interval is then one over instructions alone.
    """
    g, n = torch.Generator().manual_seed(0), ours.shape[1]

    def drawn(count):
        """[times, count]: how often each of `count` things is drawn, as a share of all draws."""
        picks = torch.randint(count, (times, count), generator=g)
        return torch.zeros(times, count).scatter_add_(1, picks, torch.ones(picks.shape)) / count

    def read(curve, level):
        return reached(sizes, rising(curve), level)
    items = drawn(n)  # the same instructions for all models
    means = [((items @ x.T) * drawn(len(x))).sum(1) for x in (*by_size, ours)]  # each [times]
    found = sorted(read(curve, level) for *curve, level in torch.stack(means, 1).tolist())
    middle = read([x.mean().item() for x in by_size], ours.mean().item())
    return [middle, found[int(0.025 * times)], found[math.ceil(0.975 * times) - 1]]
