"""Clips: where they come from and how they become batches.

A clip is sound, lips or both, with what is said. It comes from the synthetic talker (talker.py) or from a file:

    python data.py --out clips --count 8      mp4 clips of the synthetic talker with their transcripts
    python data.py check DIR                  what a folder of clips holds and which of them cannot be used (folders.py)
    python data.py fsdd RECORDINGS OUT        digit strings cut from the Free Spoken Digit Dataset, real voices
"""
import argparse
import json
import multiprocessing
import os
import random
import re
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import count as endless, islice
from pathlib import Path

import numpy as np
import soundfile
import tiktoken
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import media
import mouth
import weights
from encoders import FPS, HOP_LENGTH, SAMPLE_RATE, SAMPLES_PER_FRAME, compress, mel_power
from media import MAX_SECONDS, MIN_FRAMES, ClipError, shown
from talker import SPLITS, random_job, synthesize
from weights import write_whole


@dataclass(frozen=True)
class Clip:
    """One utterance. `aligned` is [(phoneme, end in seconds)] where the talker knows it; real clips have None."""
    name: str
    text: str
    wave: np.ndarray | None = None       # (samples,) float32 in -1..1 at 16 kHz
    frames: np.ndarray | None = None     # (T, H, W) uint8 at 25 fps
    mel: np.ndarray | None = None        # (M, frames) float16, log10 of the mel powers of `wave`
    aligned: tuple | None = None

    @property
    def streams(self):
        return tuple(s for s, x in (("audio", self.mel), ("video", self.frames)) if x is not None)

    @property
    def duration(self):
        """Seconds."""
        return len(self.frames) / FPS if self.mel is None else self.mel.shape[1] / (SAMPLE_RATE // HOP_LENGTH)


def talker_clip(job):
    """(part, index, seed, size, keep_wave) -> that clip of the synthetic talker; see talker.py."""
    part, index, seed, size, keep_wave = job
    text, person, delivery = random_job(part, index, seed)
    wave, frames, aligned = synthesize(text, person, delivery, size)
    return with_mel(Clip(f"talker{person:04d}_{delivery:05d}", text, wave, frames, aligned=aligned), keep_wave)


def talker_clips(counts, seed, size=32):
    """{part: how many} -> {part: so many clips of its talkers and sentences}, the same however many processes make them.
    Training's have no waves: its babble is cheaper, see `noisy_power`."""
    jobs = [(part, i, seed, size, part != "train") for part, count in counts.items() for i in range(count)]
    n_workers = min(8, len(jobs), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    with processes(n_workers, 1) as workers:
        made = iter(tqdm(workers.map(talker_clip, jobs, chunksize=20), "clips", len(jobs), leave=False))
        return {part: list(islice(made, count)) for part, count in counts.items()}


def processes(count, threads):
    """A pool of worker processes of `threads` threads each; one that dies is an error, not a wait without end."""
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,))


# --- sound as training sees it ---------------------------------------------------------------------------------------

def with_mel(clip, keep_wave=True, n_mels=80):
    """The clip with log10 mel powers beside its wave, or in its place (half the memory); as many bands as it had before."""
    if clip.wave is None:
        return clip
    mel = mel_power(torch.from_numpy(clip.wave), n_mels if clip.mel is None else len(clip.mel)).clamp(min=1e-10).log10().half().numpy()
    return replace(clip, mel=mel, wave=clip.wave if keep_wave else None)


def add_babble(wave, voices, snr_db, rng):
    """wave + the sum of other people's voices (waves, looped from random points) at exactly `snr_db` over the clip."""
    babble = np.zeros_like(wave)
    for voice in voices:
        start = rng.randrange(len(voice))
        babble += np.resize(np.roll(voice, -start), len(wave)) / (np.sqrt(np.mean(voice ** 2)) + 1e-9)
    gain = np.sqrt(np.mean(wave ** 2) / (np.mean(babble ** 2) + 1e-20)) * 10 ** (-snr_db / 20)
    return wave + np.float32(gain) * babble


def in_babble(clip, snr_db, voices, n_voices=4):
    """The clip in the babble of `n_voices` of the `voices` (clips with waves), the same at every call; None is no noise."""
    if snr_db is None or clip.mel is None:
        return clip
    rng = random.Random(f"{clip.name} {snr_db}")
    others = [other.wave for other in rng.sample(voices, min(n_voices + 1, len(voices))) if other is not clip]
    if not others:
        raise ClipError("babble is made of other clips' voices, and there is no other clip here: use --snr clean")
    return with_mel(replace(clip, wave=add_babble(clip.wave, others[:n_voices], snr_db, rng)))


def noisy_power(power, voices, rng):
    """Training's cheap babble: mel powers of 2 to 5 other clips, added at -7 to 15 dB. power (M, frames) -> the same."""
    babble = torch.zeros_like(power)
    for clip in rng.sample(voices, min(rng.randint(2, 5), len(voices))):
        voice = 10 ** torch.from_numpy(clip.mel).float()
        where = (torch.arange(power.shape[1]) + rng.randrange(voice.shape[1])) % voice.shape[1]
        babble += voice[:, where] / voice.mean()
    return power + babble * (power.mean() / babble.mean() * 10 ** (-rng.uniform(-7, 15) / 10))


def at_pace(x, pace):
    """x (T, ...) -> (T * pace, ...), each moment the nearest one of x."""
    return x[(torch.arange(round(len(x) * pace)) / pace).long()] if pace != 1 else x


def batch(clips, streams, rng=None, voices=()):
    """Clips -> {stream: (x, lengths)} as the model reads them, zero-padded: audio (B, M, frames), video (B, 1, T, H, W).

    With a random.Random `rng` they are augmented: babble of `voices` (clips with sound), no high frequencies, masks in time and
    frequency; mouths shifted and mirrored, frames dropped as by a slower camera. Clips without alignment (real ones, of which there are few) get less babble and another pace."""
    features = {}
    paces = [rng.uniform(0.85, 1.15) if rng and not clip.aligned else 1 for clip in clips]
    if "audio" in streams:
        rows = []
        for clip, pace in zip(clips, paces):
            power = 10 ** torch.from_numpy(clip.mel).float()
            if rng and voices and rng.random() < (0.5 if clip.aligned else 0.25):
                power = noisy_power(power, voices, rng)
            if rng and rng.random() < 0.08:
                power[int(len(power) * rng.uniform(0.78, 1)):] = 0  # as sampled at 8 to 16 kHz
            mel = compress(power)
            if rng:
                band, moment = rng.randrange(mel.shape[0] - 10), rng.randrange(mel.shape[1])
                mel[band:band + rng.randrange(10)] = 0
                mel[:, moment:moment + rng.randrange(12)] = 0
            rows.append(at_pace(mel.T, pace))
        features["audio"] = pad_sequence(rows, True).mT.contiguous(), torch.tensor([len(row) for row in rows])
    if "video" in streams:
        rows = []
        for clip, pace in zip(clips, paces):
            frames = at_pace(torch.from_numpy(clip.frames), pace)
            if rng and rng.random() < 0.1:
                frames = frames[[max(0, t - (rng.random() < 0.2)) for t in range(len(frames))]]
            if rng:
                frames = frames.roll((rng.randint(-2, 2), rng.randint(-2, 2)), (1, 2)).flip([2] * (rng.random() < 0.5))
            rows.append(frames.float() / 255)
        features["video"] = pad_sequence(rows, True)[:, None], torch.tensor([len(row) for row in rows])
    return features


def to(device, features):
    """Move features to a device."""
    return {stream: (x.to(device), lengths.to(device)) for stream, (x, lengths) in features.items()}


# --- text ------------------------------------------------------------------------------------------------------------

def normalize(text):
    """What training, WER and transcripts share: lower case, letters, digits and apostrophes, single spaces."""
    return " ".join(re.sub(r"[^\w']|_", " ", text.lower().replace("’", "'")).split())


SPECIAL_TOKENS = ("<bos>", "<eos>", "<transcribe>")  # the last is the whole prompt


def make_tokenizer(words):
    """A tiktoken Encoding of <bos>, <eos>, the prompt, all bytes, and each word with its leading space as one token."""
    pieces = [bytes([b]) for b in range(256)] + [f" {word}".encode() for word in words]
    return tiktoken.Encoding("mome", pat_str=r" ?\S+|\s+", mergeable_ranks={piece: i for i, piece in enumerate(pieces)},
                             special_tokens={name: len(pieces) + i for i, name in enumerate(SPECIAL_TOKENS)})


def common_words(texts, most=4096):
    """The words of these texts, the commonest first, then by alphabet."""
    counts = Counter(word for text in texts for word in text.split())
    return sorted(counts, key=lambda word: (-counts[word], word))[:most]


def save_tokenizer(words, folder):
    """Write what `load_tokenizer` needs: the words, in the order of their ids."""
    text = json.dumps({"words": list(words)}) + "\n"
    write_whole(Path(folder) / "tokenizer.json", lambda path: path.write_text(text, "utf-8"))


def load_tokenizer(folder):
    """The tokenizer of the checkpoint, or of the HF model, in `folder`; its `encode` adds no special tokens."""
    path = Path(folder, "tokenizer.json")
    ours = path.is_file() and weights.read_json(path).get("words")
    return make_tokenizer(ours) if ours else weights.read_tokenizer(folder)


# --- real clips ------------------------------------------------------------------------------------------------------

def read_pieces(path, longest, size=32, text="", n_mels=80, streams=("audio", "video"), box=None, cache=None):
    """Yield (start in seconds, Clip) of the pieces of any media file, none longer than `longest` seconds, parted at pauses; None: the
    whole file as one. Its mouths at (size, size), see mouth.py; a stream that it lacks, or that is silent, is None.

    Raises ClipError. Where ffmpeg has read past some damage it is a ClipError for a whole, and a note for pieces."""
    source, steps, n_frames = media.probe(path), round((longest or MAX_SECONDS + 1) * FPS), 0
    wanted = ((i, i + steps) for i in endless(0, steps))
    level = media.loudness(source) if longest and source.sound else []
    if len(level) and max(level) < -80:
        source, level = replace(source, sound=False), []
    only = media.only(source, streams)
    if longest and not source.sound and source.seconds > longest:
        with closing(mouth.mouths(only, size, box, cache)) as frames:
            level = media.motion(frames)
    wanted, source = media.spans(level, steps) if len(level) > steps else wanted, only
    with ExitStack() as stack:
        wave = media.samples(stack.enter_context(media.sound(source))) if source.sound else None
        frames = stack.enter_context(closing(mouth.mouths(source, size, box, cache))) if source.picture else None
        for start, heard, seen in media.pieces(wave, frames, wanted):
            heard = None if not longest and heard is not None and np.abs(heard).max() < 1e-4 else heard
            n_frames = start + max(0 if seen is None else len(seen), 0 if heard is None else len(heard) // SAMPLES_PER_FRAME)
            if heard is not None or seen is not None:
                if n_frames < MIN_FRAMES:
                    break
                yield start / FPS, with_mel(Clip(str(path), text, heard, seen), n_mels=n_mels)
    if n_frames < MIN_FRAMES:
        raise ClipError(f"{shown(path)}: " + (f"{n_frames / FPS:.2f} s long, too short for a word" if n_frames else "its sound is silent"
                                              if media.probe(path).sound else "no picture in it can be read"))
    if source.complaints and not longest:
        raise ClipError(f"{shown(path)}: damaged; ffmpeg says: {source.complaints[0]}")
    if source.complaints:
        media.note(f"{shown(path)}: read, but damaged; ffmpeg says: {source.complaints[0]}")


def read_clip(path, **how):
    """A media file of at most 30 s -> Clip; `how` and errors: see `read_pieces`."""
    (_, clip), *more = read_pieces(path, None, **how)
    if more or clip.duration > MAX_SECONDS:
        raise ClipError(f"{shown(path)}: longer than {MAX_SECONDS} s; cut it into pieces")
    return clip


# --- writing clips ---------------------------------------------------------------------------------------------------

def write_clip(clip, path):
    """Write a clip as mp4 with its transcript beside it, each whole or not at all."""
    write_whole(Path(path).with_suffix(".txt"), lambda temporary: temporary.write_text(clip.text + "\n"))
    media.write_mp4(path, clip.frames, clip.wave)


def write_talker_clips(out, count, part, seed, size=96):
    """Write `count` clips of this part's talkers and sentences as NAME.mp4 and NAME.txt; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in tqdm(range(count), "writing clips", leave=False):
        clip = talker_clip((part, i, seed, size, True))
        paths.append(out / f"sample{i + 1}_{clip.name}.mp4")
        write_clip(clip, paths[-1])
    return paths


DIGITS = "zero one two three four five six seven eight nine".split()


def cut_digit_strings(recordings, out, talkers, seed):
    """Free Spoken Digit Dataset ({digit}_{talker}_{take}.wav) -> out/train (800) and out/test (200): flac and txt.

    Strings of 3 to 6 digits of one talker, 40 to 160 ms apart; the test part has other takes and no string in common."""
    rng, tested = random.Random(seed), set()
    for part, takes, n_clips in (("test", range(0, 5), 200), ("train", range(5, 50), 800)):
        (out / part).mkdir(parents=True, exist_ok=True)
        for n in tqdm(range(n_clips), part, leave=False):
            talker, digits = rng.choice(talkers), None
            while digits is None or (part == "train" and digits in tested):
                digits = tuple(rng.choices(range(10), k=rng.randint(3, 6)))
            tested |= {digits} if part == "test" else set()
            pieces = [np.zeros(int(rng.uniform(.08, .2) * 8000))]
            for digit in digits:
                path = recordings / f"{digit}_{talker}_{rng.choice(takes)}.wav"
                if not path.is_file():
                    raise ClipError(f"{path}: no such recording; RECORDINGS is that dataset's folder of wav files")
                wave, rate = soundfile.read(path)
                if rate != 8000 or wave.ndim != 1:
                    raise ClipError(f"{path}: {rate} Hz, {wave.ndim} axes; these recordings are 8000 Hz, mono")
                pieces.append(wave / (np.abs(wave).max() + 1e-6) * rng.uniform(.3, .8))
                pieces.append(np.zeros(int(rng.uniform(.04, .16) * 8000)))
            name = out / part / f"{talker}_{n:04d}"
            soundfile.write(name.with_suffix(".flac"), np.concatenate(pieces), 8000)
            name.with_suffix(".txt").write_text(" ".join(DIGITS[d] for d in digits) + "\n")


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command = argv[0] if argv[:1] in (["fsdd"], ["check"]) else "talker"
    if command != "talker":
        parser.add_argument("command", help=command)
    if command == "check":
        parser.add_argument("folder", type=Path, help="of clips with transcripts, or with a manifest.csv")
    elif command == "fsdd":
        parser.add_argument("recordings", type=Path, help="the dataset's folder of {digit}_{talker}_{take}.wav")
        parser.add_argument("out", type=Path, help="folder to write")
        parser.add_argument("--talkers", default="george,jackson,nicolas,theo", help="comma-separated (default %(default)s)")
    else:
        parser.add_argument("--out", type=Path, default=Path("clips"), help="folder to write (default %(default)s)")
        parser.add_argument("--count", type=int, default=8, help="number of clips (default %(default)s)")
        parser.add_argument("--part", choices=SPLITS, default="train", help="whose talkers and sentences (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default %(default)s)")
    args = parser.parse_args(argv, argparse.Namespace(command=command))
    if args.seed < 0 or command == "talker" and args.count < 1:
        parser.error("--seed must be 0 or more, and --count 1 or more")
    return args


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        if args.command == "check":
            from folders import check  # it builds on this file
            return check(args.folder)
        if args.command == "fsdd":
            cut_digit_strings(args.recordings, args.out, args.talkers.split(","), args.seed)
        else:
            for path in write_talker_clips(args.out, args.count, args.part, args.seed):
                print(path)
    except (ClipError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
