"""Memory stays flat: 5,000 steps of stage 3 at small size; the resident memory grows by less than 2 % after the first 200.

    python tests/soak_memory.py [--steps 5000]         some minutes; not a part of the tests
"""
import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
JOB = "--rates 2,8 --clips 60 --valid-clips 12 --test-clips 10 --audio-steps 5 --video-steps 5 --llm-steps 5 --snr clean".split()


def resident():
    """Bytes of memory that this process has now."""
    fields = Path("/proc/self/status").read_text().split()
    return 1024 * int(fields[fields.index("VmRSS:") + 1])


def main():
    import train
    from real.run import Run
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000, help="of stage 3 (default %(default)s)")
    args = parser.parse_args()
    after, sizes = Run.after, {}

    def looked_after(run, step):
        after(run, step)
        if step % 200 == 0:
            sizes[step] = resident()
    Run.after = looked_after
    with tempfile.TemporaryDirectory() as folder:
        code = train.main([*JOB, "--steps", str(args.steps), "--out", f"{folder}/out"])
    assert code == 0
    for step, size in sizes.items():
        if step in (200, 400) or step % 1000 == 0:
            print(f"step {step:5}: {size / 2**20:7.1f} MiB, {size / sizes[200] - 1:+.2%}")
    growth = max(sizes.values()) / sizes[200] - 1
    print(f"the largest is {growth:+.2%} over that after 200 steps")
    return int(growth >= 0.02)


if __name__ == "__main__":
    sys.exit(main())
