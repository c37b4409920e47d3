"""Which clips a folder holds, what is said in them and which split they belong to. These layouts are known:

    manifest.csv or .tsv             columns path, text and, if you like, split and talker; paths relative to the table
    Common Voice                     clips/, train.tsv, dev.tsv, test.tsv
    LRS2                             main/, pretrain/ and the lists train.txt, val.txt, test.txt
    Sphinx (AN4)                     wav/, etc/NAME_train.fileids, etc/NAME_train.transcription, the same for test
    LibriSpeech                      TALKER-CHAPTER.trans.txt beside the sound, in folders like train-clean-100
    GRID                             s1/NAME.mpg, and NAME.align beside it or in a folder align or alignments
    LRS3, or your own                NAME.mp4 and NAME.txt; the text follows `Text:`, or is the whole file

A split is named by the table or list, or by a folder: train, dev and test, or a name that begins with one of them.
Where no split is named, or training's alone, Entry.split is None. Links are followed.
"""
import csv
import io
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from data import MAX_SECONDS
from real.files import shown
from real.media import SOUND_SUFFIXES, SUFFIXES, clip_error

SYNONYMS = {"train": "train training trainval pretrain trainset", "test": "test testing testset eval",
            "valid": "valid validation val dev development devset"}
SPLITS = {name: split for split, names in SYNONYMS.items() for name in names.split()}
KINDS = re.compile(r"(audio|video|wav|mp4|mpg|flac|sound)s?(_\d+k?)?")     # folders named for what is in them
TEXTS = {".txt", ".align", ".csv", ".tsv", ".md", ".transcription", ".fileids", ".dic", ".lm", ".json", ".html"}
CUT_SECONDS = 20       # where word times are known, a clip that is too long is cut into pieces of at most this length


@dataclass(frozen=True)
class Entry:
    """A clip that is not read yet."""
    path: Path
    talker: str
    split: str | None = None                   # train, valid or test
    text: str | None = None                    # None: its transcript is the file `source`
    source: Path | None = None                 # None: there is none
    sound: Path | None = None                  # a sound file that belongs to these pictures
    span: tuple[float, float] | None = None    # seconds from start to end; None: all of it
    is_drawn: bool = False                     # the split is ours, not the folder's


def recognise(folder):
    """A folder -> (the name of its layout, [Entry], a Counter of suffixes of the files that are passed over)."""
    names = list(files_below(folder))
    for name, read in {"manifest": manifest, "Common Voice": common_voice, "LRS2": lrs2}.items():
        if listed := read(folder):
            break
    else:
        name, listed = by_files(folder, sorted(map(Path, names)))          # 100,000 Paths take seconds
    used = {str(path) for entry in listed for path in (entry.path, entry.source, entry.sound) if path}
    suffixes = (os.path.splitext(path)[1].lower() for path in names if path not in used)
    return name, listed, Counter(suffix or "without suffix" for suffix in suffixes if suffix not in TEXTS)


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


def files_below(folder, above=()):
    """Yield the names of the files below a folder. Links are followed, but not into a folder that they stand in."""
    real = os.path.realpath(folder)
    for found in os.scandir(folder):
        if found.name.startswith("."):
            continue
        if not (os.path.isdir(found) if found.is_symlink() else found.is_dir()):
            yield found.path.removeprefix("./")                # as in str(Path(folder, name))
        elif os.path.realpath(found) not in (*above, real):
            yield from files_below(found.path, (*above, real))


def read_text(path):
    """The text of a file in UTF-8, with or without a byte order mark. Raises ClipError."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise clip_error(path, "not UTF-8 text; save it as UTF-8") from None


def named_split(name):
    """The split that a file or folder name begins with, like train-clean-100 or train1; else None."""
    return SPLITS.get(re.match("[a-z]*", name.lower())[0])


# --- tables ----------------------------------------------------------------------------------------------------------

def read_table(path, *names):
    """Yield (line number, {column: value}) of a table. Its header tells whether comma, semicolon or tab separates.

    `names` are columns that it must have. Raises ClipError, which names the line."""
    text = read_text(path)
    separator = max(",;\t", key=text.partition("\n")[0].count)
    quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True)
    try:
        columns = [name.strip().lower() for name in next(rows, [])]
        if missing := [name for name in names if name not in columns]:
            raise clip_error(path, f"no column {missing[0]!r}; its first line should be path,text[,split,talker]")
        for row in rows:
            if len(row) > len(columns):
                raise clip_error(path, f"line {rows.line_num} has {len(row)} columns, its header {len(columns)}: "
                                       f"a text with {separator!r} in it stands in \"quotes\"")
            if any(row):
                yield rows.line_num, dict(zip_longest(columns, map(str.strip, row), fillvalue=""))
    except csv.Error as error:
        raise clip_error(path, f"line {rows.line_num}: not a table: {error}") from None


def manifest(folder):
    """The Entries of manifest.csv or manifest.tsv in the folder, None if there is none. Raises ClipError."""
    path = next((folder / name for name in ("manifest.csv", "manifest.tsv") if (folder / name).is_file()), None)
    if path is None:
        return None
    listed = []
    for line, row in read_table(path, "path", "text"):
        split = row.get("split", "")
        if split and split.lower() not in SPLITS:
            raise clip_error(path, f"line {line}: split {split!r} is not one of {', '.join(SPLITS)}")
        listed.append(Entry(folder / row["path"], row.get("talker", ""), SPLITS.get(split.lower()), text=row["text"]))
    if not listed:
        raise clip_error(path, "no clips here, only its first line")
    return listed


def common_voice(folder):
    """The Entries of a language of Common Voice, None for another layout. Raises ClipError."""
    tables = [folder / f"{name}.tsv" for name in ("train", "dev", "test")]
    if not (folder / "clips").is_dir() or not tables[0].is_file():
        return None
    return [Entry(folder / "clips" / row["path"], row.get("client_id", ""), SPLITS[table.stem], text=row["sentence"])
            for table in tables if table.is_file() for _, row in read_table(table, "path", "sentence")]


# --- lists -----------------------------------------------------------------------------------------------------------

def lrs2(folder):
    """The Entries of LRS2's lists, None for another layout. Raises ClipError if a list is missing."""
    if not (folder / "main").is_dir():
        return None
    lists = [folder / f"{name}.txt" for name in ("train", "val", "test", "pretrain")]
    if missing := [path.name for path in lists[:3] if not path.is_file()]:
        raise clip_error(folder, f"a folder main/, as in LRS2, but no {', '.join(missing)}: copy LRS2's lists into it")
    listed = []
    for path in filter(Path.is_file, lists):
        below = folder / ("pretrain" if path.stem == "pretrain" else "main")
        for words in map(str.split, read_text(path).splitlines()):
            if words:                          # a tag may follow the name
                clip = below / f"{words[0]}.mp4"
                listed += cut(Entry(clip, clip.parent.name, SPLITS[path.stem], source=clip.with_suffix(".txt")))
    return listed


def sphinx(files):
    """The Entries of Sphinx lists, as AN4 has them; [] for another layout."""
    lists = [path for path in files if path.suffix == ".fileids"]      # their names end with that of the split
    clips = {path.with_suffix(""): path for path in files if path.suffix.lower() in SUFFIXES}
    listed = []
    for path in lists:
        texts = {}
        for line in read_text(path.with_suffix(".transcription")).splitlines():
            if found := re.fullmatch(r"(.*)\((\S+)\)\s*", line):
                texts[found[2]] = re.sub(r"<[^>]*>|\+\+\S*\+\+", " ", found[1])
        for name in read_text(path).split():
            stem = path.parent.parent / "wav" / name
            split = named_split(re.split("[-_.]", path.stem)[-1])
            text = texts.get(name, texts.get(stem.name))
            listed.append(Entry(clips.get(stem, stem), stem.parent.name, split, text=text))
    return listed


# --- transcripts beside the clips ------------------------------------------------------------------------------------

def side_by_side(folder, files):
    """Entries of media files with a transcript, or with none, in which case reading them says so."""
    lists, aligns = {}, defaultdict(list)
    for path in files:
        if path.name.endswith(".trans.txt"):   # LibriSpeech: each line is the name of a clip and its text
            for line in read_text(path).splitlines():
                name, _, text = line.partition(" ")
                lists[path.parent / name] = text
        elif path.suffix.lower() == ".align":
            aligns[path.stem].append(path)
    known, listed = {path.with_suffix(path.suffix.lower()): path for path in files}, []
    sounds = [path for path in files if path.suffix.lower() in SOUND_SUFFIXES]
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES - SOUND_SUFFIXES]
    of_pictures = {clip_key(path, folder) for path in pictures}
    clips = sorted(pictures + [path for path in sounds if clip_key(path, folder) not in of_pictures])
    sound_of = {clip_key(path, folder): path for path in sounds}
    parents = [path.relative_to(folder).parts[:-1] for path in clips]
    for path, names, talker in zip(clips, parents, talkers(parents)):
        split = next(filter(None, map(named_split, names)), None)
        text, source = lists.get(path.with_suffix("")), known.get(path.with_suffix(".txt"))
        if source is None:                     # of several .align of this name, the one whose folders are most alike
            source = max(aligns[path.stem], key=lambda align: len(set(align.parts) & set(path.parts)), default=None)
        sound = sound_of.get(clip_key(path, folder)) if path.suffix.lower() not in SOUND_SUFFIXES else None
        listed += cut(Entry(path, talker, split, text=text, source=source, sound=sound))
    if {entry.split for entry in listed} - {None} == {"train"}:        # as in LibriSpeech's train-clean-100 alone
        listed = [replace(entry, split=None) for entry in listed]
    return listed


def clip_key(path, folder):
    """What a video and its sound have in common: the folders that name no kind of media, and the name."""
    names = path.relative_to(folder).parts[:-1]
    return *(name for name in names if not KINDS.fullmatch(name.lower())), path.stem


def talkers(parents):
    """Folders of each clip -> the talker of each: the folder below that of a split, else the highest that differ."""
    depth = next((n for n in range(1, 9) if len({names[:n] for names in parents}) > 1), 0)
    for names in parents:
        splits = [i for i, name in enumerate(names) if named_split(name)]
        yield "/".join(names[splits[0] + 1:splits[0] + 2]) if splits else "/".join(names[:depth])


# --- transcripts -----------------------------------------------------------------------------------------------------

def transcript(entry):
    """What is said in an Entry's clip. Raises ClipError if that is not known."""
    if entry.text is not None:
        return entry.text
    source = entry.source
    if source is None or not source.is_file():
        names = f"{shown(entry.path.with_suffix('.txt').name)} or {shown(entry.path.with_suffix('.align').name)}"
        raise clip_error(entry.path, f"no transcript, expected {names} beside it")
    lines = read_text(source).splitlines()
    if source.suffix.lower() == ".align":      # GRID's lines are: start end word
        words = [line.split()[2] for line in lines if len(line.split()) == 3]
        return " ".join(word for word in words if word not in ("sil", "sp"))
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
        words = [(word, float(start), float(end)) for word, start, end, *_ in map(str.split, table.splitlines()[1:])]
    except ValueError:
        return [entry]
    if not words or words[-1][2] <= MAX_SECONDS:
        return [entry]
    pieces = [[]]
    for word, start, end in words:
        if pieces[-1] and end - pieces[-1][0][1] > CUT_SECONDS and words[-1][2] - start > 1:    # no leftover of a word
            pieces.append([])
        pieces[-1].append((word, start, end))
    return [replace(entry, text=" ".join(word for word, _, _ in piece), span=(piece[0][1], piece[-1][2])) for piece in pieces]
