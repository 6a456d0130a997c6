"""What all tests share: the repository on the path, a small random Llama, and the committed tiny one."""
import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"  # real data that is not part of the project; what needs it is skipped without it
sys.path.insert(0, str(ROOT))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))  # as many for everyone; fewer where others need the cores

import evaluate  # noqa: E402
import model as llama  # noqa: E402


@pytest.fixture(scope="session")
def tiny():
    """(model, tokenizer) as committed; tests that change weights load their own."""
    return llama.load(ROOT / "tiny")


def command(module, folder, *flags):
    """A module's command in a folder, as from the command line but in this process: a CompletedProcess. Saves the start of one.

    Curves are not drawn, as that takes longer than the few steps of a test: there is an empty file in their place.
    """
    out, err = io.StringIO(), io.StringIO()
    no_picture = mock.patch.object(evaluate, "draw", lambda runs, path: Path(path).touch() or True)
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), no_picture:
        try:
            code = llama.run_command(lambda: module.main(list(flags)))
        except SystemExit as stop:  # argparse's
            code = stop.code
    return subprocess.CompletedProcess(flags, code, out.getvalue(), err.getvalue())


def small_config(**changes):
    """A Llama small enough to compute by hand, as a config.json's dict."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | changes


@pytest.fixture
def small():
    """A random Llama with 50 tokens, whose weights are large enough for the context to matter."""
    torch.manual_seed(0)
    raw = small_config()
    model = llama.Llama(llama.Config.from_json(raw), raw)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=0.3)
    model.end_ids = {2}
    return model
