"""Memory stays flat in 5,000 small steps of stage 3: the resident memory grows by less than 2 % after the first 200.

    python tests/soak_memory.py [--steps 5000]         a quarter of an hour; not a part of the tests

The resident memory is read after each step, and means of 200 steps are compared. From step to step it goes up and down
by 4 %, with the clips that are being read.
"""
import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
JOB = "--rates 2,8 --clips 60 --valid-clips 12 --test-clips 10 --audio-steps 5 --video-steps 5 --llm-steps 5 --snr clean".split()
WINDOW = 200      # steps


def resident():
    """MiB of memory that this process has now."""
    fields = Path("/proc/self/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1]) / 1024


def main():
    import train
    from real.run import Run
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000, help="of stage 3 (default %(default)s)")
    args = parser.parse_args()
    after, looks, means = Run.after, [], []

    def looked_after(run, step):
        after(run, step)
        looks.append(resident())
        if step % WINDOW == 0:
            means.append(sum(looks) / WINDOW)
            looks.clear()
            if step > WINDOW:
                print(f"steps {step - WINDOW:5} to {step:5}: {means[-1]:6.1f} MiB, {means[-1] / means[1] - 1:+.2%}", flush=True)
    Run.after = looked_after
    with tempfile.TemporaryDirectory() as folder:
        code = train.main([*JOB, "--steps", str(args.steps), "--out", f"{folder}/out"])
    assert code == 0
    growth = max(means[1:]) / means[1] - 1
    print(f"the largest mean of {WINDOW} steps is {growth:+.2%} over the first that counts, the last {means[-1] / means[1] - 1:+.2%}")
    return int(growth >= 0.02)


if __name__ == "__main__":
    sys.exit(main())
