"""A cache of what real encoders make of real clips, as they are and in augmented copies (not in the paper).

Real encoders are frozen and large. So each clip passes them once, not once in every epoch, and training costs only the
LLM. Every (clip, copy, stream) is a small file whose name is a hash of all that it depends on. Files are written whole.
So a run may be killed and started again, and two runs may share the folder.
"""
import hashlib
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from tqdm import tqdm

import data
from encoders import SAMPLE_RATE
from real.files import digest, read_stored, write_whole
from real.folders import Unread

VERSION = 4         # raise it when this file, data.py or encoders.py makes other features of the same clips
BATCH_SECONDS = 48  # seconds of clips that are encoded together


def distort(wave, pace, voices, rng):
    """wave (samples,) -> (samples * pace,) float32 in -1 to 1: as if another voice spoke in another room.

    Speech is slower by `pace`, and deeper by as much. Half of the waves lose their lows, half their highs. The spectrum
    is tilted by up to 6 dB per octave. 60% get babble of 1 to 5 voices, or noise, 0 to 25 dB below the speech. The
    level changes by -15 to 6 dB; what is then too loud is clipped."""
    n = round(len(wave) * pace)
    wave = np.interp(np.arange(n) / pace, np.arange(len(wave)), wave)
    freq = np.fft.rfftfreq(n, 1 / SAMPLE_RATE)
    low = rng.choice((0, rng.uniform(20, 400)))
    high = rng.choice((SAMPLE_RATE / 2, rng.uniform(2200, SAMPLE_RATE / 2)))
    tilt = 10 ** (rng.uniform(-6, 6) / 20 * np.log2(np.maximum(freq, 100) / 1000))
    wave = np.fft.irfft(np.fft.rfft(wave) * tilt * ((low <= freq) & (freq <= high)), n)
    kind, snr_db = rng.choices(("babble", "noise", "quiet"), (.36, .24, .4))[0], rng.uniform(0, 25)
    if kind == "babble":
        wave = data.add_babble(wave, rng.sample(voices, min(len(voices), rng.randint(1, 5))), snr_db, rng)
    elif kind == "noise":  # an exponent of 0 makes it white, 0.5 pink
        noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(n)
        noise = np.fft.irfft(np.fft.rfft(noise) / np.maximum(freq, 50) ** rng.uniform(0, 1), n)
        wave = data.add_babble(wave, [noise], snr_db, rng)
    return np.clip(wave * 10 ** (rng.uniform(-15, 6) / 20), -1, 1).astype(np.float32)


def augmented(clip, stream, voices, rng):
    """The clip with one stream augmented. Its audio and its video get the same pace from equal `rng`s.

    Audio is distorted. Mouths are shifted by up to a 20th of the picture, and half of the clips are mirrored."""
    pace = min(rng.uniform(0.8, 1.25), data.MAX_SECONDS / clip.duration)
    if stream == "audio":
        wave = distort(clip.wave, pace, voices, rng)
        return data.with_log_power(replace(clip, wave=wave), n_mels=len(clip.log_power))
    frames = data.stretch(torch.from_numpy(clip.frames), pace).numpy()
    reach = frames.shape[1] // 20
    frames = np.roll(frames, (rng.randint(-reach, reach), rng.randint(-reach, reach)), (1, 2))
    return replace(clip, frames=frames[:, :, ::-1].copy() if rng.random() < .5 else frames)


def name_and_words(clip):
    """A hash of the name of a clip's file, wherever it lies, and of its words: the seed of what is done to the clip."""
    return digest([os.path.basename(clip.name), clip.text])


def content(clip, stream):
    """A hash of the sound or the pictures of a clip: another file, or another `--box`, has another."""
    return hashlib.sha256(np.ascontiguousarray(clip.wave if stream == "audio" else clip.frames)).hexdigest()[:40]


class Features:
    """The encoded clips of one training run, in `folder`. Missing ones are made at once, or when they are drawn.

    model (AVSR) encodes them. identity {stream: value} names its streams. The value (anything for JSON) must
    identify the encoder and how clips are read for it. Each clip has `copies` augmented copies besides itself."""

    def __init__(self, folder, model, identity, clips, copies, seed):
        self.folder, self.model, self.identity, self.copies, self.seed = Path(folder), model, identity, copies, seed
        clips = [clip for clip in clips if not isinstance(clip, Unread)]
        self.contents = {(clip.name, stream): content(clip, stream) for clip in clips for stream in clip.streams}
        voices = {self.contents[clip.name, "audio"]: clip.wave for clip in clips if clip.wave is not None}
        self.voices = [voices[key] for key in sorted(voices)]               # whatever the order of the clips
        self.babble_key = digest([seed, sorted(self.contents.values())])    # all clips make babble
        self.fill(clips)

    def path(self, clip, copy, stream):
        """The file of one stream of a clip. Copy 0 is the clip itself."""
        known = self.contents.get((clip.name, stream)) or content(clip, stream)
        name = digest([VERSION, name_and_words(clip), known, self.identity[stream],
                       [copy, self.babble_key] if copy else 0])
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def fill(self, clips):
        """Encode the files that are missing, in batches of clips of like length."""
        batches = []  # of (clip, copy, stream)
        for stream in self.identity:
            jobs = [(clip, copy, stream) for clip in sorted(clips, key=lambda clip: clip.duration)
                    if stream in clip.streams for copy in range(self.copies + 1)]
            jobs = [job for job in jobs if not self.path(*job).is_file()]
            while jobs:  # the longest clips come first: if they need too much memory, that shows at once
                size = max(1, int(BATCH_SECONDS / jobs[-1][0].duration))
                batches.append(jobs[-size:])
                del jobs[-size:]
        n_workers = 2 if self.model.device.type == "cpu" else min(8, os.cpu_count())   # distorting takes longest there
        with ThreadPoolExecutor(n_workers) as workers, tqdm(None, "encoding clips", sum(map(len, batches))) as progress:
            for n_clips in workers.map(self.encode, batches):
                progress.update(n_clips)

    def encode(self, jobs):
        """Encode and write a batch of (clip, copy, stream) with one stream -> its size."""
        stream, versions = jobs[0][2], []
        for clip, copy, _ in jobs:
            rng = random.Random(f"{self.seed} {name_and_words(clip)} {copy}")
            versions.append(augmented(clip, stream, self.voices, rng) if copy else clip)
        inputs = data.to_device(data.batch(versions, [stream]), self.model.device)
        tokens, lengths = self.model.encode(inputs)[stream]
        for job, x, length in zip(jobs, tokens.half().cpu(), lengths.tolist()):
            path = self.path(*job)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda temporary: temporary.write_bytes(save({"x": x[:length].contiguous()})))
        return len(jobs)

    def rows(self, clips, streams, rng):
        """Each clip in one of its versions -> {stream: B rows (T, D)}."""
        copies = [rng.randrange(self.copies + 1) for _ in clips]
        for job in [(clip, copy, stream) for clip, copy in zip(clips, copies) for stream in streams]:
            if not self.path(*job).is_file():
                self.encode([job])     # alone: others beside it would change its last bits
        return {stream: [read_stored(self.path(clip, copy, stream), lambda path: load_file(path)["x"])
                         for clip, copy in zip(clips, copies)] for stream in streams}
