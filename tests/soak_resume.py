"""A run that is killed at random moments, and started again each time, ends with the model of a run that nobody killed.

    python tests/soak_resume.py [--kills 20] [--seed 0]         some minutes; not a part of the tests
"""
import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
JOB = ("--rates 2,4 --clips 60 --valid-clips 12 --test-clips 10 --audio-steps 20 --video-steps 20 --llm-steps 40 --steps 60 "
       "--save-every 0.01 --snr clean").split()


def start(out):
    argv = [sys.executable, str(ROOT / "train.py"), *JOB, "--out", str(out)]
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many times the run is killed (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    args = parser.parse_args()
    rng, n_kills, others = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        since = time.monotonic()
        assert start(whole).wait() == 0
        seconds = time.monotonic() - since
        print(f"uninterrupted: {seconds:.0f} s", flush=True)
        while n_kills < args.kills:               # a round: from an empty folder to the end, with a kill at every start
            shutil.rmtree(killed, ignore_errors=True)
            done = False
            while not done:
                process = start(killed)
                try:
                    moment = rng.uniform(0.05, 1) * seconds if n_kills < args.kills else None
                    _, errors = process.communicate(timeout=moment)
                    assert process.returncode == 0, errors.decode()[-2000:]
                    done = True
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()
                    n_kills += 1
                    parts = ", ".join(sorted(path.name for path in killed.glob("*.safetensors"))) or "no state"
                    print(f"kill {n_kills} after {moment:.1f} s: {parts}", flush=True)
            same = (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
            others += not same
            left = [path.name for path in killed.rglob(".*") if path.is_file()]
            print(f"the model is {'the same' if same else 'ANOTHER'}; temporary files left: {left or 'none'}", flush=True)
    print(f"{n_kills} kills; {others} models differ")
    return int(others > 0)


if __name__ == "__main__":
    sys.exit(main())
