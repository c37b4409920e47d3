"""The frozen parts that nobody needs to download: two encoders and a tiny Llama, trained here in a few minutes.

    stage 1  the two encoders learn to tell speech sounds apart           stands in for Whisper and AV-HuBERT
    stage 2  a tiny Llama learns, from text alone, to read out a noisy,   stands in for Llama 3
             stretched sequence of sounds that it finds in its context

Each is skipped where the real part is given (train.py --audio-encoder, --video-encoder, --llm). What has been trained is
kept in a cache and found there again by what it was made of. The training loop of all three stages stands here too. None
of this is from the paper.
"""
import hashlib
import json
import math
import multiprocessing
import random
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
from encoders import FPS
from mome import Llama, pool
from talker import mishear, spell
from weights import write_whole

AHEAD = 4  # batches that wait: some take longer to make, others to learn from


# --- the training loop, for all three stages -------------------------------------------------------------------------

def fit(name, parameters, make_batch, loss_of, steps, lr, weight_decay=0.01, every=0, check=None, workers=1):
    """Minimise by AdamW the mean of `loss_of(*part)` over the parts of a batch, a list that `make_batch()` returns: short warm-up,
    cosine to 5%, gradients clipped to norm 1. `workers` threads learn from the parts while another makes the next batches.
    `check(step, mean loss since the last)` is called `every` so often."""
    losses, parameters = deque(maxlen=max(1, every)), list(parameters)
    warmup = min(30, steps // 10 + 1)
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / warmup, 0.525 + 0.475 * math.cos(math.pi * step / steps)))

    def learn(part):
        loss = loss_of(*part)
        return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

    with ThreadPoolExecutor(1) as maker, ThreadPoolExecutor(workers) as learners:
        each = learners.map if workers > 1 else map
        batches = deque(maker.submit(make_batch) for _ in range(min(AHEAD, steps)))
        for step in (progress := tqdm(range(steps), name, position=int(multiprocessing.parent_process() is not None))):
            parts = batches.popleft().result()
            if step + AHEAD < steps:
                batches.append(maker.submit(make_batch))
            optimizer.zero_grad()
            losses.append(0)
            for loss, gradients in each(learn, parts):  # in the order of the parts, so that sums are the same in every run
                losses[-1] += loss / len(parts)
                for parameter, gradient in zip(parameters, gradients):
                    if gradient is not None:
                        gradient = gradient / len(parts)
                        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step % 10 == 0:
                progress.set_postfix(loss=f"{losses[-1].item():.3f}")
            if every and (step + 1) % every == 0:
                check(step + 1, torch.stack(tuple(losses)).mean().item())


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
    modules = ("talker", "data", "encoders", "mome", "pretrain")
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
    batches = draws(clips, 4 if clips[0].aligned else 8, rng)  # CTC tells less of each clip

    def make_batch():
        chosen = next(batches)
        x, lengths = data.to(device, data.batch(chosen, [stream], rng, clips))[stream]
        return [(chosen, x, lengths)]

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
        for _ in range(16):
            text = rng.choice(texts)
            made_up = rng.random() < .3
            while made_up or text in tested:
                made_up = False
                text = " ".join(rng.choices(words, k=max(1, rng.choice(lengths) + rng.randint(-2, 2))))
            streams = [(mishear(text, unit_ids, rng), rng.uniform(0, .5)) for _ in rates]
            clips.append((text, [(heard.to(device), torch.randn(len(heard), llm.config.dim).to(device) * noise)
                                 for heard, noise in streams]))
        return [(clips, rates)]

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


# --- both, side by side ----------------------------------------------------------------------------------------------

def pretrain(model, given, clips, texts, tested, tokenizer, config, cache, watch):
    """Stages 1 and 2 for those parts of `model` that are not `given` ("llm", "audio", "video"), with the training clips,
    their sentences and those of the test part; `config` gives seed and steps, `watch` is told when a stage is over."""
    seed, device = config.seed, model.device
    units = sorted({unit for word in data.common_words(texts) for unit in spell(word)})
    torch.manual_seed(seed)
    made_of = [seed, device.type, [(clip.name, clip.text, clip.duration) for clip in clips]]
    with data.processes(1, torch.get_num_threads()) as beside:
        if "llm" not in given:  # beside the encoders: it needs no clips
            plain = replace(model.config, llm=replace(model.config.llm, n_routed=0, n_shared=0))
            make = partial(train_llm, Llama(plain.llm), texts, tested, units, tokenizer, plain, config.llm_steps,
                           random.Random(f"{seed} llm"), device)
            key = [seed, device.type, asdict(plain.llm), config.llm_steps, texts, sorted(tested)]
            llama = beside.submit(cached, cache, "llama", key, make)
        for stream, encoder in model.encoders.items():
            if stream not in given:
                having = [clip for clip in clips if stream in clip.streams]
                steps = getattr(config, f"{stream}_steps") if having[0].aligned else config.ctc_steps
                torch.manual_seed(seed)
                make = partial(train_encoder, stream, type(encoder)(encoder.config).to(device), having, units, steps,
                               random.Random(f"{seed} {stream}"), device)
                encoder.load_state_dict(cached(cache, f"{stream}-encoder", [made_of, asdict(encoder.config), steps], make))
                watch.lap(f"stage 1, {stream}")
        if "llm" not in given:
            loaded = model.llm.load_state_dict(llama.result(), strict=False)
            assert not loaded.unexpected_keys and all(".mome." in name for name in loaded.missing_keys), loaded
            watch.lap("stage 2, rest")
