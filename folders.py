"""A folder of clips, with what is said in them -> the clips of its train and of its test part.

    manifest.csv                               path,text[,split,talker]: paths from the folder on; split train or test
    NAME.mp4, NAME.txt                         LRS2, LRS3, one's own: the first line, an optional `Text:` in front
    s1/NAME.mpg, align/NAME.align              GRID as it is downloaded; align/ in s1/ or beside it, or the files side by side

The parts are what the manifest says; else the folders train (trainval, pretrain) and test if they are there; else a fifth of
the talkers (in the manifest, or the folders at the highest level with several), or of the clips if there is one talker, are
for testing. Never is a sentence in both.
"""
import csv
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import normalize, read_clip
from media import SUFFIXES, ClipError, note, shown

PARTS = {"train": "train", "trainval": "train", "pretrain": "train", "test": "test"}  # names of folders and splits
CHARACTERS = 50                                        # a second of speech has at most so many


@dataclass(frozen=True)
class Entry:
    """A clip before it is read; `text` None: still to be looked for beside it."""
    path: Path
    talker: str
    part: str | None = None
    text: str | None = None


# --- which clips there are -------------------------------------------------------------------------------------------

def entries(folder):
    """All clips of a folder, each in its part, None those of other parts (as val). Raises ClipError where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ClipError(f"{shown(folder)}: no such folder")
    listed = folder / "manifest.csv"
    found = manifest(listed) if listed.is_file() else walk(folder)
    if not found:
        raise ClipError(f"{shown(folder)}: no clips here, expected files like NAME.mp4 or NAME.flac with NAME.txt beside them, or a manifest.csv")
    if any(entry.part for entry in found):
        return [Entry(e.path, e.talker, PARTS.get(e.part), e.text) for e in found]
    several = len({entry.talker for entry in found}) > 1
    key = (lambda entry: entry.talker) if several else (lambda entry: entry.path.stem)
    keys = sorted({key(entry) for entry in found}, key=lambda k: (zlib.crc32(k.encode(errors="surrogateescape")), k))
    tested = set(keys[:max(1, len(keys) // 5)])
    return [Entry(e.path, e.talker, "test" if key(e) in tested else "train", e.text) for e in found]


def walk(folder):
    """Every media file below the folder; its talker is the folder it is in, at the highest level that has several."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    inside = [p.relative_to(folder).parts[:-1] for p in paths]
    parted = (folder / "test").is_dir() and any((folder / name).is_dir() for name in PARTS if name != "test")
    depth = next((n for n in range(1, 9) if len({parts[:n] for parts in inside}) > 1), 0)
    return [Entry(path, "/".join(parts[1:2] if parted else parts[:depth]), (parts[:1] or ("",))[0] if parted else None)
            for path, parts in zip(paths, inside)]


def manifest(path):
    """The entries that a manifest.csv lists."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            lacking = [name for name in ("path", "text") if name not in (reader.fieldnames or ())]
            if lacking:
                raise ClipError(f"{shown(path)}: no column {lacking[0]!r}; its first line should be path,text[,split,talker]")
            return [Entry(path.parent / (row["path"] or ""), row.get("talker") or "", row.get("split") or None, row["text"] or "") for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ClipError(f"{shown(path)}: not a table in UTF-8: {error}") from None


def transcript(path):
    """What is said in the clip at `path`: the first line of its .txt (less LRS's `Text:`), or the words of its .align."""
    txt, name = path.with_suffix(".txt"), path.with_suffix(".align").name
    aligns = [path.with_name(name), path.parent / "align" / name, path.parent.parent / "align" / name,
              path.parent.parent / "align" / path.parent.name / name]
    source = next((p for p in [txt, *aligns] if p.is_file()), None)
    if source is None:
        raise ClipError(f"{shown(path)}: no transcript, expected {shown(txt.name)} or {shown(name)} beside it")
    try:
        lines = source.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ClipError(f"{shown(source)}: not UTF-8 text; save it as UTF-8") from None
    if source == txt:
        return lines[0].removeprefix("Text:").strip() if lines else ""
    words = [line.split()[2] for line in lines if len(line.split()) == 3]  # GRID's lines are: start end word
    return " ".join(word for word in words if word not in ("sil", "sp"))


# --- reading them ----------------------------------------------------------------------------------------------------

def read(entry, how=()):
    """An entry -> its Clip, or the ClipError that tells why not. `how`: see data.read_pieces."""
    try:
        text = normalize(transcript(entry.path) if entry.text is None else entry.text)
        if not text:
            raise ClipError(f"{shown(entry.path)}: no words in its transcript, expected what is said")
        clip = read_clip(entry.path, text=text, **dict(how))
        if len(text) > CHARACTERS * (1 + clip.duration):
            raise ClipError(f"{shown(entry.path)}: a transcript of {len(text):,} letters for {clip.duration:.1f} s; is it another clip's?")
        return clip
    except (ClipError, OSError) as error:
        return error if isinstance(error, ClipError) else ClipError(f"{shown(entry.path)}: {error.strerror}")


def read_all(found, how):
    """Entries -> their clips or errors, in order, several at a time."""
    with ThreadPoolExecutor() as readers:
        yield from tqdm(readers.map(lambda entry: read(entry, how), found), "reading clips", len(found), leave=False)


def folder_clips(folder, how=None, max_bad=1.):
    """A folder of clips -> {"train": [Clip], "test": [Clip]}, with no sentence in both. `how`: see data.read_pieces.

    Clips that cannot be used are told and left out; more than `max_bad` percent of them are a ClipError. So are training
    clips left out whose sentence the test part has."""
    found = [entry for entry in entries(folder) if entry.part]
    clips, n_bad = {"train": [], "test": []}, 0
    for entry, clip in zip(found, read_all(found, how or {})):
        if not isinstance(clip, ClipError):
            clips[entry.part].append(clip)
            continue
        note(f"left out: {clip}")
        n_bad += 1
        if n_bad > max_bad / 100 * len(found):
            raise ClipError(f"{shown(folder)}: {n_bad} of {len(found)} clips cannot be used so far, and no more than --max-bad {max_bad:g} % may be; "
                            "python data.py check lists them all")
    tested = {clip.text for clip in clips["test"]}
    fresh = [clip for clip in clips["train"] if clip.text not in tested]
    if dropped := len(clips["train"]) - len(fresh):
        note(f"left out: {dropped} training clips of {shown(folder)} whose sentence is in its test part")
    clips["train"] = fresh
    for part, usable in clips.items():
        if not usable:
            raise ClipError(f"{shown(folder)}: no usable clip is left in its {part} part")
    return clips


def check(folder):
    """Print what is in the folder, and each clip that cannot be used. Returns 0, or 1 if there are such."""
    found, good, bad = entries(folder), [], []
    for entry, clip in zip(found, read_all(found, {"box": "all"})):  # whole pictures: faces are not looked for
        if isinstance(clip, ClipError):
            bad.append(clip)
        else:
            good.append((entry, clip.text.split(), clip.duration, clip.streams))
    for error in bad:
        print(f"bad: {error}")
    parts = Counter(entry.part or "other" for entry, *_ in good)
    print(f"{len(good)} clips can be used" + "".join(f", {n} {part}" for part, n in sorted(parts.items())) + f"; {len(bad)} cannot")
    if not good:
        return 1
    seconds = np.array([duration for *_, duration, _ in good])
    streams = Counter(" and ".join(streams) for *_, streams in good)
    words = {part: Counter(word for entry, text, *_ in good if entry.part == part for word in text) for part in ("train", "test")}
    unseen = words["test"].keys() - words["train"].keys()
    print(f"{seconds.sum() / 3600:.2f} hours; seconds: {seconds.min():.1f} the shortest, {np.median(seconds):.1f} the median, {seconds.max():.1f} the longest")
    print("streams: " + ", ".join(f"{n} {kind}" for kind, n in streams.most_common()))
    print(f"talkers: {len({entry.talker for entry, *_ in good})}; words: " + ", ".join(
        f"{sum(count.values()):,} {part} ({len(count):,} different)" for part, count in words.items()))
    if unseen:
        print(f"{len(unseen):,} words of the test part are not in training: {', '.join(sorted(unseen)[:10])}{' ...' if len(unseen) > 10 else ''}")
    print("commonest: " + ", ".join(f"{word} {n}" for word, n in (words["train"] + words["test"]).most_common(10)))
    return int(bool(bad))
