"""A manifest of 100,000 lines starts in seconds, and training waits little for its clips. Both are measured.

    python tests/soak_manifest.py [--lines 100000] [--source DIR] [--steps 300]         some minutes; not a part of the tests

DIR holds clips like NAME.mp4 with NAME.txt; without it, 200 clips of the synthetic talker are written. The manifest names
them over and over. A manifest of 120 lines is timed too, from the command to the first batch of stage 3, with stages 1
and 2 of two steps each. On a machine that is busy with other work, compare the seconds of CPU.
"""
import argparse
import csv
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from soak_memory import resident  # noqa: E402

N_TEST = 20      # lines of the test split


def write_manifest(folder, source, n_lines):
    """A manifest of so many lines, which names the clips of `source` over and over."""
    clips = [path for path in sorted(source.rglob("*.*")) if path.suffix in (".mp4", ".wav", ".mpg", ".flac")]
    folder.mkdir()
    with (folder / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "text", "split"])
        for i in range(n_lines):
            path = clips[i % len(clips)]
            table.writerow([path.resolve(), path.with_suffix(".txt").read_text(), "test" if i < N_TEST else "train"])


class Timed:
    """Runs train.py on a folder and measures it."""

    def __init__(self, folder, out, argv):
        import train
        self.waits, self.sizes, prefetched = [], [], train.prefetched

        def waiting(*arguments):
            batches = prefetched(*arguments)
            since = time.monotonic()
            for drawn in batches:
                self.waits.append(time.monotonic() - since)
                if len(self.waits) == 1:
                    self.first, self.cpu = time.monotonic(), time.process_time() - began_cpu
                self.sizes.append(resident())
                yield drawn
                since = time.monotonic()
            self.seconds = time.monotonic() - self.first

        train.prefetched, began, began_cpu = waiting, time.monotonic(), time.process_time()
        try:
            assert train.main(["--data", str(folder), "--out", str(out), *argv]) == 0
        finally:
            train.prefetched = prefetched
        self.start = self.first - began


def main():
    from toy.talker import write_talker_clips
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=100_000, help="of the manifest (default %(default)s)")
    parser.add_argument("--source", type=Path, help="folder of clips (default: of the synthetic talker)")
    parser.add_argument("--steps", type=int, default=300, help="of stage 3 (default %(default)s)")
    parser.add_argument("more", nargs="*", help="flags of train.py, after --")
    args = parser.parse_args()
    argv = ["--snr", "clean", *"--clips 12 --audio-steps 2 --video-steps 2".split(), "--ctc-steps", "2", "--llm-steps", "2", "--save-every", "60", *args.more]
    with tempfile.TemporaryDirectory() as folder:
        source = args.source or Path(folder, "clips")
        if not args.source:
            list(write_talker_clips(source, 200, "train", 0))
        write_manifest(Path(folder, "large"), source, args.lines)
        write_manifest(Path(folder, "small"), source, 120)
        for out in "ab":       # the first of these two runs loads what the others find loaded
            small = Timed(Path(folder, "small"), Path(folder, out), [*argv, "--steps", "2"])
        large = Timed(Path(folder, "large"), Path(folder, "c"), [*argv, "--steps", str(args.steps)])
    for name, run in (("120", small), (f"{args.lines:,}", large)):
        print(f"{name:>8} lines: {run.start:.1f} s from the command to the first batch, {run.cpu:.1f} s of CPU")
    waited = sum(large.waits[1:])
    print(f"{len(large.waits)} steps: waited {waited:.1f} s of {large.seconds:.1f} s for batches, {waited / large.seconds:.1%}")
    third = len(large.sizes) // 3
    print("resident MiB, mean of each third of the steps: " + ", ".join(
        f"{sum(large.sizes[i * third:(i + 1) * third]) / third:.0f}" for i in range(3)))
    return int(large.start - small.start >= 5)


if __name__ == "__main__":
    sys.exit(main())
