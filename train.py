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
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path

import jiwer
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
from encoders import FPS, AudioConfig, AudioEncoder, VideoConfig, VideoEncoder
from mome import AVSR, PLACES, AVSRConfig, Llama, LlamaConfig, load_model, pool, save_model, write_whole

TASKS = {"avsr": ("audio", "video"), "asr": ("audio",), "vsr": ("video",)}
TEST_BATCH = 100  # clips decoded together
TASK_SHARE = {"avsr": 0.4, "asr": 0.25, "vsr": 0.35}  # of stage 3's steps; not in the paper


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
    steps: int = flag(600, "common", "of stage 3")
    snr: str = flag("clean,0,-5", "common", "noise at test: 'clean' or dB of speech over babble, comma-separated")
    eval_only: bool = flag(False, "common", "test the model that is in --out, train nothing")
    device: str = flag("auto", "common", "auto takes a GPU when there is one", choices=("auto", "cpu", "cuda"))
    cache: str = flag("", "common", "folder for stages 1 and 2, default OUT/cache; runs may share one")
    n_routed: int = flag(8, "MoME", "routed experts in each layer; with --n-shared 0 too: projectors only")
    top_k: int = flag(2, "MoME", "routed experts that a token is sent to")
    n_shared: int = flag(1, "MoME", "experts that every token passes")
    bottleneck: int = flag(8, "MoME", "width of an expert")
    place: str = flag("attn", "MoME", "what MoME stands beside: attention, feed-forward, whole layer", choices=PLACES)
    batch_size: int = flag(8, "training", "clips in a step of stage 3")
    lr: float = flag(1.5e-3, "training", "peak learning rate of stage 3")
    weight_decay: float = flag(0.1, "training", "of stage 3")
    clips: int = flag(3000, "training", "training clips of the synthetic talker")
    test_clips: int = flag(500, "training", "test clips of the synthetic talker")
    encoder_steps: int = flag(400, "training", "of stage 1, for each encoder")
    ctc_steps: int = flag(1000, "training", "of stage 1 on clips that come without an alignment (--data)")
    llm_steps: int = flag(450, "training", "of stage 2")


def parse_rates(text):
    """'2,4,8' | '4:2,16:5' | '4,16x2,5' -> [(audio rate, video rate)], each once; ValueError says what is wrong."""
    try:
        if "x" in text:
            audio, video = text.split("x")
            pairs = list(product(map(int, audio.split(",")), map(int, video.split(","))))
        else:
            pairs = [(int(a), int(v or a)) for a, colon, v in (part.partition(":") for part in text.split(","))
                     if v or not colon or int("")]
    except ValueError:
        raise ValueError(f"rates {text!r} are not like '2,4,8', '4:2,16:5' or '4,16x2,5'") from None
    if min(map(min, pairs)) < 1:
        raise ValueError(f"rates {text!r}: a rate is how many tokens become one, 1 or more")
    return list(dict.fromkeys(pairs))


def task_rates(task, pairs):
    """The `rates` dicts of a task: every pair for avsr, the distinct rates of its one stream for asr and vsr."""
    found = [{s: r for s, r in zip(("audio", "video"), pair) if s in TASKS[task]} for pair in pairs]
    return [rates for i, rates in enumerate(found) if rates not in found[:i]]


def parse_args(argv):
    """-> TrainConfig, checked; argparse ends the program with one line and exit code 2 where a flag is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {}
    for f in fields(TrainConfig):
        group = groups.setdefault(f.metadata["group"], None) or parser.add_argument_group(f.metadata["group"])
        groups[f.metadata["group"]] = group
        name = "--" + f.name.replace("_", "-")
        if f.type is bool:
            group.add_argument(name, action="store_true", help=f.metadata["help"])
        else:
            group.add_argument(name, type=f.type, default=f.default, choices=f.metadata.get("choices"),
                               help=f.metadata["help"] + (f" (default {f.default})" if f.default != "" else ""))
    config = TrainConfig(**vars(parser.parse_args(argv)))
    try:
        parse_rates(config.rates)
        for task in config.tasks.split(","):
            if task not in TASKS:
                raise ValueError(f"--tasks: {task!r} is not one of {', '.join(TASKS)}")
        for snr in config.snr.split(","):
            if snr != "clean" and not math.isfinite(float(snr)):
                raise ValueError
        for name in ("steps", "encoder_steps", "ctc_steps", "llm_steps", "clips", "test_clips", "batch_size"):
            if getattr(config, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(config, name)}")
        LlamaConfig(1, n_routed=config.n_routed, top_k=config.top_k, n_shared=config.n_shared,
                    bottleneck=config.bottleneck, place=config.place)
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: this machine has no GPU that torch can use; use auto or cpu")
    except ValueError as error:
        parser.error(f"--snr {config.snr!r}: expected 'clean' or dB, like clean,0,-5"
                     if "float" in str(error) or not str(error) else str(error))
    return config


# --- the training loop, for all three stages -------------------------------------------------------------------------

def fit(name, parameters, loss_of, steps, lr, weight_decay=0.01):
    """Minimise `loss_of(step)` by AdamW: short warm-up, cosine to 5%, gradients clipped to norm 1."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    warmup = min(30, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / warmup, 0.525 + 0.475 * math.cos(math.pi * step / steps)))
    progress = tqdm(range(steps), name)
    for step in progress:
        loss = loss_of(step)
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


def to(device, features):
    return {stream: (x.to(device), lengths.to(device)) for stream, (x, lengths) in features.items()}


def cached(folder, name, key, make):
    """The state dict that `make()` returns, kept in `folder` under the name and a hash of the key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
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

    def loss_of(step):
        chosen = next(batches)
        x, lengths = to(device, data.batch(chosen, [stream], rng, clips))[stream]
        log_probs = head(encoder(x, lengths)).log_softmax(-1)                                # (B, T, units + 1)
        lengths = encoder.n_tokens(lengths)
        if chosen[0].aligned:
            per_second = FPS * (2 if stream == "audio" else 1)
            targets = pad_sequence([frame_units(clip, n, per_second, unit_ids)
                                    for clip, n in zip(chosen, lengths.tolist())], True, padding_value=-100)
            return F.nll_loss(log_probs.flatten(0, 1), targets.flatten().to(device))
        targets = [torch.tensor([unit_ids[u] for u in data.spell(clip.text)]) for clip in chosen]
        return F.ctc_loss(log_probs.transpose(0, 1), torch.cat(targets).to(device), lengths,
                          torch.tensor([len(t) for t in targets]), zero_infinity=True)

    encoder.train()
    fit(f"stage 1, {stream} encoder", [*encoder.parameters(), *head.parameters()], loss_of, steps, 3e-3)
    return encoder.eval().state_dict()


# --- stage 2: a small Llama that has learned to listen ---------------------------------------------------------------

class Mishearing(nn.Module):
    """Texts as an imperfect ear would report them: sequences of vectors (T, D), with no sound or picture involved.

    Each unit lasts a few tokens; some are taken for others, neighbours smear into one another, noise is added. The
    vectors are sums of this module's table, which is thrown away after stage 2: stage 3's projectors must find out how
    to speak to the LLM."""

    def __init__(self, units, dim):
        super().__init__()
        self.ids = {unit: i + 1 for i, unit in enumerate(units)}
        self.table = nn.Embedding(len(units) + 1, dim)
        nn.init.normal_(self.table.weight, std=0.5)

    def forward(self, text, rng):
        """text -> (T, D) at about 25 tokens a second."""
        mistaken, flicker = rng.uniform(0, .2), rng.uniform(0, .15)
        sequence = [0] * rng.randint(2, 6)
        n = len(self.table.weight)
        for word in text.split():
            for unit in data.spell(word):
                heard = rng.randrange(n) if rng.random() < mistaken else self.ids[unit]
                length = rng.randint(2, 4) * (1 if word in data.LEXICON else 3)
                sequence += [rng.randrange(n) if rng.random() < flicker else heard for _ in range(length)]
            sequence += [0] * rng.randint(0, 2)
        sharp = F.one_hot(torch.tensor(sequence), n).float()                                    # (T, units + 1)
        smear = rng.uniform(0, .3)
        smeared = (1 - 2 * smear) * sharp + smear * sharp.roll(1, 0) + smear * sharp.roll(-1, 0)
        x = smeared.to(self.table.weight.device) @ self.table.weight
        return x + rng.uniform(0, .5) * torch.randn(x.shape).to(x.device) * self.table.weight.std().detach()


def train_llm(llm, texts, tested, units, tokenizer, config, steps, rng, device):
    """Pretrain the Llama to transcribe what `Mishearing` makes of 70% sentences of `texts`, 30% random words, pooled by
    1 to 8, sometimes as two streams. No text is in `tested`: random words that make up a test sentence are redrawn."""
    ear = Mishearing(units, llm.config.dim).to(device)
    words = data.common_words(texts)
    lengths = [len(text.split()) for text in rng.sample(texts, min(1000, len(texts)))]
    table = llm.embed_tokens

    def loss_of(step):
        prefixes, labels, rates = [], [], [rng.randint(1, 8) for _ in range(rng.choice((1, 1, 2)))]
        for _ in range(32):
            text = rng.choice(texts)
            made_up = rng.random() < .3
            while made_up or text in tested:
                made_up = False
                text = " ".join(rng.choices(words, k=max(1, rng.choice(lengths) + rng.randint(-2, 2))))
            parts = [table.weight[config.bos, None]]
            for rate in rates:
                x = ear(text, rng)[None]
                parts.append(pool(x, torch.tensor([x.shape[1]]), rate)[0][0])
            prefixes.append(torch.cat([*parts, table.weight[list(config.prompt)]]))
            labels.append(torch.tensor([*tokenizer.encode(f" {text}"), config.eos], device=device))
        return llm.transcript_loss(prefixes, labels)

    fit("stage 2, the Llama", [*llm.parameters(), *ear.parameters()], loss_of, steps, 2e-3)
    return llm.state_dict()


# --- stage 3: the paper ----------------------------------------------------------------------------------------------

def count_parameters(model):
    """One line: what is frozen and what stage 3 trains."""
    def count(choose):
        return sum(p.numel() for name, p in model.named_parameters() if choose(name, p))
    mome = count(lambda name, p: ".mome." in name)
    trained = count(lambda name, p: p.requires_grad)
    return (f"frozen: encoders {count(lambda name, p: name.startswith('encoders.')):,}, LLM "
            f"{count(lambda name, p: name.startswith('llm.')) - mome:,} parameters; "
            f"trained: MoME {mome:,}, projectors and markers {trained - mome:,}")


def train_mome(model, clips, tasks, pairs, tokenizer, config, rng, device):
    """Train projectors, markers and MoME on all rate pairs at once; a step is a batch of one task."""
    trained = [p for p in model.parameters() if p.requires_grad]
    batches = {task: draws([c for c in clips if set(TASKS[task]) <= set(c.streams)], config.batch_size, rng) for task in tasks}

    def loss_of(step):
        task = rng.choices(tasks, [TASK_SHARE[t] for t in tasks])[0]
        chosen = next(batches[task])
        features = to(device, data.batch(chosen, TASKS[task], rng, clips))
        return model.loss(features, [tokenizer.encode(f" {clip.text}") for clip in chosen], task_rates(task, pairs))

    fit("stage 3, MoME", trained, loss_of, config.steps, config.lr, config.weight_decay)


# --- test ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, clips, tasks, pairs, snrs, tokenizer, device):
    """Corpus-level WER (jiwer, after data.normalize) of every task at every rate, clean and in babble -> metrics rows.

    Each clip is encoded once for each noise and serves all tasks and rates; lips hear no noise, so vsr is tested clean."""
    told = {}  # (task, rates, snr) -> [(reference, hypothesis)]
    model.eval()
    for snr in snrs:
        noisy = sorted(data.in_babble(clips, snr), key=lambda clip: (clip.streams, clip.duration))
        for start in tqdm(range(0, len(noisy), TEST_BATCH), f"test, {'clean' if snr is None else f'{snr:g} dB'}", leave=False):
            for streams in sorted({clip.streams for clip in noisy[start:start + TEST_BATCH]}):
                chunk = [clip for clip in noisy[start:start + TEST_BATCH] if clip.streams == streams]
                encoded = model.encode(to(device, data.batch(chunk, [s for s in streams if s in model.streams])))
                for task in tasks:
                    if set(TASKS[task]) <= set(streams) and (snr is None or "audio" in TASKS[task]):
                        for rates in task_rates(task, pairs):
                            answers = [tokenizer.decode(ids) for ids, _ in model.generate(encoded, rates)]
                            told.setdefault((task, tuple(rates.items()), snr), []).extend(
                                (clip.text, data.normalize(answer)) for clip, answer in zip(chunk, answers))
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

def main(argv=None):
    config = parse_args(argv)
    try:
        run(config)
    except (data.ClipError, FileNotFoundError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


def run(config):
    """Everything: clips, the three stages, the test, and the files in config.out."""
    out, seed = Path(config.out), config.seed
    cache = Path(config.cache or out / "cache")
    tasks, pairs = config.tasks.split(","), parse_rates(config.rates)
    snrs = [None if snr == "clean" else float(snr) for snr in config.snr.split(",")]
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    streams = [s for s in ("audio", "video") if any(s in TASKS[task] for task in tasks)]
    seconds, clock = {}, time.perf_counter()

    def lap(stage):
        nonlocal clock
        seconds[stage] = round(time.perf_counter() - clock, 1)
        clock = time.perf_counter()

    if config.eval_only:
        model, saved = load_model(out)
        tokenizer, model = data.load_tokenizer(out), model.to(device)
        missing = [s for s in streams if s not in model.streams]
        if missing:
            raise data.ClipError(f"{out}: this model has no {missing[0]} encoder; choose other --tasks")
    parts = ["test"] if config.eval_only else ["train", "test"]
    if config.data:
        clips = data.folder_clips(config.data)
    else:
        clips = {part: data.talker_clips(part, config.clips if part == "train" else config.test_clips, seed) for part in parts}
    for part, task in product(parts, tasks):
        if not any(set(TASKS[task]) <= set(clip.streams) for clip in clips[part]):
            raise data.ClipError(f"{config.data}: no {part} clip has {' and '.join(TASKS[task])}, which {task} needs; "
                                 "choose other --tasks")
    lap("clips")

    if not config.eval_only:
        texts = [clip.text for clip in clips["train"]] if config.data else data.grid_sentences("train")
        tested = {clip.text for clip in clips["test"]} if config.data else set(data.grid_sentences("test"))
        words = sorted(data.common_words(texts))
        units = sorted({unit for word in words for unit in data.spell(word)})
        tokenizer = data.make_tokenizer(words)
        special = tokenizer._special_tokens
        sizes = {"audio": AudioConfig() if "audio" in streams else None, "video": VideoConfig() if "video" in streams else None}
        plain = AVSRConfig(LlamaConfig(tokenizer.n_vocab), **sizes, bos=special["<bos>"], eos=special["<eos>"],
                           prompt=(special["<transcribe>"],))
        torch.manual_seed(seed)
        model = AVSR(replace(plain, llm=replace(plain.llm, n_routed=config.n_routed, top_k=config.top_k, place=config.place,
                                                n_shared=config.n_shared, bottleneck=config.bottleneck))).to(device)
        made_of = [seed, device.type, [(c.name, c.text) for c in clips["train"]]]
        for stream, encoder in model.encoders.items():
            having = [clip for clip in clips["train"] if stream in clip.streams]
            steps = config.encoder_steps if having[0].aligned else config.ctc_steps
            torch.manual_seed(seed)
            fresh = type(encoder)(encoder.config).to(device)
            encoder.load_state_dict(cached(cache, f"{stream}-encoder", [made_of, asdict(encoder.config), steps], lambda: train_encoder(
                stream, fresh, having, units, steps, random.Random(f"{seed} {stream}"), device)))
            lap(f"stage 1, {stream}")
        torch.manual_seed(seed)
        llm = Llama(plain.llm).to(device)
        state = cached(cache, "llama", [seed, device.type, asdict(plain.llm), texts if config.data else "grid", config.llm_steps],
                       lambda: train_llm(llm, texts, tested, units, tokenizer, plain, config.llm_steps,
                                         random.Random(f"{seed} llm"), device))
        fresh_names = set(model.llm.load_state_dict(state, strict=False).missing_keys)
        assert all(".mome." in name for name in fresh_names), fresh_names
        lap("stage 2")

        print(count_parameters(model))
        torch.manual_seed(seed)
        model.train()
        train_mome(model, clips["train"], tasks, pairs, tokenizer, config, random.Random(f"{seed} mome"), device)
        lap("stage 3")
        out.mkdir(parents=True, exist_ok=True)
        save_model(model.cpu(), out, rates=pairs, tasks=tasks)
        data.save_tokenizer(words, out)
        model.to(device)

    rows = evaluate(model, clips["test"], tasks, pairs, snrs, tokenizer, device)
    lap("test")
    text = json.dumps({"rows": rows, "seconds": seconds, "config": asdict(config)}, indent=2) + "\n"
    write_whole(out / "metrics.json", lambda path: path.write_text(text, "utf-8"))
    if not config.eval_only:
        shutil.rmtree(out / "samples", ignore_errors=True)
        (out / "samples").mkdir()
        if config.data:
            for clip in clips["test"][:3]:
                shutil.copy(clip.name, out / "samples")
        else:
            data.write_talker_clips(out / "samples", 3, "test", seed)
    print(table(rows))
    print(", ".join(f"{stage} {s:.0f} s" for stage, s in seconds.items()) + f"; in all {sum(seconds.values()):.0f} s")


if __name__ == "__main__":
    sys.exit(main())
