"""Decode: transcribe clips with a trained model, and measure its word error rate.

    python sample.py                              the three unseen clips that train.py wrote
    python sample.py clip.mp4 --rate 8 --json     your own clip, with fewer tokens for the LLM to read
    python sample.py talk.mp4 --srt talk.srt      a long clip, with subtitles

Each clip gives a line of text on stdout, or a line on stderr if it cannot be read. The exit code is 0; 1 if
some clips failed; 2 if all failed. From Python: `sample.transcribe("clip.mp4")`. A clip longer than the training
clips is cut at pauses, and the texts of the pieces are joined.

Axes: B batch, T time, D width, V vocabulary, W beams, S slots of the cache, H heads.
"""
import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import groupby, islice
from pathlib import Path

import jiwer
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
from data import TASKS, TOKENS_PER_SECOND, ClipError, parse_rates, task_rates
from encoders import valid_mask
from real import media, mouth
from real.checkpoint import FLAGS, load_model, reading
from real.clips import read_pieces
from real.files import run_script, shown
from real.subtitles import write_srt

TEST_BATCH = 50     # hypotheses that are decoded together in a test
PIECES = 8          # pieces of a long clip that are decoded together


# --- decoding ---------------------------------------------------------------------------------------------

class KVCache:
    """Keys and values of all layers, two tensors (layers, B * W, kv heads, S, D/H).

    The prefix is computed once per clip and copied to its W beams. After that, one token is appended to every
    beam. Prefixes of unequal length leave padding between the prefix and the generated tokens."""

    def __init__(self, config, lengths, slots, like, beam=1):
        shape = (config.n_layers, len(lengths) * beam, config.n_kv_heads, slots, config.head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)
        self.lengths, self.beam = lengths.repeat_interleave(beam), beam     # of the prefixes
        self.is_ragged = bool((lengths != lengths[0]).any())
        self.filled = self.prefix = 0               # slots in use, and how many of them prefixes use

    def writer(self, layer):
        """The function that one layer calls with new k and v (B or B * W, kv heads, T, D/H)."""
        def write(k, v):
            start, end = self.filled, self.filled + k.shape[2]
            copies = self.beam if start == 0 else 1
            self.k[layer, :, :, start:end] = k.repeat_interleave(copies, 0)
            self.v[layer, :, :, start:end] = v.repeat_interleave(copies, 0)
            if layer == len(self.k) - 1:
                self.filled, self.prefix = end, self.prefix or end
            return (k, v) if start == 0 else (self.k[layer, :, :, :end], self.v[layer, :, :, :end])
        return write

    def mask(self):
        """(B * W, 1, 1, S) true where the next token may look. None for a prefix, which is causal."""
        if self.filled == 0 or not self.is_ragged:
            return None
        slot = torch.arange(self.filled + 1, device=self.k.device)
        valid = (slot < self.lengths[:, None]) | (slot >= self.prefix)
        return valid[:, None, None]

    def reorder(self, rows):
        """Beam i goes on from the generated tokens of beam rows[i]. Beams of one clip share their prefix."""
        generated = slice(self.prefix, self.filled)
        for store in (self.k, self.v):
            store[:, :, :, generated] = store[:, rows, :, generated]


@torch.no_grad()
def generate(llm, prefixes, eos, beam=1, max_tokens=32):
    """Continue `prefixes` (B tensors (T_b, D)) -> B pairs (token ids, mean log-probability per token).

    Beam search; a width of 1 is greedy decoding. <eos> is scored but not returned. A hypothesis that has
    ended waits and adds 0 to its score. The highest mean log-probability wins (not in the paper)."""
    B, W, V = len(prefixes), beam, llm.config.vocab_size
    device = prefixes[0].device
    clip = torch.arange(B, device=device)
    lengths = torch.tensor([len(prefix) for prefix in prefixes], device=device)
    x = pad_sequence(prefixes, batch_first=True)
    cache = KVCache(llm.config, lengths, x.shape[1] + max_tokens, x, W)
    hidden = llm.hidden_states(x, valid_mask(lengths, x.shape[1]), cache=cache)
    last = hidden[clip, lengths - 1].repeat_interleave(W, 0)                 # (B * W, D)
    scores = torch.full((B, W), -torch.inf, device=device)
    scores[:, 0] = 0                                     # at first all beams of a clip are the same
    tokens = torch.zeros(B * W, 0, dtype=torch.long, device=device)
    done = torch.zeros(B * W, dtype=torch.bool, device=device)
    wait = torch.full((V,), -torch.inf, device=device)
    wait[eos] = 0
    for step in range(max_tokens):
        logp = llm.logits(last).float().log_softmax(-1)
        logp = torch.where(done[:, None], wait, logp).view(B, W, V)
        scores, best = (scores[..., None] + logp).flatten(1).topk(W)         # (B, W) of W * V continuations
        parents = (clip[:, None] * W + best // V).flatten()                  # the beam that is continued
        chosen = (best % V).flatten()                                        # and its new token
        tokens = torch.cat([tokens[parents], chosen[:, None]], 1)
        done = done[parents] | (chosen == eos)
        if step == max_tokens - 1 or done.all():
            break
        if W > 1:
            cache.reorder(parents)
        positions = (cache.lengths + step)[:, None, None]                    # (B * W, 1, 1)
        x = llm.embed_tokens(chosen[:, None])                                # (B * W, 1, D)
        last = llm.hidden_states(x, positions=positions, cache=cache)[:, 0]
    n_tokens = (tokens != eos).sum(-1).view(B, W)
    means = scores / (n_tokens + done.view(B, W)).clamp(min=1)
    tokens = tokens.view(B, W, -1)
    answers = []
    for b, w in enumerate(means.argmax(-1).tolist()):
        ids = tokens[b, w, :n_tokens[b, w]].tolist()
        answers.append((ids, means[b, w].item()))
    return answers


def decode(model, encoded, rates, beam=1):
    """Encoded clips -> for each (token ids, mean log-probability, rates, number of prefix tokens)."""
    prefixes = model.prefix(encoded, rates)
    hypotheses = generate(model.llm, prefixes, model.config.eos, beam, model.config.max_tokens)
    return [(*hypothesis, rates, len(prefix)) for hypothesis, prefix in zip(hypotheses, prefixes)]


def trained_rates(task, config):
    """The sets of rates of a task that a checkpoint was trained at, from the coarsest to the finest."""
    def tokens_per_second(rates):
        return sum(TOKENS_PER_SECOND[stream] / rate for stream, rate in rates.items())
    return sorted(task_rates(task, config["rates"]), key=tokens_per_second)


def decoder_at(rate, task, config):
    """A function (model, encoded, beam=1) that decodes at `rate`; `config` is a checkpoint's.

    rate: '4'; '4:2' for audio:video; also one that was never trained; None: the finest trained rate; 'auto':
    see extras/auto.py. ValueError says what is wrong."""
    if rate == "auto":
        from extras.auto import auto_decoder
        return auto_decoder(task, config)
    rate_sets = trained_rates(task, config)[-1:] if rate is None else task_rates(task, parse_rates(rate))
    if len(rate_sets) > 1:
        raise ValueError(f"--rate {rate!r}: a clip is read at one rate, like 4 or 4:2, or at auto, or at all")
    return partial(decode, rates=rate_sets[0])


# --- transcribe a clip ------------------------------------------------------------------------------------

@lru_cache(maxsize=1)
def load(ckpt, verify=False, **paths):
    """A checkpoint folder, and the paths of its real parts (llm, audio, video) -> model, config, tokenizer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paths = {part: path for part, path in paths.items() if path}
    model, config = load_model(ckpt, paths, verify, device)
    return model, config, data.load_tokenizer(config["paths"].get("llm", ckpt))


def choose_task(clip, model, task=None):
    """`task` if clip and model have its streams; None: the task with all streams that both have."""
    common = [stream for stream in model.encoders if stream in clip.streams]
    if task is None and common:
        return next(name for name, streams in TASKS.items() if set(streams) == set(common))
    if task is None or not set(TASKS[task]) <= set(common):
        needs = f"task {task} needs {' and '.join(TASKS[task])}" if task else (
            f"the model reads {' and '.join(model.encoders)}")
        raise ClipError(f"{shown(clip.name)}: the clip has {' and '.join(clip.streams)} only, and {needs}")
    return task


@torch.no_grad()
def transcribe(path, ckpt="out", rate=None, task=None, beam=1, box=None, on_segment=None, **parts):
    """Transcribe the clip at `path` -> a dict of clip, text, task, audio_rate, video_rate, tokens (read by the
    LLM before the first word), duration (s), seconds (spent), logprob (mean per output token) and segments.

    A segment has start, end, text and the like for one piece; `on_segment` is called with each. rate: see
    decoder_at. box: see real/mouth.py. parts: see load. Raises ClipError for a clip that cannot be read,
    ValueError for a bad rate, CheckpointError or WeightsError for a bad checkpoint."""
    model, config, tokenizer = load(str(ckpt), **parts)
    began = time.perf_counter()
    segments, logprobs = [], []
    source = media.probe(path)
    streams = TASKS[task] if task else tuple(model.encoders)
    longest = min(media.MAX_SECONDS, 1.1 * config.get("longest", media.MAX_SECONDS) + 0.5)
    sizes = reading(model.config.audio, model.config.video)
    pieces = read_pieces(source, longest, streams=streams, box=box, **sizes)
    short = source.seconds < PIECES * longest
    with tqdm(desc="transcribing", total=round(source.seconds), unit=" s", leave=False, disable=short) as progress:
        while group := list(islice(pieces, PIECES)):
            starts, clips = zip(*group)
            task = choose_task(clips[0], model, task)
            encoded = model.encode(data.to_device(data.batch(clips, TASKS[task]), model.device))
            answers = decoder_at(rate, task, config)(model, encoded, beam=beam)
            for start, clip, (ids, logprob, rates, n_tokens) in zip(starts, clips, answers):
                segments.append({
                    "start": round(start, 2),
                    "end": round(start + clip.duration, 2),
                    "text": data.normalize(tokenizer.decode(ids)),
                    "audio_rate": rates.get("audio"),
                    "video_rate": rates.get("video"),
                    "tokens": n_tokens,
                    "logprob": round(logprob, 4)})
                logprobs += [logprob] * (len(ids) + 1)
                if on_segment:
                    on_segment(segments[-1])
            progress.update(round(segments[-1]["end"]) - progress.n)

    def common(key):
        values = {segment[key] for segment in segments}
        return values.pop() if len(values) == 1 else "auto"

    return {
        "clip": str(path),
        "text": " ".join(segment["text"] for segment in segments if segment["text"]),
        "task": task,
        "audio_rate": common("audio_rate"),
        "video_rate": common("video_rate"),
        "tokens": sum(segment["tokens"] for segment in segments),
        "duration": segments[-1]["end"],
        "seconds": round(time.perf_counter() - began, 3),
        "logprob": round(sum(logprobs) / len(logprobs), 4),
        "segments": segments}


# --- measure many clips -----------------------------------------------------------------------------------

def decode_all(model, clips, plan, snrs, tokenizer, beam=1):
    """Decode all clips, clean and in babble -> {(plan key, snr): [(reference, hypothesis, logprob, tokens)]}.

    plan: {key: (task, decoder)}, see decoder_at. Sound is encoded once per noise and lips once, for all tasks
    and rates. Lips hear no noise, so vsr is decoded clean only. The order of clips is the same in all lists."""
    voices = [clip for clip in clips if "audio" in clip.streams]
    clips = sorted(clips, key=lambda clip: (clip.streams, clip.duration))
    used = data.task_streams(task for task, _ in plan.values())
    size = max(1, TEST_BATCH // beam)
    chunks = []
    for _, group in groupby(clips, lambda clip: clip.streams):
        while chunk := list(islice(group, size)):
            chunks.append(chunk)

    def decode_chunk(chunk):
        results, encoded = {}, {}
        for snr in snrs if "audio" in used else [None]:
            noisy = [data.in_babble(clip, snr, voices) for clip in chunk]
            fresh = [s for s in chunk[0].streams if s in used and (s == "audio" or s not in encoded)]
            encoded |= model.encode(data.to_device(data.batch(noisy, fresh), model.device))
            for key, (task, decoder) in plan.items():
                if set(TASKS[task]) <= set(encoded) and (snr is None or "audio" in TASKS[task]):
                    answers = decoder(model, {s: encoded[s] for s in TASKS[task]}, beam=beam)
                    results[key, snr] = [(clip.text, data.normalize(tokenizer.decode(ids)), logprob, tokens)
                                         for clip, (ids, logprob, _, tokens) in zip(chunk, answers)]
        return results

    model.eval()
    merged = {}
    with ThreadPoolExecutor(2) as workers:      # two chunks at a time: decoding is many small steps
        for results in tqdm(workers.map(decode_chunk, chunks), "test", len(chunks), leave=False):
            for key, rows in results.items():
                merged.setdefault(key, []).extend(rows)
    return merged


def fixed_plan(tasks, pairs):
    """The plan for every task at each of its rates: {(task, audio rate, video rate): (task, decoder)}."""
    return {(task, rates.get("audio"), rates.get("video")): (task, partial(decode, rates=rates))
            for task in tasks for rates in task_rates(task, pairs)}


def evaluate(model, clips, plan, snrs, tokenizer, beam=1):
    """Corpus WER (jiwer, after data.normalize) by task, rate and noise -> rows of metrics.json.

    plan: {(task, audio rate, video rate): (task, decoder)}."""
    rows = []
    for ((task, audio, video), snr), answers in decode_all(model, clips, plan, snrs, tokenizer, beam).items():
        references, hypotheses, _, tokens = map(list, zip(*answers))
        rows.append({
            "task": task,
            "audio_rate": audio,
            "video_rate": video,
            "snr_db": snr,
            "wer": jiwer.wer(references, hypotheses),
            "words": sum(len(reference.split()) for reference in references),
            "clips": len(references),
            "tokens": sum(tokens) / len(tokens),
            "split": "test"})
    order, noises = list(plan), list(snrs)
    return sorted(rows, key=lambda row: (
        list(TASKS).index(row["task"]), noises.index(row["snr_db"]),
        order.index((row["task"], row["audio_rate"], row["video_rate"]))))


# --- the command line -------------------------------------------------------------------------------------

def parse_args(argv):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("clips", nargs="*", metavar="CLIP", help="media files (default: those in CKPT/samples)")
    add("--ckpt", default="out", help="folder that train.py wrote (default %(default)s)")
    add("--rate", help="compression rate: '4', or '4:2' for audio:video, also one that was never trained; auto: "
                       "coarse, and finer where the model is unsure; all: every trained rate (default: the finest)")
    add("--task", choices=TASKS, help="which streams to use (default: all that the clip has)")
    add("--beam", type=int, default=1, help="beam width; 1 is greedy (default %(default)s)")
    add("--json", action="store_true", help="print a JSON object per line instead of the text")
    add("--srt", metavar="FILE", help="write subtitles of the clip")
    add("--box", metavar="X,Y,W,H", help="where the mouth is (default: small square pictures are mouths; in others "
                                         "it is searched, which needs requirements-face.txt)")
    add("--show-crop", metavar="PNG", help="write a picture of the mouths that are read")
    for part, flag in FLAGS.items():
        add(flag, dest=part, metavar="PATH", help=f"where the checkpoint's real {part} part is now")
    add("--verify", action="store_true", help="compare every byte of the real parts with those of training")
    args = parser.parse_args(argv)
    if len(args.clips) != 1 and (args.srt or args.show_crop):
        parser.error("--srt and --show-crop are for one clip")
    return args


def prepare(args, parts):
    """Check the arguments against the checkpoint before any clip is read -> the clips."""
    if args.beam < 1:
        raise ValueError(f"--beam must be 1 or more, not {args.beam}")
    args.box = args.box and mouth.parse_box(args.box)
    model, config, _ = load(args.ckpt, **parts)
    if args.task and not set(TASKS[args.task]) <= set(model.encoders):
        streams = " and ".join(model.encoders)
        raise ValueError(f"--task {args.task}: the model in {args.ckpt} reads {streams} only")
    if args.rate != "all":
        decoder_at(args.rate, args.task or config["tasks"][0], config)
    samples = sorted(Path(args.ckpt, "samples").glob("*"))
    clips = args.clips or [path for path in samples if path.suffix.lower() in media.SUFFIXES]
    if not clips:
        raise FileNotFoundError(f"{args.ckpt}/samples: no clips there; name the clips to transcribe")
    return clips


def transcribe_and_print(path, args, options):
    """One clip from the command line: its text or JSON, and the files that were asked for."""
    if args.show_crop:
        from extras.sheet import write_sheet
        write_sheet(media.select_streams(media.probe(path), ("video",)), args.show_crop, args.box)
    if args.rate == "all":
        from extras.every_rate import print_every_rate
        return print_every_rate(path, args.json, **options)
    piecewise = sys.stdout.isatty() and not args.json
    show = (lambda segment: tqdm.write(segment["text"])) if piecewise else None
    result = transcribe(path, rate=args.rate, on_segment=show, **options)
    if not piecewise:
        print(json.dumps(result) if args.json else result["text"], flush=True)
    if args.srt:
        write_srt(args.srt, result["segments"])


def main(argv=None):
    args = parse_args(argv)
    parts = {"verify": args.verify} | {part: getattr(args, part) for part in FLAGS}
    try:
        clips = prepare(args, parts)
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    options = {"ckpt": args.ckpt, "task": args.task, "beam": args.beam, "box": args.box, **parts}
    failed = 0
    for path in clips:
        try:
            transcribe_and_print(path, args, options)
        except (ClipError, OSError) as error:
            print(f"sample.py: {error}", file=sys.stderr)
            failed += 1
    return 2 if failed == len(clips) else int(failed > 0)


if __name__ == "__main__":
    run_script(main)
