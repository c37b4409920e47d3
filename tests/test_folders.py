"""python -m pytest tests/test_folders.py: folders of clips, their transcripts and splits."""
import re

import numpy as np
import pytest
import soundfile

from data import ClipError
from real import clips
from real.folders import Entry, entries, folder_clips, read_entry, transcript


def test_transcripts(tmp_path):
    clip, txt, align = tmp_path / "a.mp4", tmp_path / "a.txt", tmp_path / "a.align"
    with pytest.raises(ClipError, match="no transcript, expected a.txt or a.align"):
        transcript(clip)
    align.write_text("0 100 sil\n100 200 bin\n200 300 sp\n300 400 blue\n400 500 sil\n")
    assert transcript(clip) == "bin blue"
    txt.write_text("Text:  SO IT'S 5, ISN'T IT\nConf:  4\n")
    assert transcript(clip) == "SO IT'S 5, ISN'T IT"
    write_tone(clip.with_suffix(".wav"), "")
    for content, message in ((b"", "no words"), (b"...\n", "no words"), (b"caf\xe9", "not UTF-8"),
                             (b"word " * 200_000, "1,000,000 letters|999,999 letters")):
        txt.write_bytes(content)
        assert re.search(message, str(read_entry(Entry(clip.with_suffix(".wav"), "")))), content[:9]


def write_tone(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
    if text:
        path.with_suffix(".txt").write_text(text)


def names(splits):
    """{split: [Clip]} -> {split: [name of its file]}."""
    return {split: sorted(clip.name.rpartition("/")[2] for clip in clips) for split, clips in splits.items()}


def test_folder_with_splits(tmp_path, capsys):
    write_tone(tmp_path / "train/a.wav", "one two")
    write_tone(tmp_path / "train/b.wav", "three")
    write_tone(tmp_path / "train/c.flac", "")
    write_tone(tmp_path / "test/d.wav", "THREE")
    assert names(folder_clips(tmp_path, max_bad=25)) == {"train": ["a.wav"], "test": ["d.wav"]}
    notes = capsys.readouterr().err
    assert "c.flac: no transcript" in notes and "1 training clips" in notes


def test_folder_splits_by_talker_or_stem(tmp_path):
    for talker_name in "pqrst":
        for i in range(3):
            write_tone(tmp_path / "many" / talker_name / f"{i}.wav", f"{talker_name} says {i}")
    many = folder_clips(tmp_path / "many")
    people = {split: {clip.name.split("/")[-2] for clip in clips} for split, clips in many.items()}
    assert len(people["test"]) == 1 and len(people["train"]) == 4 and not people["test"] & people["train"]
    for i in range(10):
        write_tone(tmp_path / "one" / f"{i}.wav", f"word {i}")
    one, again = folder_clips(tmp_path / "one"), folder_clips(tmp_path / "one")
    assert len(one["test"]) == 2 and len(one["train"]) == 8 and names(one) == names(again)


def test_a_talker_s_sessions_stay_together(tmp_path):
    for session in ("alice/day1", "alice/day2", "bob/day1", "carl/day1", "carl/day2"):
        write_tone(tmp_path / session / "a.wav", session)
    people = {split: {clip.name.split("/")[-3] for clip in clips} for split, clips in folder_clips(tmp_path).items()}
    assert not people["train"] & people["test"]


def test_folder_errors(tmp_path):
    with pytest.raises(ClipError, match="no clips here"):
        folder_clips(tmp_path)
    write_tone(tmp_path / "a.wav", "")
    with pytest.raises(ClipError, match="1 of 1 clips cannot be used .* --max-bad 1 %"):
        folder_clips(tmp_path)
    with pytest.raises(ClipError, match="no usable clip"):
        folder_clips(tmp_path, max_bad=100)


# --- layouts ---

def test_manifest(tmp_path, capsys):
    for name in ("a b.wav", "c.wav", "deep/d.wav", "e.wav", "unlisted.wav"):
        write_tone(tmp_path / name, "")
    manifest = tmp_path / "manifest.csv"
    manifest.write_text('\ufeffpath,text,split,talker\na b.wav,"One, two!",train,ann\nc.wav,three,test,bob\n'
                        'deep/d.wav,four,train,ann\ne.wav,five,val,eve\n', "utf-8")
    splits = folder_clips(tmp_path)
    assert names(splits) == {"train": ["a b.wav", "d.wav"], "test": ["c.wav"]} and splits["train"][0].text == "one two"
    manifest.write_text("path,text,talker\na b.wav,one,ann\nc.wav,two,bob\ndeep/d.wav,three,ann\ne.wav,four,ann\n")
    split = {entry.path.name: entry.split for entry in entries(tmp_path)}
    assert split["a b.wav"] == split["d.wav"] == split["e.wav"] != split["c.wav"]  # a talker is in one split
    for text, message in (("file,text\na.wav,x\n", "manifest.csv: no column 'path'"), ("", "no column 'path'"),
                          ("path\na.wav\n", "no column 'text'"), ("path,text\n", "no clips here")):
        manifest.write_text(text)
        with pytest.raises(ClipError, match=message):
            entries(tmp_path)
    manifest.write_bytes(b"path,text\na.wav,caf\xe9\n")
    with pytest.raises(ClipError, match="manifest.csv: not a table in UTF-8"):
        entries(tmp_path)
    manifest.write_text("path,text,split\na b.wav,one,train\nc.wav,two,test\ngone.wav,three,train\nc.wav,,train\n")
    folder_clips(tmp_path, max_bad=50)
    notes = capsys.readouterr().err
    assert "gone.wav: no such file" in notes and "c.wav: no words" in notes


def test_grid_as_downloaded(tmp_path):
    align = "0 100 sil\n100 200 bin\n200 300 blue\n"
    for talker, folder in (("s1", "s1/align"), ("s2", "align"), ("s3", "align/s3"), ("s4", "s4")):
        write_tone(tmp_path / talker / f"{talker}a.wav", "")
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / f"{talker}a.align").write_text(align)
    for entry in entries(tmp_path):
        assert read_entry(entry).text == "bin blue", entry
    assert {entry.talker for entry in entries(tmp_path)} == {"s1", "s2", "s3", "s4"}


def test_lrs_splits(tmp_path):
    for name in ("trainval/p1/00001", "pretrain/p1/00002", "pretrain/p2/00001", "test/p3/00001", "val/p4/00001"):
        write_tone(tmp_path / f"{name}.wav", f"Text:  SAYS {name}.wav\nConf:  4\n")
    splits = folder_clips(tmp_path)
    assert {split: len(clips) for split, clips in splits.items()} == {"train": 3, "test": 1}
    assert splits["test"][0].text.startswith("says test p3")


def test_max_bad(tmp_path):
    for i in range(40):
        write_tone(tmp_path / f"{i:02}.wav", f"number {i}" if i > 1 else "")
    with pytest.raises(ClipError, match="2 of 40 clips cannot be used so far, and no more than --max-bad 4 %"):
        folder_clips(tmp_path, max_bad=4)
    assert sum(map(len, folder_clips(tmp_path, max_bad=5).values())) == 38


def test_check(tmp_path, capsys):
    for talker in ("ann", "bob"):
        for i in range(3):
            write_tone(tmp_path / talker / f"{i}.wav", f"{talker} says {i}")
    assert clips.main(["check", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "6 clips can be used, 3 test, 3 train; 0 cannot" in printed and "1.0 the median" in printed
    assert "talkers: 2" in printed and "6 audio" in printed
    (tmp_path / "ann/0.wav").write_bytes(b"")
    (tmp_path / "bob/1.txt").unlink()
    assert clips.main(["check", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "4 clips can be used" in printed and "bad: " in printed
    assert "0.wav: not readable" in printed and "1.wav: no transcript" in printed
    assert clips.main(["check", str(tmp_path / "none")]) == 2
    assert "none: no such folder" in capsys.readouterr().err
