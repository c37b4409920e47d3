"""python -m pytest tests/test_brought.py: files and mistakes that users bring; each is read right, or refused in a line."""
import gc
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, TRAINED, ffmpeg, tiny_avsr
from safetensors.torch import load_file, save_file

import data
import mome
import sample
import train
from data import ClipError
from encoders import FPS
from mome import LlamaConfig
from real import clips, files, media, mouth, report, script, setup
from real.checkpoint import load_model, save_model
from real.clips import read_clip, read_pieces
from real.features import content
from real.files import CheckpointError
from real.run import own_folder
from toy import pretrain
from toy.talker import grid_sentences, write_talker_clips
from toy.tokenizer import make_tokenizer

LONGEST = 4     # seconds of a piece


def pieces(path, **options):
    return [(start, clip) for start, clip in read_pieces(media.probe(path), LONGEST, **options)]


def write_mp4(path, frames, wave):
    media.write_mp4(path, frames, wave.astype(np.float32))
    return path


@pytest.fixture(scope="module")
def voice(talker_clips):
    return talker_clips[0].wave


# --- sound that is there but not heard ---

def heard(path):
    """The sound that is read, as (samples,)."""
    return read_clip(path, streams=("audio",)).wave


def alike(a, b):
    n = min(len(a), len(b))
    return np.corrcoef(a[:n], b[:n])[0, 1] ** 2 > 0.9


def test_opposite_phases_do_not_cancel(tmp_path, voice, capsys):
    soundfile.write(tmp_path / "a.wav", np.stack([voice, -voice], 1), 16000)
    assert alike(heard(tmp_path / "a.wav"), voice) and "channels cancel out" in capsys.readouterr().err


@pytest.mark.parametrize("n_channels, channel", [(2, 1), (6, 3), (8, 7), (9, 0), (10, 9)])
def test_a_voice_on_any_of_many_channels_is_heard(tmp_path, voice, n_channels, channel):
    sound = np.zeros((len(voice), n_channels))
    sound[:, channel] = voice
    soundfile.write(tmp_path / "a.wav", sound, 16000)
    assert alike(heard(tmp_path / "a.wav"), voice)


@pytest.mark.parametrize("noise", [np.random.default_rng(0).standard_normal(48000), np.sin(np.arange(48000) / 6)])
def test_opposite_phases_under_common_noise_do_not_cancel(tmp_path, voice, capsys, noise):
    noise = noise[:len(voice)] * voice.std() / noise.std() / 4              # 12 dB below the voice
    soundfile.write(tmp_path / "a.wav", np.stack([voice + noise, noise - voice], 1) / 2, 16000)
    assert alike(heard(tmp_path / "a.wav"), voice) and "channels cancel out" in capsys.readouterr().err


def test_usual_stereo_is_mixed_without_a_word(tmp_path, voice, capsys):
    soundfile.write(tmp_path / "a.wav", np.stack([voice, voice], 1), 16000)
    assert alike(heard(tmp_path / "a.wav"), voice) and not capsys.readouterr().err


@pytest.mark.parametrize("default, silent, read", [(0, None, 0), (1, None, 1), (0, 0, 1), (None, 0, 1)])
def test_the_default_track_is_read_or_the_first_with_sound(tmp_path, talker_clips, capsys, default, silent, read):
    tracks = [clip.wave[:32000] for clip in talker_clips[:2]]
    for i, wave in enumerate(tracks):
        soundfile.write(tmp_path / f"{i}.wav", wave * (i != silent), 16000)
    marks = [x for i in range(2) for x in (f"-disposition:a:{i}", "default" if i == default else "0")]
    ffmpeg("-i", tmp_path / "0.wav", "-i", tmp_path / "1.wav", "-map", 0, "-map", 1, *marks, tmp_path / "two.mkv")
    assert alike(heard(tmp_path / "two.mkv"), tracks[read])
    assert f"2 sound tracks; read is number {read + 1}" in capsys.readouterr().err


def test_a_silent_stream_is_said(tmp_path, talker_clips, capsys):
    path = write_mp4(tmp_path / "a.mp4", talker_clips[0].frames, 0 * talker_clips[0].wave)
    assert read_clip(path).streams == ("video",) and "sound is silent" in capsys.readouterr().err


def test_a_task_that_the_model_never_learned_is_said(tmp_path, voice, capsys):
    words = ["bin", "blue"]
    model = tiny_avsr(vocab=make_tokenizer(words).n_vocab)
    save_model(model, tmp_path, {}, words, rates=[[2, 2]], tasks=["avsr"], longest=4)
    soundfile.write(tmp_path / "a.wav", voice, 16000)
    assert sample.main([str(tmp_path / "a.wav"), "--ckpt", str(tmp_path)]) == 0
    assert "task asr, for which this model was not trained" in capsys.readouterr().err


# --- long recordings ---

def test_silence_is_not_read(tmp_path, voice, capsys):
    soundfile.write(tmp_path / "a.wav", np.concatenate([voice, np.zeros(16000 * 120)]), 16000)
    found = pieces(tmp_path / "a.wav")
    assert len(found) == 1 and found[0][1].duration < len(voice) / 16000 + 0.5
    assert "s without speech are skipped" in capsys.readouterr().err
    soundfile.write(tmp_path / "late.wav", np.concatenate([np.zeros(16000 * 60), voice]), 16000)
    assert 59.5 < pieces(tmp_path / "late.wav")[0][0] < 60.5


@pytest.mark.parametrize("kind, codec", [("mp3", "libmp3lame"), ("aac", "aac")])
def test_channels_that_change_within_a_file_do_not_shift_what_follows(tmp_path, talker_clips, kind, codec):
    """As in a podcast with inserted advertisements; ffmpeg decodes what is one file after another."""
    sound = np.concatenate([np.pad(clip.wave, (8000, 8000)) for clip in talker_clips[:2]])
    soundfile.write(tmp_path / "a.wav", sound, 16000)
    for name, channels in (("one", 1), ("two", 2)):
        ffmpeg("-i", tmp_path / "a.wav", "-ac", channels, "-ar", 44100, "-c:a", codec, tmp_path / f"{name}.{kind}")
    parts = [(tmp_path / f"{name}.{kind}").read_bytes() for name in ("one", "two", "one")]
    (tmp_path / f"joined.{kind}").write_bytes(b"".join(parts))
    source = media.probe(tmp_path / f"joined.{kind}")
    assert sum(map(len, media.wave_frames(source))) == pytest.approx(3 * len(sound), abs=6000)


def test_channels_that_change_and_sound_that_begins_late(tmp_path, talker_clips):
    sound = talker_clips[0].wave[:32000]
    soundfile.write(tmp_path / "a.wav", sound, 16000)
    for channels in (1, 2):
        ffmpeg("-i", tmp_path / "a.wav", "-ac", channels, "-ar", 44100, tmp_path / f"{channels}.mp3")
    (tmp_path / "joined.mp3").write_bytes(b"".join((tmp_path / f"{n}.mp3").read_bytes() for n in (1, 2, 1, 2)))
    ffmpeg(*"-f lavfi -i testsrc=size=32x32:rate=25:duration=9".split(), "-itsoffset", 0.635, "-i", tmp_path / "joined.mp3",
           *"-map 0 -map 1 -c:a copy".split(), tmp_path / "late.mkv")
    n_samples = [sum(map(len, media.wave_frames(media.probe(tmp_path / name)))) for name in ("joined.mp3", "late.mkv")]
    assert n_samples[1] - n_samples[0] == pytest.approx(0.635 * 16000, abs=500)


def test_a_mute_file_without_a_length_is_cut_at_pauses(tmp_path, talker_clips):
    frames = np.concatenate([np.concatenate([clip.frames, clip.frames[-1:].repeat(25, 0)]) for clip in talker_clips[:2]])
    write_mp4(tmp_path / "a.mp4", frames, np.zeros(len(frames) * 640))
    ffmpeg("-i", tmp_path / "a.mp4", "-an", "-c:v", "copy", tmp_path / "a.h264")
    assert LONGEST not in [start for start, _ in pieces(tmp_path / "a.h264")]


def test_a_mute_file_that_is_longer_than_its_header_says_is_read_to_its_end(tmp_path, talker_clips):
    frames = np.concatenate([np.concatenate([clip.frames, clip.frames[-1:].repeat(25, 0)]) for clip in talker_clips[:2]])
    write_mp4(tmp_path / "a.mp4", frames, np.zeros(len(frames) * 640))
    ffmpeg("-i", tmp_path / "a.mp4", "-an", "-c:v", "mpeg2video", "-q:v", 2, tmp_path / "a.mpg")
    (tmp_path / "joined.mpg").write_bytes((tmp_path / "a.mpg").read_bytes() * 3)
    found = pieces(tmp_path / "joined.mpg")
    assert len(found) >= 6 and found[-1][0] > 2.4 * len(frames) / FPS


def test_a_limited_voice_is_no_steady_noise(tmp_path, talker_clips):
    sound = np.tile(np.concatenate([clip.wave / np.abs(clip.wave).max() for clip in talker_clips]), 3)
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.wav", np.clip(300 * sound + rng.normal(0, 1e-3, len(sound)), -1, 1), 16000)
    assert sum(clip.duration for _, clip in pieces(tmp_path / "a.wav")) > 0.95 * len(sound) / 16000


def test_an_hour_of_flac_with_one_sentence(tmp_path, voice):
    sound = np.zeros(16000 * 3600, np.float32)
    sound[16000 * 1800:16000 * 1800 + len(voice)] = voice
    soundfile.write(tmp_path / "hour.flac", sound, 16000)
    (start, clip), = pieces(tmp_path / "hour.flac")
    assert 1799.5 < start < 1800.5 and clip.duration < len(voice) / 16000 + 0.5


def test_a_quiet_voice_is_a_voice(tmp_path, talker_clips):
    loud, quiet = (clip.wave / np.abs(clip.wave).max() for clip in talker_clips[:2])
    gap = np.random.default_rng(0).normal(0, 1e-5, 16000)
    soundfile.write(tmp_path / "a.wav", .5 * np.concatenate([gap, loud, gap, quiet * 10 ** (-36 / 20), gap, loud, gap]), 16000, "FLOAT")
    start, end = (32000 + len(loud)) / 16000, (32000 + len(loud) + len(quiet)) / 16000
    found = [(max(start, at), min(end, at + clip.duration)) for at, clip in pieces(tmp_path / "a.wav")]
    assert sum(max(0, last - first) for first, last in found) > 0.7 * (end - start)


def test_speech_in_loud_noise_is_read(tmp_path, talker_clips):
    """As loud as the voice, noise hides most of its frames. In quiet the pauses are left out."""
    rng = np.random.default_rng(0)
    sound = np.concatenate([np.pad(clip.wave / clip.wave.std(), (0, 24000)) for clip in talker_clips])
    speaks = np.square(sound[:len(sound) // 640 * 640].reshape(-1, 640)).mean(1) > 0.01
    for noise, least, most in ((1, .95, 1), (.001, .95, .9)):
        soundfile.write(tmp_path / "a.wav", 0.1 * (sound + noise * rng.standard_normal(len(sound))), 16000, "FLOAT")
        read = np.zeros(len(speaks) + LONGEST * FPS, bool)
        for start, clip in pieces(tmp_path / "a.wav"):
            read[round(start * FPS):round((start + clip.duration) * FPS)] = True
        assert read[:len(speaks)][speaks].mean() >= least and read[:len(speaks)].mean() <= most


def test_lips_are_read_where_the_sound_is_over(tmp_path, talker_clips):
    """Pictures of all clips, with a second of stillness after each; the sound ends after the second clip."""
    frames = np.concatenate([np.concatenate([clip.frames, clip.frames[-1:].repeat(25, 0)]) for clip in talker_clips])
    sound = np.concatenate([np.pad(clip.wave, (0, 16000)) for clip in talker_clips[:2]])
    for kind, wave in (("over", sound), ("muted", np.pad(sound, (0, len(frames) * 640 - len(sound))))):
        path = write_mp4(tmp_path / f"{kind}.mp4", frames, wave)
        found = pieces(path)
        streams = [clip.streams for _, clip in found]
        assert streams[:2] == [("audio", "video")] * 2 and set(streams[2:]) == {("video",)}, kind
        assert sum(clip.duration for _, clip in found[2:]) > 0.7 * sum(clip.duration for clip in talker_clips[2:])


def test_pictures_that_do_not_move_say_nothing(tmp_path, talker_clips):
    black, still = np.zeros((300, 32, 32), np.uint8), talker_clips[0].frames[:1].repeat(300, 0)
    for frames in (black, still, still[:60]):
        path = write_mp4(tmp_path / "a.mp4", frames, np.zeros(len(frames) * 640))
        with pytest.raises(ClipError, match="sound is silent and its pictures do not move"):
            pieces(path)


def test_no_piece_is_a_leftover(tmp_path, talker_clips):
    frames = np.concatenate([clip.frames for clip in talker_clips])[:LONGEST * FPS + 19]     # 4.76 s
    write_mp4(tmp_path / "a.mp4", frames, np.zeros(len(frames) * 640))
    ffmpeg("-i", tmp_path / "a.mp4", "-an", "-c", "copy", tmp_path / "mute.mp4")
    assert min(clip.duration for _, clip in pieces(tmp_path / "mute.mp4")) >= 0.5


@pytest.mark.parametrize("kind", ["ts", "mpg"])
def test_joined_files_are_read_to_their_end(tmp_path, talker_clips, kind):
    for i, clip in enumerate(talker_clips[:2]):
        write_mp4(tmp_path / f"{i}.mp4", clip.frames, clip.wave)
        ffmpeg("-i", tmp_path / f"{i}.mp4", "-c:v", "mpeg2video", "-b:v", "2M", "-c:a", "mp2", tmp_path / f"{i}.{kind}")
    joined = tmp_path / f"joined.{kind}"
    joined.write_bytes((tmp_path / f"0.{kind}").read_bytes() + (tmp_path / f"1.{kind}").read_bytes())
    clip = read_clip(joined)
    assert clip.duration == pytest.approx(sum(clip.duration for clip in talker_clips[:2]), abs=0.4)
    n = len(talker_clips[0].frames)
    assert np.abs(clip.frames[n + 10:n + 40].astype(int) - talker_clips[1].frames[10:40]).mean() < 25
    assert len(clip.wave) == len(clip.frames) * 640


# --- files with faults ---

def test_a_clip_with_a_changed_byte_is_used_with_a_note(tmp_path, talker_clips, capsys):
    clip, rng, n_used = talker_clips[0], np.random.default_rng(0), 0
    write_mp4(tmp_path / "a.mp4", clip.frames.repeat(3, 1).repeat(3, 2), clip.wave)
    ffmpeg("-i", tmp_path / "a.mp4", "-c:v", "mpeg1video", "-b:v", "400k", "-c:a", "mp2", tmp_path / "a.mpg")
    whole = (tmp_path / "a.mpg").read_bytes()
    for i in range(6):
        content = bytearray(whole)
        content[int(rng.uniform(.3, .9) * len(whole))] ^= 0x55
        (tmp_path / f"{i}.mpg").write_bytes(content)
        used = read_clip(tmp_path / f"{i}.mpg")
        assert abs(used.duration - clip.duration) < 0.2
        n_used += "read, but damaged" in capsys.readouterr().err
    assert n_used
    (tmp_path / "half.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    ffmpeg("-i", tmp_path / "a.mp4", "-c:v", "libx264", "-c:a", "aac", "-movflags", "+faststart", "-y", tmp_path / "half.mp4")
    (tmp_path / "half.mp4").write_bytes((tmp_path / "half.mp4").read_bytes()[:-20_000])
    with pytest.raises(ClipError, match="damaged"):
        read_clip(tmp_path / "half.mp4")


def test_a_long_clip_is_refused_by_its_header(tmp_path, monkeypatch):
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=64x64:rate=25:duration=40", "-preset", "ultrafast", tmp_path / "long.mp4")
    monkeypatch.setattr(clips, "read_pieces", lambda *_, **__: pytest.fail("the clip is decoded"))
    with pytest.raises(ClipError, match="longer than 30 s"):
        read_clip(tmp_path / "long.mp4", box="all")


def test_the_box_counts_pixels_as_shown(tmp_path):
    """A white square of shown pixels 600 to 664 in a picture stored 720 wide and shown 1024 wide (PAL, 16:9)."""
    ffmpeg("-f", "lavfi", "-i", "color=black:size=1024x576:duration=1:rate=25", "-vf",
           "drawbox=x=900:y=200:w=64:h=64:color=white:t=fill,scale=720:576,setsar=64/45", tmp_path / "pal.mkv")
    source = media.probe(tmp_path / "pal.mkv")
    assert source.picture_size == (1024, 576)
    frame = next(iter(mouth.mouths(source, 32, (904, 204, 56, 56))))
    assert frame.mean() > 200
    with pytest.raises(ClipError, match="reaches beyond its pictures of 1024x576"):
        next(iter(mouth.mouths(source, 32, (1000, 0, 64, 64))))


def test_an_address_is_not_a_file():
    with pytest.raises(ClipError, match="https://example.org/a.mp4: an address"):
        media.probe("https://example.org/a.mp4")


# --- faces ---

def test_a_piece_without_a_face_is_lost_and_not_the_talk():
    frames = [None if 10 <= t < 20 else np.full((2, 2), t, np.uint8) for t in range(40)]
    found = list(media.cut_pieces(None, iter(frames), [(0, 10), (10, 20), (20, 40)]))
    assert [start for start, _, frames in found if frames is not None] == [0, 20]


def test_notes_are_seen_while_a_face_is_looked_for():
    code = ("import os, sys; from real.mouth import quiet; from real.files import note\n"
            "with quiet():\n    note('left out: a.mp4'); os.write(2, b'chatter')\nnote('after')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.split("\n")[:2] == ["note: left out: a.mp4", "note: after"], done


# --- caches and checkpoints ---

def test_features_are_known_by_content(talker_clips):
    clip, other = talker_clips[0], talker_clips[1]
    replaced = data.Clip(clip.name, clip.text, other.wave, clip.frames, other.log_power)
    assert content(clip, "video") == content(replaced, "video") and content(clip, "audio") != content(replaced, "audio")


def saved(folder, seed=0, words=("bin", "blue")):
    folder.mkdir(exist_ok=True)
    model = tiny_avsr(seed, vocab=make_tokenizer(words).n_vocab)
    save_model(model, folder, {}, list(words), rates=[[2, 2]], tasks=["avsr"], longest=4)
    return folder


def test_a_checkpoint_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    saved(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    write, n_written = files.Path.write_bytes, []

    def disk_full(path, content):
        n_written.append(path)
        if len(n_written) == 3:
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(files.Path, "write_bytes", disk_full)
    with pytest.raises(OSError, match="No space left.*config.json"):
        saved(tmp_path / "a", seed=1, words=("red", "green"))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}


@pytest.mark.parametrize("change", [
    lambda a, b: (a / "tokenizer.json").write_bytes((b / "tokenizer.json").read_bytes()),
    lambda a, b: (a / "model.safetensors").write_bytes((b / "model.safetensors").read_bytes()),
    lambda a, b: (a / "tokenizer.json").write_text((a / "tokenizer.json").read_text().replace('"bin",', "")),
    lambda a, b: (a / "tokenizer.json").unlink()])
def test_parts_of_a_checkpoint_must_belong_together(tmp_path, change):
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", 1, ("red", "green"))
    load_model(a)
    change(a, b)
    with pytest.raises(CheckpointError, match="of another run"):
        load_model(a)


@pytest.mark.parametrize("change, reason", [
    (lambda config: config["model"]["llm"].update(n_layers=1_000_000), "llm.n_layers is 1,000,000 in config.json"),
    (lambda config: config.update(tasks=["opera"]), "tasks or rates that do not exist"),
    (lambda config: config.update(rates=[[0, 2]]), "tasks or rates that do not exist"),
    (lambda config: config["model"]["audio"].update(dim=10 ** 9), "audio.dim is 1,000,000,000 in config.json, at most")])
def test_a_checkpoint_beyond_reason_is_refused_at_once(tmp_path, change, reason):
    """An older checkpoint, without the hash that refuses every edit."""
    path = saved(tmp_path / "a") / "config.json"
    config = json.loads(path.read_text())
    del config["digest"]
    change(config)
    path.write_text(json.dumps(config))
    since = time.process_time()
    with pytest.raises(CheckpointError, match=f"damaged: .*{reason}"):
        load_model(tmp_path / "a")
    assert time.process_time() - since < 5


def test_an_edited_model_is_refused(tmp_path):
    """Two heads in place of four have the same tensors. A checkpoint without a hash, which an older version made, loads."""
    path = saved(tmp_path / "a") / "config.json"
    config = json.loads(path.read_text())
    written = config.pop("digest")
    path.write_text(json.dumps(config))
    load_model(tmp_path / "a")
    llm = config["model"]["llm"] | {"n_heads": 2, "head_dim": 16}
    for edit in ({"model": config["model"] | {"llm": llm}}, {"rates": [[3, 3]]}, {"tasks": ["asr"]}):
        path.write_text(json.dumps(config | {"digest": written} | edit))
        with pytest.raises(CheckpointError, match="damaged: its config.json is not as it was written"):
            load_model(tmp_path / "a")


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path):
    folder = saved(tmp_path / "a")
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    del tensors["projectors.audio.0.weight"]
    save_file(tensors, folder / "model.safetensors")
    config["files"]["model.safetensors"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="projectors.audio.0.weight is missing or unknown"):
        load_model(folder)


def test_what_stages_1_and_2_are_told_about_the_clips(talker_clips, monkeypatch, tmp_path):
    """They get the training sentences, and those of other splits, which they must not meet. The longest sentence counts."""
    met, lengths = [], []
    monkeypatch.setattr(setup, "pretrain", lambda model, parts, clips, texts, tested, *_:
                        met.append((texts, tested)) or lengths.append(model.config.max_tokens))
    splits = {"train": ["a b", " ".join("b" * 40)], "valid": ["c b"], "test": ["b a", "a b"]}
    clips_of = {split: [replace(talker_clips[0], text=text) for text in texts] for split, texts in splits.items()}
    monkeypatch.setattr(setup, "load_clips", lambda *_, **__: clips_of)
    for folder in ("", "x"):
        setup.set_up(train.TrainConfig(data=folder, out=str(tmp_path)), ["asr"], torch.device("cpu"), report.Stopwatch())
    assert met == [(grid_sentences("train"), set(grid_sentences("test"))), (splits["train"], {"c b", "b a"})]
    assert lengths[1] == 80


def test_data_py_passes_its_flags_on(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("toy.talker.write_talker_clips", lambda *args: asked.append(args) or [])
    assert clips.main(["--out", str(tmp_path), "--count", "2", "--part", "test", "--seed", "3"]) == 0
    assert asked == [(tmp_path, 2, "test", 3)]


def test_the_garbage_collector_works_again_after_a_folder_is_read():
    with files.no_collector():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_a_test_of_a_finished_model_refuses(tiny, talker_clips, monkeypatch, capsys):
    known = {"paths": {}, "tasks": ["avsr"], "rates": [[4, 2]], "method": "mome", "rank": 1, "projector_per_rate": False}
    monkeypatch.setattr(setup, "load_model", lambda *_, **__: (tiny, known))
    monkeypatch.setattr(setup, "load_clips", lambda *_: {"test": talker_clips})

    def load(*tasks, **more):
        setup.load_for_test(train.TrainConfig(rates="4:2", **more), tasks, torch.device("cpu"))
        return capsys.readouterr().err
    assert "not trained for asr, but for avsr" in load("avsr", "asr") and "not trained" not in load("avsr")
    known["paths"] = {"audio": "x"}
    load("avsr", data="x")
    with pytest.raises(CheckpointError, match="its encoders are for real clips: name their folder by --data"):
        load("avsr")
    known["paths"] = {}
    del tiny.encoders["video"]
    with pytest.raises(ClipError, match="this model reads audio only, not what avsr needs"):
        load("avsr")


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path):
    path = saved(tmp_path / "a") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match="made by a newer version"):
        load_model(tmp_path / "a")


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    saved(tmp_path / "a")
    (tmp_path / "a/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        load_model(tmp_path / "a")


# --- training ---

def test_clips_of_nearly_30_s_are_not_stretched_beyond(talker_clips):
    wave = np.resize(talker_clips[0].wave, 16000 * 29)
    clip = data.with_log_power(data.Clip("a", "text", wave))
    for seed in range(20):
        (_, lengths), = data.batch([clip], ["audio"], random.Random(seed)).values()
        assert lengths.item() <= 3000


def run(capsys, *argv):
    code = train.main([*TRAINED, *map(str, argv)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    return code, lines


def test_a_loss_that_is_no_number_stops_and_keeps_the_old_model(tmp_path, capsys):
    saved(tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").read_bytes()
    code, (line,) = run(capsys, "--out", tmp_path / "out", "--lr", 1e30, "--steps", 6)
    assert code == 2 and "the loss is nan" in line and "talker" in line
    assert (tmp_path / "out/model.safetensors").read_bytes() == before and not (tmp_path / "out/.lock").exists()


def test_a_gradient_that_is_no_number_reaches_no_weight(tmp_path, capsys, monkeypatch):
    """Not even in the last step, after which no loss is looked at."""
    saved(tmp_path / "out")
    before, loss, seen = (tmp_path / "out/model.safetensors").read_bytes(), mome.AVSR.loss, []

    def loss_of(model, *args):
        cross_entropy, balance = loss(model, *args)
        seen.append(cross_entropy)
        if len(seen) == 2:
            cross_entropy = cross_entropy + 0 * (0 * cross_entropy).sqrt()      # the value stays, its gradient is nan
        return cross_entropy, balance
    monkeypatch.setattr(mome.AVSR, "loss", loss_of)
    code, (line,) = run(capsys, "--out", tmp_path / "out", "--steps", 2, "--rates", 4)
    assert code == 2 and "step 1: the loss is" in line and "the norm of its gradient nan" in line and len(seen) == 2
    assert (tmp_path / "out/model.safetensors").read_bytes() == before


def test_two_trainings_do_not_share_a_folder(tmp_path, capsys):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (tmp_path / ".lock").write_text(str(other.pid))
        code, (line,) = run(capsys, "--out", tmp_path)
        assert code == 2 and f"process {other.pid} trains into it" in line
    finally:
        other.kill()
        other.wait()
    with own_folder(tmp_path):     # the lock of a process that is gone
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    assert not (tmp_path / ".lock").exists()


def test_a_lock_that_appears_after_the_look_for_one_counts(tmp_path, monkeypatch):
    """As in two trainings that begin at once."""
    with own_folder(tmp_path), monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", lambda path: False)
        with pytest.raises(CheckpointError, match="another process has just begun to train into it"):
            with own_folder(tmp_path):
                pass
    assert not (tmp_path / ".lock").exists()


def test_out_in_the_folder_of_the_clips(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in (tmp_path, tmp_path / "out", "out"):
        with pytest.raises(SystemExit):
            train.main(["--data", ".", "--out", str(out)])
        assert f"--out {out} is in the folder of --data" in capsys.readouterr().err


def test_a_tokenizer_that_is_missing_is_said_before_clips_are_read(tmp_path, capsys):
    parts = {"llm": SimpleNamespace(config=LlamaConfig(9))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "read_parts", lambda *_: parts)
        patch.setattr(setup, "identify", lambda *_: {})
        code, (line,) = run(capsys, "--llm", tmp_path, "--data", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert code == 2 and "tokenizer.json" in line


def test_out_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code, (line,) = run(capsys, "--out", tmp_path / "file")
    assert code == 2 and "a file, not a folder" in line
    with pytest.raises(SystemExit):
        train.main(["--out", ""])


def test_a_cache_that_cannot_be_written_is_said_before_the_work(tmp_path):
    def never():
        raise AssertionError("the stage was trained")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: a file, not a folder; name another --cache"):
        pretrain.cached(tmp_path / "file", "audio", 0, never)
    with pytest.raises(OSError):
        pretrain.cached(Path("/proc/nowhere"), "audio", 0, never)


def test_too_few_clips_to_hold_out(talker_clips):
    with pytest.raises(ClipError, match="only 5; leave it out"):
        setup.hold_out(talker_clips)


def test_samples_of_clips_with_long_names(tmp_path, voice):
    path = tmp_path / f"{'ü' * 122}.wav"
    soundfile.write(path, voice, 16000)
    clip = data.Clip(str(path), "text", voice)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/sample3_old.mp4").touch()              # of an earlier run
    piece = replace(clip, name=f"{path}{files.SPAN}0,1")        # a part of a file is no sample
    setup.write_samples(train.TrainConfig(data="x"), [piece, clip], tmp_path / "samples")
    assert sorted(path.suffix for path in (tmp_path / "samples").iterdir()) == [".txt", ".wav"]


def test_a_sample_has_the_sound_that_its_clip_has(tmp_path, voice):
    """Pictures whose sound is a file of its own would be transcribed from lips alone."""
    write_talker_clips(tmp_path / "clips", 2, "test", 0)
    mute, whole = sorted((tmp_path / "clips").glob("*.mp4"))
    ffmpeg("-i", mute, "-an", "-c", "copy", tmp_path / "cut.mp4")
    (tmp_path / "cut.mp4").replace(mute)
    read = [data.with_log_power(data.Clip(str(path), "text", voice, np.zeros((9, 32, 32), np.uint8))) for path in (mute, whole)]
    setup.write_samples(train.TrainConfig(data="x"), read, tmp_path / "samples")
    assert [path.name for path in (tmp_path / "samples").glob("*.mp4")] == [f"sample1_{whole.stem[:40]}.mp4"]


# --- the terminal ---

def test_letters_that_the_terminal_lacks(tmp_path, voice):
    saved(tmp_path / "out", words=("blåbär", "größe"))
    soundfile.write(tmp_path / "größe.wav", voice, 16000)
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, ROOT / "sample.py", tmp_path / "größe.wav", tmp_path / "fehlt-größe.wav", "--ckpt", tmp_path / "out", "--task", "asr"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "no such file" in done.stderr


def test_a_closed_pipe_ends_sample_py(tmp_path, voice):
    saved(tmp_path / "out")
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", voice, 16000)
    paths = " ".join(str(tmp_path / f"{i}.wav") for i in range(4))
    command = f"{sys.executable} {ROOT}/sample.py {paths} --ckpt {tmp_path}/out --json | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1 and "Broken pipe" not in done.stderr and "Traceback" not in done.stderr


def test_a_pattern_in_quotes_is_expanded(tmp_path, voice, capsys):
    """Brackets are letters of a name: talk[1].wav, which is not there, is not talk1.wav."""
    saved(tmp_path / "out")
    (tmp_path / "a[1]").mkdir()
    for name in ("clip0", "clip1", "talk1"):
        soundfile.write(tmp_path / f"a[1]/{name}.wav", voice, 16000)
    assert sample.main([str(tmp_path / "a[1]/clip*.wav"), "--ckpt", str(tmp_path / "out"), "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert sample.main([str(tmp_path / "a[1]/talk[1].wav"), "--ckpt", str(tmp_path / "out")]) == 2
    assert "talk[1].wav: no such file" in capsys.readouterr().err


def test_scripts_without_spaces_are_measured_by_letters():
    from real.report import error_rates, table
    assert error_rates(["ab c"], ["ab d"]) == {"wer": 0.5}
    rates = error_rates(["ภาษาไทย"], ["ภาษาไทย์"])
    assert rates["wer"] == 1 and 0 < rates["cer"] < 0.3
    row = {"task": "asr", "audio_rate": 2, "video_rate": None, "snr_db": None, "tokens": 9., **rates}
    assert table([row]).startswith("CER %")
    assert table([row, {key: row[key] for key in row if key != "cer"}]).startswith("WER %")


# --- the command line ---

def test_subtitles_are_of_one_rate(capsys):
    with pytest.raises(SystemExit):
        sample.main(["a.mp4", "--rate", "all", "--srt", "a.srt"])
    assert "--srt is for one rate" in capsys.readouterr().err


def test_a_model_that_was_written_again_is_read_again(tmp_path, voice):
    from real.checkpoint import load_for_use
    saved(tmp_path / "out")
    first, _, _ = load_for_use(tmp_path / "out")
    assert load_for_use(tmp_path / "out")[0] is first
    os.utime(tmp_path / "out" / "config.json", (1, 1))
    assert load_for_use(tmp_path / "out")[0] is not first
    soundfile.write(tmp_path / "a.wav", voice, 16000)
    assert sample.transcribe(tmp_path / "a.wav", tmp_path / "out", rate=2)["audio_rate"] == 2


# --- what a second look found ---

@pytest.mark.parametrize("rate", [8000, 16000, 48000])
@pytest.mark.parametrize("kind", ["ts", "mpg", "mkv"])
def test_sound_and_lips_stay_together_at_any_rate_and_start(tmp_path, talker_clips, rate, kind):
    """A file may begin at any time, and its sound may have any rate (MPEG has none of 8 kHz)."""
    clip, path = talker_clips[0], tmp_path / f"a.{kind}"
    write_mp4(tmp_path / "a.mp4", clip.frames, clip.wave)
    rate = 44100 if (rate, kind) == (8000, "mpg") else rate
    codecs = ("-c:v", "mpeg2video", "-q:v", "2", "-c:a", "mp2") if kind == "mpg" else ("-c:v", "libx264", "-c:a", "aac")
    start = ("-output_ts_offset", "3") if kind == "mkv" else ()
    ffmpeg("-i", tmp_path / "a.mp4", *codecs, "-ar", rate, *start, path)
    found = read_clip(path)
    later = np.correlate(found.wave, clip.wave, "full").argmax() - len(clip.wave) + 1    # the coder of the sound delays both
    n = len(clip.frames) - 6
    apart = [np.abs(found.frames[i:i + n].astype(int) - clip.frames[:n]).mean() for i in range(6)]
    assert abs(later / 16000 - np.argmin(apart) / FPS) < 0.06 and later < 0.2 * 16000


def test_a_still_picture_beside_a_voice_is_not_read(tmp_path, talker_clips, capsys):
    clip = talker_clips[0]
    found = read_clip(write_mp4(tmp_path / "a.mp4", np.full_like(clip.frames, 90), clip.wave))
    assert found.streams == ("audio",) and "pictures do not move" in capsys.readouterr().err


def test_hum_and_an_offset_hide_no_quiet_voice(tmp_path, talker_clips):
    a, b = talker_clips[0].wave, talker_clips[1].wave * 10 ** (-12 / 20)
    wave = np.concatenate([a, np.zeros(64000), b, np.zeros(64000)])
    clean = [(round(start, 1), round(clip.duration, 1)) for start, clip in pieces(write_wav(tmp_path / "a.wav", wave))]
    hum = 0.03 + 0.03 * np.sin(2 * np.pi * 50 * np.arange(len(wave)) / 16000)
    found = [(round(start, 1), round(clip.duration, 1)) for start, clip in pieces(write_wav(tmp_path / "b.wav", wave + hum))]
    assert len(clean) == len(found) == 2
    assert np.abs(np.subtract(clean, found)).max() <= 0.4


def test_a_noise_that_begins_later_is_no_speech(tmp_path, talker_clips):
    rng, starts = np.random.default_rng(0), (5, 30, 48)
    wave = rng.standard_normal(60 * 16000) * 10 ** (-75 / 20)
    wave[20 * 16000:] *= 10
    for start, clip in zip(starts, talker_clips):
        wave[start * 16000:start * 16000 + len(clip.wave)] += clip.wave
    found = [(start, start + clip.duration) for start, clip in pieces(write_wav(tmp_path / "a.wav", wave))]
    assert len(found) == 3
    for (start, end), begin, clip in zip(found, starts, talker_clips):
        assert begin - 0.3 < start < begin + 0.7 and end < begin + clip.duration + 0.3


def write_wav(path, wave, rate=16000):
    soundfile.write(path, wave, rate, subtype="FLOAT")
    return path


@pytest.mark.parametrize("n_channels", [3, 6, 12])
def test_each_channel_may_be_a_microphone(tmp_path, talker_clips, n_channels):
    """Voices that follow one another, each on a channel of its own, are all heard."""
    voices = [talker_clips[i % 3].wave for i in range(n_channels)]
    sound = np.zeros((sum(map(len, voices)), n_channels))
    end = 0
    for channel, wave in enumerate(voices):
        sound[end:end + len(wave), channel] = wave
        end += len(wave)
    found = np.concatenate(list(media.wave_frames(media.probe(write_wav(tmp_path / "a.wav", sound)))))
    assert alike(found, sound.sum(1)) and np.abs(found).max() < 1
    assert alike(found[-len(voices[-1]):], voices[-1])


def test_one_voice_in_many_microphones_is_no_louder(tmp_path, voice):
    found = heard(write_wav(tmp_path / "a.wav", np.stack([voice] * 8, 1)))
    assert alike(found, voice) and np.abs(found).max() < 1.2 * np.abs(voice).max()


def test_a_long_file_that_was_cut_is_refused(tmp_path, talker_clips):
    wave = np.concatenate([clip.wave for clip in talker_clips * 4])[:40 * 16000]
    soundfile.write(tmp_path / "a.flac", wave, 16000)
    whole = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[:len(whole) * 6 // 10])
    with pytest.raises(ClipError, match="longer than 30 s|damaged"):
        read_clip(tmp_path / "cut.flac")


@pytest.mark.parametrize("coder", ["libx264 -crf 38 -g 25", "libvpx -b:v 60k -g 30"])
def test_a_portrait_from_a_coder_does_not_move(tmp_path, talker_clips, voice, coder):
    """Its key frames differ a little from the pictures before them."""
    rng = np.random.default_rng(0)
    face = np.clip(np.kron(talker_clips[0].frames[0], np.ones((8, 8))) + rng.normal(0, 8, (256, 256)), 0, 255).astype(np.uint8)
    write_mp4(tmp_path / "a.mp4", np.repeat(face[None], len(voice) // 640, 0), voice)
    ffmpeg("-i", tmp_path / "a.mp4", "-c:v", *coder.split(), "-c:a", "copy", tmp_path / "b.mkv")
    frames = np.stack(list(mouth.mouths(media.probe(tmp_path / "b.mkv"), 32, box=(80, 80, 96, 96)))).astype(int)
    assert np.abs(np.diff(frames, axis=0)).mean((1, 2)).max() > 1
    assert read_clip(tmp_path / "b.mkv", box=(80, 80, 96, 96)).streams == ("audio",)


def test_lips_in_strongly_compressed_film_move():
    """A coder that skips blocks changes few pixels, but these by much."""
    frames = np.full((50, 32, 32), 90, np.uint8)
    frames[10:40:4, 14:17, 12:16] = 140
    assert not media.is_still(frames) and media.is_still(frames[:10])


def test_check_does_not_judge_lips_in_whole_pictures(tmp_path, talker_clips, capsys):
    """A mouth of 12 pixels in a picture that stands still otherwise."""
    frames = np.full((len(talker_clips[0].frames), 240, 320), 60, np.uint8)
    frames[:, 150:162, 150:162] = talker_clips[0].frames[:, ::2, ::2][:, 2:14, 2:14]
    write_mp4(tmp_path / "a.mp4", frames, talker_clips[0].wave)
    assert read_clip(tmp_path / "a.mp4", box="all").streams == ("audio", "video") and not capsys.readouterr().err
    write_mp4(tmp_path / "b.mp4", frames[:1].repeat(75, 0)[:, :96, :96], talker_clips[0].wave)
    assert read_clip(tmp_path / "b.mp4", box="all").streams == ("audio",)


def test_a_clip_that_was_cut_without_recoding_is_not_joined(tmp_path, talker_clips, capsys):
    frames = np.concatenate([clip.frames for clip in talker_clips])
    write_mp4(tmp_path / "a.mp4", frames, np.concatenate([clip.wave for clip in talker_clips]))
    ffmpeg("-i", tmp_path / "a.mp4", "-c:v", "libx264", "-g", "400", "-sc_threshold", "0", "-c:a", "aac", tmp_path / "b.mp4")
    ffmpeg("-ss", "6", "-i", tmp_path / "b.mp4", "-t", "1.5", "-c", "copy", tmp_path / "c.mp4")
    media.probe(tmp_path / "c.mp4")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("level, read", [(-65, "voice"), (-20, "hiss")])
def test_a_default_track_that_only_hisses_is_not_read(tmp_path, voice, level, read):
    """An open input. A quiet voice on the default track is still the one that is read."""
    hiss = np.random.default_rng(0).normal(0, 10 ** (level / 20), len(voice))
    soundfile.write(tmp_path / "hiss.wav", hiss, 16000)
    soundfile.write(tmp_path / "voice.wav", 0.1 * voice / voice.std(), 16000)
    ffmpeg("-i", tmp_path / "hiss.wav", "-i", tmp_path / "voice.wav", "-map", "0:a", "-map", "1:a", "-c", "copy", tmp_path / "a.mkv")
    assert alike(heard(tmp_path / "a.mkv"), {"voice": voice, "hiss": hiss}[read])


def test_two_channels_without_a_usual_mix(tmp_path, voice):
    soundfile.write(tmp_path / "a.wav", voice, 16000)
    ffmpeg("-i", tmp_path / "a.wav", "-af", "pan=SL+SR|SL=c0|SR=c0", tmp_path / "b.wav")
    assert alike(heard(tmp_path / "b.wav"), voice)


def test_sound_beside_a_longer_stream_is_whole(tmp_path, voice):
    soundfile.write(tmp_path / "a.wav", voice, 16000)
    soundfile.write(tmp_path / "b.wav", np.tile(voice, 3), 16000)
    ffmpeg("-i", tmp_path / "a.wav", "-i", tmp_path / "b.wav", "-map", "0:a", "-map", "1:a", tmp_path / "c.mka")
    assert alike(heard(tmp_path / "c.mka"), voice)


def test_lips_that_seldom_move_are_no_portrait(talker_clips):
    """Ten pictures of speech in ten seconds."""
    frames = talker_clips[0].frames
    rare = np.concatenate([np.repeat(frames[:1], 120, 0), frames[:10], np.repeat(frames[9:10], 120, 0)])
    assert not media.is_still(rare) and media.is_still(rare[:120]) and media.is_still(rare[:1]) and media.is_still(rare[:0])


def test_a_model_that_never_read_sound_alone_keeps_a_still_picture(tmp_path, talker_clips):
    clip = talker_clips[0]
    path = write_mp4(tmp_path / "a.mp4", np.full_like(clip.frames, 90), clip.wave)
    [(_, found)] = pieces(path, voice_alone=False)
    assert found.streams == ("audio", "video")


def test_channels_of_opposite_phase_among_many(tmp_path, voice, capsys):
    sound = np.zeros((len(voice), 12))
    sound[:, 3], sound[:, 4] = voice, -voice
    assert alike(heard(write_wav(tmp_path / "a.wav", sound)), voice) and "cancel out" in capsys.readouterr().err


def test_the_default_picture_track_is_read(tmp_path, talker_clips, capsys):
    clip = talker_clips[0]
    write_mp4(tmp_path / "black.mp4", np.zeros_like(clip.frames), clip.wave)
    write_mp4(tmp_path / "a.mp4", clip.frames, clip.wave)
    ffmpeg("-i", tmp_path / "black.mp4", "-i", tmp_path / "a.mp4", "-map", "0:v", "-map", "1:v", "-map", "1:a", "-c", "copy",
           "-disposition:v:0", "0", "-disposition:v:1", "default", tmp_path / "two.mkv")
    assert np.abs(read_clip(tmp_path / "two.mkv").frames.astype(int) - clip.frames).mean() < 8
    assert "2 picture tracks; read is number 2" in capsys.readouterr().err


def test_a_file_without_a_duration(tmp_path, talker_clips):
    """A browser's recording, or one that was never finished. Where its sound is over, the lips are read."""
    a, b = talker_clips[:2]
    frames = np.concatenate([a.frames, np.repeat(a.frames[-1:], 100, 0), b.frames])
    write_mp4(tmp_path / "a.mp4", frames, a.wave)
    ffmpeg("-i", tmp_path / "a.mp4", "-c:v", "libx264", "-c:a", "aac", "-f", "matroska", "-live", "1", tmp_path / "a.mkv")
    whole, unfinished = (pieces(tmp_path / name) for name in ("a.mp4", "a.mkv"))
    assert media.probe(tmp_path / "a.mkv").seconds == pytest.approx(len(frames) / FPS, abs=0.3)
    assert [clip.streams for _, clip in whole] == [clip.streams for _, clip in unfinished] and len(whole) > 1


def test_a_header_that_claims_too_much_is_not_believed(tmp_path, talker_clips):
    clip = talker_clips[0]
    write_mp4(tmp_path / "a.mp4", clip.frames, clip.wave)
    ffmpeg("-i", tmp_path / "a.mp4", "-c", "copy", "-output_ts_offset", "3600", tmp_path / "a.mkv")
    assert media.probe(tmp_path / "a.mkv").seconds == pytest.approx(clip.duration, abs=0.3)
    assert read_clip(tmp_path / "a.mkv").duration == pytest.approx(clip.duration, abs=0.1)


def test_lips_are_read_beside_sound_that_cannot_be(tmp_path, talker_clips):
    clip = talker_clips[0]
    write_mp4(tmp_path / "a.mp4", clip.frames, clip.wave)
    write_wav(tmp_path / "nan.wav", np.full(len(clip.wave), np.nan, np.float32))
    ffmpeg("-i", tmp_path / "a.mp4", "-i", tmp_path / "nan.wav", "-map", "0:v", "-map", "1:a", "-c", "copy", tmp_path / "b.mkv")
    [(_, found)] = pieces(tmp_path / "b.mkv", streams=("video",))
    assert len(found.frames) == len(clip.frames)
    with pytest.raises(ClipError, match="not numbers"):
        pieces(tmp_path / "b.mkv")


def test_a_voice_is_brought_to_the_level_of_the_training_clips(talker_clips):
    """Too quiet or too loud: the nearer end of their range. Within it: as it is."""
    limits = clips.limits(talker_clips)
    low, high = limits["levels"]
    assert low < high and limits["longest"] == max(clip.duration for clip in talker_clips)
    assert [low, high] == np.percentile([clips.mel_level(clip) for clip in talker_clips], (5, 95)).tolist()
    for gain, level in ((1e-2, low), (30, high)):
        clip = data.with_log_power(data.Clip("a", "b", talker_clips[0].wave * np.float32(gain)))
        assert clips.mel_level(clips.at_level(clip, limits["levels"])) == pytest.approx(level, abs=0.3)
    middle = min(talker_clips, key=lambda clip: abs(clips.mel_level(clip) - (low + high) / 2))
    assert np.array_equal(clips.at_level(middle, limits["levels"]).wave, middle.wave)
    assert clips.at_level(middle, None) is middle


def test_transcribe_brings_a_voice_to_the_level_of_training(trained, tmp_path, voice, monkeypatch):
    levels, heard = json.loads((trained / "config.json").read_text())["levels"], []
    monkeypatch.setattr(sample, "batch", lambda found, *more: heard.extend(found) or data.batch(found, *more))
    sample.transcribe(write_wav(tmp_path / "a.wav", voice * np.float32(1e-2)), trained)
    assert clips.mel_level(heard[0]) == pytest.approx(levels[0], abs=0.3)


@pytest.mark.parametrize("flag", ["--srt", "--show-crop"])
def test_the_clip_itself_is_never_written_over(tmp_path, trained, talker_clips, capsys, flag):
    path = write_mp4(tmp_path / "a.mp4", talker_clips[0].frames, talker_clips[0].wave)
    before = path.read_bytes()
    (tmp_path / "link").symlink_to(path)
    for name in (path, tmp_path / "link"):
        assert sample.main([str(path), "--ckpt", str(trained), flag, str(name)]) == 2
        assert "that is the clip itself" in capsys.readouterr().err and path.read_bytes() == before


def test_a_link_is_followed_and_a_device_stays(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    os.mkfifo(tmp_path / "fifo")
    files.write_whole(tmp_path / "link", lambda path: path.write_text("new"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    with subprocess.Popen(["cat", tmp_path / "fifo"], stdout=subprocess.PIPE) as reader:
        files.write_whole(tmp_path / "fifo", lambda path: path.write_text("new"))
        with pytest.raises(OSError, match="full"):
            files.write_whole("/dev/full", lambda path: path.write_text("new"))
        assert reader.communicate(timeout=20)[0] == b"new" and (tmp_path / "fifo").is_fifo()


def test_files_of_other_programs_in_out_stay(tmp_path):
    (tmp_path / ".notes.2024").write_text("mine")
    (tmp_path / ".backup.2023").mkdir()
    (tmp_path / f".mine{files.HALF}").write_text("mine")
    (tmp_path / f".state.safetensors.999999999{files.HALF}").write_text("half")
    with own_folder(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".backup.2023", ".mine.half", ".notes.2024"]


@pytest.mark.parametrize("owner", [b"\xff\xfe", b"9" * 30, b""])
def test_a_lock_that_is_none_is_taken_over(tmp_path, owner):
    (tmp_path / ".lock").write_bytes(owner)
    with own_folder(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


# --- more of the same kinds ---

def test_silence_between_a_loud_and_a_quiet_voice(tmp_path, talker_clips):
    loud, quiet = (clip.wave / np.abs(clip.wave).max() for clip in talker_clips[:2])
    gap = np.zeros(16000 * 5)
    wave = np.concatenate([quiet * 10 ** (-36 / 20), gap, loud, gap, loud, gap])
    soundfile.write(tmp_path / "a.wav", .5 * wave, 16000, "FLOAT")
    start, clip = pieces(tmp_path / "a.wav")[0]
    assert start < 0.3 and clip.duration > len(quiet) / 16000 - 0.3      # one piece, not several words


def test_no_piece_goes_over_the_end_of_the_sound(tmp_path, talker_clips):
    """The lips of all clips, without a pause; the sound ends after the second clip."""
    frames = np.concatenate([clip.frames for clip in talker_clips])
    sound = np.concatenate([clip.wave for clip in talker_clips[:2]])
    write_mp4(tmp_path / "a.mp4", frames, np.pad(sound, (0, len(frames) * 640 - len(sound))))
    found = pieces(tmp_path / "a.mp4")
    end = len(sound) / 16000
    assert all("audio" in clip.streams for start, clip in found if start < end - 0.5)
    assert all(clip.streams == ("video",) for start, clip in found if start > end + 0.5)
    assert any(abs(start - end) < 0.5 for start, _ in found)


@pytest.mark.parametrize("kind", ["mp3", "aiff", "flac"])
def test_sound_that_lacks_its_end_is_refused(tmp_path, voice, kind):
    soundfile.write(tmp_path / "a.wav", voice, 16000)
    ffmpeg("-i", tmp_path / "a.wav", tmp_path / f"a.{kind}")
    assert read_clip(tmp_path / f"a.{kind}").duration > len(voice) / 16000 - 0.1
    whole = (tmp_path / f"a.{kind}").read_bytes()
    (tmp_path / f"b.{kind}").write_bytes(whole[:len(whole) * 6 // 10])
    with pytest.raises(ClipError, match="damaged: "):
        read_clip(tmp_path / f"b.{kind}")


@pytest.mark.parametrize("kind", ["mpg", "ts", "flac"])
def test_a_clip_without_its_middle_is_refused(tmp_path, talker_clips, kind):
    path = write_mp4(tmp_path / "a.mp4", talker_clips[0].frames, talker_clips[0].wave)
    ffmpeg("-i", path, *("-c:v", "mpeg2video", "-q:v", 2, "-c:a", "mp2") if kind != "flac" else ("-vn",), tmp_path / f"a.{kind}")
    whole = (tmp_path / f"a.{kind}").read_bytes()
    read_clip(tmp_path / f"a.{kind}")
    first, last = len(whole) * 3 // 10, len(whole) * 8 // 10
    (tmp_path / f"b.{kind}").write_bytes(whole[:first] + bytes(last - first) + whole[last:])
    with pytest.raises(ClipError, match="damaged: "):
        read_clip(tmp_path / f"b.{kind}")


def test_the_shape_of_pixels_and_rotation(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=640x480:duration=0.4:rate=25", "-c:v", "libx264", tmp_path / "a.mp4")
    ffmpeg("-i", tmp_path / "a.mp4", "-c", "copy", "-aspect", "16:9", tmp_path / "wide.mp4")
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=576x720:duration=0.4:rate=25", "-vf", "setsar=45/64", "-c:v", "libx264", tmp_path / "b.mp4")
    ffmpeg("-display_rotation", -90, "-i", tmp_path / "b.mp4", "-c", "copy", tmp_path / "turned.mp4")
    for name, size in (("wide.mp4", (853, 480)), ("turned.mp4", (1024, 576))):
        source = media.probe(tmp_path / name)
        width, height = source.picture_size
        assert source.picture_size == size
        assert len(list(media.picture_frames(source, "null", (height, width)))) == 10     # the size that is decoded


@pytest.mark.parametrize("name", ["run:1", "2026-11-27T01:15", "-x"])
def test_folders_with_any_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert clips.main([f"--out={name}", "--count", "1"]) == 0 and len(list(Path(name).glob("*.mp4"))) == 1


@pytest.mark.parametrize("out", ["", "a.txt"])
def test_data_py_wants_a_folder(tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").touch()
    with pytest.raises(SystemExit):
        clips.main([f"--out={out}", "--count", "1"])
    assert "not a folder" in capsys.readouterr().err and os.listdir() == ["a.txt"]


def test_a_closed_pipe_is_left_to_run_script(capsys):
    """Other errors of a script are one line, and its exit code is 2."""
    @script.in_one_line("train.py", OSError)
    def main(argv=None):
        raise argv
    with pytest.raises(BrokenPipeError):
        main(BrokenPipeError())
    assert main(OSError("disk full")) == 2 and capsys.readouterr().err == "train.py: disk full\n"


def test_a_closed_pipe_ends_data_py(tmp_path):
    done = subprocess.run(f"{sys.executable} {ROOT}/data.py --out {tmp_path}/c --count 3 | head -1", shell=True, capture_output=True,
                          text=True)
    assert "pipe" not in done.stderr and "Traceback" not in done.stderr and done.stdout.count("\n") == 1


def test_a_closed_pipe_is_no_success():
    """What was not printed may not have been done: a training that prints into a closed pipe has no model."""
    program = "from real.script import run_script; run_script(lambda: [print('x' * 99) for _ in range(9999)])"
    command = f"set -o pipefail; {sys.executable} -c \"{program}\" | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr == ""


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_terminal(monkeypatch, closed):
    """Python's stream is None then, as after `python sample.py clip.mp4 >&-`."""
    monkeypatch.setattr(sys, closed, None)
    with pytest.raises(SystemExit) as ended:
        script.run_script(lambda: print(sys.stdout.isatty(), file=sys.stderr))
    assert not ended.value.code


@pytest.mark.parametrize("name", ["samples", "config.json", "state.safetensors"])
def test_what_stands_in_the_way_is_said_at_once(tmp_path, name):
    (tmp_path / name).touch() if name == "samples" else (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{name}: stands where training writes"), own_folder(tmp_path):
        pass


def test_a_model_of_sound_says_that_lips_are_not_read(tmp_path, capsys):
    model = tiny_avsr()
    del model.encoders["video"]
    assert clips.choose_task("a.mp4", ("audio", "video"), model) == "asr"
    assert "a.mp4: its video is not read, because the model reads audio only" in capsys.readouterr().err


def test_a_task_that_was_trained_is_preferred(capsys):
    model, both = tiny_avsr(), ("audio", "video")
    assert clips.choose_task("a.mp4", both, model, None, ["asr", "vsr"]) == "asr"
    assert "its video is not read, because the model was trained for asr and vsr" in capsys.readouterr().err
    assert clips.choose_task("a.mp4", both, model, None, ["avsr", "asr"]) == "avsr" and not capsys.readouterr().err
    assert clips.choose_task("a.mp4", ("video",), model, None, ["avsr"]) == "vsr"
    assert "is read by task vsr, for which this model was not trained" in capsys.readouterr().err


def test_a_muted_piece_does_not_end_a_clip(tmp_path, talker_clips, capsys):
    """The model knows avsr alone, and has no threshold for lips alone."""
    words = ["bin", "blue"]
    model = tiny_avsr(vocab=make_tokenizer(words).n_vocab)
    save_model(model, tmp_path, {}, words, rates=[[2, 2], [4, 4]], tasks=["avsr"], longest=4, auto={"avsr": 0.})
    frames = np.concatenate([np.concatenate([clip.frames, clip.frames[-1:].repeat(25, 0)]) for clip in talker_clips[:4]])
    sound = np.concatenate([np.pad(clip.wave, (0, 16000)) for clip in talker_clips[:2]])
    write_mp4(tmp_path / "a.mp4", frames, np.pad(sound, (0, len(frames) * 640 - len(sound))))
    answer = sample.transcribe(tmp_path / "a.mp4", str(tmp_path), rate="auto")
    rates = [(segment["audio_rate"], segment["video_rate"]) for segment in answer["segments"]]
    assert rates[0][0] and (None, 2) in rates
    assert capsys.readouterr().err.count("is read by task vsr, for which this model was not trained") == 1


def test_a_pattern_of_several_clips_has_no_subtitles(tmp_path, voice, capsys):
    saved(tmp_path / "out")
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", voice, 16000)
    for argv, said in (([str(tmp_path / "*.wav")], "are for one clip"),
                       ([str(tmp_path / "a.wav")], "in a folder that is not there; name a file to write")):
        assert sample.main([*argv, "--ckpt", str(tmp_path / "out"), "--srt", str(tmp_path / "missing/x.srt")]) == 2
        assert said in capsys.readouterr().err


def test_clips_of_one_s_own_are_not_taken_for_samples(tmp_path, talker_clips, capsys):
    (tmp_path / "out/samples").mkdir(parents=True)
    clips.write_clip(talker_clips[0], tmp_path / "out/samples/sample1_mine.mp4")
    with pytest.raises(SystemExit, match="2"):
        run(capsys, "--data", tmp_path / "out/samples", "--out", tmp_path / "out")
    assert "would get its samples as clips" in capsys.readouterr().err


def test_the_table_is_shown_before_metrics_json_is_written(trained, tmp_path, capsys, monkeypatch):
    def full(path, value):
        raise OSError(28, "No space left on device", str(path))
    out = shutil.copytree(trained, tmp_path / "out")
    monkeypatch.setattr(train, "write_json", full)
    assert train.main(["--eval-only", "--out", str(out), "--rates", "2:2", "--tasks", "asr", "--test-clips", "2", "--snr", "clean"]) == 2
    shown = capsys.readouterr()
    assert "asr   clean" in shown.out and "No space left" in shown.err


def test_a_long_name_in_another_script_is_written(tmp_path):
    files.write_whole(tmp_path / ("字" * 80 + ".srt"), lambda path: path.write_text("1"))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["1"]


def test_a_clip_of_exactly_30_s(tmp_path, talker_clips):
    wave = np.concatenate([clip.wave for clip in talker_clips * 3])[:30 * 16000]
    soundfile.write(tmp_path / "a.wav", wave, 16000)
    for kind in ("mp2", "aac"):
        ffmpeg("-i", tmp_path / "a.wav", tmp_path / f"a.{kind}")
        assert read_clip(tmp_path / f"a.{kind}").duration == 30


@pytest.mark.parametrize("kind", ["wav", "mp4", "aiff", "mov", "flv"])
def test_joined_files_that_are_not_read_to_their_end_are_said(tmp_path, talker_clips, capsys, kind):
    path = write_mp4(tmp_path / "a.mp4", talker_clips[0].frames, talker_clips[0].wave)
    ffmpeg("-i", path, *(("-vn",) if kind in ("wav", "aiff") else ("-c", "copy")), tmp_path / f"b.{kind}")
    media.probe(tmp_path / f"b.{kind}")
    assert capsys.readouterr().err == ""
    (tmp_path / f"c.{kind}").write_bytes((tmp_path / f"b.{kind}").read_bytes() * 2)
    media.probe(tmp_path / f"c.{kind}")
    assert "is it several files joined?" in capsys.readouterr().err


def test_a_muted_piece_is_not_amplified(tmp_path, talker_clips, capsys):
    """What a coder leaves of the voice at the border of a muted stretch is no sound."""
    frames, waves = (np.concatenate([getattr(clip, name) for clip in talker_clips[:4]]) for name in ("frames", "wave"))
    n = len(talker_clips[0].wave)
    waves[n:n + 80000] = 0
    waves[n:n + 20] = 1.5e-4
    media.write_mp4(tmp_path / "a.mp4", frames, waves)
    pieces = list(read_pieces(media.probe(tmp_path / "a.mp4"), 4, levels=(-30, 0)))
    muted = [clip for start, clip in pieces if n / 16000 < start + 0.1 and start + clip.duration < n / 16000 + 5.1]
    assert muted and all(clip.streams == ("video",) for clip in muted)


def test_sound_that_ends_before_its_header_says_is_said(tmp_path, voice, capsys):
    soundfile.write(tmp_path / "a.wav", voice, 16000)
    ffmpeg("-i", tmp_path / "a.wav", tmp_path / "a.mp3")
    whole = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "cut.mp3").write_bytes(whole[:len(whole) * 55 // 100])
    for name, said in (("a.mp3", False), ("cut.mp3", True)):
        list(read_pieces(media.probe(tmp_path / name), 10))
        assert ("s of sound can be read" in capsys.readouterr().err) == said


def test_a_small_mp4_is_not_called_joined(tmp_path, talker_clips, capsys):
    media.write_mp4(tmp_path / "a.mp4", talker_clips[0].frames, talker_clips[0].wave)
    ffmpeg("-i", tmp_path / "a.mp4", "-an", "-c:v", "libx264", "-crf", "45", tmp_path / "small.mp4")
    media.write_mp4(tmp_path / "still.mp4", np.zeros((300, 32, 32), np.uint8), np.zeros(192000, np.float32))
    for name in ("small.mp4", "still.mp4"):
        media.probe(tmp_path / name)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("text", ["我 要 3 个", "今 天 天 气 好", "コーヒーサーバー"])
def test_scripts_without_spaces_have_a_character_error_rate(text):
    assert report.error_rates([text], [text])["cer"] == 0
    assert "cer" not in report.error_rates(["안녕 하세요"], ["a"])          # Korean has spaces


# --- what is lost, or not heard ---

def test_a_folder_of_other_programs_is_not_trained_into(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/sample1_mine.wav").write_text("mine")
    for found in ("config.json", "samples/sample1_mine.wav"):
        code, (line,) = run(capsys, "--out", tmp_path)
        assert code == 2 and f"{found}: training would replace it, and did not write it; name another --out" in line
        if found == "config.json":
            (tmp_path / found).unlink()
    (tmp_path / "run.json").write_text("{}")       # a run that was stopped
    with own_folder(tmp_path):
        pass


@pytest.mark.parametrize("flag", ["--srt", "--show-crop"])
def test_another_clip_is_never_written_over(tmp_path, trained, talker_clips, capsys, flag):
    path, other = (write_mp4(tmp_path / f"{name}.mp4", talker_clips[0].frames, talker_clips[0].wave) for name in "ab")
    before = other.read_bytes()
    assert sample.main([flag, str(other), str(path), "--ckpt", str(trained)]) == 2
    assert "b.mp4: a clip's name; name the file to write" in capsys.readouterr().err and other.read_bytes() == before


def test_an_offset_does_not_hide_a_quiet_voice(tmp_path, voice):
    quiet = 0.01 * voice
    soundfile.write(tmp_path / "a.wav", quiet + 0.05, 16000, "FLOAT")
    (_, clip), = read_pieces(media.probe(tmp_path / "a.wav"), 10, levels=(-30, 0))
    wave = clip.wave - clip.wave.mean()
    assert alike(wave, voice) and abs(clip.wave.mean()) < 0.1 * clip.wave.std()
    assert clips.mel_level(clip) == pytest.approx(-30, abs=0.3)


def test_a_constant_is_silence(tmp_path, talker_clips, voice):
    write_mp4(tmp_path / "a.mp4", talker_clips[0].frames, voice)
    soundfile.write(tmp_path / "flat.wav", np.full(len(voice), 1 / 128), 16000, "PCM_U8")
    ffmpeg("-i", tmp_path / "a.mp4", "-i", tmp_path / "flat.wav", "-map", "0:v", "-map", "1:a", "-c", "copy", tmp_path / "b.mkv")
    soundfile.write(tmp_path / "b.wav", voice, 16000)
    assert media.is_silent(media.probe(tmp_path / "b.mkv"))
    assert alike(read_clip(tmp_path / "b.mkv", sound=tmp_path / "b.wav").wave, voice)


def test_a_voice_after_minutes_of_loud_music_is_speech():
    rng = np.random.default_rng(0)
    music, voice = rng.uniform(-22, -8, 300 * FPS), np.concatenate([np.append(rng.uniform(-35, -20, 60), np.full(15, -75.))] * 10)
    level = np.concatenate([music, voice])
    active = media.active_frames(level, media.SILENCE, np.maximum(level, media.SILENCE), 6)
    assert active[len(music):][voice > -50].mean() > 0.7 and not active[len(music):][voice < -50].any()


def test_joined_files_with_lips_and_sound_are_said(tmp_path, talker_clips, capsys):
    path = write_mp4(tmp_path / "a.mp4", talker_clips[0].frames, talker_clips[0].wave)
    ffmpeg("-i", path, "-c", "copy", tmp_path / "a.ts")
    (tmp_path / "b.ts").write_bytes((tmp_path / "a.ts").read_bytes() * 3)
    for name, said in (("a.ts", False), ("b.ts", True)):
        list(read_pieces(media.probe(tmp_path / name), LONGEST))
        assert ("several files joined?" in capsys.readouterr().err) == said
