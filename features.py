"""What real encoders make of real clips, kept on disk: they are frozen and large, so each clip passes them once, not in every
epoch, and training costs only the LLM.

A clip is kept as it is and in a few augmented copies: another pace (and with it pitch), band, tone, noise and level; lips
shifted and mirrored. Every (clip, copy, stream) is a small file of its own, named by a hash of all that it depends on: the
clip's path, size and time, the encoder, the augmentation and this code. Files are written whole or not at all, so that a
run may be killed and started again, and two may share the folder. The augmentation is not in the paper.
"""
import hashlib
import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.torch import save_file
from tqdm import tqdm

import data
from encoders import SAMPLE_RATE
from weights import write_whole

BATCH_SECONDS = 48  # of clips encoded together


def distort(wave, pace, voices, rng):
    """wave (samples,) -> (samples * pace,): another voice in another room by another line. Slower by `pace` and deeper with
    it; half of the time without its lows or its highs; tilted by up to 6 dB per octave; mostly in babble or noise, 0 to 25
    dB below it; 15 dB quieter to 6 dB louder, clipped where that is too loud."""
    n = round(len(wave) * pace)
    wave = np.interp(np.arange(n) / pace, np.arange(len(wave)), wave)
    freq = np.fft.rfftfreq(n, 1 / SAMPLE_RATE)
    low, high = rng.choice((0, rng.uniform(20, 400))), rng.choice((SAMPLE_RATE / 2, rng.uniform(2200, SAMPLE_RATE / 2)))
    tilt = 10 ** (rng.uniform(-6, 6) / 20 * np.log2(np.maximum(freq, 100) / 1000))
    wave = np.fft.irfft(np.fft.rfft(wave) * tilt * ((low <= freq) & (freq <= high)), n)
    kind, snr_db = rng.choices(("babble", "noise", "quiet"), (.36, .24, .4))[0], rng.uniform(0, 25)
    if kind == "babble":
        wave = data.add_babble(wave, rng.sample(voices, min(len(voices), rng.randint(1, 5))), snr_db, rng)
    elif kind == "noise":  # from white to pink and a little beyond
        noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(n)
        noise = np.fft.irfft(np.fft.rfft(noise) / np.maximum(freq, 50) ** rng.uniform(0, 1), n)
        wave = data.add_babble(wave, [noise], snr_db, rng)
    return np.clip(wave * 10 ** (rng.uniform(-15, 6) / 20), -1, 1).astype(np.float32)


def augmented(clip, stream, voices, rng):
    """The clip with that stream augmented: its sound distorted, or its pictures shifted by up to 4 pixels and half of the time
    mirrored. An equal `rng` gives both the same pace."""
    pace = min(rng.uniform(0.8, 1.25), data.MAX_SECONDS / clip.duration)
    if stream == "audio":
        return data.with_mel(replace(clip, wave=distort(clip.wave, pace, voices, rng)))
    frames = data.at_pace(torch.from_numpy(clip.frames), pace).numpy()
    frames = np.roll(frames, (rng.randint(-4, 4), rng.randint(-4, 4)), (1, 2))
    return replace(clip, frames=frames[:, :, ::-1].copy() if rng.random() < .5 else frames)


def digest(key):
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:40]


class Features:
    """The cache of one training run's clips in `folder`.

    model.encode makes what is missing; `identity` is {stream: what tells its encoder from others}, of the streams that are
    kept; of each clip there are `copies` besides the clip itself."""

    def __init__(self, folder, model, identity, clips, copies, seed):
        self.folder, self.model, self.identity, self.copies, self.seed = Path(folder), model, identity, copies, seed
        self.voices = [clip.wave for clip in clips if clip.wave is not None]
        modules = ("features", "encoders", "data", "weights")
        self.code = digest([Path(__file__).with_name(f"{name}.py").read_text("utf-8") for name in modules])
        self.mixture = digest([seed, sorted(os.path.abspath(clip.name) for clip in clips)])  # babble is made of these clips
        self.fill(clips)

    def path(self, clip, copy, stream):
        stat = os.stat(clip.name)
        name = digest([os.path.abspath(clip.name), stat.st_size, stat.st_mtime_ns, self.identity[stream], self.code,
                       [copy, self.mixture] if copy else 0])
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def fill(self, clips):
        """Encode what is not there yet, clips of like length together."""
        batches = []  # of jobs (clip, copy, stream)
        for stream in self.identity:
            jobs = [(clip, copy, stream) for clip in sorted(clips, key=lambda clip: clip.duration) if stream in clip.streams
                    for copy in range(self.copies + 1) if not self.path(clip, copy, stream).is_file()]
            while jobs:
                size = max(1, int(BATCH_SECONDS / jobs[-1][0].duration))  # the longest first: too little memory shows at once
                batches.append(jobs[-size:])
                del jobs[-size:]

        def encode(jobs):
            stream = jobs[0][2]
            versions = [augmented(clip, stream, self.voices, random.Random(f"{self.seed} {os.path.abspath(clip.name)} {copy}"))
                        if copy else clip for clip, copy, _ in jobs]
            (tokens, lengths), = self.model.encode(data.to(self.model.device, data.batch(versions, [stream]))).values()
            for job, x, length in zip(jobs, tokens.half().cpu(), lengths.tolist()):
                path = self.path(*job)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, lambda temporary: save_file({"x": x[:length].contiguous()}, temporary))
            return len(jobs)

        with ThreadPoolExecutor(2) as workers, tqdm(total=sum(map(len, batches)), desc="encoding clips") as progress:
            for n in workers.map(encode, batches):
                progress.update(n)

    def batch(self, clips, streams, rng):
        """-> {stream: (tokens (B, T, D), lengths (B,))}, as AVSR.encode returns it: of each clip one of its versions. In
        numpy, because torch's threads for this thread would be in the way of those that train."""
        versions, encoded = [rng.randrange(self.copies + 1) for _ in clips], {}
        for stream in streams:
            paths = [self.path(clip, copy, stream) for clip, copy in zip(clips, versions)]
            try:
                rows = [load_file(path)["x"] for path in paths]
            except (OSError, SafetensorError) as error:
                raise data.ClipError(f"{self.folder}: damaged, delete it and start again ({error})") from None
            longest = max(map(len, rows))
            tokens = np.stack([np.pad(row, ((0, longest - len(row)), (0, 0))) for row in rows])
            encoded[stream] = torch.from_numpy(tokens), torch.tensor([len(row) for row in rows])
        return data.to(self.model.device, encoded)
