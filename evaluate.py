"""Measure a model: the word error rate of many clips at every rate, in every noise; and from that the threshold of --rate auto."""
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import jiwer
import numpy as np
from tqdm import tqdm

import data
from sample import TASKS, decode, ladder, task_rates, task_streams

TEST_BATCH = 50                 # hypotheses decoded together
CALIBRATION_SNRS = [None, 0.]
LOSS = 0.002                    # of all words, what --rate auto may cost; not in the paper


def parse_snrs(text):
    """'clean,0,-5' -> [None, 0.0, -5.0], each once, clean always and first; ValueError says what is wrong."""
    try:
        snrs = [None if part == "clean" else float(part) for part in text.split(",")]
        if not all(snr is None or math.isfinite(snr) for snr in snrs):
            raise ValueError
    except ValueError:
        raise ValueError(f"--snr {text!r}: expected 'clean' or dB, like clean,0,-5") from None
    return list(dict.fromkeys([None, *snrs]))


def answers(model, clips, plan, snrs, tokenizer, device, beam=1):
    """Decode all clips, clean and in babble, by a plan of {(task, rates): steps of `decode`} ->
    {(task, rates, snr): [(reference, hypothesis, mean log-probability, tokens read)]}, the clips in the same order everywhere.

    Sound is encoded once for each noise and lips once, for all tasks and rates; lips hear no noise, so vsr is tested clean."""
    voices = [clip for clip in clips if "audio" in clip.streams]
    clips = sorted(clips, key=lambda clip: (clip.streams, clip.duration))
    groups = [list(group) for _, group in groupby(clips, lambda clip: clip.streams)]
    wanted = task_streams(task for task, _ in plan)
    snrs = snrs if "audio" in wanted else [None]
    size = max(1, TEST_BATCH // beam)
    chunks = [group[i:i + size] for group in groups for i in range(0, len(group), size)]
    model.eval()

    def test(chunk):
        streams, encoded, told = chunk[0].streams, {}, {}
        for snr in snrs:
            noisy = [data.in_babble(clip, snr, voices) for clip in chunk]
            heard = [s for s in streams if s in wanted and (s == "audio" or s not in encoded)]
            encoded |= model.encode(data.to(device, data.batch(noisy, heard)))
            for (task, rates), steps in plan.items():
                if set(TASKS[task]) <= set(streams) and (snr is None or "audio" in TASKS[task]):
                    told[task, rates, snr] = [
                        (clip.text, data.normalize(tokenizer.decode(ids)), logprob, tokens) for clip, (ids, logprob, _, tokens)
                        in zip(chunk, decode(model, {s: encoded[s] for s in TASKS[task]}, steps, beam))]
        return told

    told = {}
    with ThreadPoolExecutor(2) as testers:
        for part in tqdm(testers.map(test, chunks), "test", len(chunks), leave=False):
            for key, of_chunk in part.items():
                told.setdefault(key, []).extend(of_chunk)
    return told


def fixed_rates(tasks, pairs):
    """The plan of `answers` that decodes at every one of the task's rates: {(task, (audio rate, video rate)): steps}."""
    return {(task, (rates.get("audio"), rates.get("video"))): [(rates, -math.inf)] for task in tasks for rates in task_rates(task, pairs)}


def evaluate(model, clips, plan, snrs, tokenizer, device, beam=1):
    """Corpus-level WER (jiwer, after data.normalize) by task, rate and noise -> metrics rows; see `answers`."""
    rows = []
    for (task, (audio, video), snr), told in answers(model, clips, plan, snrs, tokenizer, device, beam).items():
        references, hypotheses, _, tokens = map(list, zip(*told))
        rows.append({"task": task, "audio_rate": audio, "video_rate": video, "snr_db": snr, "wer": jiwer.wer(references, hypotheses),
                     "words": sum(len(r.split()) for r in references), "clips": len(references), "tokens": sum(tokens) / len(told), "split": "test"})
    order = list(plan)
    return sorted(rows, key=lambda r: (list(TASKS).index(r["task"]), -99 if r["snr_db"] is None else -r["snr_db"],
                                       order.index((r["task"], (r["audio_rate"], r["video_rate"])))))


def table(rows):
    """The metrics rows as a text table: a line for each task and noise, a column for each audio:video rate. Beside the WER at
    'auto' stands how many tokens it read, as a share of those at the finest rate."""
    lines, widths = {}, {}
    for row in sorted(rows, key=lambda row: row["audio_rate"] == "auto"):
        column = ":".join(str(r) for r in (row["audio_rate"], row["video_rate"]) if r)
        noise = "clean" if row["snr_db"] is None else f"{row['snr_db']:g} dB"
        lines.setdefault((row["task"], noise), {})[column] = row
        widths[column] = 14 if column == "auto" else 7

    def cell(line, column):
        if column not in line:
            return ""
        share = f" ({100 * line[column]['tokens'] / max(row['tokens'] for name, row in line.items() if name != 'auto'):.0f}%)"
        return f"{100 * line[column]['wer']:.1f}{share if column == 'auto' else ''}"

    return "\n".join([f"{'WER %':14}" + "".join(f"{column:>{width}}" for column, width in widths.items())]
                     + [f"{task:6}{noise:8}" + "".join(f"{cell(line, column):>{width}}" for column, width in widths.items())
                        for (task, noise), line in lines.items()])


# --- the threshold of --rate auto ------------------------------------------------------------------------------------

def calibrate(model, clips, tasks, pairs, tokenizer, device):
    """{task: the threshold of `sample.ladder`'s auto} (not in the paper). In each noise, the `clips` that are surer than it at the coarse
    rate lose by staying there at most LOSS of all words; of the noises' thresholds the highest is taken."""
    thresholds, voices = {}, [clip for clip in clips if "audio" in clip.streams]
    ladders = {task: ladder(task, {"rates": pairs, "auto": {task: 0}}, "auto") for task in tasks}
    plan = {(task, i): [(rates, -math.inf)] for task, steps in ladders.items() for i, (rates, _) in enumerate(steps)}
    found = answers(model, clips, plan, CALIBRATION_SNRS if len(voices) > 1 else [None], tokenizer, device)
    for task, snr in [(task, snr) for task, i, snr in found if i == 0]:
        coarse, fine = (found[task, i, snr] for i in (0, len(ladders[task]) - 1))
        surest = sorted(range(len(coarse)), key=lambda i: -coarse[i][2])
        lost = np.array([wrong_words(*coarse[i][:2]) - wrong_words(*fine[i][:2]) for i in surest]).cumsum()
        words = sum(len(reference.split()) for reference, *_ in coarse)
        left = np.count_nonzero(np.maximum.accumulate(lost) <= LOSS * words)  # the clips before the first loss too many
        threshold = coarse[surest[left - 1]][2] if left else 0.               # 0: all are in doubt
        thresholds[task] = max(threshold, thresholds.get(task, -math.inf))
    return thresholds


def wrong_words(reference, hypothesis):
    told = jiwer.process_words(reference, hypothesis)
    return told.substitutions + told.deletions + told.insertions
