"""Command line flags made from a dataclass: one place for each default, its help, its choices and its lower bound."""
import argparse
import math
import os
from dataclasses import field, fields
from glob import glob
from pathlib import Path

from data import TASKS
from real.checkpoint import FLAGS, load_for_use
from real.media import SUFFIXES
from real.mouth import parse_box


def flag(default, text, **more):
    """A dataclass field with the help text of its flag; `more`: choices=, least=."""
    return field(default=default, metadata={"help": text, **more})


def parse_options(kind, argv, description, usage, presets, check):
    """The command line `argv` as a `kind` (a dataclass of `flag` fields). A wrong flag ends the program with one line.

    presets: {value of --preset: {field: other default}}. `check(options)` raises ValueError for a wrong combination."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, usage=usage, formatter_class=style)
    for f in fields(kind):
        name, text = f"--{f.name.replace('_', '-')}", f.metadata["help"]
        if f.type is bool:
            parser.add_argument(name, action="store_true", help=text)
        else:
            text += "" if f.default == "" else f" (default {f.default})".replace("%", "%%")
            parser.add_argument(name, type=f.type, default=f.default, choices=f.metadata.get("choices"), help=text)
    preset = parser.parse_args(argv).preset     # a preset changes defaults, so the arguments are parsed twice
    parser.set_defaults(**presets[preset])
    options = kind(**vars(parser.parse_args(argv)))
    try:
        for f in fields(options):
            value, least = getattr(options, f.name), f.metadata.get("least", -math.inf)
            if f.type in (int, float) and not least <= value < math.inf:
                raise ValueError(f"--{f.name.replace('_', '-')} must be {least} or more, not {value}")
        check(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def parse_max_bad(text):
    """'1%' -> 1.0. ValueError says what is wrong."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise ValueError(f"--max-bad {text!r}: expected a share of the clips, like 1%")
    return value


def parse_snrs(text):
    """'clean,0,-5' -> [None, 0.0, -5.0]: clean is always there and first. ValueError says what is wrong."""
    try:
        snrs = [None if item == "clean" else float(item) for item in text.split(",")]
        if not all(snr is None or math.isfinite(snr) for snr in snrs):
            raise ValueError
    except ValueError:
        raise ValueError(f"--snr {text!r}: expected 'clean' or dB, like clean,0,-5") from None
    return list(dict.fromkeys([None, *snrs]))


def parse_sample_options(argv, description):
    """The command line of sample.py. A wrong flag ends the program with one line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("clips", nargs="*", metavar="CLIP", help="media files (default: those in CKPT/samples)")
    add("--ckpt", default="out", help="folder that train.py wrote (default %(default)s)")
    add("--rate", help="compression rate: '4', or '4:2' for audio:video, also one that was never trained; "
                       "auto: coarse, and finer where the model is unsure; all: every trained rate "
                       "(default: the finest)")
    add("--task", choices=TASKS, help="which streams to use (default: those of clip and model)")
    add("--beam", type=int, default=1, help="beam width; 1 is greedy (default %(default)s)")
    add("--json", action="store_true", help="print a JSON object per line instead of the text")
    add("--srt", metavar="FILE", help="write subtitles of the clip")
    add("--box", metavar="X,Y,W,H", help="where the mouth is (default: small square pictures are mouths; in "
                                         "others it is searched, which needs requirements-face.txt)")
    add("--show-crop", metavar="PNG", help="write a picture of the mouths that are read")
    for part, flag in FLAGS.items():
        add(flag, dest=part, metavar="PATH", help=f"where the checkpoint's real {part} part is now")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one")
    add("--verify", action="store_true", help="compare every byte of the real parts with those of training")
    args = parser.parse_args(argv)
    if len(args.clips) != 1 and (args.srt or args.show_crop):
        parser.error("--srt and --show-crop are for one clip")
    if "" in (args.srt, args.show_crop):
        parser.error("--srt and --show-crop need the name of a file")
    if args.srt and args.rate == "all":
        parser.error("--srt is for one rate, not for --rate all")
    return args


def sample_clips(ckpt):
    """The clips in CKPT/samples. Raises FileNotFoundError if there is none."""
    paths = [path for path in sorted(Path(ckpt, "samples").glob("*")) if path.suffix.lower() in SUFFIXES]
    if not paths:
        raise FileNotFoundError(f"{ckpt}/samples: no clips there; name the clips to transcribe")
    return paths


def expanded(path):
    """[path], or the files of a pattern like *.mp4, which the shell may have left. A bracket is a letter of a name."""
    return not os.path.exists(path) and sorted(glob(path.replace("[", "[[]"))) or [path]


def check_sample_options(args):
    """Check the command line of sample.py against its checkpoint before any clip is read -> its config, the paths.

    ValueError or OSError say what is wrong."""
    if args.beam < 1:
        raise ValueError(f"--beam must be 1 or more, not {args.beam}")
    args.box = args.box and parse_box(args.box)
    model, config, _ = load_for_use(args.ckpt, args.verify, args.device, **{part: getattr(args, part) for part in FLAGS})
    if args.task and not set(TASKS[args.task]) <= set(model.encoders):
        streams = " and ".join(model.encoders)
        raise ValueError(f"--task {args.task}: the model in {args.ckpt} reads {streams} only")
    clips = [found for path in args.clips for found in expanded(path)] or sample_clips(args.ckpt)
    if len(clips) != 1 and (args.srt or args.show_crop):
        raise ValueError(f"--srt and --show-crop are for one clip, and {args.clips[0]} is {len(clips)}")
    for flag, path in (("--srt", args.srt), ("--show-crop", args.show_crop)):
        if path and (os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or ".")):
            raise ValueError(f"{flag} {path}: a folder, or in a folder that is not there; name a file to write")
        if path and os.path.exists(path) and os.path.exists(clips[0]) and os.path.samefile(path, clips[0]):
            raise ValueError(f"{flag} {path}: that is the clip itself; name another file")
        if path and Path(path).suffix.lower() in SUFFIXES:
            raise ValueError(f"{flag} {path}: a clip's name; name the file to write, like {Path(path).stem}.srt or .png")
    return config, clips
