"""Decode any media file that ffmpeg reads: sound at 16 kHz and pictures at 25 per second, placed by their time stamps.

Both streams begin at the file's first time stamp and are decoded frame by frame: 640 samples of sound, one picture.
A stream that starts late is preceded by silence or by its first picture. A gap is filled with silence or with the
picture before it. So lips and sound stay together, whatever the file's own rates are. An hour needs no more memory
than a minute.
"""
import math
import os
import re
import subprocess
import tempfile
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe as ffmpeg        # -> the path of the program

from data import MAX_SECONDS, ClipError
from encoders import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from real.files import is_pointer, note, shown

# Files in a folder count as clips if they have one of these suffixes. A single file may have any name.
SOUND_SUFFIXES = set(".wav .flac .mp3 .m4a .ogg .oga .opus .aac .aiff .aif .mka .sph .wma .mp2 .amr .au .caf".split())
SUFFIXES = SOUND_SUFFIXES | set(
    ".mp4 .m4v .mpg .mpeg .mov .avi .mkv .webm .3gp .ts .mts .m2ts .wmv .flv .ogv .vob".split())
MAX_HOURS = 5            # a header that claims more is not believed
SILENCE = -80            # dB below full scale: digital silence
NO_HUM = "highpass=f=150:poles=2,highpass=f=150:poles=2"    # before loudness is measured: no offset, no hum
MIN_FRAMES = 5           # 0.2 s: a shorter clip has no word in it
MAX_PIXELS = 36_000_000  # of one picture: 8k
HELD_FRAMES = 10         # sound that outlasts the pictures by more is read to its end (not in the paper)
PAUSE = 9                # frames: a longer pause separates two pieces of a long clip (not in the paper)
MARGIN = 4               # frames of the pause that each piece keeps (not in the paper)
HISS = 30                # dB: a track quieter by more than another is an open input, not a voice (not in the paper)
NEAR = 3 * FPS           # frames: in loud noise all so near to a frame with speech is read (not in the paper)


def first_words(text):
    """The first line of what ffmpeg prints, without the "[decoder @ address]" in front of it."""
    lines = [re.sub(r"^(\[.*?\] )*", "", line).strip() for line in text.splitlines()]
    return next((line for line in lines if line and "misdetection possible" not in line), "")


def clip_error(path, text):
    """A ClipError that begins with the path."""
    return ClipError(f"{shown(path)}: {text}")


# --- what is in a file -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Source:
    """A media file with sound, pictures or both. `probe` makes it."""
    path: Path
    start: float                          # the first time stamp, seconds
    has_sound: bool
    picture_size: tuple[int, int] | None  # width and height as shown; None: no pictures
    seconds: float                        # its header's duration if that is at most MAX_SECONDS, else its packets'
    claimed: float = 0.                   # the duration that ffmpeg reads from its header; 0: none, or a guess
    picture_track: int = 0                # the number of the picture track that is read
    sound_track: int = 0                  # the number of the sound track that is read
    late: int = 0                         # samples by which its sound begins after its start
    mix: str = "aformat=channel_layouts=mono"    # the filter that makes one channel of several
    complaints: list[str] = field(default_factory=list)  # ffmpeg's messages about damage that it could read past

    @property
    def streams(self):
        """("audio", "video") or one of the two."""
        present = {"audio": self.has_sound, "video": self.picture_size}
        return tuple(stream for stream, found in present.items() if found)

    @property
    def max_seconds(self):
        """The longest plausible duration for a file of this size and header. Damaged time stamps can claim years."""
        return max(20 + os.path.getsize(self.path) / 250, min(self.seconds + 20, MAX_HOURS * 3600))


def probe(path):
    """Path -> Source. Raises ClipError if it is no file, not media, or has neither sound nor pictures."""
    if "://" in str(path):
        raise clip_error(path, "an address, not a file; download it first")
    path = Path(path)
    if not path.is_file():
        raise clip_error(path, "not a file" if path.exists() else "no such file")
    if not os.path.getsize(path):
        raise clip_error(path, "not readable as media: an empty file")
    if is_pointer(path):
        raise clip_error(path, "a Git LFS pointer, not the clip; fetch it with: git lfs pull")
    text, code = ask_ffmpeg(path)
    if "Input #0" not in text:
        complaint = first_words(text) or f"nothing ({code})"
        raise clip_error(path, f"not readable as media; ffmpeg says: {complaint}")
    streams = [line for line in re.findall(r"^ *Stream #0:\d.*$", text, re.M) if "(attached pic)" not in line]
    sounds, videos = ([line for line in streams if f": {kind}: " in line] for kind in ("Audio", "Video"))
    if not sounds and not videos:
        raise clip_error(path, "neither sound nor pictures in it")
    shows, size = default_first(videos)[:1], None
    if shows and not (size := size_shown(videos[shows[0]], text)):
        raise clip_error(path, "pictures of unknown size in it; is it damaged?")
    if len(videos) > 1:
        note(f"{shown(path)}: {len(videos)} picture tracks; read is number {shows[0] + 1}")
    if sounds and not all(1000 < int(rate) < 1_000_000 for rate in re.findall(r": Audio: .* (\d+) Hz", text)):
        raise clip_error(path, "sound of an impossible sampling rate in it; is it damaged?")
    note_if_joined(path, text, streams)
    start = re.search(r"^  Duration: .*start: (-?[\d.]+)", text, re.M)
    duration = re.search(r"^  Duration: (\d+):(\d+):([\d.]+)", text, re.M)
    seconds = claimed = seconds_of(duration)
    if "Estimating duration from bitrate" in text or not size and len(streams) > 1:
        claimed = 0.                                        # a guess, or of a stream that is not read: no claim
    if not 0 < seconds <= MAX_SECONDS:
        seconds = packed_seconds(path) or seconds
    source = Source(path, float(start[1]) if start else 0., bool(sounds), size, seconds, claimed, *shows)
    source = choose_sound(source, sounds)
    return replace(source, late=late_samples(source)) if sounds and len(streams) > 1 else source


def size_shown(track, text):
    """The width and height of a picture track as shown; None: unknown. track: the line about it in ffmpeg's `text`."""
    if not (size := re.search(r" (\d+)x(\d+)[ ,]", track)):
        return None
    width, height = map(int, size.groups())
    aspect = re.findall(r"[ \[]SAR (\d+):(\d+)", track)
    wide, high = map(int, aspect[-1]) if aspect else (1, 1)     # of a pixel; the container's comes last, and holds
    own = re.split(r"^ *Stream #", text.partition(track)[2], maxsplit=1, flags=re.M)[0]       # not of another track
    if re.search(r"^ *display ?matrix: rotation of -?90", own, re.M | re.I):
        width, height, wide, high = height, width, high, wide
    return round(width * wide / high), height                   # as the filters do: turned, and then made wider


def note_if_joined(path, text, streams):
    """Print a note if a file is much larger than its streams: ffmpeg stops where the first file's header ends.

    text: what ffmpeg says of the file; streams: its lines about streams."""
    rates = re.findall(r" (\d+) kb/s", "".join(streams))
    has_index = re.search(r"^Input #0, (wav|aiff|mov|flv)", text, re.M)
    if not has_index or "(attached pic)" in text or len(rates) != len(streams):
        return

    def is_larger(text):    # than 1.5 times its streams and an index of 16 kb/s and 4 kB
        total = re.search(r"^  Duration: (\d+):(\d+):([\d.]+).*bitrate: (\d+)", text, re.M)
        return total and (int(total[4]) - 1.5 * sum(map(int, rates)) - 16) * seconds_of(total) > 32

    if is_larger(text) and has_index[1] == "mov":     # what an edit list hides, as in a trimmed file, is no other file
        text, _ = ask_ffmpeg(path, reading=("-ignore_editlist", "1"))
    if is_larger(text):
        note(f"{shown(path)}: a large part of it is not read; is it several files joined? ffmpeg can join them")


def ask_ffmpeg(path, *writing, reading=()):
    """What ffmpeg prints about a file, and its exit code. `reading` and `writing`: options of its input and output."""
    command = [ffmpeg(), "-hide_banner", "-nostdin", *reading, "-i", f"file:{path}", *writing]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    return done.stderr.decode(errors="replace"), done.returncode


def default_first(tracks):
    """ffmpeg's lines about tracks of one kind -> their numbers, those that are marked as default first."""
    return sorted(range(len(tracks)), key=lambda i: "(default)" not in tracks[i])


def seconds_of(found):
    """A match of hours, minutes and seconds -> seconds; 0 for None."""
    return sum(part * float(text) for part, text in zip((3600, 60, 1), found.groups()[:3])) if found else 0.


def packed_seconds(path):
    """The duration of the sound and pictures of a file, without decoding them; 0 if ffmpeg cannot tell.

    A header may have no duration, or that of its subtitles, or the last time stamp although the first is not 0."""
    text, _ = ask_ffmpeg(path, *"-map 0:V? -map 0:a? -c copy -f null -".split())
    return max(map(seconds_of, re.finditer(r" time=(\d+):(\d+):([\d.]+)", text)), default=0.)


def choose_sound(source, tracks):
    """The source with the sound track and the channels that are read; `tracks` are ffmpeg's lines about its tracks.

    Of several tracks it is the one marked as default, or the first with sound. Two channels are mixed as usual. More
    are added up, as loud as the loudest: each may be a microphone. If that cancels them, the loudest is read."""
    order = default_first(tracks)
    if not order or len(order) == 1 and re.search(r"Hz, (mono|1 channels)", tracks[0]):
        return source
    levels = {i: channel_levels(source, i) for i in order}
    enough = max(SILENCE, max(max(channels, default=-200) for channels, _, _ in levels.values()) - HISS)
    i = next((i for i in order if max(levels[i][0], default=-200) > enough), None)
    if i is None:
        return source
    channels, mix, mixed = levels[i]
    if len(order) > 1:
        note(f"{shown(source.path)}: {len(order)} sound tracks; read is number {i + 1}")
    loudest = int(np.argmax(channels))
    if mixed < channels[loudest] - 9:           # a usual mix is 6 dB below the loudest at most
        mix = f"pan=mono|c0=c{loudest}"
        note(f"{shown(source.path)}: its {len(channels)} channels cancel out or are not mixed; "
             f"read is channel {loudest + 1}")
    return replace(source, sound_track=i, mix=mix)


def channel_levels(source, track):
    """The loudness of each channel of a sound track, the filter that mixes them, and the loudness of that mix.

    Loudness is in dB below full scale."""
    stats = f"{NO_HUM},astats=measure_perchannel=RMS_level:measure_overall=none"

    def levels(filters):
        text, _ = ask_ffmpeg(source.path, "-map", f"0:a:{track}", "-af", filters, "-f", "null", "-")
        found = re.findall(r"RMS level dB: (-?[\d.]+|-inf|nan)", text)
        return [max(-200., float(level)) for level in found]     # -200 also for -inf and nan

    channels, mix = levels(stats), source.mix
    mixed = levels(f"{mix},{stats}") if len(channels) == 2 else []
    if is_sum := len(channels) > 1 and not mixed:     # of many, or of two without a usual mix, like those of the sides
        mix = "aformat=sample_fmts=flt,pan=mono|c0=" + "+".join(f"c{c}" for c in range(len(channels)))
        mixed = levels(f"{mix},{stats}")
    mixed = mixed[0] if mixed else max(channels, default=-200.)
    if is_sum:
        mix += f",volume={max(channels) - mixed:.1f}dB"
    return channels, mix, mixed


def select_streams(source, streams):
    """The source with those of its streams that are in `streams`. Raises ClipError if there is none."""
    source = replace(source, has_sound=source.has_sound and "audio" in streams,
                     picture_size=source.picture_size if "video" in streams else None)
    if not source.has_sound and not source.picture_size:
        raise clip_error(source.path, f"has no {'sound' if 'audio' in streams else 'pictures'}; choose another task or clip")
    return source


# --- decoding --------------------------------------------------------------------------------------------------------

def decode(source, n_bytes, stream, filters, *output):
    """Run ffmpeg on a stream (like "a:0" or "V:0") and yield its output: `n_bytes` for each 1/25 s, fewer at the end.

    Raises ClipError if ffmpeg fails, or if the stream lasts longer than a file of this size can."""
    limits = ["-threads", "1", "-max_pixels", str(MAX_PIXELS), "-timelimit", str(30 + round(source.max_seconds / 40)),
              "-reinit_filter:v", "0"]    # where pictures change their size, their time goes on
    # Clamp absurd time stamps to just beyond the limit. Otherwise ffmpeg fills the gap until memory is full.
    # Where time stamps jump back, as in files joined by `cat`, the second file follows the first.
    limit = source.start + source.max_seconds + 1
    joined = "st(0,ld(0)+if(gt(PREV_INPTS-PTS,0.5/TB),PREV_INPTS-PTS,0))"
    clamp = f"{'a' * (stream[0] == 'a')}setpts='{joined};if(gt(T+ld(0)*TB,{limit}),{limit}/TB,PTS+ld(0))'"
    command = [ffmpeg(), "-v", "error", "-nostdin", *limits, "-copyts", "-i", f"file:{source.path}",
               "-map", f"0:{stream}", "-filter", f"{clamp},{filters}", *output, "pipe:1"]
    with tempfile.TemporaryFile() as stderr, subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr) as process:
        try:
            for _ in range(int(source.max_seconds * FPS)):
                chunk = process.stdout.read(n_bytes)
                if chunk:
                    yield chunk
                if len(chunk) < n_bytes:
                    break
            else:
                raise too_long(source)
            code = process.wait()
        finally:
            process.kill()
        stderr.seek(0)
        complaint = first_words(stderr.read().decode(errors="replace"))
    if code:
        raise clip_error(source.path, f"not readable as media; ffmpeg says: {complaint or f'nothing ({code})'}")
    if complaint:
        source.complaints.append(complaint)


def too_long(source):
    """The error of time stamps that no file of this size has."""
    return clip_error(source.path, f"its time stamps span more than {source.max_seconds:.0f} s, too much for a file of its "
                                   "size; it is damaged: write it anew with ffmpeg")


def late_samples(source):
    """Samples by which a source's sound begins after the source, which begins with the earlier of its streams."""
    text, _ = ask_ffmpeg(source.path, *f"-map 0:a:{source.sound_track} -frames:a 1 -af ashowinfo -f null -".split(), reading=["-copyts"])
    first = re.search(r" pts_time:(-?[\d.]+)", text)
    return max(0, round(SAMPLE_RATE * (float(first[1]) - source.start))) if first else 0


def wave_frames(source):
    """Yield a source's sound in arrays (640,) float32, one for each frame. The last may be shorter.

    Zeros stand before sound that begins late. ffmpeg could add them by first_pts of aresample. But it builds its filters
    anew where the channels or the rate change, and would add them again there. A gap just there is lost."""
    if source.late > source.max_seconds * SAMPLE_RATE:
        raise too_long(source)
    yield from [np.zeros(SAMPLES_PER_FRAME, np.float32)] * (source.late // SAMPLES_PER_FRAME)
    rest = np.zeros(source.late % SAMPLES_PER_FRAME, np.float32)              # at the head of the next array
    filters = f"aresample={SAMPLE_RATE},aresample=async=1,{source.mix}"
    with closing(decode(source, 4 * SAMPLES_PER_FRAME, f"a:{source.sound_track}", filters, "-f", "f32le")) as chunks:
        for chunk in chunks:
            wave = np.frombuffer(chunk[:len(chunk) // 4 * 4], np.float32)
            if not (np.abs(wave) < 100).all():
                raise clip_error(source.path, "its sound has samples that are not numbers, or far beyond -1 to 1; "
                                              "export it anew")
            wave = np.concatenate([rest, wave])
            yield wave[:SAMPLES_PER_FRAME]
            rest = wave[SAMPLES_PER_FRAME:]
    if len(rest):
        yield rest


def picture_frames(source, filters, shape):
    """Yield a source's pictures after these ffmpeg filters as uint8 arrays: (H, W) is grey, (H, W, 3) is RGB."""
    steady = f"fps={FPS}:start_time={source.start},format={'gray' if len(shape) == 2 else 'rgb24'}"
    filters = f"scale=iw*sar:ih,setsar=1,{filters},{steady}"
    output = "-fps_mode passthrough -f rawvideo".split()     # else pictures before a time stamp of 0 would be dropped
    with closing(decode(source, math.prod(shape), f"V:{source.picture_track}", filters, *output)) as chunks:
        for chunk in chunks:
            if len(chunk) == math.prod(shape):
                yield np.frombuffer(chunk, np.uint8).reshape(shape)


# --- pieces of long clips --------------------------------------------------------------------------------------------

def cut_pieces(wave, frames, spans):
    """Cut sound and pictures into pieces. Yields (start, wave (samples,), frames (T, H, W)), None for a missing stream.

    `wave` and `frames` are iterators of (640,) and (H, W) arrays, or None. A piece with a picture of None has none.
    `spans` are [(start, end)], in frames.
    Spans after the end of the file yield nothing. Both streams of a piece become equally long: sound is filled up with
    silence. Sound that goes on after the pictures is cut if that loses at most 0.4 s, else the last picture is held."""
    position, last = 0, None
    for start, end in spans:
        sound = list(islice(wave, start - position, end - position)) if wave else []
        pictures = list(islice(frames, start - position, end - position)) if frames else []
        position, last = end, pictures[-1] if pictures else last
        if last is not None and wave:
            if pictures and len(pictures) < len(sound) <= len(pictures) + HELD_FRAMES and len(sound) < end - start:
                sound = sound[:len(pictures)]
            pictures += [last] * (len(sound) - len(pictures))
            sound += [np.zeros(SAMPLES_PER_FRAME, np.float32)] * (len(pictures) - len(sound))
        if not sound and not pictures:
            break
        if sound:
            sound = np.concatenate(sound)
            sound = np.pad(sound, (0, -len(sound) % SAMPLES_PER_FRAME))  # the file's last samples
        lost = not pictures or any(picture is None for picture in pictures)
        yield start, sound if len(sound) else None, None if lost else np.stack(pictures)


def loudness(source):
    """The loudness of each frame of a source's sound -> (T,) dB below full scale. Less than -80 is silence."""
    level = [10 * math.log10(np.sum(wave.astype(float) ** 2) / SAMPLES_PER_FRAME + 1e-10)
             for wave in wave_frames(replace(source, mix=f"{source.mix},{NO_HUM}"))]
    return np.array((level[1:2] or level) + level[1:])  # the filter answers to an offset in the first frame


def is_silent(source):
    """Has it no sound, or nothing but silence?"""
    return not source.has_sound or max(loudness(source), default=SILENCE) <= SILENCE


def motion(frames):
    """Pictures of lips -> (T,) dB: how much each differs from the one before it. It replaces a missing loudness."""
    level, previous = [], 0.
    for picture in frames:
        picture = previous if picture is None else picture    # no face: nothing moves
        level.append(10 * math.log10(np.mean((picture - previous) ** 2) + 1))
        previous = np.asarray(picture, float)
    return np.array(level[1:2] + level[1:])  # the first picture has none before it


def active_frames(level, silence, quiet, rise, clear=0):
    """Loudness or motion (T,) in dB -> (T,) bool: the frames in which somebody speaks.

    A frame is active if it is `rise` above the floor. The floor is the level of the quietest tenth of `quiet`, or of
    the frame's own minute if that is lower. So a quiet voice counts beside a loud one, and after music. What varies by
    less than `rise` within two seconds is a noise that began later. If nothing else is left, all that is not silence is
    active. If less than a tenth of the active frames is `clear` above the floor, noise hides parts of the speech. Then
    all frames within NEAR of an active one count that are not silence."""
    if not (level > silence).any():
        return np.zeros(len(level), bool)
    floor, minutes = np.percentile(quiet, 10), np.array_split(level, math.ceil(len(level) / (60 * FPS)))
    floors = [np.percentile(np.append(minute[minute > silence], floor), 10) for minute in minutes]
    threshold = rise + np.repeat(floors, [len(minute) for minute in minutes]).clip(max=floor)
    n = 2 * FPS
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(level, (0, max(0, n - len(level))), "edge"), n)
    steady = np.convolve(np.ptp(windows, axis=1) < rise, np.ones(n))[:len(level)] > 0
    active = (level > threshold) & ~steady
    if not active.any():
        return level > silence
    if np.percentile((level - threshold)[active], 90) < clear - rise:
        active = (np.convolve(active, np.ones(2 * NEAR + 1))[NEAR:][:len(level)] > 0) & (level > silence)
    return active


def speech_spans(active, level, longest, borders=()):
    """-> [(start, end)]: spans of frames with speech, none longer than `longest`. active (T,) bool, level (T,) in dB.

    No span goes over one of `borders`, which are frames. Between them are pauses of more than PAUSE frames, quieter
    than speech but not necessarily silent. A span that is too long is cut at the quietest frame in the second half
    of what may stay together."""
    active = np.flatnonzero(active)
    if not len(active):
        return []
    pauses = np.flatnonzero(np.diff(active) > PAUSE)
    starts, ends = active[[0, *(pauses + 1)]], active[[*pauses, -1]] + 1
    smooth = np.convolve(np.pad(level, 2, "edge"), np.full(5, .2), "valid")
    spans = []
    for start, end in zip(starts.tolist(), ends.tolist()):
        if end - start < MIN_FRAMES // 2:      # a click is no word
            continue
        start, last = max(0, start - MARGIN), min(len(level), end + MARGIN)
        for end in (*(border for border in borders if start < border < last), last):
            while end - start > longest:
                half, latest = start + longest // 2, min(start + longest, end - longest // 4)
                cut = half + int(smooth[half:latest].argmin())
                spans.append((start, cut))
                start = cut
            spans.append((start, end))
            start = end
    return spans


def is_still(frames):
    """Whether pictures (T, H, W) uint8 show one and the same: black, frozen or single ones, or a coded portrait.

    Key frames change a portrait by up to 2 of 255 now and then, which is over five times its usual change. The mean
    change over each second is under 0.5, and 99 % of the pixels stay within 25. Lips in compressed film go further."""
    changes = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=(1, 2))
    if not len(changes):
        return True
    n = min(FPS, len(changes))
    means = np.convolve(changes, np.full(n, 1 / n), "valid")
    ranges = [np.percentile(np.ptp(frames[i:i + FPS + 1], axis=0), 99) for i in range(0, len(changes), FPS)]
    is_coded = changes.max() > 5 * np.median(changes) and means.max() < 0.5 and max(ranges) < 25
    return is_coded or changes.max() < 0.2


# --- writing ---------------------------------------------------------------------------------------------------------

def write_mp4(path, frames, wave):
    """Write grey pictures (T, H, W) at 25 fps and sound at 16 kHz as an mp4 (H.264, AAC), whole or not at all."""
    path, (height, width) = Path(path), frames.shape[1:]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as scratch:
        samples = (np.clip(wave, -1, 1) * 32767).round().astype("<i2")
        Path(scratch, "sound").write_bytes(samples.tobytes())
        sound = f"-f s16le -ar {SAMPLE_RATE} -ac 1 -i".split()
        raw = f"-f rawvideo -pix_fmt gray -s {width}x{height} -r {FPS} -i pipe:0".split()
        coded = "-c:v libx264 -crf 12 -pix_fmt yuv420p -c:a aac -b:a 96k".split()
        command = [ffmpeg(), "-v", "error", *sound, f"file:{scratch}/sound", *raw, *coded, f"file:{scratch}/clip.mp4"]
        done = subprocess.run(command, input=frames.tobytes(), capture_output=True)
        if done.returncode:
            raise clip_error(path, f"not written; ffmpeg says: {first_words(done.stderr.decode(errors='replace'))}")
        Path(scratch, "clip.mp4").replace(path)
