"""Decode: transcribe clips with a trained model, and measure its word error rate.

    python sample.py                              the three unseen clips that train.py wrote
    python sample.py clip.mp4 --rate 8 --json     your own clip, with fewer tokens for the LLM to read
    python sample.py talk.mp4 --srt talk.srt      a long clip, with subtitles

Each clip gives its text on stdout, or a line on stderr if it cannot be read. The exit code is 0; 1 if
some clips failed; 2 if all failed. A clip much longer than the training clips is cut at pauses, and the texts
of its pieces are joined. From Python: `sample.transcribe("clip.mp4")`.

Axes: B batch, T time, D width, V vocabulary, W beams, S slots of the cache, H heads.
"""
from real.script import run_script  # before torch: Ctrl-C then ends quietly at any time
import json
import operator
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import TASKS, TOKENS_PER_SECOND, ClipError, batch, in_babble, normalize
from data import MAX_SECONDS, parse_rates, task_rates, task_streams, to_device
from real import media
from real.checkpoint import FLAGS, load_for_use, reading
from real.clips import choose_task, groups_of, read_pieces
from real.files import ERRORS
from real.options import check_sample_options, parse_sample_options
from real.report import error_rates, write_srt
from real.run import over_processes

TEST_BATCH = 50     # hypotheses that are decoded together in a test
TEST_SECONDS = 300  # seconds of clips that are encoded together in a test
PIECES = 8          # pieces of a long clip that are decoded together


# --- decoding ---------------------------------------------------------------------------------------------
class KVCache:
    """Keys and values of all layers, two tensors (layers, B * W, kv heads, S, D/H).

    The prefix is computed once per clip and copied to its W beams. Generated tokens of all beams start at the
    same slot, after the longest prefix. Slots behind a shorter prefix are empty. `mask` hides these slots."""
    def __init__(self, config, lengths, slots, like, beam=1):
        shape = (config.n_layers, len(lengths) * beam, config.n_kv_heads, slots, config.head_dim)
        self.k = like.new_zeros(shape)
        self.v = like.new_zeros(shape)
        self.lengths, self.beam = lengths.repeat_interleave(beam), beam     # of the prefixes
        self.is_ragged = bool((lengths != lengths[0]).any())
        self.filled = self.prefix = 0               # slots in use, and how many of them prefixes use

    def writer(self, layer):
        """The function that one layer calls with new k and v (B or B * W, kv heads, T, D/H)."""
        def write(k, v):
            start, end = self.filled, self.filled + k.shape[2]
            self.k[layer, :, :, start:end] = k if start else k.repeat_interleave(self.beam, 0)
            self.v[layer, :, :, start:end] = v if start else v.repeat_interleave(self.beam, 0)
            if layer == len(self.k) - 1:            # the last layer has stored the new tokens
                self.filled, self.prefix = end, self.prefix or end
            if start == 0:
                return k, v
            return self.k[layer, :, :, :end], self.v[layer, :, :, :end]
        return write

    def mask(self):
        """(B * W, 1, 1, S) true where the next token may look. None for a prefix, or if no slot is empty."""
        if self.filled == 0 or not self.is_ragged:
            return None
        slot = torch.arange(self.filled + 1, device=self.k.device)
        valid = (slot < self.lengths[:, None]) | (slot >= self.prefix)
        return valid[:, None, None]

    def reorder(self, rows):
        """Beam i goes on from the generated tokens of beam rows[i]. Beams of one clip share their prefix."""
        generated = slice(self.prefix, self.filled)
        for stored in (self.k, self.v):
            stored[:, :, :, generated] = stored[:, rows, :, generated]


@torch.no_grad()
def generate(llm, prefixes, eos, beam=1, max_tokens=32):
    """Continue `prefixes` (B tensors (T_b, D)) -> B pairs (token ids, mean log-probability per token).

    Beam search; a width of 1 is greedy decoding. <eos> is scored but not returned. Totals of
    log-probability rank beams. An ended beam keeps its total. The best mean wins (not in the paper)."""
    B, W, V = len(prefixes), beam, llm.config.vocab_size
    device = prefixes[0].device
    clip = torch.arange(B, device=device)
    lengths = torch.tensor([len(prefix) for prefix in prefixes], device=device)
    x = pad_sequence(prefixes, batch_first=True)
    cache = KVCache(llm.config, lengths, x.shape[1] + max_tokens, x, W)
    hidden = llm.hidden_states(x, cache=cache)
    last = hidden[clip, lengths - 1].repeat_interleave(W, 0)                 # (B * W, D)
    scores = torch.full((B, W), -torch.inf, device=device)
    scores[:, 0] = 0                                     # at first all beams of a clip are the same
    tokens = torch.zeros(B * W, 0, dtype=torch.long, device=device)
    done = torch.zeros(B * W, dtype=torch.bool, device=device)
    ended = torch.full((V,), -torch.inf, device=device)
    ended[eos] = 0                                       # an ended beam repeats <eos>, at no cost
    for step in range(max_tokens):
        logp = llm.logits(last).float().log_softmax(-1)
        logp = torch.where(done[:, None], ended, logp).view(B, W, V)
        continued = scores[..., None] + logp
        scores, best = continued.flatten(1).topk(W)                          # (B, W) of W * V continuations
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


@torch.no_grad()
def decode(model, encoded, rates, beam=1):
    """Encoded clips -> for each (token ids, mean log-probability, rates, number of prefix tokens)."""
    prefixes = model.prefix(encoded, rates)
    config = model.config
    hypotheses = generate(model.llm, prefixes, config.eos, beam, config.max_tokens)
    return [(ids, logprob, rates, len(prefix)) for (ids, logprob), prefix in zip(hypotheses, prefixes)]


def decoder_at(rate, task, saved):
    """A function (model, encoded, beam=1) that decodes at `rate`. saved: the dict of config.json.

    rate: '4'; '4:2' for audio:video; also one that was never trained; None: the finest trained rate; 'auto':
    see extras/auto.py. ValueError says what is wrong."""
    if rate == "auto":
        from extras.auto import auto_decoder
        return auto_decoder(task, saved)
    if rate is None:
        return partial(decode, rates=trained_rates(task, saved)[-1])
    rates, *more = task_rates(task, parse_rates(str(rate)))
    if more:
        raise ValueError(f"--rate {rate!r}: a clip is read at one rate, like 4 or 4:2, or at auto, or at all")
    return partial(decode, rates=rates)


def trained_rates(task, saved):
    """The sets of rates of a task that a checkpoint was trained at, from the coarsest to the finest."""
    def tokens_per_second(rates):
        return sum(TOKENS_PER_SECOND[stream] / rate for stream, rate in rates.items())
    return sorted(task_rates(task, saved["rates"]), key=tokens_per_second)


# --- transcribe a clip ------------------------------------------------------------------------------------
@torch.no_grad()
def transcribe(path, ckpt="out", rate=None, task=None, beam=1, box=None, on_segment=None, **loading):
    """Transcribe the clip at `path` -> the dict that --json prints. tokens: read by the LLM before the first
    word. duration: the end of the last piece, in s. seconds: computing time. logprob: mean of output tokens.
    segments: a dict for each piece; `on_segment` is called with each. rate: see decoder_at. box: see
    real/mouth.py. loading: see load_for_use. Raises ClipError, ValueError, CheckpointError, WeightsError."""
    model, saved, tokenizer = load_for_use(str(ckpt), **loading)
    began, segments, n_ids = time.perf_counter(), [], []
    source = media.probe(path)
    longest = min(1.1 * saved.get("longest", MAX_SECONDS) + 0.5, MAX_SECONDS)    # in seconds
    task = choose_task(path, source.streams, model, task, saved["tasks"])
    decoders = {TASKS[task]: decoder_at(rate, task, saved)}
    how = reading(model.config.audio, model.config.video)
    how |= {"levels": saved.get("levels"), "voice_alone": "asr" in saved["tasks"]}
    pieces = read_pieces(source, longest, streams=TASKS[task], box=box, **how)
    bar = {"desc": "transcribing", "unit": " s", "leave": False, "disable": source.seconds < PIECES * longest}
    with tqdm(total=round(source.seconds), **bar) as progress:
        for group in groups_of(pieces, PIECES, lambda piece: piece[1].streams):
            starts, clips = zip(*group)
            streams = clips[0].streams                                       # a silent piece lacks one
            if streams not in decoders:
                own_task = choose_task(path, streams, model, None, saved["tasks"])
                has_threshold = rate != "auto" or own_task in saved["auto"]
                decoders[streams] = decoder_at(rate if has_threshold else None, own_task, saved)
            inputs = to_device(batch(clips, streams), model.device)
            answers = decoders[streams](model, model.encode(inputs), beam=beam)
            for start, clip, (ids, logprob, rates, n_tokens) in zip(starts, clips, answers):
                n_ids.append(len(ids) + 1)                                   # with <eos>
                segments.append({
                    "start": round(start, 2),
                    "end": round(start + clip.duration, 2),
                    "text": normalize(tokenizer.decode(ids)),
                    "audio_rate": rates.get("audio"),
                    "video_rate": rates.get("video"),
                    "tokens": n_tokens,
                    "logprob": round(logprob, 4)})
                if on_segment:
                    on_segment(segments[-1])
            progress.update(round(segments[-1]["end"]) - progress.n)

    columns = {key: [segment[key] for segment in segments] for key in segments[0]}
    used = {key: set(columns[key]) - {None} for key in ("audio_rate", "video_rate")}
    whole = {key: "auto" if len(rates) > 1 else next(iter(rates), None) for key, rates in used.items()}
    logprob = sum(map(operator.mul, columns["logprob"], n_ids)) / sum(n_ids)
    return {
        "clip": str(path),
        "text": " ".join(filter(None, columns["text"])),
        "task": task,
        **whole,
        "tokens": sum(columns["tokens"]),
        "duration": segments[-1]["end"],
        "seconds": round(time.perf_counter() - began, 3),
        "logprob": round(logprob, 4),
        "segments": segments}


# --- measure many clips -----------------------------------------------------------------------------------
def fixed_plan(tasks, pairs):
    """The plan for every task at each of its rates: {(task, audio rate, video rate): (task, decoder)}."""
    plan = {}
    for task in tasks:
        for rates in task_rates(task, pairs):
            plan[task, rates.get("audio"), rates.get("video")] = task, partial(decode, rates=rates)
    return plan


def decode_all(model, clips, plan, snrs, tokenizer, beam=1):
    """Decode all clips, clean and in babble -> {(plan key, snr): [(reference, hypothesis, logprob, tokens)]}.

    plan: {key: (task, decoder)}, see fixed_plan. Sound is encoded once per noise, lips once, for all tasks
    and rates. Lips hear no noise: vsr is decoded clean only. The order of clips is the same in all lists."""
    voices = [clip for clip in clips if "audio" in clip.streams]
    used = task_streams(task for task, _ in plan.values())
    clips = sorted(clips, key=lambda clip: (clip.streams, clip.duration))
    longest = max(clip.duration for clip in clips)
    size = min(TEST_BATCH / beam, TEST_SECONDS / longest)
    chunks = list(groups_of(clips, max(1, int(size)), lambda clip: clip.streams))

    def decode_chunk(chunk):
        results, encoded = {}, {}
        for snr in snrs if "audio" in used else [None]:
            noisy = [in_babble(clip, snr, voices) for clip in chunk]
            changed = {"audio"} if encoded else used
            fresh = [stream for stream in chunk[0].streams if stream in changed]
            encoded |= model.encode(to_device(batch(noisy, fresh), model.device))
            for key, (task, decoder) in plan.items():
                streams = TASKS[task]
                if set(streams) <= set(encoded) and (snr is None or "audio" in streams):
                    answers = decoder(model, {stream: encoded[stream] for stream in streams}, beam=beam)
                    rows = results[key, snr] = []
                    for clip, (ids, logprob, _, tokens) in zip(chunk, answers):
                        text = normalize(tokenizer.decode(ids))
                        rows.append((clip.text, text, logprob, tokens))
        return results

    def decode_share(chunks):
        with ThreadPoolExecutor(2) as workers:      # two chunks at a time: decoding is many small steps
            yield from tqdm(workers.map(decode_chunk, chunks), "test", len(chunks), leave=False)

    model.eval()
    merged = {}
    for results in over_processes(decode_share, chunks):
        for key, rows in results.items():
            merged.setdefault(key, []).extend(rows)
    return merged


def evaluate(model, clips, plan, snrs, tokenizer, beam=1):
    """Error rates of the corpus (after data.normalize) by task, rate and noise -> rows of metrics.json.

    plan: {(task, audio rate, video rate): (task, decoder)}, see fixed_plan."""
    rows = []
    decoded = decode_all(model, clips, plan, snrs, tokenizer, beam)
    for task, snr, key in product(TASKS, snrs, plan):
        if key[0] == task and (key, snr) in decoded:
            references, hypotheses, _, tokens = map(list, zip(*decoded[key, snr]))
            rows.append({
                "task": task,
                "audio_rate": key[1],
                "video_rate": key[2],
                "snr_db": snr,
                **error_rates(references, hypotheses),
                "words": len(" ".join(references).split()),
                "clips": len(references),
                "tokens": sum(tokens) / len(tokens),
                "split": "test"})
    return rows


# --- the command line -------------------------------------------------------------------------------------
def transcribe_and_print(path, args, **options):
    """One clip from the command line: its text or JSON, and the files that were asked for."""
    if args.show_crop:
        from extras.sheet import write_sheet
        write_sheet(media.probe(path), args.show_crop, args.box)
    if args.rate == "all":
        from extras.every_rate import print_every_rate
        return print_every_rate(path, args.json, **options)
    piecewise = sys.stdout.isatty() and not args.json
    on_segment = (lambda segment: tqdm.write(segment["text"])) if piecewise else None
    result = transcribe(path, rate=args.rate, on_segment=on_segment, **options)
    if not piecewise:
        print(json.dumps(result) if args.json else result["text"], flush=True)
    if args.srt:
        write_srt(args.srt, result["segments"])


def main(argv=None):
    args = parse_sample_options(argv, __doc__)
    try:
        saved, clips = check_sample_options(args)
        if args.rate != "all":
            decoder_at(args.rate, args.task or saved["tasks"][0], saved)
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    names = "ckpt", "task", "beam", "box", "verify", "device", *FLAGS
    options = {name: getattr(args, name) for name in names}
    failed = 0
    for path in clips:
        try:
            transcribe_and_print(path, args, **options)
        except BrokenPipeError:
            raise
        except (ClipError, *ERRORS) as error:
            print(f"sample.py: {error}", file=sys.stderr)
            failed += 1
    return 2 if failed == len(clips) else int(failed > 0)


if __name__ == "__main__":
    run_script(main)
