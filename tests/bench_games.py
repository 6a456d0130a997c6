"""Every game with a real chat model, all weights and LoRA: seconds a step, and peak memory.

    python tests/smollm2.py              once: fetches the model
    python tests/bench_games.py          or with the folder of another model

Each line is one command, started as a user would, with few small steps. The seconds are a median
over all steps but the first, the memory is the process's peak.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from smollm2 import FOLDER

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STEPS = ("--steps", "3", "--queries", "2", "--answers", "4", "--answer-tokens", "16")
GAMES = {
    "LSP": ("selfplay.py", *STEPS, "--query-tokens", "32", "--task", "a times-table question",
            "--reward", "majority", "--eval-items", "2", "--micro-batch", "1024"),
    "GRPO, math": ("selfplay.py", *STEPS, "--game", "grpo", "--reward", "math", "--data",
                   "questions.jsonl", "--eval-items", "2", "--micro-batch", "1024"),
    "SPIN": ("spin.py", "--data", "questions.jsonl", "--iterations", "1", "--epochs", "1",
             "--pairs", "24", "--batch", "8", "--answer-tokens", "16", "--micro-batch", "1024"),
}


def play(folder, model, flags):
    """(median seconds of a step, peak GiB) of one command. Ends with its error if it has one."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURED, str(ROOT / flags[0]), *flags[1:], "--model", model]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    run = max((folder / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    peak = int(done.stderr.rsplit("peak", 1)[1])
    return statistics.median(row["seconds"] for row in rows[1:]), peak / 2**20


# Runs a file as a command, and says at the end how much memory it had at most (in KiB, on Linux).
MEASURED = """
import atexit, resource, runpy, sys
atexit.register(lambda: print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                              file=sys.stderr))
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main(model=FOLDER):
    """Print a table."""
    if not (model / "config.json").is_file():
        sys.exit(f"{model}: no model; python tests/smollm2.py fetches one")
    print(f"{model.name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}\n")
    print("| game | all weights, s a step | GiB | LoRA (rank 16), s a step | GiB |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = [{"question": f"What is {a} times {b}? Reply with the number only.",
                 "answer": str(a * b)} for a in range(2, 10) for b in range(2, 10)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "questions.jsonl").write_text(lines, encoding="utf-8")
        for name, flags in GAMES.items():
            cells = [f"{x:.1f}" for lora in ((), ("--lora", "16"))
                     for x in play(folder, str(model), (*flags, *lora))]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
