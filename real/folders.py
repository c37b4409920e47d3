"""A folder of clips with their transcripts (real/layouts.py) -> training clips and test clips.

Where the folder names no split, or train or valid alone, a fifth of the talkers is held out for testing. Of one talker
a fifth of the clips is held out. Of a large folder the test clips and some training clips are read at the start. Their
voices make babble. The other training clips are read when they are drawn.
"""
import html
import os
import random
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import Clip, ClipError, drawn_clips, normalize
from real.clips import read_clip
from real.files import no_collector, note, shown
from real.layouts import TAG, Entry, recognise, transcript
from real.media import SOUND_SUFFIXES, clip_error

MAX_LETTERS = 50     # in a second of speech
MAX_READ = 5000      # a folder with more training clips is large
FIRST_READ = 100     # training clips of a large folder that are read at the start
MAX_MISSES = 1000    # clips that are drawn, one after another, in place of one
MAX_TEST = 1000      # test clips, about, where the split is ours


def entries(folder):
    """A folder -> (name of its layout, [layouts.Entry], words that count the unused files). Raises ClipError.

    An entry's split is train, valid or test."""
    folder = Path(folder)
    if not folder.is_dir():
        raise clip_error(folder, "a file; give its folder" if folder.exists() else "no such folder")
    layout, listed, passed_over = recognise(folder)
    if not listed:
        raise clip_error(folder, "no clips here, expected files like NAME.mp4 or NAME.flac with NAME.txt beside them, "
                                 "or a manifest.csv")
    words = ", ".join(f"{n} {suffix}" for suffix, n in sorted(passed_over.items()))
    named = [entry for entry in listed if entry.split]
    splits = {entry.split for entry in named}
    if splits & {"train", "test"}:                     # valid alone is no split: a folder Dev may be a talker's
        if len(named) < len(listed):
            note(f"{shown(folder)}: {len(listed) - len(named)} clips are in no split, beside {len(named)} that are; "
                 "they are not used")
        listed = named
    if len(splits) > 1 or "test" in splits:            # train alone, as in LibriSpeech's train-clean-100, is no split
        if "test" not in splits:
            note(f"{shown(folder)}: no clip is in its test split; those of its valid split take their place")
            listed = [replace(entry, split="test" if entry.split == "valid" else entry.split) for entry in listed]
        return layout, listed, words
    talkers = [unicodedata.normalize("NFC", entry.talker).casefold() for entry in listed]
    groups = talkers if len(set(talkers)) > 1 else [entry.path.stem for entry in listed]
    sizes = Counter(groups)
    shuffled = sorted(sizes, key=lambda group: (
        2 * sizes[group] > len(groups), zlib.crc32(group.encode(errors="surrogateescape")), group))   # the largest last
    n_test = min(len(shuffled) // 5, MAX_TEST * len(shuffled) // len(listed))
    test = set(shuffled[:max(1, n_test)])
    listed = [replace(entry, split="test" if group in test else "train", own_split=True)
              for entry, group in zip(listed, groups)]
    return layout, listed, words


class Unusable:
    """The clips of a folder that cannot be used. More than `max_bad` percent of its clips are an error."""

    def __init__(self, folder, n_clips, max_bad):
        self.folder, self.n_clips, self.max_bad = folder, n_clips, max_bad
        self.found = set()     # ids of Entries, because a table may list a clip twice

    def add(self, entry, error):
        """Note a clip that cannot be used. Raises ClipError if it is one too many."""
        note(f"left out: {error}")
        self.found.add(id(entry))
        if len(self.found) > self.max_bad / 100 * self.n_clips:
            raise clip_error(self.folder, f"{len(self.found)} of {self.n_clips} clips cannot be used so far, and no more "
                                          f"than --max-bad {self.max_bad:g} % may be; python data.py check lists them all")


@dataclass(frozen=True)
class Unread(Clip):
    """A training clip of a large folder. Its name and text are known, and its file is not opened before `read`."""
    entry: Entry | None = None
    reading: dict | None = None            # arguments of clips.read_pieces
    unusable: Unusable | None = None
    streams: tuple = ()                    # those that it may have
    duration = 0                           # not known

    def read(self):
        """-> Clip, or None if it cannot be used."""
        if id(self.entry) in self.unusable.found:
            return None
        clip = read_entry(self.entry, self.reading)
        return self.unusable.add(self.entry, clip) if isinstance(clip, ClipError) else clip


def stamp(clip):
    """The sizes and times of an Unread clip's files, as bytes: other files have others. Of other clips nothing."""
    try:
        paths = (clip.entry.path, clip.entry.sound) if isinstance(clip, Unread) else ()
        stats = [os.stat(path) for path in paths if path]
        return " ".join(f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats).encode()
    except OSError:                                                       # a file is missing
        return b""


def read_all(clips):
    """Clips -> the same, in order. Unread ones are read, several at a time; None stands for one that cannot be used."""
    with ThreadPoolExecutor() as readers:
        return list(readers.map(lambda clip: clip.read() if isinstance(clip, Unread) else clip, clips))


def read_drawn(clips, streams, size, seed, step):
    """The clips that data.drawn_clips draws for a step, read.

    Another clip, drawn at random, takes the place of one that cannot be used or has not all `streams`. So a step's
    clips are a function of the files, the seed and the step."""
    rng, chosen = random.Random(f"{seed} {step} instead"), read_all(drawn_clips(clips, size, seed, step))
    for i, clip in enumerate(chosen):
        for _ in range(MAX_MISSES):
            if clip is not None and set(streams) <= set(clip.streams):
                break
            [clip] = read_all([rng.choice(clips)])
        else:
            raise ClipError(f"{shown(clips[0].name)} and {len(clips) - 1:,} others: {MAX_MISSES:,} of them in a row lack "
                            f"{' or '.join(streams)}, or cannot be used; choose other --tasks")
        chosen[i] = clip
    return chosen


def read_entry(entry, reading=None, unusable=None):
    """Entry -> Clip, or a ClipError, which is returned, not raised. `reading`: arguments of clips.read_pieces.

    With `unusable` the Clip is an Unread, whose file is not opened yet. A sound file has no pictures."""
    try:
        text = normalize(TAG.sub(" ", html.unescape(transcript(entry))))
        if not text:
            raise clip_error(entry.path, "no words in its transcript, expected what is said")
        if unusable:
            possible = ("audio",) if os.path.splitext(entry.path)[1].lower() in SOUND_SUFFIXES else ("audio", "video")
            streams = tuple(filter((reading or {}).get("streams", possible).__contains__, possible))
            return Unread(str(entry.path), text, entry=entry, reading=reading, unusable=unusable, streams=streams)
        clip = read_clip(entry.path, text=text, span=entry.span, sound=entry.sound, **(reading or {}))
        if len(text) > MAX_LETTERS * (1 + clip.duration):
            raise clip_error(entry.path, f"a transcript of {len(text):,} letters for {clip.duration:.1f} s; "
                                         "is it another clip's?")
        return clip
    except ClipError as error:
        return error
    except OSError as error:
        return clip_error(entry.path, error.strerror)


def read_entries(listed, reading=None):
    """Yield (Entry, its Clip or ClipError), in order. Several clips are read at a time."""
    with ThreadPoolExecutor() as readers:
        clips = readers.map(lambda entry: read_entry(entry, reading), listed)
        try:
            yield from zip(listed, tqdm(clips, "reading clips", len(listed), leave=False))
        finally:
            readers.shutdown(wait=False, cancel_futures=True)      # an error does not wait for all clips


@no_collector()
def folder_clips(folder, reading=None, max_bad=1., disjoint=False, splits=("train", "test")):
    """A folder -> {"train": [Clip or Unread], "test": [Clip]}, or one of them. `reading`: of clips.read_pieces.
    Raises ClipError.

    A clip that cannot be used is left out, with a note. More than `max_bad` percent of such clips are an error.
    If this program made the splits, or with `disjoint`, training clips with a test clip's sentence are left out."""
    layout, listed, passed_over = entries(folder)
    counts, own_split = Counter(entry.split for entry in listed), listed[0].own_split
    for split in splits:
        if not counts[split] and not own_split:        # said before any clip is read
            there = ", ".join(f"{n} in {name}" for name, n in sorted(counts.items()))
            raise clip_error(folder, f"no clip is in its {split} split ({there}); add some, or name other splits")
    if own_split and "train" not in splits:
        note(f"{shown(folder)}: names no test split, so {counts['test']} of its {len(listed)} clips are tested; "
             "to test all, put them into a folder test")
    n_listed, listed = len(listed), [entry for entry in listed if entry.split in splits]
    if passed_over:
        note(f"passed over in {shown(folder)} ({layout}): {passed_over}")
    clips, unusable = {split: [] for split in splits}, Unusable(folder, n_listed, max_bad)
    now, later = listed, []
    training = [entry for entry in listed if entry.split == "train"]
    if len(training) > MAX_READ:
        every = len(training) // FIRST_READ
        now = [entry for entry in listed if entry.split == "test"] + training[::every]
        later = [entry for i, entry in enumerate(training) if i % every]
        note(f"{shown(folder)}: {len(later):,} of {len(training):,} training clips are read while training")
    unread = ((entry, read_entry(entry, reading, unusable)) for entry in later)
    for entry, clip in chain(read_entries(now, reading), unread):
        if isinstance(clip, ClipError):
            unusable.add(entry, clip)
        else:
            clips[entry.split].append(clip)
    test_sentences, training = {clip.text for clip in clips["test"]}, clips.get("train", [])
    fresh = [clip for clip in training if clip.text not in test_sentences]
    if n_repeated := len(training) - len(fresh):
        clip_count = f"{n_repeated} training clips of {shown(folder)} whose sentence is in its test split"
        if disjoint or own_split:
            clips["train"] = fresh
            note(f"left out: {clip_count}")
        else:
            note(f"used, as the folder names its splits: {clip_count}; --disjoint leaves them out")
    for split, usable in clips.items():
        if not usable:
            n_clips = sum(map(len, clips.values()))
            raise clip_error(folder, f"no usable clip is in its {split} split, of {n_clips} in all; "
                                     "add clips, or name their splits")
    return clips


def check(folder, faces=False):
    """Print what is in a folder, and each clip that cannot be used. Returns an exit code: 1 if there is such a clip.

    Faces are looked for only if `faces` says so: that is slow."""
    good, bad = [], []
    layout, listed, passed_over = entries(folder)
    print(f"layout: {layout}" + f"; passed over: {passed_over}" * bool(passed_over))
    for entry, clip in read_entries(listed, {"box": None if faces else "all"}):
        if isinstance(clip, ClipError):
            bad.append(clip)
        else:  # the clip itself is dropped, or a large folder would fill memory
            streams = " and ".join(clip.streams)
            good.append((entry.split, entry.talker, clip.text.split(), clip.duration, streams))
    for error in bad:
        print(f"bad: {error}")
    splits, talkers, texts, seconds, streams = zip(*good) if good else [()] * 5
    counts = "".join(f", {n} {split}" for split, n in sorted(Counter(splits).items()))
    print(f"{len(good)} clips can be used{counts}; {len(bad)} cannot")
    if not good:
        return 1
    train, test = (Counter(word for split, text in zip(splits, texts) if split == name for word in text)
                   for name in ("train", "test"))
    print(f"{sum(seconds) / 3600:.2f} hours; seconds: {min(seconds):.1f} the shortest, "
          f"{np.median(seconds):.1f} the median, {max(seconds):.1f} the longest")
    print("streams: " + ", ".join(f"{n} {kind}" for kind, n in Counter(streams).most_common()))
    print(f"talkers: {len(set(talkers))}; words: {train.total():,} train ({len(train):,} different), "
          f"{test.total():,} test ({len(test):,} different)")
    if unseen := sorted(test.keys() - train.keys()):
        some = ", ".join(unseen[:10]) + " ..." * (len(unseen) > 10)
        print(f"{len(unseen):,} words of the test split are not in training: {some}")
    print("commonest: " + ", ".join(f"{word} {n}" for word, n in (train + test).most_common(10)))
    return int(bool(bad))
