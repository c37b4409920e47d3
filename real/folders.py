"""A folder of clips with their transcripts -> training clips and test clips. A folder has one of these layouts:

    manifest.csv                     path,text[,split,talker]: paths relative to the folder; split: train or test
    NAME.mp4, NAME.txt               LRS2, LRS3 or your own: the text is the first line, after an optional `Text:`
    s1/NAME.mpg, align/NAME.align    GRID as downloaded: align/ in s1/ or beside it, or the files side by side

The splits are those of the manifest, or else the folders train (trainval, pretrain) and test. Without either, a fifth
of the talkers is held out for testing, or of the clips if there is one talker. Talkers are named in the manifest, or
are the folders at the highest level that has several. No sentence is in both splits.
"""
import csv
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import ClipError, normalize
from real.clips import read_clip
from real.files import note, shown
from real.media import SUFFIXES, clip_error

SPLITS = {"train": "train", "trainval": "train", "pretrain": "train", "test": "test"}  # folder or column -> split
MAX_LETTERS = 50  # in a second of speech


@dataclass(frozen=True)
class Entry:
    """A clip that is not read yet. `text` None: its transcript is in a file beside it."""
    path: Path
    talker: str
    split: str | None = None
    text: str | None = None


# --- which clips there are -------------------------------------------------------------------------------------------

def entries(folder):
    """A folder -> [Entry], each of split "train", "test" or None (an unused one, like val). Raises ClipError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise clip_error(folder, "no such folder")
    manifest = folder / "manifest.csv"
    listed = read_manifest(manifest) if manifest.is_file() else walk(folder)
    if not listed:
        raise clip_error(folder, "no clips here, expected files like NAME.mp4 or NAME.flac with NAME.txt beside them, "
                                 "or a manifest.csv")
    if any(entry.split for entry in listed):
        return [replace(entry, split=SPLITS.get(entry.split)) for entry in listed]
    one_talker = len({entry.talker for entry in listed}) == 1
    groups = [entry.path.stem if one_talker else entry.talker for entry in listed]
    shuffled = sorted(set(groups), key=lambda group: (zlib.crc32(group.encode(errors="surrogateescape")), group))
    test = shuffled[:max(1, len(shuffled) // 5)]
    return [replace(entry, split="test" if group in test else "train") for entry, group in zip(listed, groups)]


def walk(folder):
    """All media files below a folder -> [Entry]. The talker is the folder at the highest level that has several."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    parents = [path.relative_to(folder).parts[:-1] for path in paths]
    if (folder / "test").is_dir() and any((folder / name).is_dir() for name in SPLITS if name != "test"):
        return [Entry(path, "/".join(names[1:2]), "".join(names[:1])) for path, names in zip(paths, parents)]
    depth = next((n for n in range(1, 9) if len({names[:n] for names in parents}) > 1), 0)
    return [Entry(path, "/".join(names[:depth])) for path, names in zip(paths, parents)]


def read_manifest(path):
    """A manifest.csv -> [Entry]. Raises ClipError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            for name in ("path", "text"):
                if name not in (rows.fieldnames or ()):
                    raise clip_error(path, f"no column {name!r}; its first line should be path,text[,split,talker]")
            return [Entry(path.parent / (row["path"] or ""), row.get("talker") or "", row.get("split") or None,
                          row["text"] or "") for row in rows]
    except (UnicodeDecodeError, csv.Error) as error:
        raise clip_error(path, f"not a table in UTF-8: {error}") from None


def transcript(path):
    """The text of the clip at `path`: the first line of its .txt without LRS's `Text:`, or the words of its .align."""
    txt, name = path.with_suffix(".txt"), path.with_suffix(".align").name
    above = path.parent.parent / "align"
    aligns = [path.with_name(name), path.parent / "align" / name, above / name, above / path.parent.name / name]
    source = next((candidate for candidate in (txt, *aligns) if candidate.is_file()), None)
    if source is None:
        raise clip_error(path, f"no transcript, expected {shown(txt.name)} or {shown(name)} beside it")
    try:
        lines = source.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise clip_error(source, "not UTF-8 text; save it as UTF-8") from None
    if source == txt:
        return lines[0].removeprefix("Text:").strip() if lines else ""
    words = [line.split()[2] for line in lines if len(line.split()) == 3]  # GRID's lines are: start end word
    return " ".join(word for word in words if word not in ("sil", "sp"))


# --- reading them ----------------------------------------------------------------------------------------------------

def read_entry(entry, reading=None):
    """Entry -> Clip, or a ClipError, which is returned, not raised. `reading`: arguments of clips.read_pieces."""
    try:
        text = normalize(transcript(entry.path) if entry.text is None else entry.text)
        if not text:
            raise clip_error(entry.path, "no words in its transcript, expected what is said")
        clip = read_clip(entry.path, text=text, **(reading or {}))
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
        yield from zip(listed, tqdm(clips, "reading clips", len(listed), leave=False))


def folder_clips(folder, reading=None, max_bad=1.):
    """A folder -> {"train": [Clip], "test": [Clip]}. `reading`: arguments of clips.read_pieces. Raises ClipError.

    A clip that cannot be used is left out, with a note. More than `max_bad` percent of such clips are an error.
    A training clip is left out if a test clip has the same sentence."""
    listed = [entry for entry in entries(folder) if entry.split]
    clips, n_bad = {"train": [], "test": []}, 0
    for entry, clip in read_entries(listed, reading):
        if not isinstance(clip, ClipError):
            clips[entry.split].append(clip)
            continue
        note(f"left out: {clip}")
        n_bad += 1
        if n_bad > max_bad / 100 * len(listed):
            raise clip_error(folder, f"{n_bad} of {len(listed)} clips cannot be used so far, and no more than "
                                     f"--max-bad {max_bad:g} % may be; python data.py check lists them all")
    test_sentences = {clip.text for clip in clips["test"]}
    fresh = [clip for clip in clips["train"] if clip.text not in test_sentences]
    if n_repeated := len(clips["train"]) - len(fresh):
        note(f"left out: {n_repeated} training clips of {shown(folder)} whose sentence is in its test split")
    clips["train"] = fresh
    for split, usable in clips.items():
        if not usable:
            raise clip_error(folder, f"no usable clip is left in its {split} split")
    return clips


def check(folder):
    """Print what is in a folder, and each clip that cannot be used. Returns an exit code: 1 if there is such a clip."""
    good, bad = [], []
    for entry, clip in read_entries(entries(folder), {"box": "all"}):  # no search for faces, which is slow
        if isinstance(clip, ClipError):
            bad.append(clip)
        else:  # the clip itself is dropped, or a large folder would fill memory
            streams = " and ".join(clip.streams)
            good.append((entry.split or "other", entry.talker, clip.text.split(), clip.duration, streams))
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
