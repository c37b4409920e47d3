"""Transcribe clips with a trained model.

    python sample.py                              the three unseen clips that train.py wrote
    python sample.py clip.mp4 --rate 8 --json     one's own clip, with fewer tokens for the LLM to read
    python sample.py talk.mp4 --srt talk.srt      a long one, with subtitles

A line of text for each clip, on stdout; what goes wrong with a clip is one line on stderr. Exit code 0; 1 if some clips
failed; 2 if nothing could be transcribed. From Python: `sample.transcribe("clip.mp4")`. Clips longer than those of training
are parted at pauses, and what is said in the pieces is put together.
"""
import argparse
import json
import math
import os
import sys
import textwrap
import time
from dataclasses import asdict
from functools import lru_cache
from itertools import islice, product
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import media
import mouth
from encoders import AudioConfig, AudioEncoder, VideoConfig, VideoEncoder
from media import SUFFIXES, ClipError, shown
from mome import AVSR, AVSRConfig, Llama, LlamaConfig
from weights import WeightsError, fingerprint, write_json, write_whole

TASKS = {"avsr": ("audio", "video"), "asr": ("audio",), "vsr": ("video",)}
EXPERTS = ("n_routed", "top_k", "n_shared", "bottleneck", "place")
PARTS = {"llm": Llama, "audio": AudioEncoder, "video": VideoEncoder}  # what may be real: frozen, from files of others
FLAGS = {"llm": "--llm", "audio": "--audio-encoder", "video": "--video-encoder"}  # that name those files
TOKENS = {"audio": 50, "video": 25}  # a second, at rate 1
PIECES = 8       # of a long clip, decoded together


# --- rates and tasks -------------------------------------------------------------------------------------------------

def parse_rates(text):
    """'2,4,8' | '4:2,16:5' | '4,16x2,5' -> [(audio rate, video rate)], each once; ValueError says what is wrong."""
    try:
        if "x" in text:
            audio, video = text.split("x")
            pairs = product(audio.split(","), video.split(","))
        else:
            pairs = [part.split(":") if ":" in part else (part, part) for part in text.split(",")]
        pairs = [(int(audio), int(video)) for audio, video in pairs]
    except ValueError:
        raise ValueError(f"rates {text!r} are not like '2,4,8', '4:2,16:5' or '4,16x2,5'") from None
    if min(map(min, pairs)) < 1:
        raise ValueError(f"rates {text!r}: a rate is how many tokens become one, 1 or more")
    return list(dict.fromkeys(pairs))


def task_streams(tasks):
    """The streams that these tasks read."""
    return {stream for task in tasks for stream in TASKS[task]}


def task_rates(task, pairs):
    """The `rates` dicts of a task: every pair for avsr, the distinct rates of its one stream for asr and vsr."""
    found = [{s: r for s, r in zip(("audio", "video"), pair) if s in TASKS[task]} for pair in pairs]
    return [rates for i, rates in enumerate(found) if rates not in found[:i]]


def trained_rates(task, config):
    """The `rates` dicts of a task that the checkpoint of this config was trained at, from the coarsest to the finest."""
    return sorted(task_rates(task, config["rates"]), key=lambda rates: sum(TOKENS[s] / r for s, r in rates.items()))


def ladder(task, config, rate=None):
    """At what to decode -> [(rates, threshold)], see `decode`. `rate` '4', or audio:video '4:2', also one that was never trained;
    None: the finest of those that were. 'auto': the coarsest, then one between the finest and the next: at 3/2 of the finest, a
    third of its tokens are saved and hardly a word is lost (not in the paper). `config`: a checkpoint's."""
    trained = trained_rates(task, config)
    if rate == "auto":
        if config.get("auto", {}).get(task) is None:
            raise ValueError(f"--rate auto: this checkpoint has no threshold for {task}; train it with --valid-every")
        finer = {stream: min(math.ceil(1.5 * r), trained[0][stream]) for stream, r in trained[-1].items()}
        return [(trained[0], config["auto"][task]), (finer, -math.inf)][finer == trained[0]:]
    found = task_rates(task, parse_rates(rate)) if rate is not None else trained[-1:]
    if len(found) > 1:
        raise ValueError(f"--rate {rate!r}: a clip is read at one rate, like 4 or 4:2, or at auto, or at all")
    return [(found[0], -math.inf)]


# --- checkpoints ------------------------------------------------------------------------------------------------------

def read_parts(paths, dtype, experts, padded):
    """{"llm": folder, "audio": folder, "video": file} or some of them -> {part: module}, in `dtype`; the LLM with new MoME
    modules as `experts` says, the audio encoder `padded` or not. Raises weights.WeightsError."""
    more = {"llm": experts, "audio": {"padded": padded}, "video": {}}
    return {part: PARTS[part].from_pretrained(path, dtype, **more[part]) for part, path in paths.items()}


def dtype_on(device):
    """In what real frozen parts are held: bf16 on a GPU, else fp32. What is trained is fp32 everywhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def stored(name, parts):
    """Whether a checkpoint holds this tensor: not that of a real frozen part, which it only names."""
    owner, inside = name.split(".")[:2]
    return ".mome." in name or (inside if owner == "encoders" else owner) not in parts


def identify(paths):
    """{part: path} of real parts -> {part: where it is and what tells it from others}, as a checkpoint keeps it."""
    return {part: {"path": os.path.abspath(path)} | fingerprint(path) | fingerprint(path, whole=True) for part, path in paths.items()}


def save_model(model, folder, parts, **more):
    """Write model.safetensors: what was trained and the stand-ins; and config.json: the model's config, the real `parts`
    (see `identify`) and `more` (rates, tasks)."""
    state = {name: t for name, t in model.state_dict().items() if stored(name, parts)}
    write_whole(Path(folder) / "model.safetensors", lambda path: save_file(state, path))
    write_json(Path(folder) / "config.json", {"model": asdict(model.config), "parts": parts, **more})


class CheckpointError(ValueError):
    """A folder without a readable checkpoint; the message says which and what is wrong."""


def check_part(folder, part, path, known, verify):
    """Raises CheckpointError if what is at `path` is not what the checkpoint in `folder` was trained with."""
    if not Path(path).exists():
        raise CheckpointError(f"{folder}: its {part} part is not at {path}; say where it is: {FLAGS[part]} PATH")
    found = fingerprint(path) | (fingerprint(path, whole=True) if verify else {})
    differing = [key for key in found if found[key] != known[key]]
    if differing:
        raise CheckpointError(f"{path}: not the {part} part that {folder} was trained with: its "
                              + ", ".join(f"{key} is {str(found[key])[:16]}, not {str(known[key])[:16]}" for key in differing))


def load_model(folder, paths=None, verify=False, device=torch.device("cpu")):
    """-> (AVSR in eval mode, the dict of config.json). Its real parts are looked for at `paths` ({part: path}), else where
    they were in training, and compared with what they were (`verify`: every byte). Raises CheckpointError, WeightsError."""
    folder, paths = Path(folder), paths or {}
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: no {name} here; train a model into it: python train.py --out {folder}")

    def build(kind, values):
        return values and kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        sizes = {part: build(kind, config["model"][part])
                 for part, kind in (("llm", LlamaConfig), ("audio", AudioConfig), ("video", VideoConfig))}
        config["paths"] = {part: str(paths.get(part) or known["path"]) for part, known in config["parts"].items()}
        if extra := [FLAGS[part] for part in paths if part not in config["parts"]]:
            raise CheckpointError(f"{folder}: holds its own stand-in for what {extra[0]} names; leave {extra[0]} out")
        for part, path in config["paths"].items():
            check_part(folder, part, path, config["parts"][part], verify)
        experts = {name: getattr(sizes["llm"], name) for name in EXPERTS}
        real = read_parts(config["paths"], dtype_on(device), experts, sizes["audio"] is not None and sizes["audio"].padded)
        for part, module in real.items():
            if module.config != sizes[part]:
                raise CheckpointError(f"{config['paths'][part]}: its config.json is not the one that {folder} was trained with")
        model = AVSR(build(AVSRConfig, config["model"] | sizes), **real)
        missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        if wrong := [*unexpected, *(name for name in missing if stored(name, real))]:
            raise CheckpointError(f"{folder}: damaged, or of another version: {wrong[0]} is missing or unknown")
    except (CheckpointError, WeightsError):
        raise
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: damaged, or of another version: {str(error).splitlines()[0]}") from None
    return model.to(device).eval(), config


def reading(audio, video):
    """How clips are read for encoders of these configs (None: no such, or a stand-in): size of pictures, number of mel bands."""
    return {"size": (video or VideoConfig()).picture, "n_mels": (audio or AudioConfig()).n_mels}


# --- transcribe a clip -----------------------------------------------------------------------------------------------

@lru_cache(maxsize=1)
def load(ckpt, verify=False, **paths):
    """Folder of a checkpoint, and where its real parts (llm, audio, video) are now -> (model, its config.json, tokenizer)."""
    model, config = load_model(ckpt, {part: path for part, path in paths.items() if path}, verify,
                               torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return model, config, data.load_tokenizer(config["paths"].get("llm", ckpt))


@torch.no_grad()
def decode(model, encoded, steps, beam=1):
    """Encoded clips -> for each (token ids, mean log-probability, rates, tokens that the LLM read before a first word).

    `steps` is [(rates, threshold)]: all clips are decoded at the first rates, those whose mean log-probability is below its
    threshold again at the next, and so on; `tokens` counts all of that."""
    left, answers = list(range(len(next(iter(encoded.values()))[0]))), {}
    for rates, threshold in steps:
        prefixes = model.prefix({stream: (x[left], lengths[left]) for stream, (x, lengths) in encoded.items()}, rates)
        told = model.llm.generate(prefixes, model.config.eos, beam, model.config.max_tokens)
        for b, prefix, (ids, logprob) in zip(left, prefixes, told):
            answers[b] = ids, logprob, rates, len(prefix) + (answers[b][3] if b in answers else 0)
        left = [b for b in left if answers[b][1] < threshold]
        if not left:
            break
    return [answers[b] for b in range(len(answers))]


def choose_task(clip, model, task=None):
    """The task if the clip and the model have its streams; None: the one with all streams that both have. Or a ClipError."""
    have = [s for s in model.streams if s in clip.streams]
    if not set(TASKS[task] if task else have[:1] or ["any"]) <= set(have):
        needs = f"task {task} needs {' and '.join(TASKS[task])}" if task else f"the model reads {' and '.join(model.streams)}"
        raise ClipError(f"{shown(clip.name)}: the clip has {' and '.join(clip.streams)} only, and {needs}")
    return task or next(t for t, streams in TASKS.items() if set(streams) == set(have))


@torch.no_grad()
def transcribe(path, ckpt="out", rate=None, task=None, beam=1, box=None, tell=None, **where):
    """What is said in the clip at `path` -> dict of clip, text, task, audio_rate, video_rate, tokens (read by the LLM before
    the first words), duration and seconds it took, logprob (mean per output token), and segments: start, end, text and the
    like of its pieces. Each is passed to `tell` as soon as it is known. `rate`: see `ladder`; `box`: see mouth.py; `where`: see `load`.

    Raises ClipError for a clip that cannot be read, ValueError for a bad rate or (CheckpointError) checkpoint."""
    model, config, tokenizer = load(str(ckpt), **where)
    began, segments, logprobs, progress = time.perf_counter(), [], [], None
    pieces = data.read_pieces(path, min(data.MAX_SECONDS, 1.1 * config.get("longest", data.MAX_SECONDS) + 0.5),
                              streams=TASKS[task] if task else model.streams, box=box, **reading(model.config.audio, model.config.video))
    while group := list(islice(pieces, PIECES)):
        task = choose_task(group[0][1], model, task)
        encoded = model.encode(data.to(model.device, data.batch([clip for _, clip in group], TASKS[task])))
        for (start, clip), (ids, logprob, rates, tokens) in zip(group, decode(model, encoded, ladder(task, config, rate), beam)):
            segments.append({"start": round(start, 2), "end": round(start + clip.duration, 2), "text": data.normalize(tokenizer.decode(ids)),
                             "audio_rate": rates.get("audio"), "video_rate": rates.get("video"), "tokens": tokens, "logprob": round(logprob, 4)})
            logprobs += [logprob] * (len(ids) + 1)
            if tell:
                tell(segments[-1])
        if len(group) == PIECES:
            progress = progress or tqdm(total=round(media.probe(path).seconds), desc="transcribing", unit=" s", leave=False)
            progress.update(round(segments[-1]["end"]) - progress.n)
    if progress:
        progress.close()
    rates = {key: {segment[key] for segment in segments} for key in ("audio_rate", "video_rate")}
    seconds = time.perf_counter() - began
    return {"clip": str(path), "text": " ".join(filter(None, (segment["text"] for segment in segments))), "task": task,
            **{key: found.pop() if len(found) == 1 else "auto" for key, found in rates.items()},
            "tokens": sum(segment["tokens"] for segment in segments), "duration": segments[-1]["end"], "seconds": round(seconds, 3),
            "logprob": round(sum(logprobs) / len(logprobs), 4), "segments": segments}


def every_rate(path, ckpt="out", task=None, beam=1, **more):
    """`transcribe` at each trained rate, from the coarsest on, with its `flops` -> yields the dicts."""
    *_, config, _ = load(str(ckpt), **{key: value for key, value in more.items() if key != "box"})
    task = task or transcribe(path, ckpt, None, None, beam, **more)["task"]
    for rates in trained_rates(task, config):
        rate = f"{rates.get('audio', 1)}:{rates.get('video', 1)}"
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # of which it counts the products
            transcribe(path, ckpt, rate, task, beam, **more)
        yield transcribe(path, ckpt, rate, task, beam, **more) | {"flops": counter.get_total_flops()}


def write_srt(path, segments):
    """Subtitles: a numbered block of time and text for each segment in which something is said."""
    def stamp(seconds):
        ms = round(1000 * seconds)
        return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02},{ms % 1000:03}"

    blocks = [f"{i}\n{stamp(s['start'])} --> {stamp(s['end'])}\n{textwrap.fill(s['text'], 42)}\n"
              for i, s in enumerate((s for s in segments if s["text"]), 1)]
    write_whole(path, lambda temporary: temporary.write_text("\n".join(blocks), "utf-8"))


# --- main ------------------------------------------------------------------------------------------------------------

def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="*", metavar="CLIP", help="media files (default: those in CKPT/samples)")
    parser.add_argument("--ckpt", default="out", help="folder that train.py wrote (default %(default)s)")
    parser.add_argument("--rate", help="compression rate: '4', or '4:2' for audio:video, also one never trained; auto: coarse, and again "
                                       "finer where the model is in doubt; all: every trained one, with its cost (default: the finest trained)")
    parser.add_argument("--task", choices=TASKS, help="which streams to use (default: all that the clip has)")
    parser.add_argument("--beam", type=int, default=1, help="beam width, 1 is greedy (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="a JSON object per line instead of the text")
    parser.add_argument("--srt", metavar="FILE", help="write subtitles of the clip")
    parser.add_argument("--box", metavar="X,Y,W,H", help="where the mouth is in the pictures (default: small square pictures are "
                                                                   "mouths, in others it is found, which needs requirements-face.txt)")
    parser.add_argument("--show-crop", metavar="PNG", help="write a contact sheet of the mouths that are read")
    for part, flag in FLAGS.items():
        parser.add_argument(flag, dest=part, metavar="PATH", help=f"where the checkpoint's real {part} part is now")
    parser.add_argument("--verify", action="store_true", help="compare every byte of the real parts' weights with those of training")
    args = parser.parse_args(argv)
    if len(args.clips) != 1 and (args.srt or args.show_crop):
        parser.error("--srt and --show-crop are for one clip")
    return args


def say(args, result):
    """Print what was made of a clip."""
    if args.json:
        print(json.dumps(result), flush=True)
    elif args.rate == "all":
        rate = ":".join(str(result[key]) for key in ("audio_rate", "video_rate") if result[key])
        print(f"rate {rate:6} {result['tokens']:5} tokens {result['flops'] / 1e9:8.2f} GFLOPs {result['seconds']:7.2f} s "
              f"({result['seconds'] / result['duration']:.2f} x real time)  {result['text']}", flush=True)
    elif not (sys.stdout.isatty() and len(result["segments"]) > 1):  # else it has been told, piece by piece
        print(result["text"], flush=True)


def main(argv=None):
    args = parse_args(argv)
    where = {"verify": args.verify} | {part: getattr(args, part) for part in PARTS}
    tell = (lambda segment: tqdm.write(segment["text"])) if sys.stdout.isatty() and not args.json and args.rate != "all" else None
    try:
        if args.beam < 1:
            raise ValueError(f"--beam must be 1 or more, not {args.beam}")
        args.box = args.box and mouth.parse_box(args.box)
        model, config, _ = load(args.ckpt, **where)
        if args.task and not set(TASKS[args.task]) <= set(model.streams):
            raise ValueError(f"--task {args.task}: the model in {args.ckpt} reads {' and '.join(model.streams)} only")
        if args.rate != "all":
            ladder(args.task or config["tasks"][0], config, args.rate)
        clips = args.clips or sorted(path for path in Path(args.ckpt, "samples").glob("*")
                                     if path.suffix.lower() in SUFFIXES)
        if not clips:
            raise FileNotFoundError(f"{args.ckpt}/samples: no clips there; name the clips to transcribe")
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    failed = 0
    for path in clips:
        try:
            if args.show_crop:
                mouth.write_sheet(media.only(media.probe(path), ("video",)), args.show_crop, args.box)
            how = {"ckpt": args.ckpt, "task": args.task, "beam": args.beam, "box": args.box, **where}
            for result in every_rate(path, **how) if args.rate == "all" else [transcribe(path, rate=args.rate, tell=tell, **how)]:
                say(args, result)
            if args.srt:
                write_srt(args.srt, result["segments"])
        except (ClipError, OSError) as error:
            print(f"sample.py: {error}", file=sys.stderr)
            failed += 1
    return 2 if failed == len(clips) else int(failed > 0)


def run_script(main):
    """Run a script's main() and exit with its code; Ctrl-C and a closed pipe end it without a traceback."""
    try:
        code = main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # as in `python sample.py ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


if __name__ == "__main__":
    run_script(main)
