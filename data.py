"""Clips, tasks and rates, noise, augmentation, batches, and the tokenizer.

A clip is sound, lips or both, with its transcript. It comes from the synthetic talker (toy/talker.py) or from
a media file (real/clips.py). From the command line:

    python data.py --out clips --count 8      write mp4 clips of the synthetic talker with their transcripts
    python data.py check DIR                  show what a folder of clips holds and which clips cannot be used

Axes: B batch, T time, M mel bands, H W rows and columns of a picture.
"""
from real.script import run_script  # before torch: Ctrl-C then ends quietly at any time
import random
import unicodedata
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import numpy as np
import regex
import torch
from torch.nn.utils.rnn import pad_sequence

from encoders import FPS, HOP_LENGTH, SAMPLE_RATE, compress, mel_power

TASKS = {"avsr": ("audio", "video"), "asr": ("audio",), "vsr": ("video",)}  # the streams that each task uses
TOKENS_PER_SECOND = {"audio": 50, "video": 25}                              # at rate 1
MAX_RATE = 10_000                                        # the most tokens that become one
MAX_SECONDS = 30                                         # the audio encoder has no positions for longer clips
LETTERS = r"[\p{L}\p{M}\p{N}]+"
WORD = regex.compile(rf"(?!\p{{M}}){LETTERS}(?:(?:['\u05f4\u200c\u200d]|(?<=[lL])·(?=[lL])){LETTERS})*")
EAST = r"[\p{scx=Hangul}\p{scx=Han}\p{scx=Hira}\p{scx=Kana}]"  # between two of these no quotation mark
HIDDEN = regex.compile(rf"""(?![\u200b-\u200d])\p{{DI}}|[\u20e3\u0640]|(?<={EAST})['"“”«»〈-』]+(?={EAST})""")
FORMS = regex.compile(r"[ĲĳĿŀŉſẛǄ-ǌǱ-ǳ⼀-⿟\ufb00-\ufdff\ufe70-\uffef\U0001d400-\U0001d7ff]+")  # joined or wide
GERSHAYIM = regex.compile(r"""(?<=\p{Hebrew})["“”](?=\p{Hebrew}\p{M}*(?!\p{Hebrew}))""")  # typed as "
PLAIN = str.maketrans(dict.fromkeys("’‘ʼʻ`´‛′՚׳", "'"))


class ClipError(ValueError):
    """A clip, folder, transcript or rate that cannot be used. The message names it and says what is wrong."""


@dataclass(frozen=True)
class Clip:
    """One utterance. The streams that it lacks are None."""
    name: str
    text: str
    wave: np.ndarray | None = None       # (samples,) float32, -1 to 1, 16 kHz
    frames: np.ndarray | None = None     # (T, H, W) uint8, 25 a second
    log_power: np.ndarray | None = None  # (M, frames) float16: log10 of the mel powers of `wave`
    aligned: tuple | None = None         # ((phoneme, its end in seconds), ...) from the synthetic talker

    @property
    def streams(self):
        """("audio", "video") or one of the two."""
        present = {"audio": self.log_power, "video": self.frames}
        return tuple(stream for stream, x in present.items() if x is not None)

    @property
    def duration(self):
        """Seconds."""
        if self.log_power is None:
            return len(self.frames) / FPS
        return self.log_power.shape[1] / (SAMPLE_RATE // HOP_LENGTH)


# --- tasks and rates --------------------------------------------------------------------------------------
def parse_rates(text):
    """'2,4,8' | '4:2,16:5' | '4,16x2,5' -> [(audio rate, video rate)] without repeats.

    '2,4,8' is three pairs: both streams at the same rate. '4,16x2,5' is all four pairs of 4, 16 and 2, 5.
    A rate is how many tokens become one. ValueError says what is wrong."""
    try:
        if "x" in text:
            audio, video = text.split("x")
            pairs = product(audio.split(","), video.split(","))
        else:
            pairs = [item.split(":") if ":" in item else (item, item) for item in text.split(",")]
        pairs = [(int(audio), int(video)) for audio, video in pairs]
    except ValueError:
        raise ValueError(f"rates {text!r} are not like '2,4,8', '4:2,16:5' or '4,16x2,5'") from None
    if not 1 <= min(map(min, pairs)) <= max(map(max, pairs)) <= MAX_RATE:
        raise ValueError(f"rates {text!r}: a rate is how many tokens become one, 1 to {MAX_RATE}")
    return list(dict.fromkeys(pairs))


def task_streams(tasks):
    """All streams that these tasks use, as a set."""
    return {stream for task in tasks for stream in TASKS[task]}


def task_rates(task, pairs):
    """The sets of rates of one task: every pair for avsr, the distinct rates of its one stream otherwise.

    [(2, 2), (4, 4)] gives [{"audio": 2}, {"audio": 4}] for asr."""
    rate_sets = []
    for audio, video in pairs:
        rates = {"audio": audio, "video": video}
        rates = {stream: rates[stream] for stream in TASKS[task]}
        if rates not in rate_sets:
            rate_sets.append(rates)
    return rate_sets


# --- sound and noise --------------------------------------------------------------------------------------
def with_log_power(clip, n_mels=80, keep_wave=True):
    """The clip with `log_power` computed from its wave. keep_wave=False drops the wave to save memory."""
    if clip.wave is None:
        return clip
    log_power = mel_power(torch.from_numpy(clip.wave), n_mels).clamp(min=1e-10).log10().half().numpy()
    return replace(clip, log_power=log_power, wave=clip.wave if keep_wave else None)


def add_babble(wave, others, snr_db, rng):
    """wave (samples,) + a sum of the waves `others`: the wave is exactly `snr_db` louder than that sum.

    Each of the others is looped from a random point and scaled to the same loudness."""
    babble = np.zeros_like(wave)
    for other in others:
        start = rng.randrange(len(other))
        loudness = np.sqrt(np.mean(other ** 2)) + 1e-9
        babble += np.resize(np.roll(other, -start), len(wave)) / loudness
    ratio = np.sqrt(np.mean(wave ** 2) / (np.mean(babble ** 2) + 1e-20))
    return wave + np.float32(ratio * 10 ** (-snr_db / 20)) * babble


def in_babble(clip, snr_db, voices, n_voices=4):
    """The clip in babble of `n_voices` others, drawn by its name. snr_db None: clean. Raises ClipError."""
    if snr_db is None or clip.log_power is None:
        return clip
    rng = random.Random(f"{'/'.join(clip.name.split('/')[-2:])} {snr_db}".encode(errors="surrogateescape"))
    drawn = rng.sample(voices, min(n_voices + 1, len(voices)))
    others = [other.wave for other in drawn if other is not clip]
    if not others:
        raise ClipError("babble is made of other clips' voices, and there is no other clip: use --snr clean")
    noisy = add_babble(clip.wave, others[:n_voices], snr_db, rng)
    return with_log_power(replace(clip, wave=noisy), n_mels=len(clip.log_power))


def noisy_power(power, voices, rng):
    """Babble for training: power (M, frames) + the mel powers of 2 to 5 clips, at -7 to 15 dB."""
    babble = torch.zeros_like(power)
    for clip in rng.sample(voices, min(rng.randint(2, 5), len(voices))):
        voice = 10 ** torch.from_numpy(clip.log_power).float()
        looped = (torch.arange(power.shape[1]) + rng.randrange(voice.shape[1])) % voice.shape[1]
        babble += voice[:, looped] / voice.mean()
    gain = power.mean() / babble.mean() * 10 ** (-rng.uniform(-7, 15) / 10)
    return power + gain * babble


# --- batches ----------------------------------------------------------------------------------------------
def stretch(x, factor):
    """x (T, ...) -> (T * factor, ...): row t is row floor(t / factor) of x. A factor of 2 is half speed."""
    return x[(torch.arange(round(len(x) * factor)) / factor).long()] if factor != 1 else x


def clip_mel(clip):
    """The clip's log-mel (M, frames)."""
    return compress(10 ** torch.from_numpy(clip.log_power).float())


def augmented_mel(clip, rng, voices):
    """The clip's log-mel (M, frames) with a masked band and time. Some clips get babble or lose high bands.

    Real clips, which have no alignment, get babble less often. All but babble: not in the paper."""
    power = 10 ** torch.from_numpy(clip.log_power).float()
    if voices and rng.random() < (0.5 if clip.aligned else 0.25):
        power = noisy_power(power, voices, rng)
    if rng.random() < 0.08:
        power[int(len(power) * rng.uniform(0.78, 1)):] = 0    # as if sampled at 8 to 16 kHz
    mel = compress(power)
    band, moment = rng.randrange(mel.shape[0] - 10), rng.randrange(mel.shape[1])
    mel[band:band + rng.randrange(10)] = 0
    mel[:, moment:moment + rng.randrange(12)] = 0
    return mel


def augmented_frames(frames, rng):
    """frames (T, H, W) with dropped frames, a shift of up to 2 pixels and a mirror (not in the paper)."""
    if rng.random() < 0.1:
        frames = frames[[max(0, t - (rng.random() < 0.2)) for t in range(len(frames))]]
    frames = frames.roll((rng.randint(-2, 2), rng.randint(-2, 2)), (1, 2))
    return frames.flip(2) if rng.random() < 0.5 else frames


def rows_of(clips, streams, rng=None, voices=()):
    """Clips -> {stream: B rows}: audio (frames, M), video (T, H, W), 0 to 1.
    With a random.Random `rng` clips are augmented, with babble of `voices`. Real clips also change pace."""
    paces = [rng.uniform(0.85, 1.15) if rng and not clip.aligned else 1 for clip in clips]  # not in the paper
    paces = [min(pace, MAX_SECONDS / clip.duration) for pace, clip in zip(paces, clips)]
    rows = {}
    if "audio" in streams:
        mels = [augmented_mel(clip, rng, voices) if rng else clip_mel(clip) for clip in clips]
        rows["audio"] = [stretch(mel.T, pace) for mel, pace in zip(mels, paces)]
    if "video" in streams:
        videos = [stretch(torch.from_numpy(clip.frames), pace) for clip, pace in zip(clips, paces)]
        if rng:
            videos = [augmented_frames(frames, rng) for frames in videos]
        rows["video"] = [frames.float() / 255 for frames in videos]
    return rows


def padded(rows):
    """{stream: B rows (T, ...)} -> {stream: (x (B, T, ...), lengths (B,))}, zero-padded."""
    inputs = {}
    for stream, xs in rows.items():
        lengths = torch.tensor([len(x) for x in xs])
        inputs[stream] = pad_sequence(xs, batch_first=True), lengths
    return inputs


def to_inputs(rows):
    """Rows -> what encoders read, {stream: (x, lengths)}: audio (B, M, frames), video (B, 1, T, H, W)."""
    inputs = padded(rows)
    for stream, (x, lengths) in inputs.items():
        inputs[stream] = x.mT.contiguous() if stream == "audio" else x[:, None], lengths
    return inputs


def batch(clips, streams, rng=None, voices=()):
    """Clips -> what encoders read, see rows_of and to_inputs."""
    return to_inputs(rows_of(clips, streams, rng, voices))


def to_device(inputs, device):
    """The same {stream: (x, lengths)} on a device."""
    return {stream: (x.to(device), lengths.to(device)) for stream, (x, lengths) in inputs.items()}


@lru_cache(maxsize=8)
def epoch_order(n_clips, seed, epoch):
    """The order of the clips in one epoch, a function of (seed, epoch)."""
    return random.Random(f"{seed} {epoch}").sample(range(n_clips), n_clips)


def drawn_clips(clips, size, seed, step):
    """The `size` clips of one step, a function of (seed, step). An epoch has each clip once."""
    chosen = []
    for number in range(step * size, (step + 1) * size):
        epoch, position = divmod(number, len(clips))
        chosen.append(clips[epoch_order(len(clips), seed, epoch)[position]])
    return chosen


# --- text -------------------------------------------------------------------------------------------------
def normalize(text):
    """Lower case; letters with their marks, digits, and apostrophes inside words; single spaces.
    NFC, and NFKC of FORMS, give equal words one coding. Training, WER and transcripts share this."""
    text = FORMS.sub(lambda forms: unicodedata.normalize("NFKC", forms[0]), text)
    text = unicodedata.normalize("NFC", text).translate(PLAIN)
    words = WORD.findall(GERSHAYIM.sub("״", HIDDEN.sub("", text)))
    lower = " ".join(words).lower().replace("i\u0307", "i")                 # Turkish İ is a capital i
    return unicodedata.normalize("NFC", lower)


def load_tokenizer(folder):
    """The tokenizer of a checkpoint or of an HF model in `folder`. Its `encode` adds no special tokens."""
    from real.tokenizer import read_tokenizer
    return read_tokenizer(folder)


if __name__ == "__main__":
    from real.clips import main     # the command line; real/clips.py imports this module
    run_script(main)
