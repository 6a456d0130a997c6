"""Kill a run again and again: `python tests/faults.py --kills 50` prints JSON.

One run is played undisturbed. Another run with the same seed is killed with SIGKILL at random
moments, and resumed after each kill, until it is finished. Weights, games and metrics (without
their seconds) of the two runs must then be the same, bit for bit.
"""
import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GAMES = {
    "lsp": ["selfplay.py", "--queries", "2", "--answers", "2", "--save-every", "2",
            "--lr", "1e-3", "--eval-items", "4", "--steps"],
    "spin": ["spin.py", "--batch", "2", "--epochs", "1", "--iterations", "3",
             "--save-every", "2", "--eval-items", "4", "--pairs"],
}


def start(folder, game, *flags):
    script, *settings = GAMES[game]
    words = flags
    if "--resume" not in flags:
        words = [*settings, *flags, "--model", str(ROOT / "tiny"), "--device", "cpu"]
    return subprocess.Popen([sys.executable, str(ROOT / script), *words], cwd=folder,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def size_of(file):
    return file.stat().st_size if file.is_file() else 0


def await_moment(process, metrics, startup, rng):
    """Wait for a random moment, and return whether the process is still running then.

    One moment in four lies before the run's next update, the others in the second after it.
    """
    until, size = None, size_of(metrics)
    if rng.random() < 0.25:
        until = time.time() + startup * rng.random()
    while process.poll() is None and (until is None or time.time() < until):
        if until is None and size_of(metrics) > size:
            until = time.time() + rng.random()
        # A resumed run first cuts off the lines that came after its checkpoint.
        size = min(size, size_of(metrics))
        time.sleep(0.002)
    return process.poll() is None


def left(run):
    """What a run leaves: its weights, games, metrics without their seconds, and evaluation."""
    weights = {path.parent.name: path.read_bytes() for path in run.glob("*/model.safetensors")}
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        row.pop("seconds", None)
    games, evaluation = (run / "games.jsonl").read_text(), (run / "evaluation.json").read_text()
    return weights, games, metrics, evaluation


def report(kills, metrics):
    """Print what the file of metrics holds after a kill."""
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    whole = not lines or lines[-1].endswith("}")
    print(f"kill {kills}: {len(lines)} updates, {'all whole' if whole else 'the last one cut off'}",
          file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many")
    parser.add_argument("--game", choices=list(GAMES), default="lsp", help="which")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng, length = random.Random(args.seed), str(8 * args.kills)
    with tempfile.TemporaryDirectory() as temporary:
        folder, began = Path(temporary), time.time()
        whole, cut = folder / "runs" / "whole", folder / "runs" / "cut"
        process = start(folder, args.game, length, "--run", "whole")
        while process.poll() is None and not size_of(whole / "metrics.jsonl"):
            time.sleep(0.01)
        startup = time.time() - began  # seconds until the first step is there
        assert process.wait() == 0, process.stderr.read()
        kills, anew = 0, 0
        while True:
            resume = any(cut.glob("checkpoint.safetensors*"))
            if not resume and cut.exists():  # killed before its first checkpoint: begin again
                shutil.rmtree(cut)
                anew += 1
            flags = ["--resume", "runs/cut"] if resume else [length, "--run", "cut"]
            process = start(folder, args.game, *flags)
            if kills < args.kills and await_moment(process, cut / "metrics.jsonl", startup, rng):
                process.kill()
                process.wait()
                kills += 1
                report(kills, cut / "metrics.jsonl")
            else:
                _, errors = process.communicate()
                assert process.returncode == 0, errors
                break
        same = left(cut) == left(whole)
        print(json.dumps({
            "game": args.game, "kills": kills,
            "begun anew, killed before the first checkpoint": anew,
            "updates": len(left(cut)[2]), "the same bits": same,
            "minutes": round((time.time() - began) / 60, 1),
        }, indent=2))
        return not same


if __name__ == "__main__":
    sys.exit(main())
