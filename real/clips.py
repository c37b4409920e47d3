"""Clips from media files, clips to media files, and the command line of data.py:

    python data.py --out clips --count 8      write mp4 clips of the synthetic talker with their transcripts
    python data.py check DIR                  show what a folder of clips holds and which clips cannot be used
"""
import argparse
import sys
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import count, groupby, islice
from pathlib import Path

import numpy as np

from data import MAX_SECONDS, TASKS, Clip, ClipError, with_log_power
from encoders import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from real import media
from real.files import SPAN, note, shown, write_whole
from real.media import MIN_FRAMES, clip_error
from real.mouth import HINT, is_mouth, mouths
from real.script import in_one_line

MISSING = 0.05         # share of a damaged training clip that may be missing
UNHEARD = 2 * FPS      # frames: where the sound is silent or over for so long, the lips show where speech is
ADDED = 0.2            # seconds that a coder may add to a clip
SILENT_POWER = 10 ** (media.SILENCE / 10)
AWAY, SILENT, STILL = "face is away for over a second", "sound is silent", "pictures do not move"


def read_pieces(source, longest, size=32, text="", n_mels=80, streams=("audio", "video"), box=None, cache=None,
                span=None, levels=None, voice_alone=True):
    """Yield (start in seconds, Clip) for each piece of a media.Source. Raises ClipError.

    Pieces are cut at pauses and are at most `longest` seconds long. A missing or silent stream is None in the clip.
    If `longest` is None, `span` (start and end in seconds) is one piece; without it, the file is cut every 30 s.
    Much damage is then an error, see `check_read`. Less damage, or damage of a long clip, is a note.
    `streams` are those to read; `size`, `box` and `cache` are passed on to mouth.mouths. levels: see `at_level`.
    voice_alone: sound may be read without pictures, so pictures that do not move are left out beside it."""
    def lips():
        return closing(mouths(selected, size, box, cache))

    selected = media.select_streams(source, streams)
    spans, n_skipped = spans_to_read(source, selected, lips, longest, span)
    name = f"{source.path}{SPAN}{span[0]:g},{span[1]:g}" if span else str(source.path)
    end = n_pieces = 0  # end of the last piece, in frames
    unused = set()      # why a stream that is there is not used
    is_close = box != "all" or not selected.picture_size or is_mouth(selected)   # in a whole picture lips are too small
    hole = 0            # frames that lack everything, one after another
    if spans == []:
        unused = {text for text, is_there in ((SILENT, source.has_sound), (STILL, selected.picture_size)) if is_there}
    with (closing(media.wave_frames(selected)) if selected.has_sound else nullcontext() as sound,
          lips() if selected.picture_size else nullcontext() as pictures):
        for start, wave, frames in media.cut_pieces(sound, pictures, spans):
            if frames is None and selected.picture_size:
                unused.add(AWAY)
                if not longest:
                    raise clip_error(source.path, f"its {AWAY}; {HINT}")
            lengths = [len(x) // size for x, size in ((wave, SAMPLES_PER_FRAME), (frames, 1)) if x is not None]
            end = start + (max(lengths, default=0) or MIN_FRAMES)
            hole = max(hole, longest_hole(wave, frames))
            if end - start < MIN_FRAMES:
                continue
            if wave is not None and (np.square(wave.reshape(-1, SAMPLES_PER_FRAME)).mean(1) <= SILENT_POWER).all():
                wave, unused = None, unused | {SILENT}
            if frames is not None and (wave is None or voice_alone) and is_close and media.is_still(frames):
                frames, unused = None, unused | {STILL}
            if wave is None and frames is None:
                continue
            if wave is not None and abs(wave.mean()) > 0.1 * wave.std():    # an offset: it would hide a quiet voice
                wave = wave - wave.mean()
            n_pieces += 1
            yield start / FPS, at_level(with_log_power(Clip(name, text, wave, frames), n_mels), levels)
    check_read(source, longest, span, end, hole, n_pieces, unused)
    if n_skipped > 10 * FPS:
        note(f"{shown(source.path)}: {n_skipped / FPS:.0f} s without speech are skipped")


def spans_to_read(source, selected, lips, longest, span):
    """-> [(start, end)] in frames, or an iterator of spans without gaps, and how many frames are skipped.

    The arguments are those of `read_pieces` and `speech_over_time`."""
    if span:
        return [(round(span[0] * FPS), round(span[1] * FPS))], 0
    max_frames = round((longest or MAX_SECONDS) * FPS)
    if longest:
        active, level, borders = speech_over_time(source, selected, lips, max_frames)
        if len(level) > max_frames:
            spans = media.speech_spans(active, level, max_frames, borders)
            return spans, len(level) - sum(end - start for start, end in spans)
    return ((start, start + max_frames) for start in count(0, max_frames)), 0


def longest_hole(wave, frames):
    """The most frames in a row, not at an end, in which the sound is 0 and the picture that of the frame before."""
    same = [] if wave is None else [~wave.reshape(-1, SAMPLES_PER_FRAME).any(1)]
    if frames is not None:
        same.append(np.append(False, (frames[1:] == frames[:-1]).all((1, 2))))
    inner = np.trim_zeros(~np.all(same, axis=0)) if same else np.zeros(0, bool)
    return max((len(run) for run in runs(inner) if not run.all()), default=0)


def check_read(source, longest, span, end, hole, n_pieces, unused):
    """Raises ClipError if what was read of a media.Source is not enough. Prints notes about what is not used.

    longest, span: see `read_pieces`. end: the frame after the last piece. hole: see `longest_hole`.
    unused: why a stream is not used."""
    if span and end < round(span[1] * FPS) - MISSING * (span[1] - span[0]) * FPS:
        raise clip_error(source.path, f"{source.seconds:.1f} s long, and its transcript has words at {span[1]:.1f} s; "
                                      "is it another clip's?")
    if not n_pieces and 0 < end < MIN_FRAMES:
        raise clip_error(source.path, f"{end / FPS:.2f} s long, too short for a word")
    if not n_pieces:
        reasons = " and ".join(f"its {reason}" for reason in sorted(unused, reverse=True))
        raise clip_error(source.path, reasons or "no picture in it can be read")
    says = f"; ffmpeg says: {source.complaints[0]}" if source.complaints else ""
    if (says or has_known_length(source)) and not longest and not span and is_cut(source, end):
        raise clip_error(source.path, f"damaged: {end / FPS:.1f} of {source.claimed:.1f} s can be read; copy it again{says}")
    if says and not longest and hole > max(MISSING * end, FPS // 2):
        raise clip_error(source.path, f"damaged: {hole / FPS:.1f} s in its middle cannot be read{says}")
    if says:
        note(f"{shown(source.path)}: read, but damaged{says}")
    if longest and not span and 0 < 1.5 * source.claimed * FPS < end - FPS and len(source.streams) > 1:
        note(f"{shown(source.path)}: several files joined? lips and sound may drift apart; ffmpeg can join them better")
    for reason in sorted(unused):
        note(f"{shown(source.path)}: its {reason} in places or throughout; those parts are not used")


def is_cut(source, n_frames):
    """Whether `n_frames` are fewer than a media.Source claims, by more than a coder adds and than may be missing."""
    return n_frames / FPS < source.claimed - max(ADDED, MISSING * source.claimed)


def has_known_length(source):
    """Whether what ffmpeg says of a file's duration is that of its sound: it has no pictures, and begins at 0."""
    return not source.picture_size and abs(source.start) < ADDED


def speech_over_time(source, selected, lips, max_frames):
    """When somebody speaks -> active (T,) bool, level (T,) in dB, borders. T are the frames of a media.Source.

    `selected` is the source with the streams that are read. Borders are frames where sound begins or ends beside lips.

    The sound shows where somebody speaks, even if only the pictures are read. Where it is silent or over for UNHEARD
    frames, `lips()` shows it, if the source is longer than `max_frames` or of unknown length."""
    try:
        level = media.loudness(source) if source.has_sound else np.zeros(0)
    except ClipError:                     # the sound cannot be read; the lips may be
        if selected.has_sound:
            raise
        level = np.zeros(0)
    if has_known_length(source) and len(level) and is_cut(source, len(level)):
        note(f"{shown(source.path)}: only {len(level) / FPS:.1f} of {source.claimed:.1f} s of sound can be read")
    n_frames = max(len(level), round(source.seconds * FPS) if selected.picture_size else 0)
    missing = 0, n_frames - len(level)
    heard = media.active_frames(level, media.SILENCE, np.maximum(level, media.SILENCE), rise=6, clear=15)
    active, borders = np.pad(heard, missing), []
    level = np.pad(level, missing, constant_values=-200)
    unheard = np.concatenate([run & (len(run) >= UNHEARD) for run in runs(level <= media.SILENCE)])
    if selected.picture_size and (not n_frames or unheard.any() and n_frames > max_frames):
        with lips() as pictures:
            motion = media.motion(pictures)
        more = 0, max(0, len(motion) - n_frames)                             # a header may claim too little
        active, level = np.pad(active, more), np.pad(level, more, constant_values=-200)
        unheard = np.pad(unheard, more, constant_values=True)[:len(motion)]
        active[:len(motion)] |= media.active_frames(motion, 0.5, motion[motion > 0.5], rise=3) & unheard
        level[:len(motion)][unheard] = motion[unheard] - 200
        borders = (np.flatnonzero(np.diff(unheard)) + 1).tolist()
    return active, level, borders


def limits(clips):
    """For sample.py: the seconds of the longest clip, the 5th and 95th percentile of levels in dB (None: no sound)."""
    levels = [mel_level(clip) for clip in clips if clip.log_power is not None]
    return {"longest": max(clip.duration for clip in clips),
            "levels": np.percentile(levels, (5, 95)).tolist() if levels else None}


def mel_level(clip):
    """The mean power of a clip's sound in dB."""
    return 10 * float(np.log10(np.mean(10 ** clip.log_power.astype(np.float32))))


def at_level(clip, levels):
    """Bring the sound of a clip into the range `levels`, (lowest, highest) in dB. Other clips stay as they are."""
    if clip.wave is None or not levels:
        return clip
    gain = np.clip(mel_level(clip), *levels) - mel_level(clip)
    return with_log_power(replace(clip, wave=clip.wave * np.float32(10 ** (gain / 20))), len(clip.log_power))


def runs(x):
    """x (T,) bool -> its parts in which it does not change, one after another."""
    return np.split(x, np.flatnonzero(np.diff(x)) + 1)


def read_clip(path, span=None, sound=None, **reading):
    """A media file of at most 30 s, or `span` of it, start and end in seconds -> Clip. Raises ClipError.

    `sound`: the file with the sound, if `path` has none or only silence. `reading` are arguments of `read_pieces`."""
    source, streams = media.probe(path), reading.get("streams", ("audio", "video"))
    if sound and "audio" in streams and media.is_silent(source):
        voice = read_clip(sound, span, **reading | {"streams": ("audio",)})
        if "video" not in streams:
            return voice
        clip = read_clip(path, span, **reading | {"streams": ("video",)})
        missing = len(clip.frames) * SAMPLES_PER_FRAME - len(voice.wave)
        if abs(missing) > max(SAMPLE_RATE / 2, MISSING * len(voice.wave)):
            raise clip_error(sound, f"{voice.duration:.1f} s of sound for {clip.duration:.1f} s of pictures; "
                                    "is it another clip's?")
        wave = np.pad(voice.wave, (0, max(0, missing)))[:len(voice.wave) + missing]
        return with_log_power(replace(clip, wave=wave), len(voice.log_power))
    if not span and source.seconds > MAX_SECONDS + 1:    # the header says so, and nothing need be decoded
        raise clip_error(path, f"longer than {MAX_SECONDS} s; cut it into pieces")
    (_, clip), *more = read_pieces(source, None, span=span, **reading)
    if clip.duration + sum(rest.duration for _, rest in more) > MAX_SECONDS + ADDED:
        raise clip_error(path, f"longer than {MAX_SECONDS} s; cut it into pieces")
    return clip


def groups_of(items, most, key):
    """Yield lists of up to `most` neighbours of the same `key(item)`."""
    for _, same in groupby(items, key):
        while group := list(islice(same, most)):
            yield group


def choose_task(name, streams, model, task=None, trained=tuple(TASKS)):
    """`task`, if the model and the clip `name` have its streams. Without a task: the one with most of the streams
    that both have, if possible one of `trained`, the model's tasks. streams: the clip's. Raises ClipError."""
    common = tuple(stream for stream in model.encoders if stream in streams)
    if task is None and common:
        possible = [known for known, needed in TASKS.items() if set(needed) <= set(common)]
        task = next(filter(trained.__contains__, possible), possible[0])
        for other in set(streams) - set(TASKS[task]):
            reason = f"was trained for {' and '.join(trained)}" if other in common else f"reads {common[0]} only"
            note(f"{shown(name)}: its {other} is not read, because the model {reason}")
    if task is None or not set(TASKS[task]) <= set(common):
        needs = f"task {task} needs {' and '.join(TASKS[task])}" if task else (
            f"the model reads {' and '.join(model.encoders)}")
        raise ClipError(f"{shown(name)}: the clip has {' and '.join(streams)} only, and {needs}")
    if task not in trained:
        note(f"{shown(name)}: is read by task {task}, for which this model was not trained")
    return task


def write_clip(clip, path):
    """Write a clip as mp4 with its transcript beside it as txt, each whole or not at all."""
    write_whole(Path(path).with_suffix(".txt"), lambda temporary: temporary.write_text(clip.text + "\n", "utf-8"))
    media.write_mp4(path, clip.frames, clip.wave)


# --- python data.py --------------------------------------------------------------------------------------------------

def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if argv[:1] == ["check"]:
        parser.add_argument("command", help="check")
        parser.add_argument("folder", type=Path, help="of clips with transcripts, or with a manifest.csv")
        parser.add_argument("--faces", action="store_true", help="look for the face in each clip too, which is slow")
        return parser.parse_args(argv)
    from toy.talker import SPLITS
    parser.add_argument("--out", default="clips", help="folder to write (default %(default)s)")
    parser.add_argument("--count", type=int, default=8, help="number of clips (default %(default)s)")
    parser.add_argument("--part", choices=SPLITS, default="train", help="the talkers' split (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default %(default)s)")
    args = parser.parse_args(argv, argparse.Namespace(command="write"))
    if args.seed < 0 or args.count < 1:
        parser.error("--seed must be 0 or more, and --count 1 or more")
    if not args.out or Path(args.out).is_file():
        parser.error(f"--out {shown(args.out)!r}: not a folder; name another one")
    return args


@in_one_line("data.py", ClipError, OSError)
def main(argv=None):
    """Run the command line of data.py. Returns the exit code."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    from real.folders import check  # imported here because these two files
    from toy.talker import write_talker_clips  # are built on this one
    if args.command == "check":
        return check(args.folder, args.faces)
    for path in write_talker_clips(Path(args.out), args.count, args.part, args.seed):
        print(path)
