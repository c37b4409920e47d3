"""python -m pytest tests/test_media.py: files of any kind, by their time stamps; pieces of long ones; bad ones."""
import numpy as np
import pytest
import soundfile
from conftest import SHARED, ffmpeg

from data import ClipError, normalize
from encoders import SAMPLES_PER_FRAME
from real import media
from real.clips import read_clip, read_pieces, write_clip
from real.layouts import Entry, transcript
from real.mouth import mouths


@pytest.fixture(scope="session")
def files(tmp_path_factory, talker_clips):
    """One synthetic clip in many containers: {name: path}."""
    folder = tmp_path_factory.mktemp("media")
    write_clip(talker_clips[0], folder / "clip.mp4")
    paths = {"mp4": folder / "clip.mp4"}
    for name, options in {
            "mkv": "-c copy", "mov": "-c copy", "avi": "-c:v mpeg4 -c:a mp3", "webm": "-c:v vp8 -b:v 1M -c:a libopus",
            "mpg": "-c:v mpeg2video -r 25 -q:v 2 -c:a mp2", "wav": "-vn", "flac": "-vn", "mp3": "-vn",
            "fast.mp4": "-vf fps=50", "silent.mp4": "-an -c:v copy", "sound.mp4": "-vn -c:a copy"}.items():
        paths[name] = folder / f"{name.partition('.')[0]}.{name.rpartition('.')[2]}"
        ffmpeg("-i", paths["mp4"], *options.split(), paths[name])
    return paths


def test_reading(files, talker_clips):
    original = talker_clips[0]
    for name, path in files.items():
        clip = read_clip(path)
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
    assert transcript(Entry(files["mp4"], "", source=files["mp4"].with_suffix(".txt"))) == talker_clips[0].text
    assert sorted(p.suffix for p in files["mp4"].parent.glob("clip.*")) == [".mp4", ".txt"]
    assert np.corrcoef(read_clip(files["mp4"]).wave, talker_clips[0].wave)[0, 1] > 0.99


def test_8_khz_and_stereo(tmp_path):
    tone = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    soundfile.write(tmp_path / "a.flac", np.stack([tone, tone], 1) / 2, 8000)
    wave = read_clip(tmp_path / "a.flac").wave
    assert len(wave) == 16000 and np.abs(np.fft.rfft(wave)).argmax() == 440


@pytest.mark.parametrize("content, reason", [(b"", "an empty file"), (b"no media at all" * 100, "ffmpeg says")])
def test_unreadable_media(tmp_path, content, reason):
    (tmp_path / "bad.mp4").write_bytes(content)
    with pytest.raises(ClipError, match=f"bad.mp4: not readable as media.*{reason}"):
        read_clip(tmp_path / "bad.mp4")
    with pytest.raises(ClipError, match="no such file"):
        read_clip(tmp_path / "missing.mp4")
    soundfile.write(tmp_path / "long.wav", np.full(8000 * 31, .1), 8000)
    with pytest.raises(ClipError, match="long.wav: longer than 30 s"):
        read_clip(tmp_path / "long.wav")


def test_silence_is_no_sound(files, tmp_path):
    ffmpeg("-f", "lavfi", "-i", "anullsrc=r=16000:d=40", tmp_path / "silent.wav")
    ffmpeg("-i", files["silent.mp4"], "-i", tmp_path / "silent.wav", "-c:v", "copy", "-shortest", tmp_path / "mute.mp4")
    for longest in (None, 20):
        with pytest.raises(ClipError, match="silent"):
            list(read_pieces(media.probe(tmp_path / "silent.wav"), longest))
        (_, clip), = read_pieces(media.probe(tmp_path / "mute.mp4"), longest)
        assert clip.streams == ("video",) and clip.wave is None


@pytest.mark.skipif(not (SHARED / "grid").is_dir(), reason="needs the real GRID clips beside the project")
def test_grid_clips_have_75_frames():
    paths = sorted((SHARED / "grid").glob("*.mpg"))
    assert len(paths) == 8
    for path in paths:
        clip = read_clip(path, box=(132, 170, 96, 96))
        n_samples = sum(map(len, media.wave_frames(media.probe(path))))
        assert len(clip.frames) == 75 and len(clip.wave) == 48000 and abs(n_samples - 47600) <= 100
        assert len(normalize(transcript(Entry(path, "", source=path.with_suffix('.txt')))).split()) == 6


# --- time ---

MARGIN = 3  # frames at the ends are not compared


def lag(wave, original):
    """By how many samples `wave` is later than `original`."""
    n = min(len(wave), len(original))
    correlation = np.fft.irfft(np.fft.rfft(wave[:n], 1 << 17) * np.conj(np.fft.rfft(original[:n], 1 << 17)))
    return (int(correlation.argmax()) + (1 << 16)) % (1 << 17) - (1 << 16)


def frame_lag(frames, original):
    n, k = min(len(frames), len(original)), MARGIN
    return min(range(-k, k + 1), key=lambda d: np.abs(frames[k + d:n - k + d].astype(int) - original[k:n - k]).mean())


@pytest.mark.parametrize("name, options", {
    "23.976.mp4": "-vf fps=24000/1001", "30.mp4": "-vf fps=30", "59.94.mp4": "-vf fps=60000/1001",
    "vfr.mp4": r"-vf select='not(eq(mod(n\,7)\,3))' -fps_mode vfr",
    "vfr.mkv": r"-vf select='not(eq(mod(n\,5)\,2))' -fps_mode vfr",
    "5.1.mp4": "-c:v copy -ac 6 -ar 48000", "8k.mp4": "-c:v copy -ac 1 -ar 8000", "h264.mkv": "-c:v libx264 -c:a aac",
    "vp9.webm": "-c:v libvpx-vp9 -b:v 1M -c:a libopus", "mpeg4.mov": "-c:v mpeg4 -q:v 2 -c:a aac",
    "odd.mkv": "-vf scale=75:75 -c:v ffv1 -c:a flac", "rgb.avi": "-c:v png -pix_fmt rgb24 -c:a pcm_s16le",
    "96k.mov": "-c:v copy -c:a pcm_s24le -ar 96000"}.items())
def test_any_rate_is_brought_to_the_same_time(files, tmp_path, talker_clips, name, options):
    ffmpeg("-i", files["mp4"], *options.split(), tmp_path / name)
    clip, original = read_clip(tmp_path / name), talker_clips[0]
    assert abs(len(clip.frames) - len(original.frames)) <= 1 and len(clip.wave) == len(clip.frames) * SAMPLES_PER_FRAME
    assert abs(lag(clip.wave, original.wave)) <= SAMPLES_PER_FRAME and abs(frame_lag(clip.frames, original.frames)) <= 1


def test_rotation(files, tmp_path, talker_clips):
    ffmpeg("-i", files["mp4"], "-vf", "transpose=1", "-crf", 12, tmp_path / "turned.mp4")
    ffmpeg("-display_rotation", 90, "-i", tmp_path / "turned.mp4", "-c", "copy", tmp_path / "marked.mp4")
    turned, marked = (read_clip(tmp_path / name).frames.astype(int) for name in ("turned.mp4", "marked.mp4"))
    assert np.abs(marked - talker_clips[0].frames).mean() < 3 < np.abs(turned - talker_clips[0].frames).mean()
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x48:d=1", tmp_path / "rotation of 90.mp4")
    ffmpeg("-display_rotation", 90, "-i", tmp_path / "rotation of 90.mp4", "-c", "copy", tmp_path / "high.mp4")
    ffmpeg("-i", tmp_path / "rotation of 90.mp4", "-i", tmp_path / "high.mp4", "-map", "0:v", "-map", "1:v", "-c", "copy",
           tmp_path / "two.mp4")
    assert media.probe(tmp_path / "two.mp4").picture_size == (64, 48)      # the second track alone is turned
    assert media.probe(tmp_path / "rotation of 90.mp4").picture_size == (64, 48)
    assert media.probe(tmp_path / "high.mp4").picture_size == (48, 64)


@pytest.mark.parametrize("kind", ("mp4", "mkv", "ts", "mpg"))
def test_a_stream_that_starts_late(files, tmp_path, talker_clips, kind):
    """The sound lacks its first 200 ms and its time stamps start at 200 ms: it stays in step with the lips."""
    codecs = ("-c:v", "mpeg2video", "-c:a", "mp2") if kind == "mpg" else ("-c:v", "libx264", "-c:a", "aac")
    ffmpeg("-i", files["mp4"], "-ss", 0.2, "-i", files["mp4"], "-map", "0:v", "-map", "1:a",
           "-af", "asetpts=PTS-STARTPTS+0.2/TB", *codecs, tmp_path / f"late.{kind}")
    clip = read_clip(tmp_path / f"late.{kind}")
    sound_lag, picture_lag = lag(clip.wave, talker_clips[0].wave), frame_lag(clip.frames, talker_clips[0].frames)
    assert abs(sound_lag / SAMPLES_PER_FRAME - picture_lag) < 0.5
    assert abs(sound_lag) <= SAMPLES_PER_FRAME and np.abs(clip.wave[:2500]).max() < 1e-2


def test_time_stamps_that_pass_their_largest_number(files, tmp_path, talker_clips):
    """MPEG's begin again at 0 after 26.5 hours; ffmpeg gives the pictures before that negative ones."""
    ffmpeg("-i", files["mp4"], *"-c:v mpeg2video -q:v 2 -c:a mp2 -muxdelay 0 -output_ts_offset 95442.5".split(), tmp_path / "a.ts")
    assert media.probe(tmp_path / "a.ts").start < -0.5
    clip, original = read_clip(tmp_path / "a.ts"), talker_clips[0]
    later = frame_lag(clip.frames, original.frames)
    assert abs(len(clip.frames) - len(original.frames)) <= 2 and abs(later) <= 2
    assert abs(later - lag(clip.wave, original.wave) / SAMPLES_PER_FRAME) < 1.5
    moved = np.roll(clip.frames, -later, 0)[3:60].astype(int)
    assert np.abs(moved - original.frames[3:60]).mean() < 4


def test_time_stamps_that_run_away(tmp_path, monkeypatch):
    """After two seconds a time stamp is a day later. The file is refused, and no day of the same picture is decoded."""
    monkeypatch.setattr(media, "MAX_HOURS", 0.1)     # of the same picture at most, five by default
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=64x64:rate=25:duration=4", "-vf", "setpts='PTS+gte(N,50)*86400/TB'",
           "-fps_mode", "passthrough", tmp_path / "gap.mkv")
    with pytest.raises(ClipError, match="gap.mkv: its time stamps span more than"):
        list(mouths(media.probe(tmp_path / "gap.mkv"), 32))


# --- pieces ---

def test_streams_are_made_equally_long():
    def piece(n_sound, n_pictures, spans=((0, 50),)):
        wave = (np.full(SAMPLES_PER_FRAME, .5, np.float32) for _ in range(n_sound))
        return list(media.cut_pieces(wave, (np.full((2, 2), t, np.uint8) for t in range(n_pictures)), spans))

    (start, wave, frames), = piece(20, 23)
    assert start == 0 and len(frames) == 23 and len(wave) == 23 * 640
    assert not wave[20 * 640:].any() and wave[:20 * 640].all()
    (_, wave, frames), = piece(28, 23)  # a little more sound is cut
    assert len(frames) == 23 and len(wave) == 23 * 640
    (_, wave, frames), = piece(40, 23)  # much more is not
    assert len(frames) == 40 and len(wave) == 40 * 640 and (frames[23:] == 22).all()
    pieces = piece(40, 23, [(0, 10), (12, 20), (20, 30), (30, 60), (60, 90)])
    assert [(start, len(wave) // 640, int(frames[0, 0, 0])) for start, wave, frames in pieces] == [
        (0, 10, 0), (12, 8, 12), (20, 10, 20), (30, 10, 22)]
    assert list(media.cut_pieces(None, iter([]), [(0, 9)])) == []


def test_the_last_samples_are_filled_up_with_silence():
    (_, wave, frames), = media.cut_pieces(iter([np.ones(640, np.float32), np.ones(100, np.float32)]), None, [(0, 9)])
    assert frames is None and len(wave) == 2 * 640 and wave[:740].all() and not wave[740:].any()


def spans_of(level, longest):
    return media.speech_spans(media.active_frames(level, media.SILENCE, np.maximum(level, media.SILENCE), 6), level, longest)


def test_speech_spans():
    rng = np.random.default_rng(0)
    speech, pause = lambda n: rng.uniform(-35, -15, n), lambda n: rng.uniform(-72, -65, n)
    level = np.concatenate([pause(20), speech(60), pause(15), speech(40), pause(4), speech(30), pause(40)])
    assert spans_of(level, 100) == [(16, 84), (91, 173)]
    assert spans_of(level, 1000) == [(16, 84), (91, 173)]
    short = spans_of(level, 50)
    assert max(b - a for a, b in short) <= 50 and [a for a, _ in short][1:] != [b for _, b in short][:-1]
    assert any(133 <= b <= 140 for _, b in short)  # the long span is cut in the short pause at 135 to 139
    for constant in (np.full(500, -20.), rng.uniform(-21, -20, 500)):
        spans = spans_of(constant, 100)
        assert spans[0][0] == 0 and spans[-1][1] == 500 and all(b == a for (_, b), (a, _) in zip(spans, spans[1:]))


def test_a_long_clip_is_cut_at_its_pauses(tmp_path, talker_clips):
    gap = np.zeros(16_000, np.float32)
    pictures = [np.concatenate([clip.frames, clip.frames[-1:].repeat(25, 0)]) for clip in talker_clips]
    sound = [wave for clip in talker_clips for wave in (clip.wave, gap)]
    media.write_mp4(tmp_path / "long.mp4", np.concatenate(pictures), np.concatenate(sound))
    longest = max(clip.duration for clip in talker_clips) + .5
    for streams in (("audio", "video"), ("video",), ("audio",)):  # pauses are found in the sound, whatever is read
        pieces = list(read_pieces(media.probe(tmp_path / "long.mp4"), longest, streams=streams))
        assert len(pieces) == 5 and all(clip.streams == streams for _, clip in pieces)
        start = 0
        for (at, clip), original in zip(pieces, talker_clips):
            assert start - media.MARGIN / media.FPS - .05 <= at < start + 0.6 and at + clip.duration <= start + original.duration + 0.6
            start += original.duration + 1
    ffmpeg("-i", tmp_path / "long.mp4", "-an", "-c", "copy", tmp_path / "mute.mp4")
    pieces = list(read_pieces(media.probe(tmp_path / "mute.mp4"), longest))
    assert len(pieces) >= 5 and max(clip.duration for _, clip in pieces) <= longest + .04
    assert {clip.streams for _, clip in pieces} == {("video",)}
