"""python -m pytest tests/test_folders.py: folders of clips, their transcripts and parts."""
import re

import numpy as np
import pytest
import soundfile

from folders import Entry, folder_clips, read, transcript
from media import ClipError


def test_transcripts(tmp_path):
    clip, txt, align = tmp_path / "a.mp4", tmp_path / "a.txt", tmp_path / "a.align"
    with pytest.raises(ClipError, match="no transcript, expected a.txt or a.align"):
        transcript(clip)
    align.write_text("0 100 sil\n100 200 bin\n200 300 sp\n300 400 blue\n400 500 sil\n")
    assert transcript(clip) == "bin blue"
    txt.write_text("Text:  SO IT'S 5, ISN'T IT\nConf:  4\n")
    assert transcript(clip) == "SO IT'S 5, ISN'T IT"
    write_tone(clip.with_suffix(".wav"), "")
    for content, message in ((b"", "no words"), (b"...\n", "no words"), (b"caf\xe9", "not UTF-8"), (b"word " * 200_000, "1,000,000 letters|999,999 letters")):
        txt.write_bytes(content)
        assert re.search(message, str(read(Entry(clip.with_suffix(".wav"), "")))), content[:9]


def write_tone(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
    if text:
        path.with_suffix(".txt").write_text(text)


def names(clips):
    return {part: sorted(clip.name.rpartition("/")[2] for clip in found) for part, found in clips.items()}


def test_folder_with_parts(tmp_path, capsys):
    write_tone(tmp_path / "train/a.wav", "one two")
    write_tone(tmp_path / "train/b.wav", "three")
    write_tone(tmp_path / "train/c.flac", "")
    write_tone(tmp_path / "test/d.wav", "THREE")
    assert names(folder_clips(tmp_path, max_bad=25)) == {"train": ["a.wav"], "test": ["d.wav"]}
    told = capsys.readouterr().err
    assert "c.flac: no transcript" in told and "1 training clips" in told


def test_folder_splits_by_talker_or_stem(tmp_path):
    for talker_name in "pqrst":
        for i in range(3):
            write_tone(tmp_path / "many" / talker_name / f"{i}.wav", f"{talker_name} says {i}")
    clips = folder_clips(tmp_path / "many")
    people = {part: {clip.name.split("/")[-2] for clip in found} for part, found in clips.items()}
    assert len(people["test"]) == 1 and len(people["train"]) == 4 and not people["test"] & people["train"]
    for i in range(10):
        write_tone(tmp_path / "one" / f"{i}.wav", f"word {i}")
    one, again = folder_clips(tmp_path / "one"), folder_clips(tmp_path / "one")
    assert len(one["test"]) == 2 and len(one["train"]) == 8 and names(one) == names(again)


def test_a_talker_s_sessions_stay_together(tmp_path):
    for session in ("alice/day1", "alice/day2", "bob/day1", "carl/day1", "carl/day2"):
        write_tone(tmp_path / session / "a.wav", session)
    people = {part: {clip.name.split("/")[-3] for clip in found} for part, found in folder_clips(tmp_path).items()}
    assert not people["train"] & people["test"]


def test_folder_errors(tmp_path):
    with pytest.raises(ClipError, match="no clips here"):
        folder_clips(tmp_path)
    write_tone(tmp_path / "a.wav", "")
    with pytest.raises(ClipError, match="1 of 1 clips cannot be used .* --max-bad 1 %"):
        folder_clips(tmp_path)
    with pytest.raises(ClipError, match="no usable clip"):
        folder_clips(tmp_path, max_bad=100)


