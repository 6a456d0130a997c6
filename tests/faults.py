"""Kill a run again and again: `python tests/faults.py --kills 50` prints JSON.

One run is played undisturbed. Another with the same seed is killed with SIGKILL at random moments and resumed after each kill, until
it is at its end. Weights, games and metrics (without their seconds) of the two must then be the same, bit for bit.
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
GAMES = {"lsp": ["selfplay.py", "--queries", "2", "--answers", "2", "--save-every", "2", "--lr", "1e-3", "--eval-items", "4", "--steps"],
         "spin": ["spin.py", "--batch", "2", "--epochs", "1", "--iterations", "3", "--save-every", "2", "--eval-items", "4", "--pairs"]}


def start(folder, game, *flags):
    script, *settings = GAMES[game]
    words = flags if "--resume" in flags else [*settings, *flags, "--model", str(ROOT / "tiny"), "--device", "cpu"]
    return subprocess.Popen([sys.executable, str(ROOT / script), *words], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def await_moment(process, metrics, startup, rng):
    """Wait for a random moment: one in four lies before the run's next update, the others in the second after it. Was the process still there then?"""
    size_now = lambda: metrics.stat().st_size if metrics.is_file() else 0
    until, size = time.time() + startup * rng.random() if rng.random() < 0.25 else None, size_now()
    while process.poll() is None and (until is None or time.time() < until):
        if until is None and size_now() > size:
            until = time.time() + rng.random()
        size = min(size, size_now())  # a run that goes on first cuts off what came after its checkpoint
        time.sleep(0.002)
    return process.poll() is None


def left(run):
    timeless = lambda line: {k: v for k, v in json.loads(line).items() if k != "seconds"}
    return ({path.parent.name: path.read_bytes() for path in run.glob("*/model.safetensors")}, (run / "games.jsonl").read_text(),
            [timeless(line) for line in (run / "metrics.jsonl").read_text().splitlines()], (run / "evaluation.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many")
    parser.add_argument("--game", choices=list(GAMES), default="lsp", help="which")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng, length = random.Random(args.seed), str(8 * args.kills)
    with tempfile.TemporaryDirectory() as temporary:
        folder, began = Path(temporary), time.time()
        whole, cut = folder / "runs" / "whole", folder / "runs" / "cut"
        process = start(folder, args.game, length, "--run", "whole")
        while process.poll() is None and not ((whole / "metrics.jsonl").is_file() and (whole / "metrics.jsonl").stat().st_size):
            time.sleep(0.01)
        startup = time.time() - began  # seconds until the first step is there
        assert process.wait() == 0, process.stderr.read()
        kills, anew = 0, 0
        while True:
            resume = any(cut.glob("checkpoint.safetensors*"))
            if not resume and cut.exists():  # killed before its first checkpoint: there is nothing to go on with
                shutil.rmtree(cut)
                anew += 1
            process = start(folder, args.game, *(["--resume", "runs/cut"] if resume else [length, "--run", "cut"]))
            if kills < args.kills and await_moment(process, cut / "metrics.jsonl", startup, rng):
                process.kill()
                process.wait()
                kills += 1
                lines = (cut / "metrics.jsonl").read_text().splitlines() if (cut / "metrics.jsonl").is_file() else []
                print(f"kill {kills}: {len(lines)} updates, {'the last one cut off' if lines and not lines[-1].endswith('}') else 'all whole'}", file=sys.stderr)
            else:
                _, errors = process.communicate()
                assert process.returncode == 0, errors
                break
        print(json.dumps({"game": args.game, "kills": kills, "begun anew, killed before the first checkpoint": anew, "updates": len(left(cut)[2]),
                          "the same bits": left(cut) == left(whole), "minutes": round((time.time() - began) / 60, 1)}, indent=2))
        return left(cut) != left(whole)


if __name__ == "__main__":
    sys.exit(main())
