"""Memory stays flat: 5,000 steps of stage 3 at small size; the resident memory grows by less than 2 % after the first 200.

    python tests/soak_memory.py [--steps 5000]         some minutes; not a part of the tests

It looks every 20 steps and compares means of 200 steps: what is alive at one moment depends on the clips being read. After
each look glibc gives back the memory that was freed, and a second look shows what is in use. glibc keeps some 100 MiB by
itself. Both numbers are printed. The exit code is that of the resident memory, with what glibc keeps.
"""
import argparse
import ctypes
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
JOB = "--rates 2,8 --clips 60 --valid-clips 12 --test-clips 10 --audio-steps 5 --video-steps 5 --llm-steps 5 --snr clean".split()
LOOK, WINDOW = 20, 200      # steps


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
        if step <= WINDOW or step % LOOK:
            return
        kept = resident()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        looks.append((resident(), kept))
        if step % WINDOW == 0:
            used, kept = (sum(column) / len(looks) for column in zip(*looks))
            means.append((used, kept))
            looks.clear()
            print(f"steps {step - WINDOW:5} to {step:5}: {used:6.1f} MiB in use, {used / means[0][0] - 1:+.2%}; "
                  f"{kept:6.1f} MiB resident, {kept / means[0][1] - 1:+.2%}", flush=True)
    Run.after = looked_after
    with tempfile.TemporaryDirectory() as folder:
        code = train.main([*JOB, "--steps", str(args.steps), "--out", f"{folder}/out"])
    assert code == 0
    in_use, growth = (max(column) / column[0] - 1 for column in zip(*means))
    print(f"the largest mean of memory in use is {in_use:+.2%} over that of the first {WINDOW} steps that count")
    print(f"the largest mean of resident memory is {growth:+.2%} over it")
    return int(growth >= 0.02)


if __name__ == "__main__":
    sys.exit(main())
