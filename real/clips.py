"""Clips from media files, clips to media files, and the command line of data.py:

    python data.py --out clips --count 8      write mp4 clips of the synthetic talker with their transcripts
    python data.py check DIR                  show what a folder of clips holds and which clips cannot be used
"""
import argparse
import sys
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np

from data import TASKS, Clip, ClipError, with_log_power
from encoders import FPS, SAMPLES_PER_FRAME
from real import media
from real.files import note, shown, write_whole
from real.media import MAX_SECONDS, MIN_FRAMES, clip_error
from real.mouth import mouths


def read_pieces(source, longest, size=32, text="", n_mels=80, streams=("audio", "video"), box=None, cache=None):
    """Yield (start in seconds, Clip) for each piece of a media.Source. Raises ClipError.

    Pieces are cut at pauses and are at most `longest` seconds long. A missing or silent stream is None in the clip.
    With `longest` None the file is read as one clip. Damage that ffmpeg reports is then an error, otherwise a note.
    `streams` are those to read; `size`, `box` and `cache` are passed on to mouth.mouths."""
    def lips():
        return closing(mouths(selected, size, box, cache))

    # 1. Where are the pauses? The sound shows them, even if only the pictures are read.
    max_frames = round((longest or MAX_SECONDS + 1) * FPS)
    level = media.loudness(source) if longest and source.has_sound else []
    silent = len(level) > 0 and max(level) < -80
    audible = replace(source, has_sound=source.has_sound and not silent)
    selected = media.select_streams(audible, streams)
    if longest and not audible.has_sound:
        level = []
        if source.seconds > longest:
            with lips() as pictures:
                level = media.motion(pictures)
    spans = ((start, start + max_frames) for start in count(0, max_frames))
    if len(level) > max_frames:
        spans = media.speech_spans(level, max_frames)

    # 2. Decode the sound, find the mouths, cut both into pieces, make the clips.
    end = 0  # of the last piece, in frames
    with ExitStack() as stack:
        sound = stack.enter_context(closing(media.wave_frames(selected))) if selected.has_sound else None
        pictures = stack.enter_context(lips()) if selected.picture_size else None
        for start, wave, frames in media.cut_pieces(sound, pictures, spans):
            if not longest and wave is not None and np.abs(wave).max() < 1e-4:
                wave = None  # with `longest`, step 1 has looked for silence
            if wave is None and frames is None:
                continue
            end = start + (len(wave) // SAMPLES_PER_FRAME if frames is None else len(frames))
            if end < MIN_FRAMES:
                break
            yield start / FPS, with_log_power(Clip(str(source.path), text, wave, frames), n_mels)

    # 3. Is anything wrong with the file?
    if end == 0:
        raise clip_error(source.path, "its sound is silent" if source.has_sound else "no picture in it can be read")
    if end < MIN_FRAMES:
        raise clip_error(source.path, f"{end / FPS:.2f} s long, too short for a word")
    if source.complaints and not longest:
        raise clip_error(source.path, f"damaged; ffmpeg says: {source.complaints[0]}")
    if source.complaints:
        note(f"{shown(source.path)}: read, but damaged; ffmpeg says: {source.complaints[0]}")


def read_clip(path, **reading):
    """A media file of at most 30 s -> Clip. `reading` are arguments of `read_pieces`. Raises ClipError."""
    (_, clip), *more = read_pieces(media.probe(path), None, **reading)
    if more or clip.duration > MAX_SECONDS:
        raise clip_error(path, f"longer than {MAX_SECONDS} s; cut it into pieces")
    return clip


def choose_task(clip, model, task=None):
    """`task` if clip and model have its streams; None: the task with all streams that both have."""
    common = tuple(stream for stream in model.encoders if stream in clip.streams)
    if task is None and common:
        return next(name for name, streams in TASKS.items() if streams == common)
    if task is None or not set(TASKS[task]) <= set(common):
        needs = f"the model reads {' and '.join(model.encoders)}"
        if task:
            needs = f"task {task} needs {' and '.join(TASKS[task])}"
        raise ClipError(f"{shown(clip.name)}: the clip has {' and '.join(clip.streams)} only, and {needs}")
    return task


def write_clip(clip, path):
    """Write a clip as mp4 with its transcript beside it as txt, each whole or not at all."""
    write_whole(Path(path).with_suffix(".txt"), lambda temporary: temporary.write_text(clip.text + "\n"))
    media.write_mp4(path, clip.frames, clip.wave)


# --- python data.py --------------------------------------------------------------------------------------------------

def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if argv[:1] == ["check"]:
        parser.add_argument("command", help="check")
        parser.add_argument("folder", type=Path, help="of clips with transcripts, or with a manifest.csv")
        return parser.parse_args(argv)
    from toy.talker import SPLITS
    parser.add_argument("--out", type=Path, default=Path("clips"), help="folder to write (default %(default)s)")
    parser.add_argument("--count", type=int, default=8, help="number of clips (default %(default)s)")
    parser.add_argument("--part", choices=SPLITS, default="train", help="the talkers' split (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default %(default)s)")
    args = parser.parse_args(argv, argparse.Namespace(command="write"))
    if args.seed < 0 or args.count < 1:
        parser.error("--seed must be 0 or more, and --count 1 or more")
    return args


def main(argv=None):
    """Run the command line of data.py. Returns the exit code."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    from real.folders import check  # imported here because these two files
    from toy.talker import write_talker_clips  # are built on this one
    try:
        if args.command == "check":
            return check(args.folder)
        for path in write_talker_clips(args.out, args.count, args.part, args.seed):
            print(path)
    except (ClipError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    return 0
