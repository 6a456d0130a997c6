"""The exercises of the course: each check knows the right function from three typical mistakes."""
import importlib.util
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, command

from support.console import UserError

FOLDER = ROOT / "docs" / "exercises"


def load_check(folder=FOLDER):
    """The module check.py of a folder."""
    spec = importlib.util.spec_from_file_location("check", folder / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = load_check()


def grpo(reward, mean, std):
    return (reward - mean) / (std + 1e-4)


def pair_sums(lp, ref):
    return (lp - ref)[:, 0] - (lp - ref)[:, 1]


def causal(last):
    return torch.ones(last.shape[1], last.shape[1], dtype=torch.bool).tril().expand(
        len(last), -1, -1)


def places(last):
    return torch.arange(last.shape[1])[:, None]  # [T, 1]: of who looks


def wrong_centre(R, Q):
    paid = -R.mean(1) + Q.mean(1)
    return R + Q - (R + Q).mean(), paid - paid.mean()


def wrong_sign(R, Q):
    paid = R.mean(1) + Q.mean(1)
    return R + Q - (R + Q).mean(1, keepdim=True), paid - paid.mean()


def without_quality(R, Q):
    paid = -R.mean(1) + Q.mean(1)
    return R - R.mean(1, keepdim=True), paid - paid.mean()


WEIGHTS = torch.arange(8.0) / 7
MISTAKES = {
    1: {"causal alone": causal,
        "it looks ahead": lambda last: places(last) <= last[:, None, :],
        "not at the last one": lambda last: causal(last) & (places(last) < last[:, None, :])},
    2: {"the likeliest grade": lambda x, d: x[:, d].argmax(-1) / 7.0,
        "among all tokens": lambda x, d: x.softmax(-1)[:, d] @ WEIGHTS,
        "in points": lambda x, d: 7 * x[:, d].softmax(-1) @ WEIGHTS},
    3: {"the mean of the whole batch": lambda R: grpo(R, R.mean(), R.std(1, correction=0)[:, None]),
        "torch's own deviation": lambda R: grpo(R, R.mean(1, keepdim=True), R.std(1)[:, None]),
        "nothing added to a deviation of 0": lambda R: (
            (R - R.mean(1, keepdim=True)) / R.std(1, correction=0)[:, None])},
    4: {"centred over the batch": wrong_centre, "the wrong sign": wrong_sign,
        "no quality for the Solver": without_quality},
    5: {"the wrong way round": lambda pi, ref: (pi - ref).exp() - (pi - ref) - 1,
        "the plain log-ratio": lambda pi, ref: pi - ref,
        "without the 1": lambda pi, ref: (ref - pi).exp() - (ref - pi)},
    6: {"paid where nobody is right": lambda R: 1 - R.mean(1),
        "the share of right answers": lambda R: R.mean(1),
        "of the whole batch": lambda R: ((1 - R.mean()) * (R.mean() > 0)).expand(len(R))},
    7: {"without the opponent": lambda lp, ref, lam: F.softplus(-lam * (lp[:, 0] - lp[:, 1])),
        "the wrong sign": lambda lp, ref, lam: F.softplus(lam * pair_sums(lp, ref)),
        "it overflows": lambda lp, ref, lam: torch.log1p(torch.exp(-lam * pair_sums(lp, ref)))},
}


@pytest.mark.parametrize("number", check.EXERCISES)
def test_the_projects_own_function_is_right(number):
    right, text = check.mark(number, check.EXERCISES[number].right)
    assert right and text.endswith(f"right, on {len(check.EXERCISES[number].cases)} inputs")


@pytest.mark.parametrize("number, name", [(n, name) for n in MISTAKES for name in MISTAKES[n]])
def test_a_typical_mistake_is_seen(number, name):
    right, text = check.mark(number, MISTAKES[number][name])
    assert not right and "The smallest input on which it is wrong" in text
    assert "expected" in text and "yours" in text and "failed" not in text, text


def test_each_exercise_has_three_mistakes_and_inputs_that_grow():
    assert set(MISTAKES) == set(check.EXERCISES) and all(len(m) == 3 for m in MISTAKES.values())
    for exercise in check.EXERCISES.values():
        sizes = [sum(x.numel() for x in case if isinstance(x, torch.Tensor))
                 for case in exercise.cases]
        assert sizes == sorted(sizes)


def test_the_right_values_by_hand():
    """The oracles are the project's functions; these are their values worked out by hand."""
    def right(number, *values):
        return check.EXERCISES[number].right(*check.tensors(*values))
    assert right(3, [[1.0, 0.0, 0.0]]).tolist() == [pytest.approx([1.4139, -0.70696, -0.70696],
                                                                  abs=1e-4)]
    a_sol, a_ch = right(4, [[1.0, 0.0, 0.0, 1.0], [0.0] * 4], [[0.5] * 4, [0.1] * 4])
    assert a_sol.tolist() == [pytest.approx([0.5, -0.5, -0.5, 0.5]), pytest.approx([0.0] * 4)]
    assert a_ch.tolist() == pytest.approx([-0.05, 0.05])  # -0.5 + 0.5 = 0, and 0 + 0.1
    assert right(5, [-1.0], [-2.0]).tolist() == pytest.approx([0.367879], abs=1e-5)
    assert right(1, [[3, 3, 2, 3]]).int().tolist() == [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0],
                                                        [1, 1, 0, 1]]]
    lp, ref = check.tensors([[-1.0, -3.0]], [[-2.0, -2.0]])  # m = 1 - (-1) = 2
    assert check.EXERCISES[7].right(lp, ref, 1.0).tolist() == pytest.approx([0.126928], abs=1e-5)
    assert right(2, [[0.0] * 8], list(range(8))).tolist() == pytest.approx([0.5])
    assert right(6, [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).tolist() == pytest.approx([2 / 3, 0.0])


def test_the_mask_is_the_one_of_a_packed_row():
    """The docstring of model.Packed draws this row."""
    import model
    packed, = model.pack([[10, 11]], [[[5, 6, 2], [5, 7, 2], [8, 2]]])
    mask = check.packed_mask(packed.last)[0].int().tolist()
    assert mask == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0],
                    [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1]]


def test_the_files_wait_for_an_answer(tmp_path):
    """As committed, nothing is solved, and the exit code says so."""
    done = command(check, tmp_path)
    assert done.returncode == 1 and done.stdout.count("still to be done") == len(check.EXERCISES)


@pytest.fixture
def solved(tmp_path):
    """A copy of the folder to be worked in; its check.py marks the files there."""
    folder = tmp_path / "docs" / "exercises"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize("body, code, says", [
    ("return (log_ref - log_pi).exp() - (log_ref - log_pi) - 1", 0, "exercise 5, k3: right, on 4"),
    ("return log_pi - log_ref", 1, "    expected  tensor([0.3679])\n    yours     tensor([1.])"),
    ("return torch.zeros(())", 1, "log_pi    tensor([-1.])"),
    ("return 0.0", 1, "yours     0.0"),
    ("return log_pi, log_ref", 1, "yours     tensor([-1.]), tensor([-1.])"),
    ("log_pi += 1; return 1 / 0", 1, "ZeroDivisionError: division by zero (5_kl.py, line 12)")])
def test_a_file_is_marked(solved, tmp_path, body, code, says):
    path = solved / "5_kl.py"
    path.write_text(path.read_text().replace("    ...\n", f"    {body}\n"))
    done = command(load_check(solved), tmp_path, "5")
    assert done.returncode == code and says in done.stdout, done.stdout + done.stderr
    assert not done.stderr


def test_a_file_that_is_no_python_is_one_line(solved, tmp_path):
    (solved / "5_kl.py").write_text("def k3(:\n")
    done = command(load_check(solved), tmp_path, "5")
    assert done.returncode == 2 and "SyntaxError" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [("8",), ("0",), ("x",), ("1", "2"), ("--all",)])
def test_bad_input_is_one_line(tmp_path, words):
    done = command(check, tmp_path, *words)
    assert done.returncode == 2 and "1 to 7" in done.stderr and done.stderr.count("\n") == 1


def test_an_unknown_exercise_is_refused_in_a_notebook():
    with pytest.raises(UserError, match="no exercise 8"):
        check.check(8)


def test_help_says_what_it_is(tmp_path):
    done = command(check, tmp_path, "-h")
    assert done.returncode == 0 and done.stdout.startswith("usage: check.py")
