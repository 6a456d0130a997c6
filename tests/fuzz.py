"""Feed broken files to everything that reads files: `python tests/fuzz.py --inputs 100000`.

A whole file is broken at random and then read. It is broken as bytes (cut, flipped, repeated,
spliced) or as JSON (a value is replaced by an absurd one). A reader may take the file, or raise
UserError. Anything else is a failure, and so is taking more than SECONDS or more than MEMORY. The
inputs that failed are kept in --keep. The result is printed as JSON.
"""
import argparse
import copy
import json
import random
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from safetensors import safe_open

import model as llama
import selfplay
import spin
from support import console, data, learning, report, runs, text, worked

SECONDS, MEMORY = 5, 4 * 2**30
text.TEMPLATE_SECONDS = 1  # the usual limit is longer, and there are a hundred hostile templates
LOOP = "{% for i in range(99999) %}"
ABSURD = [
    None, True, -1, 0, 1, 2.5, 1e308, float("nan"), float("inf"), 10**12, 10**30,
    "", "x" * 1000, "../../etc/passwd", "a\0b", "\ud800", [], {}, [[]], {"a": {}},
    "default", "llama3", "llama", "{{ 1 // 0 }}",
    LOOP + "{% for j in range(99999) %}{% endfor %}{% endfor %}",
    LOOP + "{{ 'x' * 9999 }}{% endfor %}", "{{ messages.append(1) }}", "{%",
]
DEEP = "[" * 100000


def chat(folder):
    tokenizer = text.Tokenizer(folder)
    tokenizer.chat([{"role": "user", "content": "hello <|end|>"}])


def state(folder):
    learning.read_state(folder / runs.CHECKPOINT)


def weights(folder):
    llama.load(folder)


def judge(folder):
    """Compare a worked answer with known ones, whatever it says now."""
    given = worked.final_answer((folder / "answer.txt").read_text(errors="replace"))
    for known in ("#### 18", "\\boxed{(1,2)}", "\\boxed{x^2+1}"):
        worked.same(worked.final_answer(known), given)
        worked.same(given, worked.final_answer(known))


# The file that is broken, and how it is read. All other files of the folder are whole.
READERS = {
    "config.json": weights,
    "generation_config.json": weights,
    "model.safetensors": weights,
    "model.safetensors.index.json": weights,
    "tokenizer.json": chat,
    "tokenizer_config.json": chat,
    "data.jsonl": lambda folder: data.read_data(folder / "data.jsonl"),
    "data.json": lambda folder: data.read_data(folder / "data.json"),
    "data.csv": lambda folder: data.read_data(folder / "data.csv"),
    "answer.txt": judge,
    "instructions.json":
        lambda folder: data.read_instructions(folder / "instructions.json"),
    "metrics.jsonl": lambda folder: report.read_metrics(folder),
    "games.jsonl": lambda folder: report.read_games(folder),
    "settings.json": lambda folder: selfplay.parse_args(["--resume", str(folder)]),
    "old/settings.json": lambda folder: spin.parse_args(["--resume", str(folder / "old")]),
    runs.CHECKPOINT: state,
}


def write_json(path, value):
    path.write_text(json.dumps(value))


def whole(folder):
    """A small model, a run's files and data, all whole."""
    torch.manual_seed(0)
    model, _ = llama.load(ROOT / "tiny")
    raw = model.raw | {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    small = llama.Llama(llama.config_from_json(raw))
    small.raw, small.folder = raw, ROOT / "tiny"
    llama.save(small, folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = list(file.keys())
    write_json(folder / "model.safetensors.index.json", {
        "metadata": {"total_size": 1},
        "weight_map": {name: "shard.safetensors" for name in names}})
    shutil.copy(folder / "model.safetensors", folder / "shard.safetensors")
    (folder / "data.jsonl").write_text(
        '{"prompt": "a", "answer": "b"}\n'
        '{"question": "c", "answer": "d"}\n'
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},'
        ' {"role": "assistant", "content": "v"}]}\n')
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    write_json(folder / "data.json", [
        {"instruction": "a", "input": "b", "output": "c"}, {"conversations": turns},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
         "completion": "b", "system": "c", "level": 1}])
    (folder / "data.csv").write_text('question,answer\n"a, b",1\nc,2\n')
    (folder / "answer.txt").write_text(
        "So 3/4 of $1,234.50 is \\frac{1}{2}, or -5 \\times 10^{3} cm.\n#### 18\n"
        "\\boxed{(1, \\frac{3}{4})} the answer is **x^2 + 2 1/2**")
    write_json(folder / "instructions.json", [
        {"instruction": "a", "dataset": "b"}, {"instruction": "c"}])
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "reward": 0.5}\n'
        '{"step": 2, "reward": 0.25}\n')
    game = {"query": "q", "valid": True, "challenger_advantage": 0.1, "answers": []}
    (folder / "games.jsonl").write_text((json.dumps({"step": 1, "games": [game]}) + "\n") * 3)
    args = vars(selfplay.parse_args(["--model", str(ROOT / "tiny")]))
    write_json(folder / "settings.json", args | {"torch": "2"})
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    learning.save_state(folder / runs.CHECKPOINT, optimizer, torch.Generator(), {"step": 1})
    (folder / "old").mkdir()
    write_json(folder / "old" / "settings.json", {  # as an older version wrote them
        "game": "spin", "lr": 0.1, "lr_late": 0.1, "lam": 1.0, "lam_last": 2.0, "iterations": 3,
        "revision": "v1", "model": "org/tiny", "recompute": True, "clip": 1.0, "torch": "2"})
    shutil.copy(folder / runs.CHECKPOINT, folder / "old")


def broken(data, name, rng):
    """A file's bytes, broken in one to three places."""
    if name.endswith("json") and rng.random() < 0.6:
        value = json.loads(data)
        for _ in range(rng.randint(1, 3)):
            here = value
            while isinstance(here, (dict, list)) and here:
                key = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
                replaceable = not isinstance(here[key], (dict, list)) or not here[key]
                if replaceable or rng.random() < 0.3:
                    if rng.random() < 0.2:
                        del here[key]
                    else:
                        here[key] = copy.deepcopy(rng.choice(ABSURD))
                    break
                here = here[key]
        return json.dumps(value).encode()
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        way = rng.choice(["cut", "flip", "repeat", "delete", "insert", "deep", "number", "head"])
        if way == "cut":
            del data[i:]
        elif way == "flip" and data:
            data[i % len(data)] ^= 1 << rng.randrange(8)
        elif way == "repeat":
            data[i:i] = data[i:min(j, i + 2000)] * rng.randint(1, 5)
        elif way == "delete":
            del data[i:min(j, i + 50)]
        elif way == "insert":
            data[i:i] = rng.randbytes(rng.randint(1, 8))
        elif way == "deep" and rng.random() < 0.1:
            data[i:i] = DEEP.encode()
        elif way == "number":
            data[i:i] = str(rng.choice([10**12, -1, 1e308])).encode()
        elif way == "head":  # a safetensors file begins with the length of its header
            data[:8] = rng.choice([0, 1, 2**31, 2**63, len(data)]).to_bytes(8, "little")
    return bytes(data)


def fuzz(inputs, seed, keep=None):
    """{file: {"inputs", "taken", "refused", "failed"}}, and the first lines of the failures."""
    counts = {name: {"inputs": 0, "taken": 0, "refused": 0, "failed": 0} for name in READERS}
    failures = []
    late = f"more than {SECONDS} seconds"
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        whole(folder)
        originals = {name: (folder / name).read_bytes() for name in READERS}
        for i in range(inputs):
            if i % 10000 == 0 and i:
                print(f"{i} inputs, {len(failures)} failures", file=sys.stderr)
            name = list(READERS)[i % len(READERS)]
            data = broken(originals[name], name, rng)
            (folder / name).write_bytes(data)
            if name.endswith("index.json"):
                (folder / "model.safetensors").unlink()
            counts[name]["inputs"] += 1
            try:
                with console.time_limit(SECONDS, late):
                    READERS[name](folder)
                verdict = "taken"
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # any exception at all is what this test looks for
                text = str(error)
                one_line = isinstance(error, console.UserError) and "\n" not in text
                verdict = "refused" if one_line and text != late else "failed"
                if verdict == "failed":
                    failures.append(f"{name}: {type(error).__name__}: {text[:150]}")
                    if keep:
                        (Path(keep) / f"{len(failures)}-{name.replace('/', '-')}").write_bytes(data)
            counts[name][verdict] += 1
            (folder / name).write_bytes(originals[name])
            (folder / "model.safetensors").write_bytes(originals["model.safetensors"])
    return counts, failures


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of what is broken")
    parser.add_argument("--keep", default=None, help="folder for the inputs that failed")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    began = time.time()
    counts, failures = fuzz(args.inputs, args.seed, args.keep)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({
        "readers": counts, "inputs": args.inputs, "failed": len(failures),
        "minutes": round((time.time() - began) / 60, 1), "peak_gib": round(peak, 2),
        "failures": sorted(set(failures))[:40],
    }, indent=2))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
