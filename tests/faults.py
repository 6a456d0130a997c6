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
        kills, anew, last = 0, 0, ""
        while True:
            resume = any(cut.glob("checkpoint.safetensors*"))
            if not resume and cut.exists():  # killed before its first checkpoint: there is nothing to go on with
                shutil.rmtree(cut)
                anew += 1
            process = start(folder, args.game, *(["--resume", "runs/cut"] if resume else [length, "--run", "cut"]))
            try:
                _, errors = process.communicate(timeout=startup * rng.uniform(0.7, 1.3) if kills < args.kills else None)
                assert process.returncode == 0, errors
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                lines = (cut / "metrics.jsonl").read_text().splitlines() if (cut / "metrics.jsonl").is_file() else []
                last = lines[-1][:14] if lines else ""
                print(f"kill {kills}: {last}", file=sys.stderr)
        print(json.dumps({"game": args.game, "kills": kills, "begun anew, killed before the first checkpoint": anew, "updates": len(left(cut)[2]),
                          "the same bits": left(cut) == left(whole), "minutes": round((time.time() - began) / 60, 1)}, indent=2))
        return left(cut) != left(whole)


if __name__ == "__main__":
    sys.exit(main())
