"""`sample.py --rate auto`: decode at the coarsest rate, and again at a finer one if the model is unsure (not in the paper).

A clip is decoded again if the mean log-probability of its tokens is below a threshold. `calibrate` finds the threshold of
each task on validation clips; the checkpoint keeps it.
"""
import math
from functools import partial

import jiwer
import numpy as np

from data import ClipError
from extras.baselines import PerRate
from real.files import note
from sample import decode, decode_all, trained_rates

SNRS = [None, 0.]     # noises of the calibration
MAX_LOSS = 0.002      # share of all words that may be lost by decoding at the coarse rate only


def decode_ladder(model, encoded, ladder, beam=1):
    """Like sample.decode, for a ladder [(rates, threshold)]: clips below the threshold are decoded again at the next rates.

    The token counts of all passes are added up."""
    doubtful, answers = list(range(len(next(iter(encoded.values()))[1]))), {}
    for rates, threshold in ladder:
        subset = {stream: (x[doubtful], lengths[doubtful]) for stream, (x, lengths) in encoded.items()}
        for clip, (ids, logprob, _, n_tokens) in zip(doubtful, decode(model, subset, rates, beam)):
            earlier = answers[clip][3] if clip in answers else 0
            answers[clip] = ids, logprob, rates, earlier + n_tokens
        doubtful = [clip for clip in doubtful if answers[clip][1] < threshold]
        if not doubtful:
            break
    return [answers[clip] for clip in range(len(answers))]


def two_rates(task, saved):
    """The coarsest trained rates, and 3/2 of the finest: a third fewer tokens (half at a finest rate of 1)."""
    trained = trained_rates(task, saved)
    finer = {stream: min(math.ceil(1.5 * rate), trained[0][stream]) for stream, rate in trained[-1].items()}
    return trained[0], finer


def auto_decoder(task, saved):
    """A function (model, encoded, beam=1) that decodes as sample.decode does. saved: see auto_plan.

    Raises ClipError if the checkpoint has no threshold for the task."""
    threshold = saved.get("auto", {}).get(task)
    if threshold is None:
        raise ClipError(f"--rate auto: this checkpoint has no threshold for {task}; train it with --valid-every")
    coarse, fine = two_rates(task, saved)
    ladder = [(coarse, threshold), (fine, -math.inf)] if fine != coarse else [(coarse, -math.inf)]
    return partial(decode_ladder, ladder=ladder)


def auto_plan(tasks, pairs, saved):
    """The plan of sample.evaluate for `auto`. saved: the dict of config.json. pairs: the tested rates.

    The table compares auto's tokens with those at the trained rates. So without these in `pairs` the plan is empty."""
    if saved.get("auto") and not set(map(tuple, saved["rates"])) <= set(pairs):
        trained = ",".join(f"{audio}:{video}" for audio, video in saved["rates"])
        note(f"auto is tested only beside all trained rates: {trained}")
        return {}
    return {(task, "auto", None): (task, auto_decoder(task, saved)) for task in tasks if task in saved.get("auto", ())}


def wrong_words(reference, hypothesis):
    """Substitutions + deletions + insertions."""
    words = jiwer.process_words(reference, hypothesis)
    return words.substitutions + words.deletions + words.insertions


def calibrate(model, clips, tasks, pairs, tokenizer, beam=1):
    """{task: threshold}, from validation clips, for this width of the beam: wider ones have higher log-probabilities.

    For each noise: the lowest threshold such that clips above it lose at most MAX_LOSS of all words at the coarse rate.
    The threshold of a task is the highest over the noises."""
    if any(isinstance(module, PerRate) for module in model.modules()):
        return {}       # such a model has no rates between those that it was trained at
    plan = {(task, i): (task, partial(decode, rates=rates))
            for task in tasks for i, rates in enumerate(two_rates(task, {"rates": pairs}))}
    n_voices = sum("audio" in clip.streams for clip in clips)
    results = decode_all(model, clips, plan, SNRS if n_voices > 1 else [None], tokenizer, beam)
    thresholds = {}
    for (task, i), snr in results:
        if i == 0:
            coarse, fine = results[(task, 0), snr], results[(task, 1), snr]
            surest = sorted(range(len(coarse)), key=lambda clip: -coarse[clip][2])
            lost = np.cumsum([wrong_words(*coarse[clip][:2]) - wrong_words(*fine[clip][:2]) for clip in surest])
            n_words = sum(len(reference.split()) for reference, *_ in coarse)
            n_sure = np.count_nonzero(np.maximum.accumulate(lost) <= MAX_LOSS * n_words)
            threshold = coarse[surest[n_sure - 1]][2] if n_sure else 0.     # 0: every clip is decoded twice
            thresholds[task] = max(threshold, thresholds.get(task, -math.inf))
    return thresholds
