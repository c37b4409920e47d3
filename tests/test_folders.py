"""python -m pytest tests/test_folders.py: folders of clips, their transcripts and splits."""
import re

import numpy as np
import pytest
import soundfile
from conftest import ffmpeg

from data import TASKS, ClipError, task_streams
from real import clips, media
from real.folders import entries, folder_clips, read_entry
from real.layouts import Entry, named_split, recognise, transcript


def test_transcripts(tmp_path):
    clip, txt, align = tmp_path / "a.mp4", tmp_path / "a.txt", tmp_path / "a.align"
    with pytest.raises(ClipError, match="no transcript, expected a.txt or a.align"):
        transcript(Entry(clip, ""))
    align.write_text("0 100 sil\n100 200 bin\n200 300 sp\n300 400 blue\n400 500 sil\n")
    assert transcript(Entry(clip, "", source=align)) == "bin blue"
    txt.write_text("Text:  SO IT'S 5, ISN'T IT\nConf:  4\n")
    assert transcript(Entry(clip, "", source=txt)) == "SO IT'S 5, ISN'T IT"
    txt.write_text("one line\nfor each\nsegment\n")
    assert transcript(Entry(clip, "", source=txt)) == "one line for each segment"
    txt.write_text("Disk reference:  6075\nChannel:  BBC1\nDuration:  1.16 seconds\n")
    with pytest.raises(ClipError, match="facts about a clip of LRW"):
        transcript(Entry(clip, "", source=txt))
    write_tone(clip.with_suffix(".wav"), "")
    for content, message in ((b"", "no words"), (b"...\n", "no words"), (b"caf\xe9", "not UTF-8"),
                             (b"word " * 200_000, "1,000,000 letters|999,999 letters")):
        txt.write_bytes(content)
        assert re.search(message, str(read_entry(Entry(clip.with_suffix(".wav"), "", source=txt)))), content[:9]


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
    assert names(folder_clips(tmp_path, max_bad=25)) == {"train": ["a.wav", "b.wav"], "test": ["d.wav"]}
    notes = capsys.readouterr().err
    assert "c.flac: no transcript" in notes
    assert "used, as the folder names its splits: 1 training clips" in notes and "--disjoint leaves them out" in notes
    assert names(folder_clips(tmp_path, max_bad=25, disjoint=True)) == {"train": ["a.wav"], "test": ["d.wav"]}
    assert "left out: 1 training clips" in capsys.readouterr().err


def test_no_sentence_is_in_both_of_our_own_splits(tmp_path, capsys):
    for i in range(10):
        write_tone(tmp_path / f"{i}.wav", "one" if i < 8 else f"two {i}")
    splits = folder_clips(tmp_path)
    assert not {clip.text for clip in splits["train"]} & {clip.text for clip in splits["test"]}
    assert "left out: " in capsys.readouterr().err


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
    split = {entry.path.name: entry.split for entry in entries(tmp_path)[1]}
    assert split["a b.wav"] == split["d.wav"] == split["e.wav"] != split["c.wav"]  # a talker is in one split
    for text, message in (("file,text\na.wav,x\n", "manifest.csv: no column 'path'"), ("", "no column 'path'"),
                          ("path\na.wav\n", "no column 'text'"), ("path,text\n", "no clips here")):
        manifest.write_text(text)
        with pytest.raises(ClipError, match=message):
            entries(tmp_path)
    manifest.write_bytes(b"path,text\na.wav,caf\xe9\n")
    with pytest.raises(ClipError, match="manifest.csv: not UTF-8 text"):
        entries(tmp_path)
    manifest.write_text("path,text,split\na b.wav,one,train\nc.wav,two,test\ngone.wav,three,train\ne.wav,,train\n")
    folder_clips(tmp_path, max_bad=50)
    notes = capsys.readouterr().err
    assert "gone.wav: no such file" in notes and "e.wav: no words" in notes


def test_grid_as_downloaded(tmp_path):
    align = "0 100 sil\n100 200 bin\n200 300 blue\n"
    for talker, folder in (("s1", "s1/align"), ("s2", "align"), ("s3", "align/s3"), ("s4", "s4")):
        write_tone(tmp_path / talker / f"{talker}a.wav", "")
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / f"{talker}a.align").write_text(align)
    for entry in entries(tmp_path)[1]:
        assert read_entry(entry).text == "bin blue", entry
    assert {entry.talker for entry in entries(tmp_path)[1]} == {"s1", "s2", "s3", "s4"}


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


def test_check_names_the_words_that_training_lacks(tmp_path, capsys):
    write_tone(tmp_path / "train/a.wav", "one two")
    write_tone(tmp_path / "test/b.wav", "one three")
    assert clips.main(["check", str(tmp_path)]) == 0
    assert "1 words of the test split are not in training: three\n" in capsys.readouterr().out


def test_a_talker_in_two_spellings_of_unicode_is_one(tmp_path):
    """As macOS and Linux write the same letter. Of one talker a fifth of the clips is held out."""
    rows = "".join(f"{i}{n}.wav,says {i} {n},Zo{e}\n" for i in range(5) for n, e in enumerate(("\u00eb", "e\u0308")))
    (tmp_path / "manifest.csv").write_text("path,text,talker\n" + rows, "utf-8")
    assert sorted(entry.split for entry in entries(tmp_path)[1]) == ["test"] * 2 + ["train"] * 8


def test_hidden_files_and_folders_are_no_clips(tmp_path):
    """As macOS writes them."""
    for name in ("ann/a", "ann/._a", ".trash/b"):
        write_tone(tmp_path / f"{name}.wav", f"says {name[-1]}")
    assert [entry.path.name for entry in entries(tmp_path)[1]] == ["a.wav"]


# --- layouts as they are downloaded ---

ALIGN = "0 100 sil\n100 200 bin\n200 300 blue\n"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def found(folder):
    """Layout of a folder and {path below it: (talker, split, text)} of its clips, each of which can be read."""
    layout, listed, _ = entries(folder)
    read = {entry: read_entry(entry) for entry in listed}
    return layout, {str(entry.path.relative_to(folder)): (entry.talker, entry.split, clip.text) for entry, clip in read.items()}


def test_grid_of_zenodo_and_of_lipnet(tmp_path):
    for talker in ("s1", "s2"):
        write_tone(tmp_path / f"zenodo/{talker}/bbaf2n.flac", "")
        (tmp_path / f"zenodo/{talker}/bbaf2n.flac").rename(tmp_path / f"zenodo/{talker}/bbaf2n.mpg")
        write_tone(tmp_path / f"zenodo/audio_25k/{talker}/bbaf2n.wav", "")
        write(tmp_path / f"zenodo/alignments/{talker}/bbaf2n.align", ALIGN)
        write_tone(tmp_path / f"lipnet/datasets/video/{talker}/bbaf2n.wav", "")
    write(tmp_path / "lipnet/datasets/align/bbaf2n.align", ALIGN)
    layout, clips_found = found(tmp_path / "zenodo")
    assert layout == "GRID" and set(clips_found) == {"s1/bbaf2n.mpg", "s2/bbaf2n.mpg"}
    assert {talker for talker, _, _ in clips_found.values()} == {"s1", "s2"}
    layout, clips_found = found(tmp_path / "lipnet")
    assert layout == "GRID" and {text for _, _, text in clips_found.values()} == {"bin blue"} and len(clips_found) == 2


def test_an_alignment_is_that_of_the_talker(tmp_path):
    for talker, word in (("s1", "red"), ("s2", "green")):
        write_tone(tmp_path / talker / "a.wav", "")
        write(tmp_path / "align" / talker / "a.align", f"0 1 {word}\n")
    assert {path: text for path, (_, _, text) in found(tmp_path)[1].items()} == {"s1/a.wav": "red", "s2/a.wav": "green"}


def test_lrs2(tmp_path):
    for name in ("main/100/00001", "main/100/00002", "main/200/00001", "pretrain/300/00001"):
        write_tone(tmp_path / f"{name}.wav", f"Text:  SAYS {name}\nConf:  5\n")
        (tmp_path / f"{name}.wav").rename(tmp_path / f"{name}.mp4")
    write(tmp_path / "train.txt", "100/00001\n")
    write(tmp_path / "val.txt", "100/00002\n")
    write(tmp_path / "test.txt", "200/00001 NF\n")
    write(tmp_path / "pretrain.txt", "300/00001\n")
    layout, clips_found = found(tmp_path)
    splits = {path: (talker, split) for path, (talker, split, _) in clips_found.items()}
    assert layout == "LRS2" and splits == {
        "main/100/00001.mp4": ("100", "train"), "main/100/00002.mp4": ("100", "valid"),
        "main/200/00001.mp4": ("200", "test"), "pretrain/300/00001.mp4": ("300", "train")}
    (tmp_path / "val.txt").unlink()
    with pytest.raises(ClipError, match="no val.txt"):
        entries(tmp_path)


def test_lrs3_cuts_long_clips_by_their_word_times(tmp_path):
    rate, words = 16000, [f"w{i}" for i in range(40)]
    table = "".join(f"{word} {i} {i + 0.9} 5.0\n" for i, word in enumerate(words))
    write(tmp_path / "pretrain/p1/00001.txt", f"Text:  {' '.join(words)}\nConf:  5\n\nWORD START END ASDSCORE\n{table}")
    wave = np.repeat(np.linspace(0.01, 0.4, 40), rate) * np.random.default_rng(0).standard_normal(40 * rate)
    soundfile.write(tmp_path / "pretrain/p1/00001.wav", wave.clip(-1, 1), rate)
    write_tone(tmp_path / "test/p2/00001.wav", "Text:  SHORT\nConf:  4\n")
    layout, listed, _ = entries(tmp_path)
    assert layout == "LRS3"
    pieces = [read_entry(entry) for entry in listed if entry.split == "train"]
    assert " ".join(piece.text for piece in pieces) == " ".join(words) and len(pieces) == 2
    assert len({piece.name for piece in pieces}) == 2
    first, second = pieces
    assert first.duration == pytest.approx(19.9, abs=.1) and second.duration == pytest.approx(19.9, abs=.1)
    assert np.abs(first.wave).mean() < np.abs(second.wave).mean() / 2     # the second piece is the louder half


def test_librispeech(tmp_path):
    for part, talker in (("train-clean-100", 19), ("dev-clean", 84), ("test-other", 367)):
        folder = tmp_path / f"LibriSpeech/{part}/{talker}/198"
        lines = ""
        for i in range(2):
            write_tone(folder / f"{talker}-198-000{i}.flac", "")
            lines += f"{talker}-198-000{i} SAYS {talker} {i}\n"
        write(folder / f"{talker}-198.trans.txt", lines)
    layout, clips_found = found(tmp_path)
    assert layout == "LibriSpeech" and clips_found["LibriSpeech/train-clean-100/19/198/19-198-0001.flac"] == ("19", "train", "says 19 1")
    assert sorted(split for _, split, _ in clips_found.values()) == ["test", "test", "train", "train", "valid", "valid"]


def test_an4(tmp_path):
    for part, talker in (("train", "fash"), ("test", "fcaw")):
        name = f"an4{'test' * (part == 'test')}_clstk/{talker}/an251-{talker}-b"
        write_tone(tmp_path / f"wav/{name}.wav", "")
        (tmp_path / f"wav/{name}.wav").rename(tmp_path / f"wav/{name}.sph")
        write(tmp_path / f"etc/an4_{part}.fileids", f"{name}\n")
        write(tmp_path / f"etc/an4_{part}.transcription", f"<s> YES ++NOISE++ {talker} </s> (an251-{talker}-b)\n")
    layout, clips_found = found(tmp_path)
    assert layout == "Sphinx lists" and set(clips_found.values()) == {("fash", "train", "yes fash"), ("fcaw", "test", "yes fcaw")}


def test_common_voice(tmp_path):
    for name, text in (("train", 'he said "no'), ("dev", "two"), ("test", "three"), ("validated", "four")):
        write_tone(tmp_path / f"clips/{name}.wav", "")
        write(tmp_path / f"{name}.tsv", f"client_id\tpath\tsentence\tup_votes\nann\t{name}.wav\t{text}\t2\n")
    layout, clips_found = found(tmp_path)
    assert layout == "Common Voice" and {path: found[1:] for path, found in clips_found.items()} == {
        "clips/train.wav": ("train", "he said no"), "clips/dev.wav": ("valid", "two"), "clips/test.wav": ("test", "three")}


@pytest.mark.parametrize("name, separator", [("manifest.csv", ","), ("manifest.csv", ";"), ("manifest.tsv", "\t")])
def test_splits_of_a_manifest_in_any_spelling(tmp_path, name, separator):
    for clip in "abc":
        write_tone(tmp_path / f"{clip}.wav", "")
    rows = (("Path", "TEXT", "Split"), ("a.wav", "one", "Train"), ("b.wav", "two", "TEST"), ("c.wav", "three", "dev "))
    write(tmp_path / name, "\n".join(separator.join(row) for row in rows))
    assert {path: split for path, (_, split, _) in found(tmp_path)[1].items()} == {"a.wav": "train", "b.wav": "test", "c.wav": "valid"}
    write(tmp_path / name, separator.join(rows[0]) + "\n" + separator.join(("a.wav", "one", "holdout")))
    with pytest.raises(ClipError, match="line 2: split 'holdout' is not one of"):
        entries(tmp_path)


def test_a_row_with_too_many_columns_is_named(tmp_path):
    write_tone(tmp_path / "a.wav", "")
    write(tmp_path / "manifest.csv", "path,text,split\na.wav,hello, world,train\n")
    with pytest.raises(ClipError, match="manifest.csv: line 2 has 4 columns, its header 3"):
        entries(tmp_path)


def test_links_are_followed_and_circles_are_not(tmp_path):
    write_tone(tmp_path / "clips/ann/a.wav", "one")
    write_tone(tmp_path / "elsewhere/bob/b.wav", "two")
    (tmp_path / "clips/bob").symlink_to(tmp_path / "elsewhere/bob")
    (tmp_path / "clips/ann/circle").symlink_to(tmp_path / "clips")
    assert sorted(found(tmp_path / "clips")[1]) == ["ann/a.wav", "bob/b.wav"]


def test_a_folder_that_has_two_names_is_read_once(tmp_path, capsys):
    """Two folders that link to each other are a circle, and a link may stand in another split than its folder."""
    for talker, other in (("ann", "bob"), ("bob", "ann")):
        write_tone(tmp_path / "mutual" / talker / "a.wav", talker)
        (tmp_path / "mutual" / talker / "friend").symlink_to(tmp_path / "mutual" / other)
    assert sorted(found(tmp_path / "mutual")[1]) == ["ann/a.wav", "bob/a.wav"]
    write_tone(tmp_path / "splits/train/ann/a.wav", "one")
    (tmp_path / "splits/test").symlink_to(tmp_path / "splits/train")
    assert list(found(tmp_path / "splits")[1]) == ["train/ann/a.wav"]
    assert "test: this folder is read already, under another name" in capsys.readouterr().err


def test_lists_that_no_layout_uses_are_named(tmp_path):
    for split in ("train", "val", "test"):
        write_tone(tmp_path / f"mvlrs_v1/main/55/{split}.wav", f"Text: {split}")
        write(tmp_path / f"{split}.txt", f"55/{split}\n")
    with pytest.raises(ClipError, match="train.txt: a list without its clips: LRS2's lies beside main/"):
        entries(tmp_path)
    write_tone(tmp_path / "own/train.wav", "choo choo")
    assert [text for _, _, text in found(tmp_path / "own")[1].values()] == ["choo choo"]


def test_pictures_and_sound_of_one_name_are_one_clip(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 255, (30, 32, 32), np.uint8)
    media.write_mp4(tmp_path / "both.mp4", pictures, np.zeros(19200, np.float32))
    ffmpeg("-i", tmp_path / "both.mp4", "-an", "-c:v", "copy", tmp_path / "a.mp4")
    (tmp_path / "both.mp4").unlink()
    write_tone(tmp_path / "a.wav", "one")
    (_, listed, _) = entries(tmp_path)
    clip, = map(read_entry, listed)
    assert clip.streams == ("audio", "video") and len(clip.wave) == 19200 and np.abs(clip.wave[:16000]).mean() > .05
    assert read_entry(listed[0], {"streams": task_streams(["asr"])}).streams == ("audio",)


def test_what_is_passed_over_is_said(tmp_path, capsys):
    for i in range(5):
        write_tone(tmp_path / f"{i}.wav", f"word {i}")
    (tmp_path / "0.wav").rename(tmp_path / "0.xyz")
    ffmpeg("-i", tmp_path / "1.wav", tmp_path / "1.opus")
    (tmp_path / "1.wav").unlink()
    assert clips.main(["check", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "layout: transcripts beside the clips; passed over: 1 .xyz" in out and "4 clips can be used" in out
    folder_clips(tmp_path)
    assert "passed over" in capsys.readouterr().err


def test_one_split_alone_is_split_by_talker(tmp_path):
    for talker in "abcde":
        write_tone(tmp_path / f"train-clean-100/{talker}/1/{talker}-1-0.wav", "")
        write(tmp_path / f"train-clean-100/{talker}/1/{talker}-1.trans.txt", f"{talker}-1-0 SAYS {talker}\n")
    assert sorted(split for _, split, _ in found(tmp_path)[1].values()) == ["test", "train", "train", "train", "train"]


def test_clips_of_one_name_below_different_talkers_are_all_there(tmp_path):
    for talker in ("ann", "bob", "carl"):
        for i in (1, 2):
            write_tone(tmp_path / f"{talker}/day1/{i}.wav", f"{talker} says {i}")
            (tmp_path / f"{talker}/day1/{i}.wav").rename(tmp_path / f"{talker}/day1/{i}.mp4")
    assert len(found(tmp_path)[1]) == 6
    write_tone(tmp_path / "bob/day1/3.wav", "bob says 3")
    write_tone(tmp_path / "bob/day2/3.mp4.wav", "")
    (tmp_path / "bob/day2/3.mp4.wav").rename(tmp_path / "bob/day2/3.MP4")
    write(tmp_path / "bob/day2/3.TXT", "another clip")
    texts = {path: text for path, (_, _, text) in found(tmp_path)[1].items()}
    assert len(texts) == 8 and texts["bob/day2/3.MP4"] == "another clip" and texts["bob/day1/3.wav"] == "bob says 3"


def test_a_stray_quote_and_a_damaged_word_table(tmp_path, capsys):
    write_tone(tmp_path / "a.wav", "")
    write(tmp_path / "manifest.csv", 'path,text\na.wav,"hello\nb.wav,two\n')
    with pytest.raises(ClipError, match="manifest.csv: line 3: not a table"):
        entries(tmp_path)
    write_tone(tmp_path / "lrs/pretrain/p/1.wav", "Text:  HELLO\n\nWORD START END ASDSCORE\nX 0.1 n/a 3\n")
    assert read_entry(entries(tmp_path / "lrs")[1][0]).text == "hello"


def test_clips_in_no_split_are_said(tmp_path, capsys):
    for name in ("train/a", "test/b", "extra/c"):
        write_tone(tmp_path / f"{name}.wav", f"says {name}")
    assert len(entries(tmp_path)[1]) == 2 and "1 clips are in no split" in capsys.readouterr().err


@pytest.mark.parametrize("name, split", [("train1", "train"), ("testset", "test"), ("dev-other", "valid"), ("Test_2", "test"),
                                         ("s1", None), ("trains", None), ("testament", None), ("2", None)])
def test_names_of_splits(name, split):
    assert named_split(name) == split


def test_sphinx_lists_with_folders_in_their_ids(tmp_path):
    for name, part in (("fash/one", "train"), ("fcaw/one", "test")):
        write_tone(tmp_path / f"wav/{name}.wav", "")
        (tmp_path / "etc").mkdir(exist_ok=True)
        (tmp_path / f"etc/my-{part}.fileids").write_text(f"{name}\n")
        (tmp_path / f"etc/my-{part}.transcription").write_text(f"<s> says {name[:4]} </s> ({name})\n")
    assert [(entry.split, entry.text.strip()) for entry in entries(tmp_path)[1]] == [("test", "says fcaw"), ("train", "says fash")]


# --- what folders of one's own hold ---

def test_a_table_below_the_folder_is_named(tmp_path):
    write_tone(tmp_path / "my/clips/0.wav", "beside")
    write(tmp_path / "my/Manifest.CSV", "path,text\nclips/0.wav,zero\n")
    with pytest.raises(ClipError, match=f"layout manifest is in {tmp_path}/my, below it; give that"):
        entries(tmp_path)
    layout, clips_found = found(tmp_path / "my")
    assert layout == "manifest" and clips_found["clips/0.wav"][2] == "zero"
    write(tmp_path / "my/manifest.tsv", "path\ttext\nclips/0.wav\tone\n")
    with pytest.raises(ClipError, match="two tables, Manifest.CSV and manifest.tsv; keep one"):
        entries(tmp_path / "my")
    for name in ("train", "val", "test"):
        write(tmp_path / f"deep/mvlrs_v1/{name}.txt", "1/0\n")
    write_tone(tmp_path / "deep/mvlrs_v1/main/1/0.wav", "Text:  HELLO\n")
    with pytest.raises(ClipError, match="layout LRS2 is in .*mvlrs_v1, below it"):
        entries(tmp_path / "deep")


def test_a_folder_main_of_one_s_own_is_not_lrs2(tmp_path):
    write_tone(tmp_path / "main/a.wav", "one")
    assert found(tmp_path) == ("transcripts beside the clips", {"main/a.wav": ("", "test", "one")})


def test_an_alignment_of_another_talker_is_not_taken(tmp_path):
    for talker in ("s1", "s2", "S3"):
        write_tone(tmp_path / talker / "001.wav", "")
    write(tmp_path / "s2/001.align", "0 1000 hello\n1000 2000 new york\n")
    write(tmp_path / "alignments/s3/001.align", "0 1 green\n")
    listed = {entry.talker: read_entry(entry) for entry in entries(tmp_path)[1]}
    assert "no transcript" in str(listed["s1"])
    assert (listed["s2"].text, listed["S3"].text) == ("hello new york", "green")
    write(tmp_path / "s2/001.align", "0 1000 hello\n1000 2000\n")
    assert any("line '1000 2000', expected its start" in str(read_entry(entry)) for entry in entries(tmp_path)[1])


def test_alignments_that_fit_equally_well_are_not_guessed(tmp_path):
    for talker in ("s1", "s2"):
        write_tone(tmp_path / f"{talker}.mpg_vcd/{talker}/a.wav", "")
        write(tmp_path / f"{talker}.align/align/a.align", "0 1 SIL\n1 2 red\n")
    assert {text for _, _, text in found(tmp_path)[1].values()} == {"red"}
    write(tmp_path / "s2.align/align/a.align", "0 1 green\n")
    assert all("no transcript" in str(read_entry(entry)) for entry in entries(tmp_path)[1])


def test_timit(tmp_path):
    for split in ("TRAIN", "TEST"):
        write_tone(tmp_path / f"{split}/DR1/FCJF0/SA1.WAV", "")
        write(tmp_path / f"{split}/DR1/FCJF0/SA1.TXT", "0 46797 She had your dark suit.\n")
        write(tmp_path / f"{split}/DR1/FCJF0/SA1.PHN", "0 3050 h#\n")
    assert {text for _, _, text in found(tmp_path)[1].values()} == {"she had your dark suit"}


def test_columns_and_lines_that_are_not_used_are_said(tmp_path, capsys):
    write_tone(tmp_path / "a.wav", "")
    write(tmp_path / "manifest.csv", "path,text,subset,start\na.wav,one,test,0\n , ,,\n")
    assert found(tmp_path)[1]["a.wav"][2] == "one"
    assert "manifest.csv: columns that are not used: start, subset" in capsys.readouterr().err
    write(tmp_path / "manifest.csv", "path,text,start\na.wav,one,0\na.wav,one,0\na.wav,two,1\n")
    with pytest.raises(ClipError, match="line 4: 'a.wav' has another text on line 2"):
        entries(tmp_path)
    write(tmp_path / "manifest.csv", "path,text,text\na.wav,one,two\n")
    with pytest.raises(ClipError, match="two columns 'text'"):
        entries(tmp_path)


def test_a_clip_is_used_however_the_table_writes_its_path(tmp_path, monkeypatch):
    write_tone(tmp_path / "data/a.wav", "")
    write_tone(tmp_path / "data/b.wav", "")
    write(tmp_path / "data/manifest.csv", f"path,text\n{tmp_path}/data/a.wav,one\n../data/b.wav,two\n")
    monkeypatch.chdir(tmp_path)
    assert entries("data")[2] == ""
    write_tone(tmp_path / "data/c.wav", "")
    assert entries("data")[2] == "1 .wav"


def test_sound_beside_silent_pictures(tmp_path, capsys):
    pictures = np.random.default_rng(0).integers(0, 255, (30, 32, 32), np.uint8)
    media.write_mp4(tmp_path / "a.mp4", pictures, np.zeros(19200, np.float32))
    write_tone(tmp_path / "a.wav", "one")
    entry, = entries(tmp_path)[1]
    for task in ("avsr", "asr"):
        clip = read_entry(entry, {"streams": task_streams([task])})
        assert np.abs(clip.wave[:16000]).mean() > .05 and clip.streams == TASKS[task]
    assert "silent" not in capsys.readouterr().err
    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(24000), 16000)
    clip = read_entry(entry)                                    # 0.3 s more than the pictures
    assert len(clip.wave) == 640 * len(clip.frames) == 160 * clip.log_power.shape[1]
    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(64000), 16000)
    assert "a.wav: 4.0 s of sound for 1.2 s of pictures; is it another clip's?" in str(read_entry(entry))


@pytest.mark.parametrize("table, reason", [
    ("A 0 1\nB 5 6\nC 40 42", "1.0 s long, and its transcript has words at"), ("A -0.1 1\nB 31 32", None),
    ("A 0 1\nB 31 inf", None), ("A 0 nan\nB 40 41", None), ("A 7 8\nB 2 3\nC 40 41", None)])
def test_word_times_that_cannot_be(tmp_path, table, reason):
    write_tone(tmp_path / "pretrain/p/1.wav", "Text:  A B C\n\nWORD START END ASDSCORE\n" + "".join(
        f"{line} 1\n" for line in table.splitlines()))
    listed = entries(tmp_path)[1]
    if reason:
        assert len(listed) > 1 and all(reason in str(read_entry(entry)) for entry in listed)
    else:
        assert len(listed) == 1 and read_entry(listed[0]).text == "a b c"


def test_talkers_around_the_folder_of_a_split(tmp_path):
    for talker in ("ann", "bob"):
        write_tone(tmp_path / f"above/{talker}/train/1.wav", f"{talker} one")
        write_tone(tmp_path / f"below/train/video/{talker}/1.wav", f"{talker} one")
        write_tone(tmp_path / f"kinds/{'audio' if talker == 'ann' else 'video'}/{talker}/1.wav", f"{talker} one")
    for folder in ("above", "below", "kinds"):
        assert {talker for talker, _, _ in found(tmp_path / folder)[1].values()} == {"ann", "bob"}


def test_lists_that_lack_a_text_or_have_two(tmp_path, capsys):
    for name in ("ann/one", "bob/one"):
        write_tone(tmp_path / f"wav/{name}.wav", "")
    write(tmp_path / "etc/my_train.fileids", "ann/one\nbob/one\n")
    with pytest.raises(ClipError, match="my_train.transcription: No such file"):
        entries(tmp_path)
    write(tmp_path / "etc/my_train.transcription", "<s> HELLO ANN </s> (one)\n<s> GOODBYE BOB </s> (one)\n")
    with pytest.raises(ClipError, match="two texts of 'one'; name the folder too"):
        entries(tmp_path)
    write(tmp_path / "etc/my_train.transcription", "HELLO ANN (ann/one)\n")
    assert "bob/one.wav: no transcript, expected a line for it in my_train.transcription" in str(
        [read_entry(entry) for entry in entries(tmp_path)[1]])
    write_tone(tmp_path / "libri/1/2/1-2-0.wav", "")
    write_tone(tmp_path / "libri/1/2/1-2-9.wav", "")
    write(tmp_path / "libri/1/2/1-2.trans.txt", "1-2-0\tHELLO\n\n1-2-1 LOST\n")
    read = [read_entry(entry) for entry in entries(tmp_path / "libri")[1]]
    assert read[0].text == "hello" and "expected a line for it in 1-2.trans.txt" in str(read[1])
    assert "1 lines in .trans.txt have no sound, like 1-2-1" in capsys.readouterr().err


def test_files_that_hold_no_clip_are_named(tmp_path):
    write(tmp_path / "a.mp4", "version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 12\n")
    write(tmp_path / "a.txt", "hi")
    assert "a Git LFS pointer" in str(read_entry(entries(tmp_path)[1][0]))
    write(tmp_path / "a.mp4", "")
    assert "an empty file" in str(read_entry(entries(tmp_path)[1][0]))
    write(tmp_path / "a.mp4", "<!doctype html><html>404 Not Found")
    assert "misdetection" not in str(read_entry(entries(tmp_path)[1][0]))
    with pytest.raises(ClipError, match="a.mp4: a file; give its folder"):
        entries(tmp_path / "a.mp4")


# --- splits, as they are downloaded in part ---

def test_training_clips_alone_are_split_here(tmp_path):
    for i in range(6):
        write_tone(tmp_path / f"{i}.wav", "")
    write(tmp_path / "manifest.csv", "path, text, split, talker\n" + "".join(f'{i}.wav, "says, {i}", train, t{i}\n' for i in range(6)))
    parts = folder_clips(tmp_path)
    assert len(parts["train"]) == 5 and [clip.text[:5] for clip in parts["test"]] == ["says "]


def test_a_valid_split_is_tested_where_no_other_is(tmp_path, capsys):
    for name in ("train-clean-5/a", "train-clean-5/b", "dev-clean-2/c"):
        write_tone(tmp_path / f"{name}.wav", f"says {name[-1]}")
    assert names(folder_clips(tmp_path)) == {"train": ["a.wav", "b.wav"], "test": ["c.wav"]}
    assert "no clip is in its test split; those of its valid split take their place" in capsys.readouterr().err


def test_a_split_without_clips_is_said_before_any_is_read(tmp_path, monkeypatch):
    write_tone(tmp_path / "test-clean/a.wav", "one")
    write_tone(tmp_path / "test-clean/b.wav", "two")
    with monkeypatch.context() as patch:
        patch.setattr("real.folders.read_clip", lambda *_, **__: 1 / 0)
        with pytest.raises(ClipError, match=r"no clip is in its train split \(2 in test\)"):
            folder_clips(tmp_path)
    assert names(folder_clips(tmp_path, splits=("test",))) == {"test": ["a.wav", "b.wav"]}      # as --eval-only does


@pytest.mark.parametrize("small", ("ann", "bob"))
def test_the_talker_with_most_clips_trains(tmp_path, small):
    for talker in ("ann", "bob"):
        for i in range(1 if talker == small else 4):
            write_tone(tmp_path / f"{talker}/{i}.wav", f"{talker} says {i}")
    assert {clip.name.split("/")[-2] for clip in folder_clips(tmp_path)["test"]} == {small}


def test_a_text_in_quotes_may_have_several_lines(tmp_path):
    write_tone(tmp_path / "a.wav", "")
    write(tmp_path / "manifest.tsv", 'path\ttext\t\na.wav\t"hello\nyou"\n')
    entry, = recognise(tmp_path)[1]
    assert entry.text == "hello\nyou"


def test_common_voice_and_lrs2_in_any_spelling(tmp_path):
    write_tone(tmp_path / "cv/clips/a.wav", "")
    write(tmp_path / "cv/Test.tsv", 'client_id\tpath\tsentence\nx\ta.wav\tthe "word\n')
    name, (entry,), _ = recognise(tmp_path / "cv")
    assert (name, entry.split, entry.text) == ("Common Voice", "test", 'the "word')
    for split in ("Train", "Val", "Test"):
        write(tmp_path / f"lrs2/{split}.txt", f"5535/{split}\n")
        write(tmp_path / f"lrs2/Main/5535/{split}.mp4", "")
        write(tmp_path / f"lrs2/Main/5535/{split}.txt", "Text: one")
    name, listed, _ = recognise(tmp_path / "lrs2")
    assert (name, [entry.split for entry in listed]) == ("LRS2", ["train", "valid", "test"])
    assert all(entry.path.exists() for entry in listed)


@pytest.mark.parametrize("times, pieces", [
    ([(1, 2), (66, 67)], ["A0", "A1"]), ([(i, i + 1) for i in range(29)], [" ".join(f"A{i}" for i in range(20)), None]),
    ([(i, i + 1) for i in range(24)], [None])])
def test_where_clips_with_word_times_are_cut(tmp_path, times, pieces):
    table = "\n".join(f"A{i} {start} {end} 9.9" for i, (start, end) in enumerate(times))
    write(tmp_path / "pretrain/ann/a.txt", f"Text: all\n\nWORD START END ASDSCORE\n{table}\n\n")
    write_tone(tmp_path / "pretrain/ann/a.wav", None)
    texts = [entry.text for entry in recognise(tmp_path)[1]]
    assert len(texts) == len(pieces) and all(text == piece for text, piece in zip(texts, pieces) if piece)


# --- folders that are easily misread ---

def test_numbered_folders_keep_their_own_sound(tmp_path):
    for session in ("video_1", "video_2"):
        write_tone(tmp_path / session / "a.wav", f"says {session}")
        write(tmp_path / session / "a.mp4", "")
    listed = entries(tmp_path)[1]
    assert {entry.path: entry.sound for entry in listed} == {
        tmp_path / session / "a.mp4": tmp_path / session / "a.wav" for session in ("video_1", "video_2")}
    assert {entry.talker for entry in listed} == {"video_1", "video_2"}


def test_a_quote_over_two_rows_is_refused(tmp_path):
    write(tmp_path / "manifest.tsv", 'path\ttext\na.wav\t"I will go\nb.wav\tand you will stay"\n')
    with pytest.raises(ClipError, match="manifest.tsv: line 3: not a table: .* is a quote missing"):
        entries(tmp_path)
    write(tmp_path / "manifest.tsv", 'path\ttext\na.wav\t"two\nlines"\n')
    assert entries(tmp_path)[1][0].text == "two\nlines"


@pytest.mark.parametrize("other, split", [("evaluation", "test"), ("TestData", "test"), ("valset", "test"), ("heldout", None)])
def test_no_clip_outside_the_train_folder_is_trained_on(tmp_path, other, split, capsys):
    for i in range(10):
        write_tone(tmp_path / f"train/{i}.wav", f"says {i}")
    write_tone(tmp_path / other / "x.wav", "says x")
    found = {entry.path.stem: entry.split for entry in entries(tmp_path)[1]}
    assert found.get("x") == split and set(found.values()) == {"train", "test"}
    assert ("1 clips are in no split" in capsys.readouterr().err) == (split is None)


def test_a_talker_called_dev_is_no_split(tmp_path):
    for talker in ("alice", "bob", "carl", "Dev", "priya"):
        write_tone(tmp_path / talker / "a.wav", f"says {talker}")
    assert sorted(entry.split for entry in entries(tmp_path)[1]) == ["test", *["train"] * 4]


def test_talkers_of_a_table_without_that_column(tmp_path):
    people = "alice", "bob", "carl", "dora", "eve"
    rows = [f"{talker}/{i}.wav,says {talker} {i}" for name in people for talker in (name, name.title()) for i in range(3)]
    write(tmp_path / "manifest.csv", "\n".join(["path,text", *rows]))
    listed = entries(tmp_path)[1]
    splits = {name: {entry.split for entry in listed if entry.talker.lower() == name} for name in people}
    assert sorted(map(sorted, splits.values())) == [["test"], *[["train"]] * 4]
    write(tmp_path / "manifest.csv", "path,text\na.wav,#NAME?\n")
    with pytest.raises(ClipError, match="line 2: #NAME\\? is a spreadsheet's error"):
        entries(tmp_path)


def test_sounds_and_pictures_of_one_name_with_two_texts(tmp_path):
    write_tone(tmp_path / "audio/1.wav", "what was heard")
    write(tmp_path / "video/1.mp4", "")
    write(tmp_path / "video/1.txt", "what was heard")
    assert [entry.sound for entry in entries(tmp_path)[1]] == [tmp_path / "audio/1.wav"]
    write(tmp_path / "video/1.txt", "what was seen")
    with pytest.raises(ClipError, match="audio/1.txt: another text than in .*video/1.txt"):
        entries(tmp_path)


def test_texts_of_no_clip_are_said(tmp_path, capsys):
    write_tone(tmp_path / "a.wav", "says a")
    entries(tmp_path)
    assert not capsys.readouterr().err
    write(tmp_path / "b.txt", "says b")
    entries(tmp_path)
    assert "1 .txt belong to no clip, like b.txt" in capsys.readouterr().err


def test_tags_are_no_words(tmp_path):
    write_tone(tmp_path / "a.wav", "Text:  {LG} THANK YOU <noise> [MUSIC] ＜noise＞［音楽］｛あ｝ ++um++ ALL")
    assert read_entry(entries(tmp_path)[1][0]).text == "thank you all"


def test_every_line_beside_a_phn(tmp_path):
    write_tone(tmp_path / "a.wav", "0 400 first line\n400 900 second line\n")
    write(tmp_path / "a.phn", "0 400 h#\n")
    assert read_entry(entries(tmp_path)[1][0]).text == "first line second line"


def test_sphinx_lists_whose_names_do_not_end_with_the_split(tmp_path):
    for split in ("train", "test"):
        write_tone(tmp_path / f"wav/{split}/a.wav", "")
        write(tmp_path / f"etc/my_{split}_v1.fileids", f"{split}/a\n")
        write(tmp_path / f"etc/my_{split}_v1.transcription", f"<s> says {split} </s> ({split}/a)\n")
    assert [(entry.split, entry.path.parent.name) for entry in entries(tmp_path)[1]] == [("test", "test"), ("train", "train")]


def splits_of(folder):
    """{path of a clip below the folder: its split}."""
    return {str(entry.path.relative_to(folder)): entry.split for entry in entries(folder)[1]}


def test_a_manifest_without_splits_leaves_them_to_the_folders(tmp_path):
    for name in ("train/ann/a", "train/bob/b", "test/eve/c"):
        write_tone(tmp_path / f"{name}.wav", "")
    write(tmp_path / "manifest.csv", "path,text\ntrain/ann/a.wav,one\ntrain/bob/b.wav,two\ntest/eve/c.wav,three\n")
    assert splits_of(tmp_path) == {"train/ann/a.wav": "train", "train/bob/b.wav": "train", "test/eve/c.wav": "test"}
    assert [entry.talker for entry in entries(tmp_path)[1]] == ["ann", "bob", "eve"]
    write(tmp_path / "manifest.csv", "path,text,split\ntrain/ann/a.wav,one,test\ntrain/bob/b.wav,two,train\ntest/eve/c.wav,x,train\n")
    assert splits_of(tmp_path) == {"train/ann/a.wav": "test", "train/bob/b.wav": "train", "test/eve/c.wav": "train"}


@pytest.mark.parametrize("name, split", [("my_test", "test"), ("lrs3-train", "train"), ("video_val", "valid"), ("trainlist", "train"),
                                         ("contest", None), ("s1_dev2", "valid"), ("latest", None)])
def test_any_word_of_a_name_tells_the_split(name, split):
    assert named_split(name) == split


def test_folders_of_a_kind_and_a_split(tmp_path):
    """The sound of a clip is found in audio_train/, and its text in txt_train/."""
    for split in ("train", "test"):
        for i in range(2):
            write(tmp_path / f"video_{split}/ann/{i}.mp4", "")
            write_tone(tmp_path / f"audio_{split}/ann/{i}.wav", "")
            write(tmp_path / f"txt_{split}/ann/{i}.txt", f"says {split} {i}")
    listed = entries(tmp_path)[1]
    assert [(str(entry.path.relative_to(tmp_path)), entry.split, entry.talker) for entry in listed] == [
        (f"video_{split}/ann/{i}.mp4", split, "ann") for split in ("test", "train") for i in range(2)]
    assert [str(entry.sound.relative_to(tmp_path)) for entry in listed] == [
        f"audio_{split}/ann/{i}.wav" for split in ("test", "train") for i in range(2)]
    assert [transcript(entry) for entry in listed] == [f"says {split} {i}" for split in ("test", "train") for i in range(2)]


@pytest.mark.parametrize("outer", ["TrainingData", "dev", "my project"])
def test_a_folder_that_all_clips_share_counts_after_the_others(tmp_path, outer):
    for split in ("train", "val", "test"):
        write_tone(tmp_path / outer / split / "a.wav", f"says {split}")
    assert splits_of(tmp_path) == {f"{outer}/{name}/a.wav": split for name, split in
                                   (("train", "train"), ("val", "valid"), ("test", "test"))}


def test_a_folder_of_tests_alone_is_tested_whole(tmp_path):
    for talker in ("ann", "bob", "eve"):
        write_tone(tmp_path / "test" / talker / "a.wav", f"says {talker}")
    assert set(splits_of(tmp_path).values()) == {"test"}


def test_lists_of_splits_that_are_not_read_are_said(tmp_path, capsys):
    for i in range(5):
        write_tone(tmp_path / f"{'abcde'[i]}/0.wav", f"says {i}")
    entries(tmp_path)
    assert not capsys.readouterr().err
    write(tmp_path / "splits/test_list.txt", "e/0\n")
    entries(tmp_path)
    assert "test_list.txt: not read, although it has the name of a split" in capsys.readouterr().err


def test_how_much_of_a_folder_without_splits_is_tested_is_said(tmp_path, capsys):
    for i in range(10):
        write_tone(tmp_path / f"{i}/a.wav", f"says {i}")
    assert len(folder_clips(tmp_path, splits=("test",))["test"]) == 2
    assert "names no test split, so 2 of its 10 clips are tested" in capsys.readouterr().err
    folder_clips(tmp_path)
    assert "names no test split" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["donâ€™t", "cafÃ©", "caf\ufffd", "a\x07b", "{\\rtf1\\ansi hello}", "WEBVTT\n\n00:00 hello",
                                  "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 5\n"])
def test_texts_that_are_none_are_refused(tmp_path, text):
    write_tone(tmp_path / "a.wav", "")
    write(tmp_path / "a.txt", text)
    error = read_entry(entries(tmp_path)[1][0])
    reason = "no plain text" if text[:3] in ("{\\r", "WEB", "ver") else "damaged or not UTF-8 text: "
    assert isinstance(error, ClipError) and reason in str(error)
    assert ("git lfs pull" in str(error)) is text.startswith("version")


@pytest.mark.parametrize("text, words", [("don&#39;t &amp; we&apos;ll", "don't we'll"), ("NÃO, IRMÃ… café", "não irmã café"),
                                         ("&lt;noise&gt; yes\x1a", "yes")])
def test_texts_from_web_pages_and_with_tildes(tmp_path, text, words):
    write_tone(tmp_path / "a.wav", "")
    write(tmp_path / "a.txt", text)
    assert read_entry(entries(tmp_path)[1][0]).text == words


@pytest.mark.parametrize("column", ["speaker", "Speaker_ID", "client_id", "spk"])
def test_columns_that_name_the_talker(tmp_path, column, capsys):
    for i in range(6):
        write_tone(tmp_path / f"{i}.wav", "")
    rows = "".join(f"{i}.wav,says {i},{'abc'[i % 3]}\n" for i in range(6))
    write(tmp_path / "manifest.csv", f"path,text,{column}\n{rows}")
    listed = entries(tmp_path)[1]
    assert {entry.talker for entry in listed} == {"a", "b", "c"} and "not used" not in capsys.readouterr().err
    assert len({(entry.talker, entry.split) for entry in listed}) == 3          # nobody is in both


def test_the_same_sound_in_two_formats_is_one_clip(tmp_path):
    for i in range(3):
        write_tone(tmp_path / f"{i}.wav", f"says {i}")
        write_tone(tmp_path / f"{i}.flac", "")
    layout, listed, passed_over = entries(tmp_path)
    assert [entry.path.name for entry in listed] == ["0.flac", "1.flac", "2.flac"] and passed_over == "3 .wav"


def test_the_sound_of_grid_in_a_folder_named_for_its_rate(tmp_path):
    for talker in ("s1", "s2"):
        write(tmp_path / talker / "x.mpg", "")
        write(tmp_path / "align" / talker / "x.align", "0 1 bin")
        write_tone(tmp_path / f"{talker}_50kHz" / "x.wav", "")
    listed = entries(tmp_path)[1]
    assert [(entry.talker, entry.sound.parent.name) for entry in listed] == [("s1", "s1_50kHz"), ("s2", "s2_50kHz")]


def test_a_second_suffix_of_media_is_no_part_of_the_name(tmp_path):
    """As Kaggle has TIMIT, as an extracted sound track is called, and as some programs name transcripts."""
    write_tone(tmp_path / "SA1.WAV", "says one")
    write_tone(tmp_path / "SA1.WAV.wav", "")
    write_tone(tmp_path / "b.mp3.wav", "")
    write(tmp_path / "b.txt", "says two")
    write(tmp_path / "c.mp4", "")
    write_tone(tmp_path / "c.mp4.wav", "says three")
    listed = entries(tmp_path)[1]
    assert [(entry.path.name, entry.sound and entry.sound.name) for entry in listed] == [
        ("SA1.WAV", None), ("b.mp3.wav", None), ("c.mp4", "c.mp4.wav")]
    assert [transcript(entry) for entry in listed] == ["says one", "says two", "says three"]


def test_texts_of_one_clip_in_two_folders(tmp_path):
    write(tmp_path / "video/a.mp4", "")
    write(tmp_path / "text/a.txt", "says one")
    write(tmp_path / "txt/a.txt", "says \n one")
    assert transcript(entries(tmp_path)[1][0]).split() == ["says", "one"]
    write(tmp_path / "txt/a.txt", "says two")
    with pytest.raises(ClipError, match="text/a.txt: another text than in .*txt/a.txt"):
        entries(tmp_path)


def test_one_unusable_clip_counts_alike_in_training_and_in_a_test(tmp_path):
    """Of 12 clips, 3 are for testing."""
    for i in range(12):
        write_tone(tmp_path / f"{'test' if i < 3 else 'train'}/{i}.wav", f"says {i}" if i else "")
    for splits in (("train", "test"), ("test",)):
        assert len(folder_clips(tmp_path, max_bad=10., splits=splits)["test"]) == 2
