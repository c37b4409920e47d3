"""python tests/fuzz_media.py [--count 2000] [--seed 0]: read media files that were damaged at random.

Each must be read, or refused with a ClipError, within 30 s and 2 GB, ffmpeg's memory included. A file that fails this
is kept and named, and the exit code is 1. This is not part of the default test run: it takes some minutes.
"""
import argparse
import multiprocessing
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from conftest import ffmpeg
from tqdm import tqdm

from data import ClipError
from real import media
from real.clips import read_pieces
from toy.talker import talker_clip

SECONDS, GIGABYTES = 30, 2
KINDS = {"mp4": "-c copy", "front.mp4": "-c copy -movflags faststart", "mkv": "-c copy", "ts": "-c copy",
         "mov": "-c:v mpeg4 -c:a pcm_s16le", "avi": "-c:v mpeg4 -c:a mp3", "mpg": "-c:v mpeg2video -q:v 3 -c:a mp2",
         "webm": "-c:v vp8 -b:v 300k -c:a libopus", "wav": "-vn", "flac": "-vn", "mp3": "-vn",
         "ogg": "-vn -c:a libvorbis"}


def originals(folder):
    """A clip of the synthetic talker in every container -> paths."""
    clip = talker_clip(("train", 0, 0, 32, True))
    media.write_mp4(folder / "original.mp4", clip.frames, clip.wave)
    for kind, options in KINDS.items():
        ffmpeg("-i", folder / "original.mp4", *options.split(), folder / f"clip.{kind}")
    return sorted(folder.glob("clip.*"))


def mutate(content, other, rng):
    """Bytes with 1 to 8 mutations. Half of these are in the first kilobyte, where the headers are."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(min(len(content), 1024) if rng.random() < 0.5 else len(content))
        n = min(rng.choice((1, 2, 4, 16, 256, 4096)), len(content) - at)
        kind = rng.randrange(8)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at:at + n] = rng.randbytes(n)
        elif kind == 2:
            content[at:at + n] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * n
        elif kind == 3:
            del content[at:at + n]
        elif kind == 4:
            content[at:at] = content[at:at + n] * rng.choice((1, 2, 50))
        elif kind == 5:
            content[at:at + n] = other[at:at + n]
        elif kind == 6:
            del content[at:]
        else:
            number = rng.choice((0, 1, 2 ** 31 - 1, 2 ** 32 - 1, rng.randrange(2 ** 32)))
            content[at:at + 4] = number.to_bytes(4, rng.choice(("big", "little")))
        content = content or bytearray(1)
    return bytes(content)


def late(*_):
    raise TimeoutError(f"more than {SECONDS} s")


def peak():
    """The most memory, in gigabytes, that this process or any ffmpeg that it started has ever used."""
    processes = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return max(resource.getrusage(process).ru_maxrss for process in processes) / 2 ** 20


def read(i, paths, folder, seed):
    """Make mutant number i and read it -> the result ("read", "refused" or a failure), its path, the peak of memory."""
    rng = random.Random(f"{seed} {i}")
    source, other = rng.choice(paths), rng.choice(paths)
    mutant = folder / f"mutant{i:05}.{source.name.rpartition('.')[2]}"
    mutant.write_bytes(mutate(source.read_bytes(), other.read_bytes(), rng))
    before = peak()
    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        longest = rng.choice((None, 2.))
        pieces = list(read_pieces(media.probe(mutant), longest, box="all"))
        result = "read" if pieces else "nothing was read, and no error was raised"
    except ClipError as error:
        result = "refused" if str(error).count("\n") == 0 and str(mutant) in str(error) else f"raised {error!r}"
    except BaseException:
        result = traceback.format_exc()
    finally:
        signal.alarm(0)
    used = peak()
    if used > max(GIGABYTES, before):
        result = f"{used:.1f} GB of memory"
    if result in ("read", "refused"):
        mutant.unlink()
    return result, mutant, used


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="mutants (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    args = parser.parse_args()
    folder, counts, max_used = Path(tempfile.mkdtemp(prefix="fuzz")), Counter(), 0
    task = partial(read, paths=originals(folder), folder=folder, seed=args.seed)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as workers:
        for result, mutant, used in tqdm(workers.map(task, range(args.count)), "fuzz", args.count, mininterval=5):
            counts[result if result in ("read", "refused") else "failed"] += 1
            max_used = max(max_used, used)
            if result not in ("read", "refused"):
                tqdm.write(f"{mutant}: {result}")
    results = ", ".join(f"{n} {result}" for result, n in counts.items())
    print(f"{args.count} mutants of seed {args.seed}: {results}; at most {max_used:.2f} GB")
    if not counts["failed"]:
        shutil.rmtree(folder)
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
