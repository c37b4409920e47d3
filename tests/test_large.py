"""python -m pytest tests/test_large.py: folders whose training clips are read while training."""
import csv
import os
import random
import signal
import weakref
from dataclasses import replace

import numpy as np
import pytest
import soundfile

import train
from data import Clip, ClipError, drawn_clips
from encoders import AudioConfig, VideoConfig
from real import folders, run, setup
from real.features import Features
from real.folders import Unread, entries, folder_clips, read_all, read_drawn
from real.layouts import Entry
from toy.pretrain import clips_digest

JOB = "--tasks asr --rates 4,8 --clips 12 --audio-steps 2 --ctc-steps 2 --llm-steps 2 --steps 6 --max-bad 40 --snr clean --batch-size 3".split()
N_CLIPS = 24     # of the training split


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """A folder with a manifest of short sounds. Two that are read while training are damaged."""
    folder = tmp_path_factory.mktemp("large") / "clips"
    folder.mkdir()
    rng = np.random.default_rng(0)
    with (folder / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "text", "split"])
        for i in range(N_CLIPS + 3):
            soundfile.write(folder / f"{i}.wav", 0.1 * rng.standard_normal(16000 + 640 * i), 16000)
            table.writerow([f"{i}.wav", f"word number {i}", "train" if i < N_CLIPS else "test"])
    for i in (5, 7):
        (folder / f"{i}.wav").write_bytes(b"no sound")
    return folder


@pytest.fixture(autouse=True)
def few_are_read_at_the_start(monkeypatch):
    monkeypatch.setattr(folders, "MAX_READ", 10)
    monkeypatch.setattr(folders, "FIRST_READ", 4)


def unread(clips):
    return [clip for clip in clips if isinstance(clip, Unread)]


def test_only_some_files_are_opened_at_the_start(manifest, monkeypatch, capsys):
    opened, read_clip = [], folders.read_clip
    monkeypatch.setattr(folders, "read_clip", lambda path, **more: opened.append(path.name) or read_clip(path, **more))
    clips = folder_clips(manifest, {"streams": {"audio"}})
    assert sorted(opened) == sorted(f"{i}.wav" for i in (0, 6, 12, 18, 24, 25, 26))
    assert len(clips["train"]) == N_CLIPS and len(unread(clips["train"])) == N_CLIPS - 4 and not unread(clips["test"])
    assert "20 of 24 training clips are read while training" in capsys.readouterr().err
    assert {clip.text for clip in clips["train"]} == {f"word number {i}" for i in range(N_CLIPS)}


def test_a_folder_that_is_not_large_is_read_at_the_start(manifest, monkeypatch, capsys):
    monkeypatch.setattr(folders, "MAX_READ", N_CLIPS)
    clips = folder_clips(manifest, max_bad=10)["train"]
    assert not unread(clips) and len(clips) == N_CLIPS - 2
    assert read_drawn(clips, ["audio"], 4, 0, 3) == drawn_clips(clips, 4, 0, 3)
    assert "while training" not in capsys.readouterr().err


def test_a_clip_read_later_is_the_same(manifest, monkeypatch):
    later = {clip.name: clip for clip in read_all(folder_clips(manifest, max_bad=10)["train"]) if clip}
    monkeypatch.setattr(folders, "MAX_READ", N_CLIPS)
    at_once = folder_clips(manifest, max_bad=10)["train"]
    assert later.keys() == {clip.name for clip in at_once}
    for clip in at_once:
        assert type(later[clip.name]) is Clip and later[clip.name].text == clip.text
        assert np.array_equal(later[clip.name].log_power, clip.log_power)


def test_another_clip_takes_the_place_of_a_bad_one(manifest, capsys):
    """It is the same one in whatever order the steps are drawn, as after a stop."""
    def names(clips, step):
        return [clip.name.rpartition("/")[2] for clip in read_drawn(clips, ["audio"], 4, 0, step)]

    whole, resumed = (folder_clips(manifest, max_bad=10)["train"] for _ in range(2))
    steps = [names(whole, step) for step in range(12)]
    assert steps == [names(resumed, step) for step in reversed(range(12))][::-1]
    assert not {"5.wav", "7.wav"} & set(sum(steps, []))
    errors = capsys.readouterr().err
    assert errors.count("left out: ") == 4 and "5.wav: " in errors and "7.wav: " in errors
    with pytest.raises(ClipError, match="of 27 clips cannot be used so far, and no more than --max-bad 1 %"):
        read_all(folder_clips(manifest)["train"])


def test_a_clip_without_the_streams_of_a_task_is_replaced(manifest):
    clips = folder_clips(manifest, max_bad=10)["train"]
    silent = Clip("silent", "word", frames=np.zeros((25, 8, 8), np.uint8))
    assert all(clip is not silent for clip in read_drawn([silent, *clips], ["audio"], 25, 0, 0))


def test_streams_of_an_unread_clip(manifest):
    sound = unread(folder_clips(manifest)["train"])[0]
    assert sound.streams == ("audio",) and sound.wave is None and sound.aligned is None


def test_another_file_is_another_key(manifest):
    clips = folder_clips(manifest)["train"]
    before = clips_digest(clips)
    assert clips_digest(folder_clips(manifest)["train"]) == before
    time = os.stat(manifest / "8.wav").st_mtime_ns
    os.utime(manifest / "8.wav", ns=(time, time + 1))
    assert clips_digest(clips) != before
    os.utime(manifest / "8.wav", ns=(time, time))


def test_other_files_of_clips_that_are_not_read_yet_are_another_training(tmp_path):
    """The time of the pictures and that of their sound file count."""
    paths = [tmp_path / "a.mp4", tmp_path / "a.wav"]
    for path in paths:
        path.touch()
    clip = Unread("a", "b", entry=Entry(paths[0], "", sound=paths[1]))
    for path in paths:
        before = run.Run(train.TrainConfig(), [clip]).settings
        assert run.Run(train.TrainConfig(), [clip]).settings == before
        os.utime(path, (1, 1))
        assert run.Run(train.TrainConfig(), [clip]).settings != before


def test_a_folder_that_no_task_or_noise_can_use_is_refused_at_the_start(talker_clips, monkeypatch):
    """Clips that are read while training may turn out to lack a stream, so only those that are read count."""
    def load(train_clips, test_clips, *tasks, **more):
        monkeypatch.setattr(setup, "folder_clips", lambda *_: {"train": train_clips, "test": test_clips})
        setup.load_clips(train.TrainConfig(data="x", **more), tasks, AudioConfig(), VideoConfig())
    later = Unread("a", "b", streams=("audio", "video"))
    with pytest.raises(ClipError, match="no train clip has audio and video"):
        load([later, replace(talker_clips[0], frames=None)], talker_clips, "avsr")
    with pytest.raises(ClipError, match="only one test clip has sound"):
        load(talker_clips, talker_clips[:1], "asr")
    load(talker_clips, talker_clips[:1], "asr", snr="clean")
    load(talker_clips, talker_clips[:1], "vsr")


def test_what_is_read_is_not_kept(manifest):
    clips = folder_clips(manifest, max_bad=10)["train"]
    drawn = read_all(unread(clips)[:3])
    kept = [weakref.ref(clip) for clip in drawn]
    del drawn
    assert not any(clip() for clip in kept) and unread(clips)[0].log_power is None


def test_held_out_clips_are_read_at_the_start(manifest):
    config = train.TrainConfig(data=str(manifest), tasks="asr", max_bad="40%", valid_every=1, snr="clean")
    clips = setup.load_clips(config, ["asr"], setup.AudioConfig(), None)
    assert clips["valid"] and not unread(clips["valid"]) and unread(clips["train"])
    assert not {clip.text for clip in clips["valid"]} & {clip.text for clip in clips["train"]}


def test_no_sentence_is_held_out_and_trained_on():
    clips = [Clip(str(i), f"say {i % 8}") for i in range(40)]                    # each sentence five times
    rest, held_out = setup.hold_out(clips)
    assert len(held_out) == 4 and len(rest) == 35                                # one more says the same
    assert not {clip.text for clip in rest} & {clip.text for clip in held_out}
    rest, held_out = setup.hold_out([Clip(str(i), f"say {i}") for i in range(600)])
    assert (len(rest), len(held_out)) == (550, setup.MAX_HELD_OUT)


def test_a_large_folder_is_not_tested_on_a_fifth(tmp_path, monkeypatch):
    (tmp_path / "manifest.csv").write_text("path,text\n" + "".join(f"{i}.wav,word {i}\n" for i in range(100)))
    n_test = [sum(entry.split == "test" for entry in entries(tmp_path)[1])]
    monkeypatch.setattr(folders, "MAX_TEST", 8)
    n_test.append(sum(entry.split == "test" for entry in entries(tmp_path)[1]))
    assert n_test == [20, 8]


def test_features_of_unread_clips_are_made_when_they_are_drawn(manifest, tmp_path, tiny):
    """They are the same in whatever company and order they are drawn."""
    clips = folder_clips(manifest, max_bad=10)["train"]
    drawn = read_all([clip for clip in unread(clips) if clip.name[-5:] not in ("5.wav", "7.wav")][:4])
    files = []
    for i, batches in enumerate(([drawn], [[clip] for clip in reversed(drawn)])):
        store = Features(tmp_path / str(i), tiny, {"audio": "x"}, clips, 0, 0)
        assert len(list(store.folder.rglob("*.safetensors"))) == 4
        for batch in batches:
            rows = store.rows(batch, ["audio"], random.Random(0))["audio"]
            assert len(rows) == len(batch)
        files.append({path.name: path.read_bytes() for path in store.folder.rglob("*.safetensors")})
    assert len(files[0]) == 8 and files[0] == files[1]


@pytest.fixture(scope="module")
def whole(manifest):
    """The folder of a run that nobody stopped."""
    out = manifest.parent / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "MAX_READ", 10)
        patch.setattr(folders, "FIRST_READ", 4)
        assert train.main([*JOB, "--data", str(manifest), "--out", str(out), "--cache", str(manifest.parent / "cache")]) == 0
    return out


def test_a_stopped_run_goes_on_bit_for_bit(manifest, whole, monkeypatch, capsys):
    out, log = manifest.parent / "half", run.Run.log

    def ask(run, step, *more):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        log(run, step, *more)
    command = [*JOB, "--data", str(manifest), "--out", str(out), "--cache", str(manifest.parent / "cache")]
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "log", ask)
        with pytest.raises(KeyboardInterrupt):
            train.main(command)
    assert train.main(command) == 0
    assert "goes on after step 3" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
