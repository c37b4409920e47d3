"""Which clips a folder holds, what is said in them and which split they belong to. docs/real.md lists the layouts.

A table or list names the split of a clip. Else a folder does: one word of its name is train, dev, test or a synonym.
Where nothing names the split, Entry.split is None. Links are followed.
"""
import csv
import io
import math
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from data import MAX_SECONDS
from real.files import note, shown
from real.media import SOUND_SUFFIXES, SUFFIXES, clip_error

SYNONYMS = {"train": "train training trainval pretrain", "test": "test testing eval evaluation",
            "valid": "valid validation validate val dev development"}
SPLITS = {name + end: split for split, names in SYNONYMS.items() for name in names.split()
          for end in ("", "set", "data", "list")}
TALKERS = "talker", "speaker", "speaker_id", "client_id", "spk", "spk_id"     # the names of a column of talkers
# These words of a folder's name tell the kind of its files, like audio_25k. They name neither a talker nor a split.
KIND = re.compile(r"(?<![a-z\d])(mpg_\d{4}|(audio|video|sound|clip|text|txt|wav|flac|mp3|ogg|mp4|mpg|avi|mov|mkv|"
                  r"webm)s?|\d+k(hz)?)(?![a-z\d])", re.I)
MEDIA = "|".join(map(re.escape, sorted(SUFFIXES)))
NEXT_CLIP = re.compile(rf"\n.*({MEDIA})\b", re.I)    # a later line of a cell names a file of media
# A text is damaged if it has zeros of UTF-16, control characters, U+FFFD, or UTF-8 that was read as Windows text.
DAMAGE = re.compile("[\0-\x08\x0e-\x19\x1b-\x1f\x7f-\x84\x86-\x9f\ufffd]|Ã[\xa1-\xbf]|â€")
ERROR_CELL = re.compile(r"#[^\s#]+[!?]|#N/?[AV]|Err:\d+")           # what a spreadsheet shows for a text like =yes
MANIFESTS = {"manifest.csv", "manifest.tsv"}
LISTS = MANIFESTS | {"train.tsv", "train.txt", "pretrain.txt"}    # one of these shows the folder of a table layout
TEXTS = {".txt", ".csv", ".tsv", ".md", ".transcription", ".fileids", ".dic", ".lm", ".json", ".html"}
TAG = re.compile(r"[<＜][^<>＜＞]*[>＞]|[{｛][^{}｛｝]*[}｝]|[\[［][^][［］]*[]］]|\+\+\S*\+\+")    # as [MUSIC]: no word
CUT_SECONDS = 20       # where word times are known, a clip that is too long is cut into pieces of about this length


@dataclass(frozen=True)
class Entry:
    """A clip that is not read yet."""
    path: Path
    talker: str
    split: str | None = None                   # train, valid or test; None: nothing names it
    text: str | None = None                    # None: its transcript is the file `source`
    source: Path | None = None                 # None: there is none
    sound: Path | None = None                  # a sound file that belongs to these pictures
    span: tuple[float, float] | None = None    # seconds from start to end; None: all of it
    own_split: bool = False                    # this program made the split, not the folder


def recognise(folder):
    """A folder -> (the name of its layout, [Entry], a Counter of suffixes of the unused files, without TEXTS)."""
    names = list(files_below(folder))
    name, listed = by_tables(folder)
    if not listed:
        for path in sorted(Path(name) for name in names if os.path.basename(name).lower() in LISTS):
            if path.parent != folder and (name := by_tables(path.parent)[0]):
                raise clip_error(folder, f"layout {name} is in {shown(path.parent)}, below it; give that folder")
            if path.parent == folder and not any(path.with_suffix(suffix).is_file() for suffix in SUFFIXES):
                raise clip_error(path, "a list without its clips: LRS2's lies beside main/, Common Voice's beside clips/; "
                                       "move it there, or away")
        name, listed = by_files(folder, sorted(map(Path, names)))          # 100,000 Paths take seconds
    used = {os.path.abspath(path) for entry in listed for path in (entry.path, entry.source, entry.sound) if path}
    others = [Path(path) for path in names if os.path.abspath(path) not in used]
    lists = [path for path in others if path.suffix.lower() in TEXTS and named_split(path.stem)]
    if lists and not any(entry.split for entry in listed):
        note(f"{shown(lists[0])}: not read, although it has the name of a split; "
             "a manifest.csv or folders can name splits")
    suffixes = (path.suffix.lower() for path in others)
    return name, listed, Counter(suffix or "without suffix" for suffix in suffixes if suffix not in TEXTS)


def by_tables(folder):
    """The name of a layout with tables or lists, and its Entries; (None, []) for another layout."""
    for name, read in {"manifest": manifest, "Common Voice": common_voice, "LRS2": lrs2}.items():
        if listed := read(folder):
            return name, listed
    return None, []


def by_files(folder, files):
    """The name of a layout without tables, and its Entries."""
    if listed := sphinx(files):
        return "Sphinx lists", listed
    listed = side_by_side(folder, files)
    if any(path.name.endswith(".trans.txt") for path in files):
        return "LibriSpeech", listed
    if any(path.suffix.lower() == ".align" for path in files):
        return "GRID", listed
    is_lrs3 = any((folder / name).is_dir() for name in ("trainval", "pretrain"))
    return "LRS3" if is_lrs3 else "transcripts beside the clips", listed


def files_below(folder):
    """Yield the names of the files below a folder. Links to folders are followed last, but no folder is read twice."""
    places, links, seen = [folder], [], set()
    while places or links:
        place = places.pop() if places else links.pop()
        if (real := os.path.realpath(place)) in seen:
            note(f"{shown(place)}: this folder is read already, under another name")
            continue
        seen.add(real)
        for found in sorted(os.scandir(place), key=lambda found: found.name):
            if found.name.startswith("."):
                continue
            if not (os.path.isdir(found) if found.is_symlink() else found.is_dir()):
                yield found.path.removeprefix("./")            # as in str(Path(folder, name))
            else:
                (links if found.is_symlink() else places).append(found.path)


def read_text(path):
    """The text of a file in UTF-8, with or without a byte order mark. Raises ClipError."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise clip_error(path, "not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise clip_error(path, error.strerror) from None
    if found := DAMAGE.search(text):
        raise clip_error(path, f"damaged or not UTF-8 text: {found[0]!r} is in it; write what is said anew, as UTF-8")
    if found := re.match(r"\{\\rtf|WEBVTT|version https://git-lfs", text):
        advice = "fetch the file with: git lfs pull" if found[0].startswith("version") else "save the spoken words alone"
        raise clip_error(path, f"begins with {found[0]!r}: no plain text of what is said; {advice}")
    return text


def named_split(name):
    """The split that is a word of a file or folder name, like train-clean-100 or my_test1; else None."""
    return next(filter(None, map(SPLITS.get, re.findall("[a-z]+", name.lower()))), None)


# --- tables ----------------------------------------------------------------------------------------------------------

def read_table(path, *names, quotes=csv.QUOTE_MINIMAL):
    """Yield (line number, {column: value}) of a table. Its header tells whether comma, semicolon or tab separates.

    `names` are columns that it must have; others that it lacks are "". Spreadsheets end lines with empty columns, which
    do not count. Raises ClipError, which names the line."""
    text = read_text(path)
    separator = max(",;\t", key=text.partition("\n")[0].count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quotes, strict=True,
                      skipinitialspace=separator != "\t")
    try:
        columns = without_empty_end(map(str.lower, next(rows, [])))
        if missing := [name for name in names if name not in columns]:
            raise clip_error(path, f"no column {missing[0]!r} in its first line, expected {', '.join(names)}")
        if twice := [name for name, n in Counter(columns).items() if n > 1 and name]:
            raise clip_error(path, f"two columns {twice[0]!r}")
        for row in map(without_empty_end, rows):
            if len(row) > len(columns):
                raise clip_error(path, f"line {rows.line_num} has {len(row)} columns, its header {len(columns)}: "
                                       f"a text with {separator!r} in it stands in \"quotes\"")
            if any(map(NEXT_CLIP.search, row)):
                raise csv.Error("a text in quotes goes on over the next clips; is a quote missing?")
            if row:
                yield rows.line_num, defaultdict(str, zip_longest(columns, row, fillvalue=""))
    except csv.Error as error:
        raise clip_error(path, f"line {rows.line_num}: not a table: {error}") from None


def in_lower_case(folder):
    """{a name in the folder, in lower case: its path}."""
    return {name.lower(): folder / name for name in os.listdir(folder)}


def without_empty_end(cells):
    """The cells of a line without blanks around them, and without those at the end that are empty."""
    cells = list(map(str.strip, cells))
    return cells[:next((n for n in range(len(cells), 0, -1) if cells[n - 1]), 0)]


def manifest(folder):
    """The Entries of manifest.csv or manifest.tsv in the folder, None if there is none. Raises ClipError."""
    tables = [folder / name for name in sorted(os.listdir(folder)) if name.lower() in MANIFESTS]
    if not tables:
        return None
    if len(tables) > 1:
        raise clip_error(folder, f"two tables, {tables[0].name} and {tables[1].name}; keep one")
    path, listed, seen = tables[0], [], {}
    for line, row in read_table(path, "path", "text"):
        if not listed and (unused := row.keys() - {"", "path", "text", "split", *TALKERS}):
            note(f"{shown(path)}: columns that are not used: {', '.join(sorted(unused))}")
        said = row["text"], row["split"].lower()
        before, first = seen.setdefault(os.path.normpath(folder / row["path"]), (said, line))
        if said != before:
            other = "text" if said[0] != before[0] else "split"
            raise clip_error(path, f"line {line}: {row['path']!r} has another {other} on line {first}; "
                                   "cut the clip, or keep one line")
        if "://" in row["path"]:
            raise clip_error(path, f"line {line}: {row['path']!r} is an address, not a file; download it first")
        if ERROR_CELL.fullmatch(row["text"]):
            raise clip_error(path, f"line {line}: {row['text']} is a spreadsheet's error, not what is said")
        if row["split"] and said[1] not in SPLITS:
            raise clip_error(path, f"line {line}: split {row['split']!r} is not one of {', '.join(SYNONYMS)}, nor a synonym")
        talker = next(filter(None, map(row.get, TALKERS)), "")
        listed.append(Entry(folder / row["path"], talker, SPLITS.get(said[1]), text=row["text"]))
    if not listed:
        raise clip_error(path, "no clips here, only its first line")
    parents = [without_kinds(Path(os.path.relpath(entry.path, folder)).parts[:-1]) for entry in listed]
    has_splits, has_talkers = any(entry.split for entry in listed), any(entry.talker for entry in listed)
    return [replace(entry, split=entry.split if has_splits else split, talker=entry.talker if has_talkers else talker)
            for entry, (split, talker) in zip(listed, splits_and_talkers(parents))]


def common_voice(folder):
    """The Entries of a language of Common Voice, None for another layout. Raises ClipError."""
    inside = in_lower_case(folder)
    tables = {name: inside[f"{name}.tsv"] for name in ("train", "dev", "test") if f"{name}.tsv" in inside}
    if "clips" not in inside or not tables:
        return None
    return [Entry(inside["clips"] / row["path"], row["client_id"], SPLITS[name], text=row["sentence"])
            for name, table in tables.items()
            for _, row in read_table(table, "path", "sentence", quotes=csv.QUOTE_NONE)]


# --- lists -----------------------------------------------------------------------------------------------------------

def lrs2(folder):
    """The Entries of LRS2's lists, None for another layout. Raises ClipError if a list is missing."""
    inside = in_lower_case(folder)
    if "main" not in inside or not inside["main"].is_dir():
        return None
    lists = [inside.get(f"{name}.txt", folder / f"{name}.txt") for name in ("train", "val", "test", "pretrain")]
    missing = [path.name for path in lists[:3] if not path.is_file()]
    if len(missing) == 3 and "pretrain" not in inside:
        return None
    if missing:
        raise clip_error(folder, f"a folder main/, as in LRS2, but no {', '.join(missing)}: copy LRS2's lists beside main/")
    listed = []
    for path in filter(Path.is_file, lists):
        split = path.stem.lower()
        below = inside.get("pretrain" if split == "pretrain" else "main", folder / split)
        for words in map(str.split, read_text(path).splitlines()):
            if words:                          # a tag may follow the name
                clip = below / f"{words[0]}.mp4"
                listed += cut(Entry(clip, clip.parent.name, SPLITS[split], source=clip.with_suffix(".txt")))
    return listed


def sphinx(files):
    """The Entries of Sphinx lists, as AN4 has them; [] for another layout."""
    clips = {path.with_suffix(""): path for path in files if path.suffix.lower() in SUFFIXES}
    listed = []
    for path in (path for path in files if path.suffix == ".fileids"):      # the last fitting word in its name counts
        texts, source = {}, path.with_suffix(".transcription")
        for line in read_text(source).splitlines():
            if found := re.fullmatch(r"(.*)\((\S+)\)\s*", line):
                text = TAG.sub(" ", found[1])
                if texts.setdefault(found[2], text) != text:
                    raise clip_error(source, f"two texts of {found[2]!r}; name the folder too, like talker/{found[2]}")
        for name in read_text(path).split():
            stem = path.parent.parent / "wav" / name
            split = next(filter(None, map(named_split, reversed(re.split("[-_.]", path.stem)))), None)
            text = texts.get(name, texts.get(stem.name))
            listed.append(Entry(clips.get(stem, stem), stem.parent.name, split, text=text, source=source))
    return listed


# --- transcripts beside the clips ------------------------------------------------------------------------------------

def side_by_side(folder, files):
    """Entries of media files with a transcript, or with none, in which case reading them says so."""
    key = {path: clip_key(path, folder) for path in files}
    media = [path for path in files if path.suffix.lower() in SUFFIXES]
    with_pictures = {key[path] for path in media if path.suffix.lower() not in SOUND_SUFFIXES}
    sounds = [path for path in media if path.suffix.lower() in SOUND_SUFFIXES and key[path] in with_pictures]
    sound_of = {key[path]: path for path in sounds}
    others = sorted(set(media) - set(sounds), reverse=True)                    # a.wav and a.flac are one clip
    clips = sorted({path.with_name(key[path][-1]): path for path in others}.values())
    texts, keys = {}, set(map(key.get, media))
    written = [path for path in files if path.suffix.lower() == ".txt" and not path.name.endswith(".trans.txt")]
    for path in reversed(written):
        other = texts.setdefault(key[path], path)
        if other != path and key[path] in keys and read_text(other).split() != read_text(path).split():
            raise clip_error(path, f"another text than in {shown(other)}; if this is one clip delete a text, else rename it")
    lines, list_in, aligns = {}, {}, defaultdict(list)
    for path in files:
        if path.name.endswith(".trans.txt"):   # LibriSpeech: each line is the name of a clip and its text
            list_in[path.parent] = path
            for name, *words in filter(None, map(str.split, read_text(path).splitlines())):
                lines[path.parent / name] = " ".join(words)
        elif path.suffix.lower() == ".align":
            aligns[path.stem].append((folders(path, folder), path))
    everybody, listed = set().union(*(folders(path, folder) for path in clips)), []
    parents = [without_kinds(path.relative_to(folder).parts[:-1]) for path in clips]
    for path, (split, talker) in zip(clips, splits_and_talkers(parents)):
        source = texts.get(key[path]) or list_in.get(path.parent)
        if source is None and path.stem in aligns:
            source = closest(folders(path, folder), aligns[path.stem], everybody)
        text = lines.get(path.with_suffix(""))
        listed += cut(Entry(path, talker, split, text=text, source=source, sound=sound_of.get(key[path])))
    if lost := sorted(lines.keys() - {path.with_suffix("") for path in clips}):
        note(f"{shown(folder)}: {len(lost)} lines in .trans.txt have no sound, like {shown(lost[0].name)}")
    places = {entry.source and entry.source.parent for entry in listed}
    if alone := [path for path in written if path.parent in places and key[path] not in keys]:
        note(f"{shown(folder)}: {len(alone)} .txt belong to no clip, like {shown(alone[0].name)}")
    return listed


def closest(own, aligns, everybody):
    """The .align that has most folders in common with a clip, and none of another clip; None if two of them differ.

    own: the clip's folders. aligns: [(folders, path)] with the clip's name. everybody: the folders of all clips."""
    alike = [(len(names & own), path) for names, path in aligns if not names & everybody - own]
    most = max((n for n, _ in alike), default=0)
    best = [path for n, path in alike if n == most]
    return best[0] if len(best) == 1 or len(set(map(read_text, best))) == 1 else None


def folders(path, folder):
    """The names of the folders between `folder` and a file, in lower case."""
    return {name.lower() for name in path.relative_to(folder).parts[:-1]}


def clip_key(path, folder):
    """What a video, its sound and its text have in common: the folders without words for kinds of files, and the name.

    a.mp4.wav and a.mp4.txt have the name of a.mp4."""
    names = filter(None, map(without_kind, path.relative_to(folder).parts[:-1]))
    return *names, re.sub(rf"({MEDIA})+$", "", path.stem, flags=re.I)


def without_kind(name):
    """The name of a folder without words for kinds of files: audio_25k is empty, s1_50kHz is s1."""
    return KIND.sub("", name).strip("-_. ")


def without_kinds(names):
    """The names of folders that say more than a kind of files."""
    return tuple(filter(without_kind, names))


def splits_and_talkers(parents):
    """Yield (split, talker) of each clip. parents: for each clip the names of its folders, the highest first.

    The first folder that names a split counts, those that all clips share coming last. The talker is the folder
    below it, else the one above it. Without a split: the highest folders that differ."""
    n_shared = len(os.path.commonprefix(parents))
    depth = n_shared + 1 if len(set(parents)) > 1 else 0
    first = n_shared if any(map(named_split, (name for names in parents for name in names[n_shared:]))) else 0
    for names in parents:
        at = next((i for i in range(first, len(names)) if named_split(names[i])), None)
        around = names[:depth] if at is None else (*names[at + 1:at + 2], *names[:at][-1:])[:1]
        yield None if at is None else named_split(names[at]), "/".join(around)


# --- transcripts -----------------------------------------------------------------------------------------------------

def transcript(entry):
    """What is said in an Entry's clip. Raises ClipError if that is not known."""
    if entry.text is not None:
        return entry.text
    source = entry.source
    if source and (source.suffix == ".transcription" or source.name.endswith(".trans.txt")):
        raise clip_error(entry.path, f"no transcript, expected a line for it in {shown(source.name)}")
    if source is None or not source.is_file():
        names = f"{shown(entry.path.with_suffix('.txt').name)} or {shown(entry.path.with_suffix('.align').name)}"
        raise clip_error(entry.path, f"no transcript, expected {names} beside it")
    lines = list(filter(str.strip, read_text(source).splitlines()))
    if source.suffix.lower() == ".align":      # GRID's lines are: start end word
        words = [" ".join(line.split()[2:]) for line in lines]
        if "" in words:
            raise clip_error(source, f"line {lines[words.index('')]!r}, expected its start, its end and a word")
        return " ".join(word for word in words if word.lower() not in ("sil", "sp"))
    if lines and any(source.with_suffix(suffix).is_file() for suffix in (".PHN", ".phn", ".WRD", ".wrd")):
        return " ".join(re.sub(r"^\d+ \d+ ", "", line) for line in lines)    # TIMIT: first and last sample, words
    if lines and lines[0].startswith("Text:"):  # LRS: other facts follow
        return lines[0].removeprefix("Text:").strip()
    if any(line.startswith("Disk reference:") for line in lines):
        raise clip_error(source, "facts about a clip of LRW, not what is said; a manifest.csv can name the words")
    return " ".join(lines).strip()


def cut(entry):
    """An Entry -> [Entry]: cut between words if it is too long and its transcript has word times, as in LRS3."""
    source = entry.source
    if entry.text is not None or source is None or source.suffix.lower() != ".txt" or not source.is_file():
        return [entry]
    _, _, table = source.read_text("utf-8", errors="replace").partition("WORD START END")
    try:
        rows = filter(None, map(str.split, table.splitlines()[1:]))
        words = [(word, float(start), float(end)) for word, start, end, *_ in rows]
    except ValueError:
        return [entry]
    times = [0, *(time for _, start, end in words for time in (start, end))]
    in_order = all(earlier <= later for earlier, later in zip(times, times[1:]))    # which is false for nan
    if not in_order or not MAX_SECONDS - 5 < times[-1] < math.inf:      # the file may go on for some seconds
        return [entry]
    pieces = [[]]
    for word, start, end in words:
        lasts = end - pieces[-1][0][1] if pieces[-1] else 0
        if lasts > CUT_SECONDS and (words[-1][2] - start > 1 or lasts > MAX_SECONDS):    # no piece of a last second
            pieces.append([])
        pieces[-1].append((word, start, end))
    return [replace(entry, text=" ".join(word for word, _, _ in piece), span=(piece[0][1], piece[-1][2]))
            for piece in pieces]
