"""Train MoME on frozen encoders and a frozen LLM; then test it at every rate and print the table.

    python train.py --rates 2,4,8                                         the main job: synthetic talker, all tasks
    python train.py --data DIR --tasks asr --rates 4,8,16                 real clips of one's own
    python train.py --llm DIR --audio-encoder DIR --data DIR --tasks asr  on a real LLM and a real encoder
    python train.py --preset paper --dry-run                              what the paper's model costs, without its weights

    stage 1  the two encoders        small stand-ins, trained here (pretrain.py), unless --audio-encoder (Whisper) and
                                     --video-encoder (AV-HuBERT) name real ones
    stage 2  the Llama               likewise, unless --llm names one
    stage 3  the paper               encoders and Llama frozen, projectors and MoME trained on all rate pairs at once

Stages 1 and 2, and what real encoders make of the training clips (features.py), are kept in --cache and found there again
by what they were made of. Nothing of the test part, neither sentence nor talker, is met by any stage.
"""
import argparse
import math
import random
import shutil
import sys
import time
import zlib
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

import data
import mouth
import weights
from encoders import AudioConfig, VideoConfig
from evaluate import calibrate, evaluate, fixed_rates, parse_snrs, table
from features import Features
from folders import folder_clips
from media import ClipError, note
from mome import AVSR, PLACES, AVSRConfig, LlamaConfig
from pretrain import draws, fit, pretrain
from sample import (EXPERTS, FLAGS, TASKS, CheckpointError, dtype_on, identify, ladder, load_model, parse_rates, read_parts, reading,
                    run_script, save_model, task_rates, task_streams)
from talker import grid_sentences
from weights import WeightsError, write_json

CORES = torch.get_num_threads()
HALF_OF_THE_CORES = max(1, CORES // 2)
TASK_SHARE = {"avsr": 0.3, "asr": 0.4, "vsr": 0.3}  # of stage 3's steps; not in the paper
PROMPT = "Transcribe speech to text."               # to a real LLM, whichever the streams; not in the paper
ZERO_TOO = "steps seed n_routed n_shared copies projector_dim valid_every".split()  # whole numbers that may be 0
VALID_CLIPS = 50                                    # of real ones, at most, and at most a tenth of the training clips

PRESETS = {"": {}, "paper": dict(rates="4,16x2,5", tasks="avsr", n_routed=23, top_k=4, n_shared=1, bottleneck=12, lr=1e-3,
                                 weight_decay=0.1, epochs=10, beam=15)}


# --- configuration: one dataclass owns every default, the flags are made from it -------------------------------------

def flag(default, group, text, **more):
    return field(default=default, metadata={"group": group, "help": text, **more})


@dataclass(frozen=True)
class TrainConfig:
    rates: str = flag("2,4,8", "common", "compression rates: '2,4,8' both streams at each; '4:2,16:5' audio:video pairs; "
                                         "'4,16x2,5' every pair")
    out: str = flag("out", "common", "folder for the model, its metrics and samples")
    tasks: str = flag("avsr,asr,vsr", "common", "what to train and test: audio-visual, audio-only, video-only")
    data: str = flag("", "common", "folder of real clips with transcripts (see folders.py); default: the synthetic talker")
    max_bad: str = flag("1%", "common", "so many of them may be unusable")
    box: str = flag("", "common", "x,y,w,h: where the mouth is in their pictures; default: it is found where pictures are not mouths")
    seed: int = flag(0, "common", "of everything random")
    steps: int = flag(0, "common", "of stage 3; 0: by --epochs, else 1400 with the synthetic talker, 3500 with --data, 700 with --llm")
    snr: str = flag("clean,0,-5", "common", "noise at test besides clean: dB of speech over babble, comma-separated")
    eval_only: bool = flag(False, "common", "test the model that is in --out, train nothing")
    device: str = flag("auto", "common", "auto takes a GPU when there is one", choices=("auto", "cpu", "cuda"))
    cache: str = flag("", "common", "folder for stages 1 and 2 and for real encoders' outputs, default OUT/cache; runs may share one")
    preset: str = flag("", "common", "paper: its rates, experts and recipe, where no other flag says otherwise", choices=tuple(PRESETS))
    dry_run: bool = flag(False, "common", "print parameters, tokens, FLOPs and memory of what would be trained; needs no weights")
    llm: str = flag("", "real parts", "folder of a Llama in HF's layout")
    audio_encoder: str = flag("", "real parts", "folder of a Whisper in HF's layout")
    video_encoder: str = flag("", "real parts", "file of an AV-HuBERT")
    pad_audio: bool = flag(False, "real parts", "pad clips to 30 s for Whisper, as it was trained; slow")
    copies: int = flag(5, "real parts", "augmented copies of each training clip, besides the clip, that real encoders read")
    n_routed: int = flag(8, "MoME", "routed experts in each layer; with --n-shared 0 too: projectors only")
    top_k: int = flag(LlamaConfig.top_k, "MoME", "routed experts that a token is sent to")
    n_shared: int = flag(1, "MoME", "experts that every token passes")
    bottleneck: int = flag(LlamaConfig.bottleneck, "MoME", "width of an expert")
    place: str = flag(LlamaConfig.place, "MoME", "what MoME stands beside: attention, feed-forward, whole layer", choices=PLACES)
    batch_size: int = flag(4, "training", "clips in a step of stage 3")
    epochs: float = flag(0., "training", "length of stage 3 in passes over the training clips, if --steps is 0")
    lr: float = flag(1.5e-3, "training", "peak learning rate of stage 3")
    weight_decay: float = flag(0.1, "training", "of stage 3")
    clips: int = flag(3000, "training", "training clips of the synthetic talker")
    valid_clips: int = flag(200, "training", "clips of the synthetic talker from which the threshold for sample.py --rate auto is taken")
    test_clips: int = flag(500, "training", "test clips of the synthetic talker")
    audio_steps: int = flag(650, "training", "of stage 1, the audio encoder")
    video_steps: int = flag(600, "training", "of stage 1, the video encoder")
    ctc_steps: int = flag(2500, "training", "of stage 1 on clips that come without an alignment (--data)")
    llm_steps: int = flag(1000, "training", "of stage 2")
    projector_dim: int = flag(0, "training", "hidden width of the projectors; 0: the LLM's width, at least 256")
    valid_every: int = flag(0, "training", "steps of stage 3 between tests on clips held out of training; 0: no test, and with --data no clips held out "
                                        "and no threshold for sample.py --rate auto")
    beam: int = flag(1, "training", "beam width at test; 1 is greedy")


def real_paths(config):
    """{part: path} of the real frozen parts, those of the streams that the tasks use; "" for a stand-in."""
    streams = task_streams(config.tasks.split(","))
    paths = {"llm": config.llm, "audio": config.audio_encoder, "video": config.video_encoder}
    return {part: path for part, path in paths.items() if part == "llm" or part in streams}


def how_clips_are_read(config, how):
    """-> what folder_clips wants to know, `how` included; ValueError says which flag is wrong."""
    try:
        max_bad = float(config.max_bad.removesuffix("%"))
        if not 0 <= max_bad <= 100:
            raise ValueError
    except ValueError:
        raise ValueError(f"--max-bad {config.max_bad!r}: expected a share of the clips, like 1%") from None
    cache = Path(config.cache or Path(config.out) / "cache") / "crops"
    return {"how": how | {"streams": task_streams(config.tasks.split(",")), "box": mouth.parse_box(config.box) if config.box else None,
                          "cache": cache}, "max_bad": max_bad}


def parse_args(argv):
    """-> TrainConfig, checked; a wrong flag ends the program with a line that says so and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, usage="train.py [--rates 2,4,8] [flags, see --help]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {}
    for f in fields(TrainConfig):
        title = f.metadata["group"]
        group = groups[title] = groups[title] if title in groups else parser.add_argument_group(title)
        name = f"--{f.name.replace('_', '-')}"
        if f.type is bool:
            group.add_argument(name, action="store_true", help=f.metadata["help"])
        else:
            group.add_argument(name, type=f.type, default=f.default, choices=f.metadata.get("choices"),
                               help=f.metadata["help"] + (f" (default {f.default})".replace("%", "%%") if f.default != "" else ""))
    parser.set_defaults(**PRESETS[parser.parse_args(argv).preset])
    config = TrainConfig(**vars(parser.parse_args(argv)))
    try:
        parse_rates(config.rates)
        parse_snrs(config.snr)
        for task in config.tasks.split(","):
            if task not in TASKS:
                raise ValueError(f"--tasks: {task!r} is not one of {', '.join(TASKS)}")
        how_clips_are_read(config, {})
        least = {f.name: int(f.type is int) for f in fields(config) if f.type in (int, float)}
        for name, bound in (least | dict.fromkeys(ZERO_TOO, 0)).items():
            if not bound <= getattr(config, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be {bound} or more, not {getattr(config, name)}")
        LlamaConfig(1, **{name: getattr(config, name) for name in EXPERTS})
        if (config.audio_encoder or config.video_encoder) and not (config.data or config.dry_run):
            raise ValueError("--audio-encoder and --video-encoder are for real clips: name their folder by --data")
        if config.video_encoder and "video" not in real_paths(config) or config.audio_encoder and "audio" not in real_paths(config):
            raise ValueError(f"--tasks {config.tasks} do not use both encoders: leave out the flag of the one that is not used")
        if config.pad_audio and not config.audio_encoder and not config.preset:
            raise ValueError("--pad-audio is for Whisper: name it by --audio-encoder")
        if config.preset and not config.dry_run and not all(real_paths(config).values()):
            raise ValueError(f"--preset {config.preset} needs {', '.join(FLAGS.values())} and --data; or --dry-run")
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: this machine has no GPU that torch can use; use auto or cpu")
    except ValueError as error:
        parser.error(str(error))
    return config


# --- stage 3: the paper ----------------------------------------------------------------------------------------------

def count_parameters(model):
    """One line: what is frozen and what stage 3 trains."""
    sizes = Counter()
    for name, parameter in model.named_parameters():
        sizes["MoME" if ".mome." in name else name.split(".")[0]] += parameter.numel()
    return (f"frozen: encoders {sizes['encoders']:,}, LLM {sizes['llm']:,} parameters; trained: MoME {sizes['MoME']:,}, "
            f"projectors and markers {sizes['projectors'] + sizes['markers']:,}")


def train_mome(model, clips, tasks, pairs, tokenizer, config, features):
    """Train projectors, markers and MoME on all rate pairs at once; a step is a batch of one task, its rates learned from side
    by side. Streams whose encoder is real come from `features`. Returns the learning curve: at every --valid-every steps the
    loss and the WER of clips["valid"]."""
    rng, curve, device = random.Random(f"{config.seed} mome"), [], model.device
    trained = [p for p in model.parameters() if p.requires_grad]
    voices = [clip for clip in clips["train"] if "audio" in clip.streams]
    batches = {task: draws([clip for clip in clips["train"] if set(TASKS[task]) <= set(clip.streams)], config.batch_size, rng)
               for task in tasks}
    kept = features.identity if features else {}
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copies = [deepcopy(model, dict(shared)) for _ in pairs]  # modules around the same tensors: a MoME remembers whom it routed last

    def make_batch():
        task = rng.choices(tasks, [TASK_SHARE[t] for t in tasks])[0]
        chosen = next(batches[task])
        encoded = model.encode(data.to(device, data.batch(chosen, set(TASKS[task]) - set(kept), rng, voices)))
        encoded |= features.batch(chosen, [s for s in TASKS[task] if s in kept], rng) if features else {}
        transcripts = [tokenizer.encode(f" {clip.text}") for clip in chosen]
        return [(copy, encoded, transcripts, [rates]) for copy, rates in zip(copies, task_rates(task, pairs))]

    def check(step, loss):
        rows = evaluate(model, clips["valid"], fixed_rates(tasks, pairs), [None], tokenizer, device)
        curve.append({"step": step, "loss": loss, "rows": [row | {"split": "valid"} for row in rows]})
        tqdm.write(f"step {step}: loss {loss:.3f}; WER %: " + ", ".join(
            f"{row['task']} {row['audio_rate'] or ''}:{row['video_rate'] or ''} {100 * row['wer']:.1f}" for row in rows))

    steps = config.steps or math.ceil(config.epochs * len(clips["train"]) / config.batch_size) or (
        700 if config.llm else 3500 if config.data else 1400)
    workers = 1 if device.type == "cuda" else max(1, CORES // torch.get_num_threads())
    fit("stage 3, MoME", trained, make_batch, AVSR.loss, steps, config.lr, config.weight_decay, config.valid_every, check, workers)
    return curve


# --- main ------------------------------------------------------------------------------------------------------------

def main(argv=None):
    config = parse_args(argv)
    try:
        run(config)
    except (ClipError, CheckpointError, WeightsError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print("train.py: a worker process was killed; is there enough memory?", file=sys.stderr)
        return 2
    return 0


class Stopwatch(dict):
    """Seconds of each stage, by name; `since` is when the running one began."""
    def lap(self, stage):
        self[stage], self.since = round(time.perf_counter() - self.since, 1), time.perf_counter()


def load_clips(config, tasks, how):
    """-> {"train": clips, "test": clips, "valid": clips}, of which every task has some it can use; only test clips for --eval-only.
    Of real ones --valid-every makes some training clips "valid", of sentences that no training clip has. `how` clips are read."""
    parts = {"test": config.test_clips}
    parts |= {} if config.eval_only else {"train": config.clips, "valid": config.valid_clips}
    clips = folder_clips(config.data, **how_clips_are_read(config, how)) if config.data else data.talker_clips(parts, config.seed)
    if config.eval_only:
        clips = {"test": clips["test"]}
    if config.valid_every and config.data and not config.eval_only:
        order = sorted(clips["train"], key=lambda clip: (zlib.crc32(clip.text.encode()), clip.name))
        clips["valid"] = order[:min(VALID_CLIPS, len(order) // 10)]
        held, n = {clip.text for clip in clips["valid"]}, len(order)
        clips["train"] = [clip for clip in clips["train"] if clip.text not in held]
        print(f"held out of {n} training clips: {len(clips['valid'])} for --valid-every, and "
              f"{n - len(clips['train']) - len(clips['valid'])} more that say the same")
    for part, task in product(clips, tasks):
        if not any(set(TASKS[task]) <= set(clip.streams) for clip in clips[part]):
            raise ClipError(f"{config.data}: no {part} clip has {' and '.join(TASKS[task])}, which {task} needs; "
                                 "choose other --tasks")
    heard, babble = [clip for clip in clips["test"] if "audio" in clip.streams], parse_snrs(config.snr) != [None]
    if len(heard) == 1 and babble and any("audio" in TASKS[task] for task in tasks):
        raise ClipError("only one test clip has sound, and babble is made of others' voices: use --snr clean")
    return clips


def train_all(config, clips, tasks, parts, known, device, watch):
    """The three stages, without those whose parts are given -> (model, the words of its tokenizer, the learning curve).
    `known` identifies the given parts."""
    real, seed, cache = bool(config.data), config.seed, Path(config.cache or Path(config.out) / "cache")
    texts = [clip.text for clip in clips["train"]] if real else grid_sentences("train")
    tested = {clip.text for part in clips if part != "train" for clip in clips[part]} if real else set(grid_sentences("test"))
    words = sorted(data.common_words(texts))
    if "llm" in parts:
        tokenizer, (bos, eos) = data.load_tokenizer(config.llm), weights.llama_ids(config.llm)
        llm, prompt = parts["llm"].config, tokenizer.encode(PROMPT)
    else:
        tokenizer = data.make_tokenizer(words)
        bos, eos, *prompt = (tokenizer.encode_single_token(name) for name in data.SPECIAL_TOKENS)
        llm = LlamaConfig(tokenizer.n_vocab, **{name: getattr(config, name) for name in EXPERTS})
    streams = task_streams(tasks)
    sizes = {stream: (parts[stream].config if stream in parts else stand_in()) if stream in streams else None
             for stream, stand_in in (("audio", AudioConfig), ("video", VideoConfig))}
    torch.manual_seed(seed)
    model = AVSR(AVSRConfig(llm, **sizes, bos=bos, eos=eos, prompt=tuple(prompt), projector_dim=config.projector_dim or max(256, llm.dim),
                            max_tokens=max(32, *(2 * len(tokenizer.encode(f" {clip.text}")) for clip in clips["train"]))), **parts).to(device)
    pretrain(model, parts, clips["train"], texts, tested, tokenizer, config, cache, watch)
    features = None
    if real_encoders := [stream for stream in parts if stream != "llm"]:
        identity = {s: [known[s]["whole"], asdict(parts[s].config), str(dtype_on(device))] for s in real_encoders}
        features = Features(cache / "features", model, identity, clips["train"], config.copies, seed)
        watch.lap("encoding clips")
    if features and set(features.identity) == streams:
        torch.set_num_threads(CORES)  # batches come from the disk: the LLM has the machine to itself

    print(count_parameters(model))
    torch.manual_seed(seed)
    curve = train_mome(model.train(), clips, tasks, parse_rates(config.rates), tokenizer, config, features)
    torch.set_num_threads(HALF_OF_THE_CORES)
    watch.lap("stage 3")
    return model, words, curve


def run(config):
    """Everything: clips, the three stages, the test, and the files in config.out."""
    if config.dry_run:
        from extras.cost import report  # only here: training needs nothing of extras/
        report(config)
        return
    out, watch = Path(config.out), Stopwatch()
    watch.since = time.perf_counter()
    torch.set_num_threads(HALF_OF_THE_CORES)  # work comes in pairs: two stages, two rates, two tests
    tasks, pairs = list(dict.fromkeys(config.tasks.split(","))), parse_rates(config.rates)
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    paths = {part: path for part, path in real_paths(config).items() if path}
    if config.eval_only:
        model, saved = load_model(out, paths, device=device)
        paths, audio, video = saved["paths"], model.config.audio, model.config.video
        if not config.data and {"audio", "video"} & set(paths):
            raise CheckpointError(f"{out}: its encoders are for real clips: name their folder by --data")
        config = replace(config, **{name: getattr(model.config.llm, name) for name in EXPERTS})
        for task in tasks:
            if not set(TASKS[task]) <= set(model.streams):
                raise ClipError(f"{out}: this model reads {' and '.join(model.streams)} only, not what {task} needs")
    else:
        torch.manual_seed(config.seed)
        parts = read_parts(paths, dtype_on(device), {name: getattr(config, name) for name in EXPERTS}, config.pad_audio)
        known = identify(paths)
        audio, video = (parts[stream].config if stream in parts else None for stream in ("audio", "video"))
    out.mkdir(parents=True, exist_ok=True)
    clips = load_clips(config, tasks, reading(audio, video))
    watch.lap("clips")
    if not config.eval_only:
        model, words, curve = train_all(config, clips, tasks, parts, known, device, watch)
        if "llm" not in paths:
            data.save_tokenizer(words, out)
        saved = {"rates": pairs, "tasks": tasks, "longest": max(clip.duration for clip in clips["train"])}
        if "valid" in clips:
            saved["auto"] = calibrate(model, clips["valid"], tasks, pairs, data.load_tokenizer(paths.get("llm", out)), device)
        save_model(model, out, known, **saved)
        (out / "curve.json").unlink(missing_ok=True)  # an earlier model's
        if curve:
            write_json(out / "curve.json", curve)
        write_samples(config, clips["test"], out / "samples")
        watch.lap("calibration")
    tokenizer, plan = data.load_tokenizer(paths.get("llm", out)), fixed_rates(tasks, pairs)
    if set(map(tuple, saved["rates"])) <= set(pairs):  # among them the rates that auto's cost is compared with
        plan |= {(task, ("auto", None)): ladder(task, saved, "auto") for task in tasks if task in saved.get("auto", {})}
    elif "auto" in saved:
        note("auto is tested only beside all trained rates: " + ",".join(f"{audio}:{video}" for audio, video in saved["rates"]))
    rows = evaluate(model, clips["test"], plan, parse_snrs(config.snr), tokenizer, device, config.beam)
    watch.lap("test")
    write_json(out / "metrics.json", {"rows": [row for row in rows if row["audio_rate"] != "auto"], "seconds": watch, "config": asdict(config),
                                      "auto": [row for row in rows if row["audio_rate"] == "auto"]})
    print(table(rows))
    print("; ".join(f"{stage} {s:.0f} s" for stage, s in watch.items()) + f"; in all {sum(watch.values()):.0f} s")


def write_samples(config, tested, folder):
    """Three test clips for sample.py, in place of those of an earlier run: sample*.mp4, or copies of the user's files."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("sample[123]_*"):
        old.unlink()
    if config.data:
        for i, clip in enumerate(tested[:3], 1):
            copy = folder / f"sample{i}_{Path(clip.name).name}"
            shutil.copy(clip.name, copy)
            copy.with_suffix(".txt").write_text(clip.text + "\n", "utf-8")
    else:
        data.write_talker_clips(folder, 3, "test", config.seed)


if __name__ == "__main__":
    run_script(main)
