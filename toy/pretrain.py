"""Stages 1 and 2: small frozen parts in place of those that somebody would have to download.

    stage 1  two encoders learn to tell phonemes apart                  in place of Whisper and AV-HuBERT
             with --data both go on with real clips; lips take the time of each phoneme from the audio encoder
    stage 2  a tiny Llama learns, from text alone, to read a sentence   in place of Llama 3
             that is spelled in letters and to write it in words

A stage is skipped for a part that is given (train.py --audio-encoder, --video-encoder, --llm). Trained parts are kept
in a cache, under a hash of what went in: clips, sizes, steps, seed. None of this is from the paper.
"""
import hashlib
import math
import multiprocessing
import os
import random
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import batch, to_device
from encoders import VideoConfig
from mome import Llama, LlamaConfig
from real.checkpoint import EXPERTS
from real.files import CheckpointError, digest, make_folder, read_stored, write_whole
from real.folders import Unread, read_drawn, stamp
from real.run import begin_worker
from toy.talker import LEXICON, grid_sentences, talker_clips
from toy.tokenizer import common_words

VERSION = 1        # raise this by hand when a change of code makes other weights from the same input
LLM_BATCH = 16     # sentences in a step of stage 2
MADE_UP = 0.45     # share of sentences of random words; with fewer, the Llama learns the grammar, not the letters
REACH = 6          # audio tokens (20 ms each) by which a unit is extended on each side of where CTC finds it


def fit(name, parameters, loss_at, steps, lr):
    """Minimise `loss_at(step)`: AdamW, up to 30 steps of warm-up, cosine decay to 5 %, gradients clipped to norm 1."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / min(30, steps // 10 + 1), 0.525 + 0.475 * math.cos(math.pi * step / steps)))
    is_child = multiprocessing.parent_process() is not None
    for step in (progress := tqdm(range(steps), name, position=int(is_child))):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def cache_file(folder, name, key):
    """The path at which the state dict of this name and `key` (JSON) is kept."""
    return folder / f"{name}-{digest([VERSION, key])[:12]}.safetensors"


def cached(folder, name, key, make):
    """The state dict that `make()` returns, kept in `folder` under its name and a hash of `key` (JSON)."""
    path = cache_file(folder, name, key)
    if path.is_file():
        tqdm.write(f"{name}: found in {path}")
        return read_stored(path, load_file)
    make_folder(folder, "--cache")            # a folder that cannot be written is refused before the work
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
    write_whole(path, lambda temporary: temporary.write_bytes(save(state)))
    return state


def load_cached(network, state, cache):
    """Load a state of the cache. Raises CheckpointError: a key tells configs apart, and not networks of one config."""
    try:
        network.load_state_dict(state)
    except RuntimeError:
        raise CheckpointError(f"{cache}: its weights are of another network than {type(network).__name__}; "
                              "name another --cache") from None


def clips_digest(clips):
    """A hash of all that training reads of the clips. An unread clip counts by its files' sizes and times."""
    content = hashlib.sha256()
    for clip in clips:
        content.update(repr((os.path.basename(clip.name), clip.text, clip.aligned)).encode())
        content.update(stamp(clip))
        for array in (clip.log_power, clip.frames):
            content.update(b"" if array is None else array.tobytes())
    return content.hexdigest()


# --- stage 1: encoders that tell phonemes apart ----------------------------------------------------------------------

def spell(text):
    """The units that encoders learn: the phonemes of a word in the talker's lexicon, else the word itself."""
    return [unit for word in text.split() for unit in LEXICON.get(word, [word])]


def target_units(text, unit_ids):
    """The ids of a text's units, without those that no encoder learns -> (N,)."""
    return torch.tensor([unit_ids[unit] for unit in spell(text) if unit in unit_ids], dtype=torch.long)


def frame_units(aligned, n_tokens, tokens_per_second, unit_ids):
    """The unit in the middle of each of `n_tokens` tokens, by an alignment as in data.Clip -> (n_tokens,), 0: rest."""
    ends = torch.tensor([end for _, end in aligned])
    units = torch.tensor([unit_ids.get(unit, 0) for unit, _ in aligned])
    middles = (torch.arange(n_tokens) + 0.5) / tokens_per_second
    return units[torch.searchsorted(ends, middles).clamp(max=len(units) - 1)]


def ctc_path(log_probs, target):
    """CTC's likeliest path (Viterbi) through log_probs (T, units + 1) for the units `target` (N,) -> (T,).

    A token of the k-th unit (k from 1) has the value k, any other 0. The result is None if T is too small."""
    labels = torch.zeros(2 * len(target) + 1, dtype=torch.long)             # blank, unit, blank, unit, ..., blank
    labels[1::2] = target
    places = torch.arange(len(labels))
    no_skip = (labels == labels.roll(2)) | (places < 2)                     # a blank, or a unit that is said twice
    score, moves = log_probs[0, labels].masked_fill(places > 1, -math.inf), []
    for gain in log_probs[1:, labels]:
        before = F.pad(score, (2, 0), value=-math.inf)
        ways = torch.stack([score, before[1:-1], before[:-2].masked_fill(no_skip, -math.inf)])
        score, move = ways.max(0)                                           # move: by how many places it advanced
        score = score + gain
        moves.append(move)
    place = len(score) - 2 + int(score[-1] >= score[-2])                    # the last unit, or the blank after it
    if score[place] == -math.inf:
        return None
    path = [place]
    for move in reversed(moves):
        path.append(path[-1] - int(move[path[-1]]))
    path = torch.tensor(path[::-1])
    return torch.where(path % 2 == 1, (path + 1) // 2, 0)


def fill_out(path, reach):
    """path (T,) of ctc_path -> (T,): each unit is extended by up to `reach` tokens to each side."""
    heard = path.nonzero()[:, 0]
    distance, nearest = (torch.arange(len(path))[:, None] - heard).abs().min(1)
    return torch.where(distance <= reach, path[heard[nearest]], 0)


def heard_units(encoder, head, clips, unit_ids, device):
    """The unit of each token of sound, 0 at rest -> {"0": (T,) of the first clip, "1": ...}.

    `head` is the layer that `encoder` has learned with by CTC. Clips too short for their words are left out."""
    heard = {}
    for i, clip in enumerate(tqdm(clips, "alignment", leave=False)):
        x, lengths = to_device(batch([clip], ["audio"]), device)["audio"]
        target = target_units(clip.text, unit_ids)
        with torch.no_grad():
            log_probs = head(encoder(x, lengths))[0].log_softmax(-1).cpu()
        path = ctc_path(log_probs, target) if len(target) else None
        if path is not None:
            heard[str(i)] = F.pad(target, (1, 0))[fill_out(path, REACH)]
    return heard


def train_encoder(stream, encoder, clips, units, steps, seed, device, alignments):
    """Pretrain an encoder with an output layer -> its state dict. With real clips, "head.*" holds the output layer.

    Clips with an alignment: cross-entropy with the unit at each token. Others: CTC. The synthetic talker's clips have
    one. If over half of real clips are in `alignments` {name: alignment}, only those are used, else all by CTC."""
    encoder.to(device).train()
    unit_ids = {unit: i + 1 for i, unit in enumerate(units)}
    head = nn.Linear(encoder.config.dim, len(units) + 1).to(device)
    taught = [clip for clip in clips if clip.name in alignments]
    clips, alignments = (taught, alignments) if 2 * len(taught) > len(clips) else (clips, {})
    is_real, aligned = not clips[0].aligned, bool(clips[0].aligned or clips[0].name in alignments)
    voices = [clip for clip in clips if clip.log_power is not None]
    batch_size, lr = (8, 1.5e-3) if is_real else (4, 3e-3)

    def loss_at(step):
        chosen = read_drawn(clips, [stream], batch_size, f"{seed} {stream}", step)
        rng = random.Random(f"{seed} {stream} {step}")
        x, lengths = to_device(batch(chosen, [stream], rng, voices), device)[stream]
        log_probs = head(encoder(x, lengths)).log_softmax(-1)                        # (B, T, units + 1)
        lengths = encoder.n_tokens(lengths)
        if aligned:                                          # a clip of another pace has more or fewer tokens a second
            targets = [frame_units(clip.aligned or alignments[clip.name], n, n / clip.duration, unit_ids)
                       for clip, n in zip(chosen, lengths.tolist())]
            targets = pad_sequence(targets, batch_first=True, padding_value=-100)
            return F.nll_loss(log_probs.flatten(0, 1), targets.flatten().to(device))
        targets = [target_units(clip.text, unit_ids) for clip in chosen]
        target_lengths = torch.tensor([len(target) for target in targets])
        return F.ctc_loss(log_probs.transpose(0, 1), torch.cat(targets).to(device), lengths.cpu(), target_lengths,
                          zero_infinity=True)

    fit(f"stage 1, {stream} encoder", [*encoder.parameters(), *head.parameters()], loss_at, steps, lr)
    layer = {f"head.{name}": x for name, x in head.state_dict().items()} if is_real else {}
    return encoder.eval().state_dict() | layer


@lru_cache(maxsize=1)
def first_clips(count, seed, size):
    """Clips of the synthetic talker, for both encoders."""
    return talker_clips({"train": count}, seed, size)["train"]


def begin_on_talker(stream, encoder, tested, config, cache, device):
    """Train an encoder on the synthetic talker first: real clips are few, and their phonemes have no known times."""
    def make():
        clips = first_clips(config.clips, config.seed, getattr(encoder.config, "picture", VideoConfig.picture))
        clips = [clip for clip in clips if clip.text not in tested]
        units = sorted({unit for word in LEXICON for unit in spell(word)})
        return train_encoder(stream, encoder, clips, units, steps, config.seed, device, {})

    steps = getattr(config, f"{stream}_steps")
    tested = tested & set(grid_sentences("train"))           # what the talker says
    key = ["talker", config.seed, config.clips, asdict(encoder.config), steps, sorted(tested)]
    load_cached(encoder, cached(cache, f"{stream}-encoder", key, make), cache)


def alignment(tokens, names, seconds):
    """The units of a clip's tokens, as places in `names` -> its alignment as in data.Clip."""
    ends = [t for t in range(1, len(tokens) + 1) if t == len(tokens) or tokens[t] != tokens[t - 1]]
    return [(names[tokens[t - 1]], t * seconds / len(tokens)) for t in ends]


def learn_encoder(stream, encoder, clips, units, of_clips, alignments, tested, config, cache, device, teaches):
    """Train and load an encoder -> {clip's name: alignment} for the video encoder if `teaches`, else {}."""
    is_real = not clips[0].aligned
    steps = config.ctc_steps if is_real else getattr(config, f"{stream}_steps")
    torch.manual_seed(config.seed)
    new = type(encoder)(encoder.config)
    key = [config.seed, of_clips, asdict(encoder.config), steps]
    if is_real:
        begin_on_talker(stream, new, tested, config, cache, device)
        key += [config.clips, config.audio_steps, config.video_steps, sorted(tested), bool(alignments), REACH]
        torch.manual_seed(config.seed)                                   # the same, found in the cache or not
    make = partial(train_encoder, stream, new, clips, units, steps, config.seed, device, alignments)
    state = cached(cache, f"{stream}-encoder", key, make)
    layer = {name[5:]: state.pop(name) for name in list(state) if name.startswith("head.")}
    load_cached(encoder, state, cache)
    if not teaches or not is_real or any(isinstance(clip, Unread) for clip in clips):
        return {}
    head = nn.Linear(encoder.config.dim, len(units) + 1).to(device)
    head.load_state_dict(layer)
    names = ["", *units]                                                 # "": rest; "rest" may be a word
    make = partial(heard_units, encoder.eval(), head, clips, {unit: i for i, unit in enumerate(names)}, device)
    heard = [(clips[int(i)], tokens.tolist()) for i, tokens in cached(cache, "alignments", key, make).items()]
    return {clip.name: alignment(tokens, names, clip.duration) for clip, tokens in heard}


# --- stage 2: a small language model that can read letters -----------------------------------------------------------

def random_sentence(texts, tested, words, rng):
    """A sentence of `texts`, or as many random words, more or less. It is never a sentence of `tested`."""
    text = rng.choice(texts)
    if rng.random() < MADE_UP:
        n_words = max(1, len(text.split()) + rng.randint(-2, 2))
        text = " ".join(rng.choices(words, k=n_words))
    return random_sentence(texts, tested, words, rng) if text in tested else text


def train_llm(llm, texts, tested, tokenizer, config, steps, seed, device):
    """Pretrain the Llama on text alone: it reads a sentence letter by letter and writes it word by word.

        <bos> b i n _ b l u e _ a t _ f <transcribe>  ->  bin blue at f <eos>          (_ is a space)

    It never meets sound, noise, time or pooling. In stage 3, projectors and experts must learn to speak to it."""
    llm.to(device)
    words = common_words(texts)

    def loss_at(step):
        rng = random.Random(f"{seed} llm {step}")
        sentences = [random_sentence(texts, tested, words, rng) for _ in range(LLM_BATCH)]
        prefixes, labels = [], []
        for text in sentences:
            ids = [config.bos, *text.encode(), *config.prompt]                       # the id of a byte is the byte
            prefixes.append(llm.embed_tokens(torch.tensor(ids, device=device)))
            labels.append(torch.tensor([*tokenizer.encode(f" {text}"), config.eos], device=device))
        return llm.transcript_loss(prefixes, labels)

    fit("stage 2, the Llama", llm.parameters(), loss_at, steps, 2e-3)
    return llm.state_dict()


# --- both stages -----------------------------------------------------------------------------------------------------

def pretrain(model, given, clips, texts, tested, tokenizer, config, cache, watch):
    """Train and load those parts of `model` ("llm", "audio", "video") that are not `given`.

    clips: the training clips; texts: their sentences; tested: sentences that no stage may meet. `config` gives the seed
    and the steps. `watch.lap(name)` is called after each stage. The Llama trains beside the encoders, in a process of
    its own, because it needs no clips."""
    seed, device = config.seed, model.device
    units = sorted({unit for word in common_words(texts) for unit in spell(word)})
    of_clips = clips_digest(clips) if set(model.encoders) - set(given) else ""
    no_experts = {name: getattr(LlamaConfig, name) for name in EXPERTS}
    plain = replace(model.config, llm=replace(model.config.llm, **no_experts))
    key = [seed, asdict(plain.llm), config.llm_steps, LLM_BATCH, MADE_UP, texts, sorted(tested)]
    is_there = "llm" in given or cache_file(cache, "llama", key).is_file()      # then the Llama needs no process
    process = partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"), begin_worker)
    with (ThreadPoolExecutor(1) if is_there else process((torch.get_num_threads(),))) as beside:
        if "llm" not in given:
            torch.manual_seed(seed)
            make = partial(train_llm, Llama(plain.llm), texts, tested, tokenizer, plain, config.llm_steps, seed, device)
            llama = beside.submit(cached, cache, "llama", key, make)
        alignments = {}
        for stream, encoder in model.encoders.items():
            if stream not in given:
                usable = [clip for clip in clips if stream in clip.streams]
                teaches = stream == "audio" and "video" in set(model.encoders) - set(given)
                alignments = learn_encoder(stream, encoder, usable, units, of_clips, alignments, tested, config, cache,
                                           device, teaches)
                watch.lap(f"stage 1, {stream}")
        first_clips.cache_clear()
        if "llm" not in given:
            missing, unexpected = model.llm.load_state_dict(llama.result(), strict=False)
            assert not unexpected and all(".mome." in name for name in missing), (missing, unexpected)
            watch.lap("stage 2, rest")
