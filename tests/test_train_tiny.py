"""The making of the embedded default, in small."""
import json

import pytest
from conftest import ROOT, command

from model import load
from recipes import train_tiny

SMALL = ("--steps", "2", "--again", "1", "--size", "300", "--batch", "16")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Accuracy is not measured: it takes far longer than three steps."""
    monkeypatch.setattr(train_tiny, "accuracy_log", lambda *_: lambda *figures: print(*figures))
    monkeypatch.setattr(train_tiny, "judge_accuracy", lambda *_: {"exact": 0.5})


def test_a_model_is_made_from_nothing_and_opens(tmp_path):
    """Its tokenizer, template and settings are those of the committed model, to the byte."""
    done = command(train_tiny, tmp_path, *SMALL, "--out", "new")
    assert done.returncode == 0, done.stderr
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (ROOT / "tiny" / name).read_bytes()
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config == json.loads((ROOT / "tiny" / "config.json").read_text())
    model, _ = load(tmp_path / "new")
    assert sum(p.numel() for p in model.parameters()) == 756_224
    again = command(train_tiny, tmp_path, *SMALL, "--out", "new")
    assert again.returncode == 2 and "holds a model already" in again.stderr


def test_bad_settings_are_one_line(tmp_path):
    """Nothing is made."""
    for flags in (["--steps", "0"], ["--lr", "0"], ["--batch", "400", "--size", "300"]):
        done = command(train_tiny, tmp_path, *flags, "--out", "new")
        assert done.returncode == 2 and "must be above zero" in done.stderr
    assert not (tmp_path / "new").exists()
