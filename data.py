"""Clips: where they come from and how they become batches.

A clip is sound, lips or both, with what is said. It comes from the synthetic talker (talker.py) or from a file:

    python data.py --out clips --count 8      mp4 clips of the synthetic talker with their transcripts
    python data.py fsdd RECORDINGS OUT        digit strings cut from the Free Spoken Digit Dataset, real voices
"""
import argparse
import json
import math
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import soundfile
import tiktoken
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import weights
from encoders import FPS, HOP_LENGTH, SAMPLE_RATE, SAMPLES_PER_FRAME, compress, mel_power
from talker import SPLITS, random_job, synthesize
from weights import write_whole


class ClipError(ValueError):
    """A clip, folder or transcript that cannot be used; the message says which file, what was found and what to do."""


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


def talker_clips(part, count, seed, size=32):
    """`count` clips of the part's talkers and sentences, the same however many processes make them."""
    jobs = [(part, i, seed, size, part == "test") for i in range(count)]
    n_workers = min(8, count, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    with processes(n_workers, 1) as workers:
        return list(tqdm(workers.map(talker_clip, jobs, chunksize=20), f"{part} clips", count, leave=False))


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
    if snr_db is None or clip.wave is None:
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

    With a random.Random `rng` they are augmented: babble of `voices` (clips with sound), masks in time and frequency,
    mouths shifted and mirrored. Clips without alignment (real ones, of which there are few) get less babble and another pace."""
    features = {}
    paces = [rng.uniform(0.85, 1.15) if rng and not clip.aligned else 1 for clip in clips]
    if "audio" in streams:
        rows = []
        for clip, pace in zip(clips, paces):
            power = 10 ** torch.from_numpy(clip.mel).float()
            if rng and voices and rng.random() < (0.5 if clip.aligned else 0.25):
                power = noisy_power(power, voices, rng)
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

MAX_SECONDS = 30  # the reach of the audio encoder's positions
SOUND, VIDEO = {".wav", ".flac", ".mp3"}, {".mp4", ".mpg", ".mov", ".avi", ".mkv", ".webm"}


def ffmpeg(path, *options, feed=None):
    """Run ffmpeg on `path`, return what it writes to its standard output, None where `path` has no such stream."""
    done = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", f"file:{path}", *options],
                          input=feed or b"", capture_output=True)
    if done.returncode and b"does not contain any stream" in done.stderr:
        return None
    if done.returncode:
        said = re.sub(r"^\[.*?\] ", "", done.stderr.decode(errors="replace").strip()).splitlines() or ["nothing"]
        raise ClipError(f"{path}: not readable as media; ffmpeg says: {said[0]}")
    return done.stdout


def read_clip(path, size=32, text="", n_mels=80):
    """Any media file -> Clip: a centred square of its pictures at 25 fps by their time stamps, its sound at 16 kHz.

    Sound is padded or cut to 640 samples per frame. A missing stream is None; raises ClipError where both are."""
    path = Path(path)
    if not path.is_file():
        raise ClipError(f"{path}: " + ("not a file" if path.exists() else "no such file"))
    frames = wave = None
    if path.suffix.lower() not in SOUND:
        square = f"fps={FPS},crop='min(iw,ih)':'min(iw,ih)',scale={size}:{size}:flags=area,format=gray"
        pictures = ffmpeg(path, "-map", "0:V:0?", "-vf", square, "-f", "rawvideo", "pipe:1")
        frames = np.frombuffer(pictures, np.uint8).reshape(-1, size, size).copy() if pictures else None
    sound = ffmpeg(path, "-map", "0:a:0?", "-ac", "1", "-ar", str(SAMPLE_RATE), "-f", "f32le", "pipe:1")
    if sound:
        wave = np.frombuffer(sound, np.float32)
        samples = SAMPLES_PER_FRAME * (math.ceil(len(wave) / SAMPLES_PER_FRAME) if frames is None else len(frames))
        wave = np.pad(wave, (0, max(0, samples - len(wave))))[:samples]
    if frames is None and wave is None:
        raise ClipError(f"{path}: neither sound nor pictures in it")
    clip = with_mel(Clip(str(path), text, wave, frames), n_mels=n_mels)
    if clip.duration > MAX_SECONDS:
        raise ClipError(f"{path}: {clip.duration:.1f} s long; cut it into pieces of at most {MAX_SECONDS} s")
    return clip


def transcript(path):
    """What is said in the clip at `path`: the first line of its .txt (less LRS's `Text:`) or the words of its .align."""
    txt, align = path.with_suffix(".txt"), path.with_suffix(".align")
    if not txt.is_file() and not align.is_file():
        raise ClipError(f"{path}: no transcript, expected {txt.name} or {align.name} beside it")
    source = txt if txt.is_file() else align
    try:
        lines = source.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ClipError(f"{source}: not UTF-8 text; save it as UTF-8") from None
    if source is align:  # GRID's lines are: start end word
        words = [line.split()[2] for line in lines if len(line.split()) == 3]
        text = " ".join(word for word in words if word not in ("sil", "sp"))
    else:
        text = lines[0].removeprefix("Text:") if lines else ""
    if not normalize(text):
        raise ClipError(f"{source}: no words in it, expected what is said in {path.name}")
    return normalize(text)


def folder_parts(folder, paths):
    """{path: "train" | "test"}: by the folders train/ and test/ if both are there; else a fifth of the talkers (the folders
    at the highest level with several) or, with a single folder, of the stems goes to the test part, by checksum."""
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        return {p: p.relative_to(folder).parts[0] for p in paths if p.relative_to(folder).parts[0] in ("train", "test")}
    depth = next((n for n in range(1, 9) if len({p.parent.relative_to(folder).parts[:n] for p in paths}) > 1), 0)
    key = (lambda p: "/".join(p.parent.relative_to(folder).parts[:depth])) if depth else (lambda p: p.stem)
    keys = sorted({key(p) for p in paths}, key=lambda k: (zlib.crc32(k.encode()), k))
    tested = set(keys[:max(1, len(keys) // 5)])
    return {p: "test" if key(p) in tested else "train" for p in paths}


def folder_clips(folder, size=32, n_mels=80):
    """A folder of clips with transcripts -> {"train": [Clip], "test": [Clip]}, with no sentence in both.

    Unusable clips are named on stderr and left out, and so are training clips whose sentence the test part has."""
    folder = Path(folder)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SOUND | VIDEO and not p.name.startswith("."))
    if not paths:
        raise ClipError(f"{folder}: no such folder" if not folder.is_dir() else f"{folder}: no clips here, expected files like NAME.mp4 or NAME.flac with NAME.txt beside them")
    parts, clips = folder_parts(folder, paths), {"train": [], "test": []}

    def read(path):
        try:
            return parts[path], read_clip(path, size, transcript(path), n_mels)
        except ClipError as error:
            return None, error

    with ThreadPoolExecutor() as readers:
        for part, clip in tqdm(readers.map(read, parts), "reading clips", len(parts), leave=False):
            if part is None:
                tqdm.write(f"left out: {clip}", file=sys.stderr)
            else:
                clips[part].append(clip)
    tested = {clip.text for clip in clips["test"]}
    fresh = [clip for clip in clips["train"] if clip.text not in tested]
    if dropped := len(clips["train"]) - len(fresh):
        print(f"left out: {dropped} training clips of {folder} whose sentence is in its test part", file=sys.stderr)
    clips["train"] = fresh
    for part, found in clips.items():
        if not found:
            raise ClipError(f"{folder}: no usable clip is left in its {part} part")
    return clips

# --- writing clips ---------------------------------------------------------------------------------------------------

def write_clip(clip, path):
    """Write a clip as mp4 (H.264 and AAC) with its transcript beside it, each whole or not at all."""
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as scratch:
        soundfile.write(f"{scratch}/sound.wav", clip.wave, SAMPLE_RATE)
        height, width = clip.frames.shape[1:]
        ffmpeg(f"{scratch}/sound.wav", "-f", "rawvideo", "-pix_fmt", "gray", "-s", f"{width}x{height}", "-r", str(FPS),
               "-i", "pipe:0", "-c:v", "libx264", "-crf", "12", "-pix_fmt", "yuv420p", "-c:a", "aac", "-b:a", "96k",
               f"{scratch}/clip.mp4", feed=clip.frames.tobytes())
        write_whole(path.with_suffix(".txt"), lambda temporary: temporary.write_text(clip.text + "\n"))
        Path(scratch, "clip.mp4").replace(path)


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
    for part, takes, count in (("test", range(0, 5), 200), ("train", range(5, 50), 800)):
        (out / part).mkdir(parents=True, exist_ok=True)
        for n in tqdm(range(count), part, leave=False):
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
    fsdd = argv[:1] == ["fsdd"]
    if fsdd:
        parser.add_argument("command", help="fsdd")
        parser.add_argument("recordings", type=Path, help="the dataset's folder of {digit}_{talker}_{take}.wav")
        parser.add_argument("out", type=Path, help="folder to write")
        parser.add_argument("--talkers", default="george,jackson,nicolas,theo", help="comma-separated (default %(default)s)")
    else:
        parser.add_argument("--out", type=Path, default=Path("clips"), help="folder to write (default %(default)s)")
        parser.add_argument("--count", type=int, default=8, help="number of clips (default %(default)s)")
        parser.add_argument("--part", choices=SPLITS, default="train", help="whose talkers and sentences (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default %(default)s)")
    args = parser.parse_args(argv, argparse.Namespace(fsdd=fsdd))
    if args.seed < 0 or not fsdd and args.count < 1:
        parser.error("--seed must be 0 or more, and --count 1 or more")
    return args


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        if args.fsdd:
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
