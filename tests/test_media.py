"""python -m pytest tests/test_media.py: any file, by its time stamps; pieces of long ones; bad ones."""
import numpy as np
import pytest
import soundfile
from conftest import SHARED, ffmpeg

import data
import media
from data import normalize
from encoders import SAMPLES_PER_FRAME
from folders import transcript
from media import ClipError


@pytest.fixture(scope="session")
def files(tmp_path_factory, talker_clips):
    """One synthetic clip in many containers: {name: path}."""
    folder = tmp_path_factory.mktemp("media")
    data.write_clip(talker_clips[0], folder / "clip.mp4")
    paths = {"mp4": folder / "clip.mp4"}
    for name, options in {"mkv": "-c copy", "mov": "-c copy", "avi": "-c:v mpeg4 -c:a mp3", "webm": "-c:v vp8 -b:v 1M -c:a libopus",
                          "mpg": "-c:v mpeg2video -r 25 -q:v 2 -c:a mp2", "wav": "-vn", "flac": "-vn", "mp3": "-vn",
                          "fast.mp4": "-vf fps=50", "silent.mp4": "-an -c:v copy", "sound.mp4": "-vn -c:a copy"}.items():
        paths[name] = folder / f"{name.partition('.')[0]}.{name.rpartition('.')[2]}"
        ffmpeg("-i", paths["mp4"], *options.split(), paths[name])
    return paths


def test_reading(files, talker_clips):
    original = talker_clips[0]
    for name, path in files.items():
        clip = data.read_clip(path)
        assert clip.streams == {"wav": ("audio",), "flac": ("audio",), "mp3": ("audio",), "silent.mp4": ("video",),
                                "sound.mp4": ("audio",)}.get(name, ("audio", "video")), name
        if clip.frames is not None:
            assert abs(len(clip.frames) - len(original.frames)) <= (2 if name in ("mpg", "webm", "avi") else 0), name
            n = min(len(clip.frames), len(original.frames))
            assert np.abs(clip.frames[:n].astype(int) - original.frames[:n]).mean() < 12, name
        if clip.wave is not None:
            assert len(clip.wave) % SAMPLES_PER_FRAME == 0 and clip.wave.dtype == np.float32
            n = min(len(clip.wave), len(original.wave))
            spectrum = np.fft.rfft(clip.wave[:n], 1 << 17) * np.conj(np.fft.rfft(original.wave[:n], 1 << 17))
            correlation = np.fft.irfft(spectrum)
            shift = int(correlation.argmax())
            shift = shift if shift < 1 << 16 else shift - (1 << 17)
            assert abs(shift) < 1300, (name, shift)  # mp3 and mp2 encoders add some silence at the start
            assert correlation.max() > 0.9 * np.sqrt((clip.wave[:n] ** 2).sum() * (original.wave[:n] ** 2).sum()), name


def test_written_clip_and_transcript(files, talker_clips):
    assert transcript(files["mp4"]) == talker_clips[0].text
    assert sorted(p.suffix for p in files["mp4"].parent.glob("clip.*")) == [".mp4", ".txt"]
    assert np.corrcoef(data.read_clip(files["mp4"]).wave, talker_clips[0].wave)[0, 1] > 0.99


def test_8_khz_and_stereo(tmp_path):
    tone = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    soundfile.write(tmp_path / "a.flac", np.stack([tone, tone], 1) / 2, 8000)
    wave = data.read_clip(tmp_path / "a.flac").wave
    assert len(wave) == 16000 and np.abs(np.fft.rfft(wave)).argmax() == 440


@pytest.mark.parametrize("content", [b"", b"no media at all" * 100])
def test_unreadable_media(tmp_path, content):
    (tmp_path / "bad.mp4").write_bytes(content)
    with pytest.raises(ClipError, match="bad.mp4.*ffmpeg says"):
        data.read_clip(tmp_path / "bad.mp4")
    with pytest.raises(ClipError, match="no such file"):
        data.read_clip(tmp_path / "missing.mp4")
    soundfile.write(tmp_path / "long.wav", np.full(8000 * 31, .1), 8000)
    with pytest.raises(ClipError, match="long.wav: longer than 30 s"):
        data.read_clip(tmp_path / "long.wav")



@pytest.mark.skipif(not (SHARED / "grid").is_dir(), reason="needs the real GRID clips beside the project")
def test_grid_clips_have_75_frames():
    paths = sorted((SHARED / "grid").glob("*.mpg"))
    assert len(paths) == 8
    for path in paths:
        clip = data.read_clip(path, box=(132, 170, 96, 96))
        with media.sound(media.probe(path)) as decoder:
            n_samples = sum(len(part) // 4 for part in decoder.frames(4 * SAMPLES_PER_FRAME))
        assert len(clip.frames) == 75 and len(clip.wave) == 48000 and abs(n_samples - 47600) <= 100
        assert len(normalize(transcript(path)).split()) == 6
