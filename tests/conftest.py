"""What all tests share: the import path, a small random Llama, and the committed tiny model."""
import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
# Real data that is not part of the project. Tests that need it are skipped where it is missing.
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
# Every machine uses the same number of threads, unless OMP_NUM_THREADS sets another one: two in
# all, be it one process (python -m pytest) or two (-n 2). Then the commands that a worker starts
# take one, too: beside two busy processes, spin.py took twice as long with two. It is set in the
# workers alone, since they inherit what the process that starts them sets.
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
THREADS = os.environ.get("OMP_NUM_THREADS", "1" if IS_WORKER else "2")
torch.set_num_threads(int(THREADS))
if IS_WORKER:
    os.environ["OMP_NUM_THREADS"] = THREADS

import model as llama
from support import console, report, text


@pytest.fixture(scope="session")
def tiny():
    """(model, tokenizer) as committed. A test that changes weights loads a model of its own."""
    return llama.load(ROOT / "tiny")


def first_layers(layers, folder):
    """The committed model without its later layers, in a folder. What it writes makes no sense."""
    for file in (ROOT / "tiny").glob("*.json"):
        shutil.copy(file, folder)
    config = json.loads((ROOT / "tiny" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    weights = {name: weight for name, weight in load_file(ROOT / "tiny/model.safetensors").items()
               if "layers" not in name or int(name.split(".")[2]) < layers}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# For runs of which it does not matter what is said. They take half as long as with the whole model.
_temporary = tempfile.TemporaryDirectory()  # it is gone when Python ends
HALF = first_layers(2, Path(_temporary.name))


def command(module, folder, *flags):
    """Run a module's command in a folder, with these flags, and return a CompletedProcess.

    It behaves as on the command line, but it runs in this process, which saves the time to start
    a new one. No curves are drawn: that would take longer than the few steps of a test. An empty
    file takes the place of the picture.
    """
    def touch(runs, path):
        Path(path).touch()
        return True

    out, err = io.StringIO(), io.StringIO()
    no_picture = mock.patch.object(report, "picture", touch)
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        no_picture,
    ):
        try:
            code = console.run_command(lambda: module.main(list(flags)))
        except SystemExit as stop:  # argparse's
            code = stop.code
    return subprocess.CompletedProcess(flags, code, out.getvalue(), err.getvalue())


def read_lines(path):
    """The values in a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def small_config(**changes):
    """A Llama small enough to compute by hand, as a config.json's dict."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 50,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    } | changes


def random_llama(**changes):
    """A random Llama with small_config(**changes) as its config.json. It can be saved.

    Its tokenizer is that of the committed model. Give it enough ids, or it cannot be loaded again.
    """
    raw = small_config(**changes)
    model = llama.Llama(llama.config_from_json(raw))
    model.raw, model.folder, model.end_ids = raw, ROOT / "tiny", {2}
    return model


@pytest.fixture
def small():
    """A random Llama with 50 tokens. Its weights are large enough for the context to matter."""
    torch.manual_seed(0)
    model = random_llama()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=0.3)
    return model


def copy_tokenizer(folder, **settings):
    """Copy the committed model's tokenizer into a folder. settings: other tokenizer settings."""
    folder.mkdir(exist_ok=True)
    shutil.copy(ROOT / "tiny" / "tokenizer.json", folder)
    committed = json.loads((ROOT / "tiny" / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(committed | settings))
    return folder


def llama3_tokenizer(folder, template, **settings):
    """A Tokenizer with Llama 3's own vocabulary, in a folder, with this chat template.

    The vocabulary is the same for all of them: it is read once.
    """
    if not (SHARED / "llama3_tokenizer").is_dir():
        pytest.skip("Llama 3's vocabulary is not at hand (../shared/data)")
    shutil.copy(SHARED / "llama3_tokenizer" / "tokenizer.json", folder)
    settings |= {"chat_template": template, "bos_token": "<|begin_of_text|>",
                 "eos_token": "<|eot_id|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    vocabulary = llama3_vocabulary()
    with mock.patch.object(text, "_read_tokenizer", lambda path: vocabulary):
        return text.Tokenizer(folder)


@functools.cache
def llama3_vocabulary():
    return text._read_tokenizer(SHARED / "llama3_tokenizer" / "tokenizer.json")


@pytest.fixture(scope="session")
def transformers():
    """The peer library. It is imported only where a test asks for it: that takes seconds."""
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def folder(tmp_path):
    """A copy of the committed model's folder, to be spoiled."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (ROOT / "tiny").glob("*.*"):
        if file.suffix != ".py":
            shutil.copy(file, copy)
    return copy
