"""Train MoME, the paper in miniature, in three stages; then test it at every rate and print the table.

    python train.py --rates 2,4,8                                         the main job: synthetic talker, all tasks
    python train.py --data DIR --tasks asr --rates 4,8,16                 real clips of one's own

    stage 1  the two encoders learn to tell speech sounds apart           stands in for Whisper and AV-HuBERT
    stage 2  a tiny Llama learns, from text alone, to read out a noisy,   stands in for Llama 3
             stretched sequence of sounds that it finds in its context
    stage 3  the paper: encoders and Llama frozen, projectors and MoME    the method itself
             trained on all rate pairs at once

Stages 1 and 2 are kept in --cache and found there again by what they were made of. None of them ever meets a sentence or
a talker of the test part.
"""
import argparse
import hashlib
import json
import math
import multiprocessing
import random
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
from encoders import FPS, AudioConfig, VideoConfig
from mome import AVSR, PLACES, AVSRConfig, Llama, LlamaConfig, pool
from sample import TASKS, CheckpointError, evaluate, load_model, parse_rates, parse_snrs, run_script, save_model, table, task_rates
from talker import grid_sentences, mishear, spell
from weights import write_whole

EXPERTS = ("n_routed", "top_k", "n_shared", "bottleneck", "place")
HALF_OF_THE_CORES = max(1, torch.get_num_threads() // 2)
TASK_SHARE = {"avsr": 0.4, "asr": 0.3, "vsr": 0.3}  # of stage 3's steps; not in the paper


# --- configuration: one dataclass owns every default, the flags are made from it -------------------------------------

def flag(default, group, text, **more):
    return field(default=default, metadata={"group": group, "help": text, **more})


@dataclass(frozen=True)
class TrainConfig:
    rates: str = flag("2,4,8", "common", "compression rates: '2,4,8' both streams at each; '4:2,16:5' audio:video pairs; "
                                         "'4,16x2,5' every pair")
    out: str = flag("out", "common", "folder for the model, its metrics and samples")
    tasks: str = flag("avsr,asr,vsr", "common", "what to train and test: audio-visual, audio-only, video-only")
    data: str = flag("", "common", "folder of real clips with transcripts; default: the synthetic talker")
    seed: int = flag(0, "common", "of everything random")
    steps: int = flag(0, "common", "of stage 3; 0: 650 with the synthetic talker, 2000 with --data")
    snr: str = flag("clean,0,-5", "common", "noise at test besides clean: dB of speech over babble, comma-separated")
    eval_only: bool = flag(False, "common", "test the model that is in --out, train nothing")
    device: str = flag("auto", "common", "auto takes a GPU when there is one", choices=("auto", "cpu", "cuda"))
    cache: str = flag("", "common", "folder for stages 1 and 2, default OUT/cache; runs may share one")
    n_routed: int = flag(8, "MoME", "routed experts in each layer; with --n-shared 0 too: projectors only")
    top_k: int = flag(LlamaConfig.top_k, "MoME", "routed experts that a token is sent to")
    n_shared: int = flag(1, "MoME", "experts that every token passes")
    bottleneck: int = flag(LlamaConfig.bottleneck, "MoME", "width of an expert")
    place: str = flag(LlamaConfig.place, "MoME", "what MoME stands beside: attention, feed-forward, whole layer", choices=PLACES)
    batch_size: int = flag(8, "training", "clips in a step of stage 3")
    lr: float = flag(1.5e-3, "training", "peak learning rate of stage 3")
    weight_decay: float = flag(0.1, "training", "of stage 3")
    clips: int = flag(3000, "training", "training clips of the synthetic talker")
    test_clips: int = flag(500, "training", "test clips of the synthetic talker")
    audio_steps: int = flag(400, "training", "of stage 1, the audio encoder")
    video_steps: int = flag(350, "training", "of stage 1, the video encoder")
    ctc_steps: int = flag(2500, "training", "of stage 1 on clips that come without an alignment (--data)")
    llm_steps: int = flag(500, "training", "of stage 2")


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
                               help=f.metadata["help"] + (f" (default {f.default})" if f.default != "" else ""))
    config = TrainConfig(**vars(parser.parse_args(argv)))
    try:
        parse_rates(config.rates)
        parse_snrs(config.snr)
        for task in config.tasks.split(","):
            if task not in TASKS:
                raise ValueError(f"--tasks: {task!r} is not one of {', '.join(TASKS)}")
        least = {f.name: int(f.type is int) for f in fields(config) if f.type in (int, float)}
        for name, bound in (least | {"steps": 0, "seed": 0, "n_routed": 0, "n_shared": 0}).items():
            if not bound <= getattr(config, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be {bound} or more, not {getattr(config, name)}")
        LlamaConfig(1, **{name: getattr(config, name) for name in EXPERTS})
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: this machine has no GPU that torch can use; use auto or cpu")
    except ValueError as error:
        parser.error(str(error))
    return config


# --- the training loop, for all three stages -------------------------------------------------------------------------

def fit(name, parameters, make_batch, loss_of, steps, lr, weight_decay=0.01):
    """Minimise `loss_of(*make_batch())` by AdamW: short warm-up, cosine to 5%, gradients clipped to norm 1. A thread makes
    each batch while the one before it is learned from."""
    parameters = list(parameters)
    warmup = min(30, steps // 10 + 1)
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / warmup, 0.525 + 0.475 * math.cos(math.pi * step / steps)))
    with ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(make_batch)
        for step in (progress := tqdm(range(steps), name, position=int(multiprocessing.parent_process() is not None))):
            batch = following.result()
            following = ahead.submit(make_batch) if step + 1 < steps else None
            loss = loss_of(*batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step % 10 == 0:
                progress.set_postfix(loss=f"{loss.item():.3f}")


def draws(clips, size, rng):
    """Endless batches of `size` clips, each clip once in an epoch."""
    order = []
    while True:
        while len(order) < size:
            order += rng.sample(clips, len(clips))
        yield order[:size]
        order = order[size:]


def cached(folder, name, key, make):
    """The state dict that `make()` returns, kept in `folder` under its name and a hash of the key and of the code."""
    modules = ("talker", "data", "encoders", "mome", "train")
    code = [Path(__file__).with_name(f"{module}.py").read_text("utf-8") for module in modules]
    digest = hashlib.sha256(json.dumps([key, code]).encode()).hexdigest()[:12]
    path = folder / f"{name}-{digest}.safetensors"
    if path.is_file():
        tqdm.write(f"{name}: found in {path}")
        return load_file(path)
    state = {k: v.detach().cpu().contiguous() for k, v in make().items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda temporary: save_file(state, temporary))
    return state


# --- stage 1: encoders that hear and see speech sounds ---------------------------------------------------------------

def frame_units(clip, n_tokens, tokens_per_second, unit_ids):
    """The unit at the middle of each of `n_tokens` tokens, by the clip's alignment -> (n_tokens,), 0 at rest."""
    ends = torch.tensor([end for _, end in clip.aligned])
    units = torch.tensor([unit_ids.get(phone, 0) for phone, _ in clip.aligned])
    middles = (torch.arange(n_tokens) + 0.5) / tokens_per_second
    return units[torch.searchsorted(ends, middles).clamp(max=len(units) - 1)]


def train_encoder(stream, encoder, clips, units, steps, rng, device):
    """Pretrain one encoder to tell units apart: by cross-entropy at each token where the clips are aligned (the talker),
    else by CTC. The output layer is thrown away; what stays is the encoder."""
    unit_ids = {unit: i + 1 for i, unit in enumerate(units)}
    head = nn.Linear(encoder.config.dim, len(units) + 1).to(device)
    batches = draws(clips, 8, rng)

    def make_batch():
        chosen = next(batches)
        x, lengths = data.to(device, data.batch(chosen, [stream], rng, clips))[stream]
        return chosen, x, lengths

    def loss_of(chosen, x, lengths):
        log_probs = head(encoder(x, lengths)).log_softmax(-1)                                # (B, T, units + 1)
        lengths = encoder.n_tokens(lengths)
        if chosen[0].aligned:
            per_second = FPS * (2 if stream == "audio" else 1)
            targets = pad_sequence([frame_units(clip, n, per_second, unit_ids)
                                    for clip, n in zip(chosen, lengths.tolist())], True, padding_value=-100)
            return F.nll_loss(log_probs.flatten(0, 1), targets.flatten().to(device))
        targets = [torch.tensor([unit_ids[u] for u in spell(clip.text) if u in unit_ids]) for clip in chosen]
        return F.ctc_loss(log_probs.transpose(0, 1), torch.cat(targets).to(device), lengths.cpu(),
                          torch.tensor([len(t) for t in targets]), zero_infinity=True)

    encoder.train()
    fit(f"stage 1, {stream} encoder", [*encoder.parameters(), *head.parameters()], make_batch, loss_of, steps, 3e-3)
    return encoder.eval().state_dict()


# --- stage 2: a small Llama that has learned to listen ---------------------------------------------------------------

def train_llm(llm, texts, tested, units, tokenizer, config, steps, rng, device):
    """Pretrain the Llama to transcribe what `talker.mishear` makes of sentences of `texts` and, three times in ten, of
    random words, pooled by 1 to 8, sometimes as two streams. Random words that make up a sentence in `tested` are redrawn.

    What is heard reaches the Llama by a table that is thrown away: stage 3's projectors must find out how to speak to it."""
    torch.manual_seed(rng.getrandbits(32))  # this is a process of its own
    llm.to(device)
    unit_ids = {unit: i + 1 for i, unit in enumerate(units)}
    ear = nn.Parameter(0.5 * torch.randn(len(units) + 1, llm.config.dim, device=device))
    words, table = data.common_words(texts), llm.embed_tokens
    lengths = [len(text.split()) for text in rng.sample(texts, min(1000, len(texts)))]

    def make_batch():
        clips, rates = [], [rng.randint(1, 8) for _ in range(rng.choice((1, 1, 2)))]
        for _ in range(32):
            text = rng.choice(texts)
            made_up = rng.random() < .3
            while made_up or text in tested:
                made_up = False
                text = " ".join(rng.choices(words, k=max(1, rng.choice(lengths) + rng.randint(-2, 2))))
            streams = [(mishear(text, unit_ids, rng), rng.uniform(0, .5)) for _ in rates]
            clips.append((text, [(heard.to(device), torch.randn(len(heard), llm.config.dim).to(device) * noise)
                                 for heard, noise in streams]))
        return clips, rates

    def loss_of(clips, rates):
        prefixes = []
        for _, streams in clips:
            parts = [pool((heard @ ear + noise * ear.std().detach())[None], torch.tensor([len(heard)]), rate)[0][0]
                     for (heard, noise), rate in zip(streams, rates)]
            prefixes.append(torch.cat([table.weight[config.bos, None], *parts, table.weight[list(config.prompt)]]))
        labels = [torch.tensor([*tokenizer.encode(f" {text}"), config.eos], device=device) for text, _ in clips]
        return llm.transcript_loss(prefixes, labels)

    fit("stage 2, the Llama", [*llm.parameters(), ear], make_batch, loss_of, steps, 2e-3)
    return llm.state_dict()


# --- stage 3: the paper ----------------------------------------------------------------------------------------------

def count_parameters(model):
    """One line: what is frozen and what stage 3 trains."""
    sizes = Counter()
    for name, parameter in model.named_parameters():
        sizes["MoME" if ".mome." in name else name.split(".")[0]] += parameter.numel()
    return (f"frozen: encoders {sizes['encoders']:,}, LLM {sizes['llm']:,} parameters; trained: MoME {sizes['MoME']:,}, "
            f"projectors and markers {sizes['projectors'] + sizes['markers']:,}")


def train_mome(model, clips, tasks, pairs, tokenizer, config, rng, device):
    """Train projectors, markers and MoME on all rate pairs at once; a step is a batch of one task."""
    trained = [p for p in model.parameters() if p.requires_grad]
    voices = [clip for clip in clips if "audio" in clip.streams]
    batches = {task: draws([clip for clip in clips if set(TASKS[task]) <= set(clip.streams)], config.batch_size, rng)
               for task in tasks}

    def make_batch():
        task = rng.choices(tasks, [TASK_SHARE[t] for t in tasks])[0]
        chosen = next(batches[task])
        encoded = model.encode(data.to(device, data.batch(chosen, TASKS[task], rng, voices)))
        return encoded, [tokenizer.encode(f" {clip.text}") for clip in chosen], task_rates(task, pairs)

    steps = config.steps or (2000 if config.data else 650)
    fit("stage 3, MoME", trained, make_batch, model.loss, steps, config.lr, config.weight_decay)


# --- main ------------------------------------------------------------------------------------------------------------

def main(argv=None):
    config = parse_args(argv)
    try:
        run(config)
    except (data.ClipError, CheckpointError, OSError) as error:
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


def load_clips(config, tasks):
    """-> {"train": clips, "test": clips}, of which every task has some it can use; no training clips for --eval-only."""
    parts = {"test": config.test_clips} if config.eval_only else {"train": config.clips, "test": config.test_clips}
    clips = data.folder_clips(config.data) if config.data else {
        part: data.talker_clips(part, count, config.seed) for part, count in parts.items()}
    for part, task in product(parts, tasks):
        if not any(set(TASKS[task]) <= set(clip.streams) for clip in clips[part]):
            raise data.ClipError(f"{config.data}: no {part} clip has {' and '.join(TASKS[task])}, which {task} needs; "
                                 "choose other --tasks")
    heard, babble = [clip for clip in clips["test"] if "audio" in clip.streams], parse_snrs(config.snr) != [None]
    if len(heard) == 1 and babble and any("audio" in TASKS[task] for task in tasks):
        raise data.ClipError("only one test clip has sound, and babble is made of others' voices: use --snr clean")
    return clips


def train_all(config, clips, tasks, device, watch):
    """The three stages -> (model, the words of its tokenizer)."""
    real, seed, cache = bool(config.data), config.seed, Path(config.cache or Path(config.out) / "cache")
    texts = [clip.text for clip in clips["train"]] if real else grid_sentences("train")
    tested = {clip.text for clip in clips["test"]} if real else set(grid_sentences("test"))
    words = sorted(data.common_words(texts))
    units = sorted({unit for word in words for unit in spell(word)})
    tokenizer = data.make_tokenizer(words)
    bos, eos, prompt = (tokenizer.encode_single_token(name) for name in data.SPECIAL_TOKENS)
    streams = {stream for task in tasks for stream in TASKS[task]}
    plain = AVSRConfig(LlamaConfig(tokenizer.n_vocab), AudioConfig() if "audio" in streams else None,
                       VideoConfig() if "video" in streams else None, bos=bos, eos=eos, prompt=(prompt,),
                       max_tokens=max(32, *(2 * len(tokenizer.encode(f" {clip.text}")) for clip in clips["train"])))
    experts = {name: getattr(config, name) for name in EXPERTS}
    torch.manual_seed(seed)
    model = AVSR(replace(plain, llm=replace(plain.llm, **experts))).to(device)

    torch.manual_seed(seed)
    made_of = [seed, device.type, [(clip.name, clip.text, clip.duration) for clip in clips["train"]]]
    with data.processes(1, HALF_OF_THE_CORES) as beside:
        make = partial(train_llm, Llama(plain.llm), texts, tested, units, tokenizer, plain, config.llm_steps,
                       random.Random(f"{seed} llm"), device)
        key = [seed, device.type, asdict(plain.llm), config.llm_steps, texts, sorted(tested)]
        llama = beside.submit(cached, cache, "llama", key, make)  # beside the encoders: it needs no clips
        for stream, encoder in model.encoders.items():
            having = [clip for clip in clips["train"] if stream in clip.streams]
            steps = getattr(config, f"{stream}_steps") if having[0].aligned else config.ctc_steps
            torch.manual_seed(seed)
            make = partial(train_encoder, stream, type(encoder)(encoder.config).to(device), having, units, steps,
                           random.Random(f"{seed} {stream}"), device)
            encoder.load_state_dict(cached(cache, f"{stream}-encoder", [made_of, asdict(encoder.config), steps], make))
            watch.lap(f"stage 1, {stream}")
        loaded = model.llm.load_state_dict(llama.result(), strict=False)
    assert not loaded.unexpected_keys and all(".mome." in name for name in loaded.missing_keys), loaded
    watch.lap("stage 2, rest")

    print(count_parameters(model))
    torch.manual_seed(seed)
    train_mome(model.train(), clips["train"], tasks, parse_rates(config.rates), tokenizer, config,
               random.Random(f"{seed} mome"), device)
    watch.lap("stage 3")
    return model, words


def run(config):
    """Everything: clips, the three stages, the test, and the files in config.out."""
    out, watch = Path(config.out), Stopwatch()
    watch.since = time.perf_counter()
    torch.set_num_threads(HALF_OF_THE_CORES)  # work comes in pairs: a batch and the next one, two stages, two tests
    tasks, pairs = list(dict.fromkeys(config.tasks.split(","))), parse_rates(config.rates)
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    if config.eval_only:
        model = load_model(out)[0].to(device)
        config = replace(config, **{name: getattr(model.config.llm, name) for name in EXPERTS})
        for task in tasks:
            if not set(TASKS[task]) <= set(model.streams):
                raise data.ClipError(f"{out}: this model reads {' and '.join(model.streams)} only, not what {task} needs")
    out.mkdir(parents=True, exist_ok=True)
    clips = load_clips(config, tasks)
    watch.lap("clips")
    if not config.eval_only:
        model, words = train_all(config, clips, tasks, device, watch)
        save_model(model, out, rates=pairs, tasks=tasks)
        data.save_tokenizer(words, out)
        write_samples(config, clips["test"], out / "samples")
    rows = evaluate(model, clips["test"], tasks, pairs, parse_snrs(config.snr), data.load_tokenizer(out), device)
    watch.lap("test")
    text = json.dumps({"rows": rows, "seconds": watch, "config": asdict(config)}, indent=2) + "\n"
    write_whole(out / "metrics.json", lambda path: path.write_text(text, "utf-8"))
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
