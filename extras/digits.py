"""Strings of digits spoken by real people, cut from the recordings of the Free Spoken Digit Dataset.

    python -m extras.digits RECORDINGS OUT        RECORDINGS: the dataset's folder of {digit}_{talker}_{take}.wav
"""
import argparse
import random
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from data import ClipError
from real.script import in_one_line, run_script

DIGITS = "zero one two three four five six seven eight nine".split()
RATE = 8000  # Hz
SPLITS = {"test": (range(0, 5), 200), "train": (range(5, 50), 800)}  # which takes are used, for how many clips


def cut_digit_strings(recordings, out, talkers, seed):
    """Recordings -> flac and txt files in out/train (800 clips) and out/test (200). Raises ClipError.

    A clip is 3 to 6 digits of one talker, 40 to 160 ms apart. The splits have no takes and no strings in common."""
    rng, test_strings = random.Random(seed), set()
    for split, (takes, n_clips) in SPLITS.items():
        (out / split).mkdir(parents=True, exist_ok=True)
        for i in tqdm(range(n_clips), split, leave=False):
            talker, digits = rng.choice(talkers), None
            while digits is None or (split == "train" and digits in test_strings):
                digits = tuple(rng.choices(range(10), k=rng.randint(3, 6)))
            if split == "test":
                test_strings.add(digits)
            waves = [np.zeros(int(rng.uniform(.08, .2) * RATE))]
            for digit in digits:
                wave = read_recording(recordings / f"{digit}_{talker}_{rng.choice(takes)}.wav")
                waves.append(wave / (np.abs(wave).max() + 1e-6) * rng.uniform(.3, .8))
                waves.append(np.zeros(int(rng.uniform(.04, .16) * RATE)))
            name = out / split / f"{talker}_{i:04d}"
            soundfile.write(name.with_suffix(".flac"), np.concatenate(waves), RATE)
            name.with_suffix(".txt").write_text(" ".join(DIGITS[digit] for digit in digits) + "\n")


def read_recording(path):
    """A recording of one digit -> (samples,). Raises ClipError."""
    if not path.is_file():
        raise ClipError(f"{path}: no such recording; RECORDINGS is that dataset's folder of wav files")
    wave, rate = soundfile.read(path)
    if rate != RATE or wave.ndim != 1:
        raise ClipError(f"{path}: {rate} Hz, {wave.ndim} axes; these recordings are {RATE} Hz, mono")
    return wave


@in_one_line("digits.py", ClipError, OSError, soundfile.LibsndfileError)
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path, help="the dataset's folder of {digit}_{talker}_{take}.wav")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--talkers", default="george,jackson,nicolas,theo", help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default %(default)s)")
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error("--seed must be 0 or more")
    cut_digit_strings(args.recordings, args.out, args.talkers.split(","), args.seed)


if __name__ == "__main__":
    run_script(main)
