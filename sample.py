"""Transcribe clips with a trained model.

    python sample.py                              the three unseen clips that train.py wrote
    python sample.py clip.mp4 --rate 8 --json     one's own clip, with fewer tokens for the LLM to read

A line of text for each clip, on stdout; what goes wrong with a clip is one line on stderr. Exit code 0; 1 if some clips
failed; 2 if nothing could be transcribed. From Python: `sample.transcribe("clip.mp4")`.
"""
import argparse
import json
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch

import data
from encoders import VideoConfig
from mome import load_model
from train import TASKS, parse_rates, to


@lru_cache(maxsize=1)
def load(ckpt):
    """Folder of a checkpoint -> (model, its config.json, tokenizer)."""
    model, config = load_model(ckpt)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model, config, data.load_tokenizer(ckpt)


def choose_rates(clip, model, config, rate=None, task=None):
    """-> (task, {stream: rate}): the streams that the task names, else all that the clip has and the model knows, at
    `rate` ('4', or audio:video '4:2'), else the finest that the model was trained at."""
    have = [s for s in model.streams if s in clip.streams]
    wanted = TASKS[task] if task else have
    lacking = [s for s in wanted if s not in have]
    if lacking or not have:
        raise data.ClipError(f"{clip.name}: the clip has {' and '.join(clip.streams)} only, the model reads "
                             f"{' and '.join(model.streams)}" + (f", and task {task} needs {' and '.join(wanted)}" if task else ""))
    pairs = parse_rates(rate) if rate else [min(config["rates"])]
    if len(pairs) > 1:
        raise ValueError(f"rate {rate!r} names {len(pairs)} rates; a clip is read at one, like 4 or 4:2")
    rates = {s: r for s, r in zip(("audio", "video"), pairs[0]) if s in wanted}
    return next(t for t, streams in TASKS.items() if set(streams) == set(rates)), rates


@torch.no_grad()
def transcribe(path, ckpt="out", rate=None, task=None, beam=1):
    """What is said in the clip at `path` -> dict of clip, text, task, audio_rate, video_rate, tokens (read by the LLM
    before the first word), seconds, logprob (mean per output token).

    Raises data.ClipError for a clip that cannot be read, FileNotFoundError for a missing checkpoint."""
    model, config, tokenizer = load(str(ckpt))
    start = time.perf_counter()
    clip = data.read_clip(path, VideoConfig().size if model.config.video is None else model.config.video.size)
    task, rates = choose_rates(clip, model, config, rate, task)
    encoded = model.encode(to(model.device, data.batch([clip], rates)))
    (ids, logprob), = model.generate(encoded, rates, beam)
    return {"clip": str(path), "text": data.normalize(tokenizer.decode(ids)), "task": task,
            "audio_rate": rates.get("audio"), "video_rate": rates.get("video"),
            "tokens": len(model.prefix(encoded, rates)[0]), "seconds": round(time.perf_counter() - start, 3),
            "logprob": round(logprob, 4)}


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="*", metavar="CLIP", help="media files (default: those in CKPT/samples)")
    parser.add_argument("--ckpt", default="out", help="folder that train.py wrote (default %(default)s)")
    parser.add_argument("--rate", help="compression rate, '4', or '4:2' for audio:video (default: the finest trained)")
    parser.add_argument("--task", choices=TASKS, help="which streams to use (default: all that the clip has)")
    parser.add_argument("--beam", type=int, default=1, help="beam width, 1 is greedy (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="a JSON object per line instead of the text")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.beam < 1:
            raise ValueError(f"--beam must be 1 or more, not {args.beam}")
        if args.rate and len(parse_rates(args.rate)) > 1:
            raise ValueError(f"--rate {args.rate!r}: a clip is read at one rate, like 4 or 4:2")
        model, *_ = load(args.ckpt)
        if args.task and not set(TASKS[args.task]) <= set(model.streams):
            raise ValueError(f"--task {args.task}: the model in {args.ckpt} reads {' and '.join(model.streams)} only")
        clips = args.clips or sorted(p for p in Path(args.ckpt, "samples").glob("*") if p.suffix.lower() in data.SOUND | data.VIDEO)
        if not clips:
            raise FileNotFoundError(f"{args.ckpt}/samples: no clips there; name the clips to transcribe")
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    failed = 0
    for path in clips:
        try:
            result = transcribe(path, args.ckpt, args.rate, args.task, args.beam)
            print(json.dumps(result) if args.json else result["text"], flush=True)
        except data.ClipError as error:
            print(f"sample.py: {error}", file=sys.stderr)
            failed += 1
    return 2 if failed == len(clips) else int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
