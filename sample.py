"""Transcribe clips with a trained model; measure how well it does (train.py calls `evaluate`).

    python sample.py                              the three unseen clips that train.py wrote
    python sample.py clip.mp4 --rate 8 --json     one's own clip, with fewer tokens for the LLM to read

A line of text for each clip, on stdout; what goes wrong with a clip is one line on stderr. Exit code 0; 1 if some clips
failed; 2 if nothing could be transcribed. From Python: `sample.transcribe("clip.mp4")`.
"""
import argparse
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from itertools import groupby, product
from pathlib import Path

import jiwer
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import data
from encoders import AudioConfig, AudioEncoder, VideoConfig, VideoEncoder
from mome import AVSR, AVSRConfig, Llama, LlamaConfig
from weights import WeightsError, fingerprint, write_json, write_whole

TASKS = {"avsr": ("audio", "video"), "asr": ("audio",), "vsr": ("video",)}
EXPERTS = ("n_routed", "top_k", "n_shared", "bottleneck", "place")
PARTS = {"llm": Llama, "audio": AudioEncoder, "video": VideoEncoder}  # what may be real: frozen, from files of others
FLAGS = {"llm": "--llm", "audio": "--audio-encoder", "video": "--video-encoder"}  # that name those files
TEST_BATCH = 50  # hypotheses decoded together


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


def parse_snrs(text):
    """'clean,0,-5' -> [None, 0.0, -5.0], each once, clean always and first; ValueError says what is wrong."""
    try:
        snrs = [None if part == "clean" else float(part) for part in text.split(",")]
        if not all(snr is None or math.isfinite(snr) for snr in snrs):
            raise ValueError
    except ValueError:
        raise ValueError(f"--snr {text!r}: expected 'clean' or dB, like clean,0,-5") from None
    return list(dict.fromkeys([None, *snrs]))


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


def choose_rates(clip, model, config, rate=None, task=None):
    """-> (task, {stream: rate}): the streams that the task names, else all that the clip has and the model knows, at
    `rate` ('4', or audio:video '4:2'), else the finest that the model was trained at."""
    have = [s for s in model.streams if s in clip.streams]
    wanted = TASKS[task] if task else have
    lacking = [s for s in wanted if s not in have]
    if lacking or not have:
        needs = f"task {task} needs {' and '.join(wanted)}" if task else f"the model reads {' and '.join(model.streams)}"
        raise data.ClipError(f"{clip.name}: the clip has {' and '.join(clip.streams)} only, and {needs}")
    pairs = parse_rates(rate) if rate else [min(config["rates"], key=lambda pair: [
        r for s, r in zip(("audio", "video"), pair) if s in wanted])]
    if len(pairs) > 1:
        raise ValueError(f"rate {rate!r} names {len(pairs)} rates; a clip is read at one, like 4 or 4:2")
    rates = {s: r for s, r in zip(("audio", "video"), pairs[0]) if s in wanted}
    return next(t for t, streams in TASKS.items() if set(streams) == set(rates)), rates


@torch.no_grad()
def transcribe(path, ckpt="out", rate=None, task=None, beam=1, **where):
    """What is said in the clip at `path` -> dict of clip, text, task, audio_rate, video_rate, tokens (read by the LLM
    before the first word), seconds, logprob (mean per output token). `where`: see `load`.

    Raises data.ClipError for a clip that cannot be read, ValueError for a bad rate or (CheckpointError) checkpoint."""
    model, config, tokenizer = load(str(ckpt), **where)
    start = time.perf_counter()
    clip = data.read_clip(path, **reading(model.config.audio, model.config.video))
    task, rates = choose_rates(clip, model, config, rate, task)
    encoded = model.encode(data.to(model.device, data.batch([clip], rates)))
    (ids, logprob), = model.generate(encoded, rates, beam)
    return {"clip": str(path), "text": data.normalize(tokenizer.decode(ids)), "task": task,
            "audio_rate": rates.get("audio"), "video_rate": rates.get("video"),
            "tokens": len(model.prefix(encoded, rates)[0]), "seconds": round(time.perf_counter() - start, 3),
            "logprob": round(logprob, 4)}


# --- measure: the word error rate of many clips at every rate --------------------------------------------------------

def evaluate(model, clips, tasks, pairs, snrs, tokenizer, device, beam=1):
    """Corpus-level WER (jiwer, after data.normalize) of every task at every rate, clean and in babble -> metrics rows.

    Sound is encoded once for each noise and lips once, for all tasks and rates; lips hear no noise, so vsr is tested clean."""
    voices = [clip for clip in clips if clip.wave is not None]
    clips = sorted(clips, key=lambda clip: (clip.streams, clip.duration))
    groups = [list(group) for _, group in groupby(clips, lambda clip: clip.streams)]
    wanted = task_streams(tasks)
    snrs = snrs if "audio" in wanted else [None]
    size = max(1, TEST_BATCH // beam)
    chunks = [group[i:i + size] for group in groups for i in range(0, len(group), size)]
    model.eval()

    def test(chunk):
        """Clips of the same streams -> {(task, rates, snr): [(reference, hypothesis)]}."""
        streams, encoded, told = chunk[0].streams, {}, {}
        for snr in snrs:
            noisy = [data.in_babble(clip, snr, voices) for clip in chunk]
            heard = [s for s in streams if s in wanted and (s == "audio" or s not in encoded)]
            encoded |= model.encode(data.to(device, data.batch(noisy, heard)))
            for task in tasks:
                if set(TASKS[task]) <= set(streams) and (snr is None or "audio" in TASKS[task]):
                    for rates in task_rates(task, pairs):
                        texts = [data.normalize(tokenizer.decode(ids)) for ids, _ in model.generate(encoded, rates, beam)]
                        told[task, tuple(rates.items()), snr] = list(zip([clip.text for clip in chunk], texts))
        return told

    told = {}
    with ThreadPoolExecutor(2) as testers:
        for part in tqdm(testers.map(test, chunks), "test", len(chunks), leave=False):
            for key, answers in part.items():
                told.setdefault(key, []).extend(answers)
    rows = []
    for (task, rates, snr), answers in told.items():
        references, hypotheses = map(list, zip(*answers))
        rows.append({"task": task, "audio_rate": dict(rates).get("audio"), "video_rate": dict(rates).get("video"),
                     "snr_db": snr, "wer": jiwer.wer(references, hypotheses),
                     "words": sum(len(r.split()) for r in references), "clips": len(references), "split": "test"})
    return sorted(rows, key=lambda r: (tasks.index(r["task"]), -99 if r["snr_db"] is None else -r["snr_db"],
                                       r["audio_rate"] or 0, r["video_rate"] or 0))


def table(rows):
    """The metrics rows as a text table: a line for each task and noise, a column for each audio:video rate."""
    def rate(row):
        return ":".join(str(r) for r in (row["audio_rate"], row["video_rate"]) if r)
    columns = list(dict.fromkeys(rate(row) for row in rows))
    lines = {}
    for row in rows:
        noise = "clean" if row["snr_db"] is None else f"{row['snr_db']:g} dB"
        lines.setdefault((row["task"], noise), {})[rate(row)] = f"{100 * row['wer']:.1f}"
    header = f"{'WER %':14}" + "".join(f"{column:>7}" for column in columns)
    return "\n".join([header] + [f"{task:6}{noise:8}" + "".join(f"{cells.get(column, ''):>7}" for column in columns)
                                 for (task, noise), cells in lines.items()])


# --- main ------------------------------------------------------------------------------------------------------------

def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="*", metavar="CLIP", help="media files (default: those in CKPT/samples)")
    parser.add_argument("--ckpt", default="out", help="folder that train.py wrote (default %(default)s)")
    parser.add_argument("--rate", help="compression rate, '4', or '4:2' for audio:video (default: the finest trained)")
    parser.add_argument("--task", choices=TASKS, help="which streams to use (default: all that the clip has)")
    parser.add_argument("--beam", type=int, default=1, help="beam width, 1 is greedy (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="a JSON object per line instead of the text")
    for part, flag in FLAGS.items():
        parser.add_argument(flag, dest=part, metavar="PATH", help=f"where the checkpoint's real {part} part is now")
    parser.add_argument("--verify", action="store_true", help="compare every byte of the real parts' weights with those of training")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    where = {"verify": args.verify} | {part: getattr(args, part) for part in PARTS}
    try:
        if args.beam < 1:
            raise ValueError(f"--beam must be 1 or more, not {args.beam}")
        if args.rate is not None and len(parse_rates(args.rate)) > 1:
            raise ValueError(f"--rate {args.rate!r}: a clip is read at one rate, like 4 or 4:2")
        model, *_ = load(args.ckpt, **where)
        if args.task and not set(TASKS[args.task]) <= set(model.streams):
            raise ValueError(f"--task {args.task}: the model in {args.ckpt} reads {' and '.join(model.streams)} only")
        clips = args.clips or sorted(path for path in Path(args.ckpt, "samples").glob("*")
                                     if path.suffix.lower() in data.SOUND | data.VIDEO)
        if not clips:
            raise FileNotFoundError(f"{args.ckpt}/samples: no clips there; name the clips to transcribe")
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    failed = 0
    for path in clips:
        try:
            result = transcribe(path, args.ckpt, args.rate, args.task, args.beam, **where)
        except (data.ClipError, OSError) as error:
            print(f"sample.py: {error}", file=sys.stderr)
            failed += 1
            continue
        print(json.dumps(result) if args.json else result["text"], flush=True)
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
