"""The synthetic talker: words -> phonemes -> a timeline -> the sound and the lips of a random person.

It replaces recordings that may not be redistributed. It speaks the sentences of the GRID corpus (51 words) with a small
formant-and-noise synthesiser, and a grey mouth moves on the same timeline. Sounds that look alike on real lips look
alike here, so lip reading is ambiguous for the same reasons. The talker is cleaner, slower and more regular than
people, so its speech is easier to read. Nothing here is from the paper.
"""
import itertools
import math
import multiprocessing
import os
import random
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from data import Clip, with_log_power
from encoders import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from real.run import begin_worker

GRID = [words.split() for words in (  # the grammar of the GRID corpus: one word of each row
    "bin lay place set", "blue green red white", "at by in with", "a b c d e f g h i j k l m n o p q r s t u v x y z",
    "zero one two three four five six seven eight nine", "again now please soon")]

LEXICON = {word: phones.split() for word, phones in (entry.split(":") for entry in """
bin:B IH N|lay:L EY|place:P L EY S|set:S EH T|blue:B L UW|green:G R IY N|red:R EH D|white:W AY T|at:AE T|by:B AY|in:IH N
with:W IH TH|a:EY|b:B IY|c:S IY|d:D IY|e:IY|f:EH F|g:JH IY|h:EY CH|i:AY|j:JH EY|k:K EY|l:EH L|m:EH M|n:EH N|o:OW|p:P IY
q:K Y UW|r:AA R|s:EH S|t:T IY|u:Y UW|v:V IY|x:EH K S|y:W AY|z:Z EH D|zero:Z IH R OW|one:W AH N|two:T UW|three:TH R IY
four:F AO R|five:F AY V|six:S IH K S|seven:S EH V AH N|eight:EY T|nine:N AY N|again:AH G EH N|now:N AW|please:P L IY Z
soon:S UW N""".strip().replace("\n", "|").split("|"))}

# Lips: duration in ms, then opening, width, rounding, teeth, tongue, tucked lower lip (0 to 1). Sounds that share a row
# look alike and last equally long (p b m; f v; t d n; k g). Only sound or context tells them apart.
VISEMES = {
    "rest": (0, .02, .50, .10, .0, .0, .0), "P": (100, .00, .50, .15, .0, .0, .3), "F": (110, .14, .55, .10, .8, .0, 1.),
    "T": (90, .22, .60, .10, .6, .4, .0), "K": (90, .38, .50, .10, .2, .0, .0), "S": (120, .16, .75, .00, .9, .0, .0),
    "CH": (120, .24, .30, .70, .9, .0, .0), "TH": (100, .24, .55, .10, .5, 1., .0), "L": (90, .42, .50, .10, .2, .9, .0),
    "R": (90, .26, .35, .60, .2, .0, .0), "W": (90, .10, .10, 1.0, .0, .0, .0), "Y": (80, .20, .85, .00, .4, .0, .0),
    "IY": (140, .26, 1.0, .00, .6, .1, .0), "IH": (100, .34, .80, .00, .4, .1, .0), "EH": (120, .52, .75, .00, .4, .2, .0),
    "AE": (130, .72, .85, .00, .4, .2, .0), "AA": (140, .95, .50, .10, .1, .2, .0), "AO": (140, .66, .25, .70, .0, .0, .0),
    "AH": (100, .56, .50, .10, .2, .1, .0), "UH": (100, .32, .30, .60, .0, .0, .0), "UW": (140, .16, .10, 1.0, .0, .0, .0)}
VISEME_OF = dict(B="P", M="P", V="F", D="T", N="T", G="K", Z="S", JH="CH") | {v: v for v in VISEMES}
DIPHTHONGS = dict(EY=("EH", "IY"), AY=("AA", "IH"), AW=("AA", "UH"), OW=("AO", "UH"))

# Throat: F1 F2 F3 (Hz), voice, breath, hiss (0 to 1), centre and width of the hiss (Hz).
SOUNDS = {
    "rest": (500, 1500, 2500, 0, 0, 0, 4000, 1000), "IY": (280, 2250, 2900, 1, 0, 0, 4000, 1000),
    "IH": (400, 1950, 2550, 1, 0, 0, 4000, 1000), "EH": (550, 1780, 2500, 1, 0, 0, 4000, 1000),
    "AE": (690, 1680, 2400, 1, 0, 0, 4000, 1000), "AA": (740, 1100, 2450, 1, 0, 0, 4000, 1000),
    "AO": (570, 840, 2400, 1, 0, 0, 4000, 1000), "AH": (630, 1230, 2400, 1, 0, 0, 4000, 1000),
    "UH": (440, 1030, 2250, 1, 0, 0, 4000, 1000), "UW": (310, 900, 2250, 1, 0, 0, 4000, 1000),
    "W": (300, 620, 2200, .7, 0, 0, 4000, 1000), "Y": (270, 2250, 3000, .7, 0, 0, 4000, 1000),
    "R": (400, 1280, 1600, .8, 0, 0, 4000, 1000), "L": (380, 1150, 2900, .8, 0, 0, 4000, 1000),
    "M": (250, 950, 2200, .3, 0, 0, 4000, 1000), "N": (250, 1650, 2600, .3, 0, 0, 4000, 1000),
    "P": (250, 800, 2200, 0, .5, .3, 1200, 900), "B": (250, 800, 2200, .3, 0, .2, 1000, 800),
    "T": (250, 1750, 2650, 0, .3, .9, 4800, 1500), "D": (250, 1750, 2650, .3, 0, .5, 4300, 1500),
    "K": (250, 2150, 2500, 0, .5, .7, 2100, 600), "G": (250, 2150, 2500, .3, 0, .4, 2000, 600),
    "F": (300, 1100, 2300, 0, 0, .25, 6000, 3000), "V": (300, 1100, 2300, .45, 0, .12, 6000, 3000),
    "TH": (300, 1500, 2600, 0, 0, .18, 7000, 2000), "S": (300, 1700, 2600, 0, 0, 1, 6300, 1100),
    "Z": (300, 1700, 2600, .4, 0, .6, 6300, 1100), "CH": (280, 1900, 2500, 0, 0, 1, 3000, 900),
    "JH": (280, 1900, 2500, .35, 0, .7, 3000, 900)}
STOPS = {"P", "B", "T", "D", "K", "G", "CH", "JH"}  # a stop is first closed and nearly silent, then it bursts

TALKER_RANGES = dict(  # a person is one uniform draw from each; tilt_hz and pitch: Hz; roll: rad; lengths: half pictures
    pitch=(90, 230), lilt=(.05, .2), tract=(.84, 1.18), pace=(.9, 1.25), loudness=(.03, .12), breathiness=(.01, .06),
    tilt_hz=(350, 900), mouth=(.52, .68), lip=(.13, .2), jaw=(.8, 1.2), x=(-.1, .1), y=(-.1, .1), roll=(-.12, .12),
    skin=(.5, .8), lip_shade=(.5, .7), teeth_shade=(.8, 1.), light=(-.12, .12), camera_noise=(.005, .03))


def random_talker(seed):
    """Person number `seed`: a namespace of voice and face traits, the same for every sentence."""
    rng = np.random.default_rng([seed, 1])
    return SimpleNamespace(**{trait: rng.uniform(*bounds) for trait, bounds in TALKER_RANGES.items()})


def timeline(text, talker, rng):
    """-> [(phoneme, start s, end s, SOUNDS row, VISEMES row)]: the targets of throat and lips over time."""
    aims, now = [], 0.0

    def add(phone, seconds, sound, viseme):
        nonlocal now
        aims.append((phone, now, now + seconds, sound, VISEMES[viseme][1:]))
        now += seconds

    add("rest", rng.uniform(.12, .3), SOUNDS["rest"], "rest")
    for word in text.split():
        for phone in LEXICON[word]:
            parts = DIPHTHONGS.get(phone, (phone,))
            stretch = talker.pace * rng.uniform(.88, 1.12)
            for part in parts:
                viseme = VISEME_OF[part]
                seconds = VISEMES[viseme][0] / 1000 * stretch * (.7 if len(parts) == 2 else 1)
                if part in STOPS:  # voice bar during the closure, no hiss until the burst
                    f1, f2, f3, voice, _, _, centre, width = SOUNDS[part]
                    add(phone, .55 * seconds, (f1, f2, f3, .5 * voice, 0, 0, centre, width), viseme)
                    add(phone, .45 * seconds, SOUNDS[part], viseme)
                else:
                    add(phone, seconds, SOUNDS[part], viseme)
        add("rest", talker.pace * rng.uniform(.01, .09), SOUNDS["rest"], "rest")
    add("rest", rng.uniform(.1, .25), SOUNDS["rest"], "rest")
    return aims


def glide(aims, targets, times, softness):
    """Co-articulation: a step function through the targets (N, C), smoothed in time -> (len(times), C)."""
    edges = np.array([aims[0][1]] + [end for _, _, end, _, _ in aims])
    passed = 1 / (1 + np.exp(-np.clip((times[:, None] - edges) / softness, -30, 30)))
    passed[:, 0], passed[:, -1] = 1, 0  # the first and last aim reach past the clip's ends
    return (passed[:, :-1] - passed[:, 1:]) @ targets


def speak(aims, samples, talker, rng):
    """Formant synthesis in the STFT domain: pulses and noise through moving filters -> (samples,) float32, 16 kHz."""
    n_fft, hop = 384, 96  # 24 ms windows every 6 ms
    times = np.arange(samples // hop + 1) * hop / SAMPLE_RATE
    freq = np.linspace(0, SAMPLE_RATE / 2, n_fft // 2 + 1, dtype=np.float32)[:, None]
    sounds = np.array([sound for _, _, _, sound, _ in aims], dtype=np.float32)
    formants = glide(aims, sounds[:, :3], times, .012).T.astype(np.float32) * talker.tract
    voice, breath, hiss, centre, width = glide(aims, sounds[:, 3:], times, .004).T.astype(np.float32)
    resonance = np.ones((len(freq), len(times)), np.complex64)  # (frequency, time), a pole pair for each formant
    peaks = (*formants, np.full(len(times), 3500 * talker.tract, np.float32))
    for peak, bandwidth in zip(peaks, (70, 90, 130, 250)):
        resonance *= peak ** 2 - (freq ** 2 - 1j * bandwidth * freq)
    resonance = np.prod(peaks, axis=0) ** 2 / resonance
    glottis = voice / np.sqrt(1 + (freq / talker.tilt_hz) ** 2)
    turbulence = .3 * (breath + talker.breathiness * voice) * resonance + .5 * hiss * np.exp(
        -.5 * ((freq - centre) / width) ** 2)

    t = np.arange(samples) / SAMPLE_RATE
    lilt = talker.lilt * (np.sin(2 * np.pi * t * rng.uniform(.4, .9) + rng.uniform(0, 6)) - .4 * t)
    cycles = np.cumsum(talker.pitch * np.exp(lilt)) / SAMPLE_RATE
    pulses = np.diff(np.floor(cycles), prepend=0) * np.sqrt(SAMPLE_RATE / talker.pitch)
    sources = torch.tensor(np.stack([pulses, rng.standard_normal(samples)]), dtype=torch.float32)
    stft = dict(n_fft=n_fft, hop_length=hop, window=torch.hann_window(n_fft))
    buzz, noise = torch.stft(sources, return_complex=True, **stft)
    spectrum = buzz * torch.from_numpy(glottis * resonance) + noise * torch.from_numpy(turbulence)
    wave = torch.istft(spectrum, length=samples, **stft).numpy()
    wave *= talker.loudness / (np.sqrt(np.mean(wave ** 2)) + 1e-9)
    return np.clip(wave + rng.normal(0, 5e-4, samples), -1, 1).astype(np.float32)


def draw(aims, n_frames, talker, rng, size):
    """The mouth at 25 fps from the same aims -> (n_frames, size, size) uint8: lips, cavity, teeth, tongue, chin."""
    shapes = np.array([shape for *_, shape in aims])
    tracks = glide(aims, shapes, (np.arange(n_frames) + .5) / FPS, .018)
    opening, width, rounding, teeth, tongue, tuck = tracks.T[:, :, None, None].astype(np.float32)
    x, y = np.meshgrid(*[np.linspace(-1, 1, size, dtype=np.float32)] * 2)
    x, y = x - talker.x, y - talker.y
    x, y = x * np.cos(talker.roll) + y * np.sin(talker.roll), y * np.cos(talker.roll) - x * np.sin(talker.roll)

    def ellipse(centre, a, b, soft=.07):  # 1 inside, 0 outside, an edge `soft` wide (to first order in the distance)
        u, v = (x / a) ** 2, ((y - centre) / b) ** 2
        return np.clip(.5 - (u + v - 1) / (2 * soft * np.sqrt(u / a ** 2 + v / b ** 2) + 1e-6), 0, 1)

    half_width = talker.mouth * (.72 + .38 * width - .3 * rounding)
    gap = .015 + .42 * talker.jaw * opening * (1 - .25 * rounding)  # half the distance between the lips
    middle = .55 * gap  # the jaw drops: the lower lip moves, the upper hardly does
    lip = talker.lip * (1 + .35 * rounding)
    picture = talker.skin + talker.light * x - .05 * y + 0 * opening
    picture = picture - .10 * ellipse(middle + gap + .38, .45, .10, .2)          # shadow above the chin, moving with it

    def paint(mask, shade):
        nonlocal picture
        picture = picture + mask * (shade - picture)

    paint(ellipse(middle - .25 * lip * tuck, half_width + .5 * lip, gap + lip * (1 - .4 * tuck)), talker.skin * talker.lip_shade)
    cavity = ellipse(middle, half_width * .86, gap, .08)
    paint(cavity, .08)
    paint(cavity * ellipse(middle - gap, half_width * .7, .10 + .3 * gap, .06) * teeth, talker.teeth_shade)
    paint(cavity * ellipse(middle + .8 * gap, half_width * .5, .5 * gap + .05, .06) * tongue, .45)
    picture = picture + talker.camera_noise * rng.standard_normal(picture.shape, dtype=np.float32)
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8)


def synthesize(text, talker_seed, seed=0, size=32):
    """Person `talker_seed` says `text` (words of LEXICON); `seed` varies the delivery.

    -> sound (samples,) float32 at 16 kHz, frames (T, size, size) uint8 at 25 fps, ((phoneme, its end in seconds), ...)."""
    talker, delivery = random_talker(talker_seed), [talker_seed, seed]
    aims = timeline(text, talker, np.random.default_rng(delivery))
    n_frames = math.ceil(aims[-1][2] * FPS)
    frames = draw(aims, n_frames, talker, np.random.default_rng([*delivery, 2]), size)
    wave = speak(aims, n_frames * SAMPLES_PER_FRAME, talker, np.random.default_rng([*delivery, 3]))
    return wave, frames, tuple((phone, end) for phone, _, end, *_ in aims)


# --- splits and clips ------------------------------------------------------------------------------------------------

FEW = 200       # clips up to which starting processes takes longer than making them
SPLITS = {"train": range(0, 400), "valid": range(400, 500), "test": range(1000, 1100)}  # disjoint talkers of each split


def grid_split(text):
    """The split of a GRID sentence, by the sentence alone: one in 16 is for testing, in every run and stage."""
    return "test" if zlib.crc32(text.encode()) % 16 == 0 else "train"


@lru_cache
def grid_sentences(split):
    """All sentences of the grammar in this split, in a fixed order."""
    return [s for s in map(" ".join, itertools.product(*GRID)) if grid_split(s) == split]


def talker_clip(job):
    """(split, index, seed, size of the pictures, keep_wave) -> clip number `index` of that split."""
    split, index, seed, size, keep_wave = job
    rng = random.Random(f"{split} {seed} {index}")
    text = rng.choice(grid_sentences("test" if split == "test" else "train"))
    person, delivery = rng.choice(SPLITS[split]), seed * 1_000_000 + index
    wave, frames, aligned = synthesize(text, person, delivery, size)
    clip = Clip(f"talker{person:04d}_{delivery:05d}", text, wave, frames, aligned=aligned)
    return with_log_power(clip, keep_wave=keep_wave)


def talker_clips(counts, seed, size=32):
    """{split: count} -> {split: [Clip]}. The number of processes that make them does not change them.

    Training clips carry no waves: training mixes babble from mel powers (data.noisy_power)."""
    jobs = [(split, i, seed, size, split != "train") for split, count in counts.items() for i in range(count)]
    n_workers = min(8, len(jobs), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    processes = partial(ProcessPoolExecutor, n_workers, multiprocessing.get_context("spawn"), begin_worker, (1,))
    with (processes() if len(jobs) > FEW else ThreadPoolExecutor(1)) as workers:
        clips = iter(tqdm(workers.map(talker_clip, jobs, chunksize=20), "clips", len(jobs), leave=False))
        return {split: list(itertools.islice(clips, count)) for split, count in counts.items()}


def write_talker_clips(folder, count, split, seed, size=96):
    """Write `count` clips of this split as NAME.mp4 with NAME.txt -> their paths."""
    from real.clips import write_clip  # only here: training without --data needs no ffmpeg
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in tqdm(range(count), "writing clips", leave=False):
        clip = talker_clip((split, i, seed, size, True))
        paths.append(folder / f"sample{i + 1}_{clip.name}.mp4")
        write_clip(clip, paths[-1])
    return paths
