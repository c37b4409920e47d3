"""Any media file that ffmpeg reads -> sound at 16 kHz and pictures at 25 per second, by their time stamps.

Both begin at the file's first time stamp and are handed out a frame at a time: 640 samples, one picture. What starts late is
preceded by silence or by its first picture, a gap is filled with silence or with the last picture, so that lips and sound stay
together whatever the file's own rates are. Nothing here knows how long a file is: an hour takes the memory of a minute.
"""
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import soundfile
from tqdm import tqdm

from encoders import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
SUFFIXES = {".wav", ".flac", ".mp3", ".m4a", ".ogg", ".mp4", ".mpg", ".mov", ".avi", ".mkv", ".webm"}  # in folders; any other can be named
MAX_SECONDS = 30      # the reach of the audio encoder's positions
MOUTH_SIZE = 112      # pixels: square pictures of at most this are mouths already
MIN_SIZE = 16         # pixels: nothing smaller shows a mouth
MIN_FRAMES = 5        # 0.2 s: nothing shorter says a word
MAX_PIXELS = 36_000_000  # of a picture: 8k
HELD_FRAMES = 10      # sound may go on for so long after the pictures and is cut off; if longer, the last picture stays
PAUSE = 9             # frames: a silence of 0.36 s parts two pieces of a long clip,
MARGIN = 4            # of which each keeps so many frames (all this is not in the paper)


class ClipError(ValueError):
    """A clip, folder or transcript that cannot be used; the message says which file, what was found and what to do."""


def shown(path):
    """The path on one line, whatever its name."""
    return str(path) if str(path).isprintable() else repr(str(path))


def note(text):
    """Tell the user something that is no error."""
    tqdm.write(f"note: {text}", file=sys.stderr)


def first_words(stderr):
    """What ffmpeg complained of first, without the address of the part that did."""
    lines = [re.sub(r"^(\[.*?\] )*", "", line).strip() for line in stderr.decode(errors="replace").splitlines()]
    return next((line for line in lines if line), "")


@dataclass(frozen=True)
class Source:
    """A file with sound, pictures or both; see `probe`."""
    path: Path
    start: float                            # seconds: its first time stamp
    sound: bool
    picture: tuple[int, int] | None         # width and height as shown
    seconds: float                          # as the file says
    complaints: list[str] = field(default_factory=list)  # of ffmpeg, about damage that it read past

    @property
    def most(self):
        """Seconds that a file of its size can last: damaged time stamps can pretend to years of silence."""
        return 20 + os.path.getsize(self.path) / 250


def probe(path):
    """What is in the file. Raises ClipError where it is no file, no media, or has neither sound nor pictures."""
    path = Path(path)
    if not path.is_file():
        raise ClipError(f"{shown(path)}: " + ("not a file" if path.exists() else "no such file"))
    said = subprocess.run([FFMPEG, "-hide_banner", "-i", f"file:{path}"], stdin=subprocess.DEVNULL, capture_output=True).stderr
    text = said.decode(errors="replace")
    found = [line for line in re.findall(r"^ *Stream #0:\d.*$", text, re.M) if "(attached pic)" not in line]
    if "Input #0" not in text:
        raise ClipError(f"{shown(path)}: not readable as media; ffmpeg says: {first_words(said) or 'nothing'}")
    sizes = [re.search(r" (\d+)x(\d+)[ ,]", line) for line in found if ": Video: " in line][:1]
    sound, pictures = any(": Audio: " in line for line in found), bool(sizes)
    if not sound and not pictures:
        raise ClipError(f"{shown(path)}: neither sound nor pictures in it")
    if pictures and not sizes[0]:
        raise ClipError(f"{shown(path)}: pictures of unknown size in it; is it damaged?")
    if sound and not all(1000 < int(hertz) < 1_000_000 for hertz in re.findall(r": Audio: .* (\d+) Hz", text)):
        raise ClipError(f"{shown(path)}: sound of an impossible sampling rate in it; is it damaged?")
    start = re.search(r"^  Duration: .*start: (-?[\d.]+)", text, re.M)
    length = re.search(r"^  Duration: (\d+):(\d+):(\d+)", text, re.M)
    turned = -1 if re.search(r"rotation of -?90", text) else 1
    return Source(path, float(start[1]) if start else 0., sound, tuple(map(int, sizes[0].groups()))[::turned] if pictures else None,
                  sum(int(n) * unit for n, unit in zip(length.groups(), (3600, 60, 1))) if length else 0.)


def only(source, streams):
    """The source without the streams that are not among these; ClipError if none is left."""
    left = replace(source, sound=source.sound and "audio" in streams, picture=source.picture if "video" in streams else None)
    if not left.sound and not left.picture:
        raise ClipError(f"{shown(source.path)}: has {'no sound, or a silent one' if 'audio' in streams else 'no pictures'}")
    return left


class Decoder:
    """ffmpeg at work on a source, in a with-block: `read` what it writes. Raises ClipError where it fails, or runs away."""

    def __init__(self, source, *options):
        self.source, self.said = source, tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [FFMPEG, "-v", "error", "-nostdin", "-threads", "1", "-max_pixels", str(MAX_PIXELS), "-timelimit", str(30 + round(source.most / 40)),
             "-copyts", "-i", f"file:{source.path}", *options, "pipe:1"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.said)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()
        self.said.close()

    def frames(self, n_bytes):
        """Yield what it writes, `n_bytes` for each 25th of a second; the last may be shorter."""
        for i in range(int(self.source.most * FPS)):
            part = self.process.stdout.read(n_bytes)
            if part:
                yield part
            if len(part) < n_bytes:
                break
        else:
            raise ClipError(f"{shown(self.source.path)}: its time stamps span more than {self.source.most:.0f} s, too much for a file of "
                            "its size; it is damaged: write it anew with ffmpeg")
        failed = self.process.wait()
        self.said.seek(0)
        complaint = first_words(self.said.read())
        if failed:
            raise ClipError(f"{shown(self.source.path)}: not readable as media; ffmpeg says: {complaint or f'nothing ({failed})'}")
        self.source.complaints.extend([complaint] if complaint else [])


def within(source):
    """The filter that brings time stamps beyond all reason to just beyond the last that `Decoder` takes, lest ffmpeg fill memory."""
    last = source.start + source.most + 1
    return f"setpts='if(gt(T,{last}),{last}/TB,PTS)'"


def sound(source):
    """-> a Decoder of mono float32 sound; its `frames` are of 4 * 640 bytes."""
    resample = f"a{within(source)},aresample=osr={SAMPLE_RATE}:async=1:first_pts={round(source.start * SAMPLE_RATE)},aformat=channel_layouts=mono"
    return Decoder(source, "-map", "0:a:0", "-af", resample, "-f", "f32le")


def pictures(source, filters, pixels="gray"):
    """-> a Decoder of pictures, passed through these ffmpeg filters."""
    steady = f"{within(source)},scale=iw*sar:ih,setsar=1,{filters},fps={FPS}:start_time={source.start},format={pixels}"
    return Decoder(source, "-map", "0:V:0", "-vf", steady, "-f", "rawvideo")


def samples(decoder):
    """The frames of a Decoder of sound as arrays (640,) float32, the last filled up with silence."""
    for part in decoder.frames(4 * SAMPLES_PER_FRAME):
        wave = np.frombuffer(part[:len(part) // 4 * 4], np.float32)
        if not (np.abs(wave) < 100).all():
            raise ClipError(f"{shown(decoder.source.path)}: its sound has samples that are not numbers, or far beyond -1 to 1")
        yield np.pad(wave, (0, SAMPLES_PER_FRAME - len(wave)))


def pieces(wave, frames, wanted):
    """Iterators of sound and pictures (None: no such stream), read once and in step -> (start, wave (samples,), pictures (T, H, W))
    of each of the `wanted` spans [(start, end)] in frames that has anything in it.

    The streams are made equally long: sound is filled up with silence; where it goes on after the pictures it is cut, or the last
    picture is held if that would lose more than 0.4 s."""
    at, last = 0, None
    for start, end in wanted:
        heard = list(islice(wave, start - at, end - at)) if wave else []
        seen = list(islice(frames, start - at, end - at)) if frames else []
        at, last = end, seen[-1] if seen else last
        if last is not None and wave:
            if seen and len(seen) < len(heard) <= len(seen) + HELD_FRAMES and len(heard) < end - start:
                heard = heard[:len(seen)]
            seen += [last] * (len(heard) - len(seen))
            heard += [np.zeros(SAMPLES_PER_FRAME, np.float32)] * (len(seen) - len(heard))
        if not heard and not seen:
            break
        yield start, np.concatenate(heard) if heard else None, np.stack(seen) if seen else None


# --- long clips ------------------------------------------------------------------------------------------------------

def loudness(source):
    """Of each frame of a source's sound -> (T,) dB below full scale; less than -80 is no sound."""
    with sound(source) as decoder:
        return np.array([10 * math.log10(np.mean(wave.astype(float) ** 2) + 1e-10) for wave in samples(decoder)])


def motion(frames):
    """Pictures of lips -> (T,) dB: how much each differs from the one before it; what loudness is for clips without sound."""
    level, last = [], 0.
    for picture in frames:
        level.append(10 * math.log10(np.mean((picture - last) ** 2) + 1))
        last = picture.astype(float)
    return np.array(level[1:2] + level[1:])


def spans(level, longest):
    """Loudness or motion (T,) in dB -> the spans [(start, end)] in frames that are worth reading, none longer than `longest`.

    They are parted by pauses, which need not be silent but quieter than speech, and keep a little of them. A span that is
    too long is parted where it is quietest, in its second half."""
    floor, top = np.percentile(level, (10, 95))
    active = np.flatnonzero(level > min(top - 3, max(top - 30, floor + 0.3 * (top - floor))))
    gaps = np.flatnonzero(np.diff(active) > PAUSE)
    starts, ends = active[[0, *(gaps + 1)]], active[[*gaps, -1]] + 1
    pending, found = [(max(0, a - MARGIN), min(len(level), b + MARGIN)) for a, b in zip(starts.tolist(), ends.tolist())][::-1], []
    smooth = np.convolve(np.pad(level, 2, "edge"), np.full(5, .2), "valid")
    while pending:
        start, end = pending.pop()
        if end - start > longest:
            cut = start + longest // 2 + int(smooth[start + longest // 2:start + longest].argmin())
            pending += [(cut, end), (start, cut)]
        else:
            found.append((start, end))
    return found


# --- writing ---------------------------------------------------------------------------------------------------------

def write_mp4(path, frames, wave):
    """Grey pictures (T, H, W) at 25 per second and sound at 16 kHz -> an mp4 of H.264 and AAC, whole or not at all."""
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as scratch:
        soundfile.write(f"{scratch}/sound.wav", wave, SAMPLE_RATE)
        height, width = frames.shape[1:]
        done = subprocess.run(
            [FFMPEG, "-v", "error", "-i", f"file:{scratch}/sound.wav", "-f", "rawvideo", "-pix_fmt", "gray", "-s", f"{width}x{height}",
             "-r", str(FPS), "-i", "pipe:0", "-c:v", "libx264", "-crf", "12", "-pix_fmt", "yuv420p", "-c:a", "aac", "-b:a", "96k",
             f"{scratch}/clip.mp4"], input=frames.tobytes(), capture_output=True)
        if done.returncode:
            raise ClipError(f"{shown(path)}: not written; ffmpeg says: {first_words(done.stderr)}")
        Path(scratch, "clip.mp4").replace(path)
