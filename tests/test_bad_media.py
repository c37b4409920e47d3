"""python -m pytest tests/test_bad_media.py: files that are damaged, odd, or no clips at all.

sample.py transcribes each of them and exits with 0, or prints one line that says what is wrong and exits with 2.
It leaves no half-written file and never takes a minute.
"""
import os
import signal
import struct

import numpy as np
import pytest
import soundfile
from conftest import ffmpeg

import sample
from real import clips, media, mouth
from real.clips import read_clip
from real.folders import read_entry
from real.layouts import Entry
from toy.talker import talker_clip

MINUTE = 60  # seconds


@pytest.fixture(autouse=True)
def no_hang():
    def late(*_):
        raise AssertionError(f"more than {MINUTE} s")
    signal.signal(signal.SIGALRM, late)
    signal.alarm(MINUTE)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A clip of 2.6 s in some containers. clip.mp4 has its index in front, so that it can be read without its end."""
    folder = tmp_path_factory.mktemp("good")
    clip = talker_clip(("train", 0, 0, 96, True))
    media.write_mp4(folder / "end.mp4", clip.frames, clip.wave)
    ffmpeg("-i", folder / "end.mp4", "-c", "copy", "-movflags", "faststart", folder / "clip.mp4")
    ffmpeg("-i", folder / "end.mp4", "-c:v", "mpeg2video", "-q:v", 2, "-c:a", "mp2", folder / "clip.mpg")
    ffmpeg("-i", folder / "end.mp4", "-c:v", "mpeg4", "-c:a", "pcm_s16le", folder / "clip.avi")
    ffmpeg("-i", folder / "end.mp4", "-vn", folder / "clip.wav")
    return folder


@pytest.fixture
def ask(trained, tmp_path, capfd):
    """Run sample.py on a clip, with subtitles -> (exit code, the transcript or the error line, all lines on stderr)."""
    def run(path, *flags):
        folder = tmp_path / "written"
        folder.mkdir(exist_ok=True)
        capfd.readouterr()
        code = sample.main([str(path), "--ckpt", str(trained), "--srt", str(folder / "clip.srt"), *flags])
        out, err = capfd.readouterr()
        lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
        errors = [line for line in lines if not line.startswith("note: ")]
        assert "Traceback" not in err and len(errors) == (code != 0), err
        assert out.count("\n") == (code == 0), out
        assert [p.name for p in folder.iterdir()] == ["clip.srt"] * (code == 0)  # no half-written and no other file
        (folder / "clip.srt").unlink(missing_ok=True)
        return code, out.strip() if code == 0 else lines[-1], lines
    return run


def refused(answer, *texts):
    code, line, _ = answer
    assert code == 2 and line.startswith("sample.py: "), answer
    for text in texts:
        assert text in line, line


# --- no media --------------------------------------------------------------------------------------------------------

NO_MEDIA = {"empty": b"", "text": "bin blue at f two now\n".encode() * 50, "zeros": bytes(10_000),
            "noise": np.random.default_rng(0).bytes(50_000), "head": b"\0\0\0\x20ftypisom",
            "html": b"<!doctype html><html><body>404 Not Found</body></html>", "zip": b"PK\x03\x04" + bytes(300),
            "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
            "list": b"ffconcat version 1.0\nfile '/etc/hostname'\n"}


@pytest.mark.parametrize("kind", NO_MEDIA)
@pytest.mark.parametrize("suffix", ("mp4", "wav"))
def test_no_media(ask, tmp_path, kind, suffix):
    (tmp_path / f"bad.{suffix}").write_bytes(NO_MEDIA[kind])
    refused(ask(tmp_path / f"bad.{suffix}"), f"bad.{suffix}: ", "ffmpeg says: " if NO_MEDIA[kind] else "an empty file")


def test_no_file(ask, tmp_path):
    refused(ask(tmp_path / "missing.mp4"), "missing.mp4: no such file")
    refused(ask(tmp_path), "not a file")
    os.mkfifo(tmp_path / "pipe.mp4")
    refused(ask(tmp_path / "pipe.mp4"), "pipe.mp4: not a file")
    refused(ask("/dev/zero"), "/dev/zero: not a file")
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "missing.mp4")
    refused(ask(tmp_path / "dangling.mp4"), "dangling.mp4: no such file")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    refused(ask(tmp_path / "loop.mp4"), "loop.mp4: ")
    refused(ask(tmp_path / ("x" * 300 + ".mp4")), "File name too long")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(ask, good, tmp_path):
    (tmp_path / "locked.mp4").write_bytes((good / "clip.mp4").read_bytes())
    (tmp_path / "locked.mp4").chmod(0)
    refused(ask(tmp_path / "locked.mp4"), "locked.mp4: ", "Permission denied")


# --- incomplete files ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ("clip.mp4", "end.mp4", "clip.mpg", "clip.wav"))
@pytest.mark.parametrize("place", range(20))
def test_truncated(ask, good, tmp_path, name, place):
    """The beginning of a file is read as far as it goes, or refused with ffmpeg's reason or as too short."""
    whole = (good / name).read_bytes()
    beginning = tmp_path / f"beginning of {name}"
    beginning.write_bytes(whole[:len(whole) * place // 20])
    answer = ask(beginning)
    if answer[0]:
        refused(answer, str(beginning))
        reasons = "ffmpeg says: ", "too short for a word", "no picture in it", "of unknown size", "an empty file"
        assert any(reason in answer[1] for reason in reasons), answer
    # The index of end.mp4 is at its end.
    assert place < (20 if name == "end.mp4" else 3) or answer[0] == (2 if name == "end.mp4" else 0), answer


def test_other_extension(ask, good, tmp_path):
    expected = ask(good / "clip.mp4")
    for name in ("clip.wav", "clip.jpg", "clip.txt", "clip"):
        (tmp_path / name).write_bytes((good / "clip.mp4").read_bytes())
        assert ask(tmp_path / name)[:2] == expected[:2] and expected[0] == 0


def test_streams_without_content(ask, good, tmp_path):
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), 16000)
    refused(ask(tmp_path / "nothing.wav"), "nothing.wav: ")
    soundfile.write(tmp_path / "sample.wav", np.ones(1) / 2, 16000)
    refused(ask(tmp_path / "sample.wav"), "0.04 s long, too short for a word")
    ffmpeg("-i", good / "clip.mp4", "-frames:v", 0, "-an", "-f", "mp4", "-c:v", "copy", tmp_path / "no_frames.mp4")
    refused(ask(tmp_path / "no_frames.mp4"), "no_frames.mp4: ")
    ffmpeg("-i", good / "clip.mp4", "-frames:v", 1, "-an", tmp_path / "one.mp4")
    refused(ask(tmp_path / "one.mp4"), "0.04 s long, too short for a word")
    ffmpeg("-i", good / "clip.mp4", "-frames:v", 1, tmp_path / "picture.png")
    refused(ask(tmp_path / "picture.png"), "too short for a word")
    (tmp_path / "a.srt").write_text("1\n00:00:00,000 --> 00:00:02,000\nbin blue\n")
    ffmpeg("-i", tmp_path / "a.srt", tmp_path / "subtitles.mkv")
    refused(ask(tmp_path / "subtitles.mkv"), "neither sound nor pictures")


def test_cover_is_no_video(ask, good, tmp_path):
    ffmpeg("-i", good / "clip.mp4", "-frames:v", 1, tmp_path / "cover.png")
    ffmpeg("-i", good / "clip.wav", "-i", tmp_path / "cover.png", "-map", 0, "-map", 1, "-c:v", "copy",
           "-id3v2_version", 3, tmp_path / "song.mp3")
    code, text, lines = ask(tmp_path / "song.mp3")
    assert code == 0 and not lines and read_clip(tmp_path / "song.mp3").streams == ("audio",)


# --- sound -----------------------------------------------------------------------------------------------------------

def test_sound_that_is_no_sound(ask, good, tmp_path):
    wave = soundfile.read(good / "clip.wav")[0].astype(np.float32)
    for name, value in (("nan", np.nan), ("inf", np.inf), ("huge", 1e30)):
        broken = wave.copy()
        broken[20000] = value
        soundfile.write(tmp_path / f"{name}.wav", broken, 16000, "FLOAT")
        refused(ask(tmp_path / f"{name}.wav"), f"{name}.wav: its sound has samples that are not numbers")


def test_clipped_sound_is_read(ask, good, tmp_path):
    wave = soundfile.read(good / "clip.wav")[0]
    soundfile.write(tmp_path / "clipped.wav", np.clip(50 * wave, -1, 1), 16000)
    assert ask(tmp_path / "clipped.wav")[0] == 0
    assert np.abs(read_clip(tmp_path / "clipped.wav").wave).max() > .9


def test_silent_sound(ask, good, tmp_path):
    ffmpeg("-f", "lavfi", "-i", "anullsrc=r=48000:d=3", tmp_path / "silent.wav")
    refused(ask(tmp_path / "silent.wav"), "silent")
    ffmpeg("-i", good / "clip.mp4", "-i", tmp_path / "silent.wav", "-map", "0:v", "-map", "1:a", "-c:v", "copy",
           "-shortest", tmp_path / "mute.mp4")
    code, text, _ = ask(tmp_path / "mute.mp4")
    assert code == 0 and text == ask(good / "clip.mp4", "--task", "vsr")[1]  # its lips are read
    refused(ask(tmp_path / "mute.mp4", "--task", "asr"), "silent")


def test_streams_that_a_task_lacks(ask, good, tmp_path):
    refused(ask(good / "clip.wav", "--task", "vsr"), "clip.wav: ", "audio only", "vsr needs video")
    refused(ask(good / "clip.wav", "--task", "avsr"), "clip.wav: ", "audio only")
    ffmpeg("-i", good / "clip.mp4", "-an", "-c", "copy", tmp_path / "mute.mp4")
    refused(ask(tmp_path / "mute.mp4", "--task", "asr"), "mute.mp4: ", "video only", "asr needs audio")
    refused(ask(tmp_path / "mute.mp4", "--task", "avsr"), "mute.mp4: ", "video only")


def wav_header(rate=16000, channels=1, bits=16, declared=None, content=b""):
    declared = len(content) if declared is None else declared
    step = channels * bits // 8
    fmt = struct.pack("<IHHIIHH", 16, 1, channels, rate, min(rate * step, 2 ** 32 - 1), step % 2 ** 16, bits)
    return (b"RIFF" + struct.pack("<I", min(36 + declared, 2 ** 32 - 1)) + b"WAVEfmt " + fmt
            + b"data" + struct.pack("<I", declared) + content)


@pytest.mark.parametrize("name, header", {
    "rate 0": {"rate": 0}, "no channels": {"channels": 0}, "9000 channels": {"channels": 9000},
    "no bits": {"bits": 0}, "rate 2 ** 31": {"rate": 2 ** 31}}.items())
def test_impossible_headers(ask, tmp_path, name, header):
    tone = (np.sin(np.arange(32000) / 7) * 9000).astype("<i2").tobytes()
    (tmp_path / "odd.wav").write_bytes(wav_header(**header, content=tone))
    refused(ask(tmp_path / "odd.wav"), "odd.wav: ")


def test_header_that_promises_more(ask, tmp_path):
    tone = (np.sin(np.arange(32000) / 7) * 9000).astype("<i2").tobytes()
    (tmp_path / "streamed.wav").write_bytes(wav_header(declared=2 ** 32 - 1, content=tone))
    assert ask(tmp_path / "streamed.wav")[0] == 0
    assert read_clip(tmp_path / "streamed.wav").duration == 2


# --- pictures --------------------------------------------------------------------------------------------------------

def pictures(path, width, height, frames=10, sound=False):
    tone = ("-f", "lavfi", "-i", "sine=d=1") if sound else ()
    moving = ",noise=alls=40:allf=t" if width > 1000 else ""      # pictures that do not move would not be read
    ffmpeg("-f", "lavfi", "-i", f"testsrc=size={width}x{height}:rate=25{moving}", *tone, "-frames:v", frames,
           "-c:v", "ffv1" if width < 16 else "mjpeg", "-q:v", 20, path)
    return path


def test_sizes(ask, tmp_path):
    refused(ask(pictures(tmp_path / "dot.mkv", 2, 2)), "dot.mkv: pictures of 2x2 pixels; a mouth needs 16x16 or more")
    ffmpeg("-f", "lavfi", "-i", "color=size=1x1:rate=25:d=1", "-pix_fmt", "gray", "-c:v", "ffv1", tmp_path / "one.mkv")
    refused(ask(tmp_path / "one.mkv"), "pictures of 1x1 pixels")
    assert ask(pictures(tmp_path / "odd.mkv", 97, 97))[0] == 0
    eight_k = pictures(tmp_path / "8k.mkv", 7680, 4320, 6)
    assert ask(eight_k, "--box", "3000,2000,900,900")[0] == 0
    refused(ask(eight_k, "--box", "7000,4000,900,900"),
            "8k.mkv: --box 7000,4000,900,900 reaches beyond its pictures of 7680x4320")
    refused(ask(pictures(tmp_path / "16k.mkv", 15360, 8640, 1), "--box", "0,0,90,90"), "16k.mkv: ", "ffmpeg says: ")


def test_a_face_without_a_detector(ask, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mediapipe", None)
    monkeypatch.setitem(__import__("sys").modules, "mediapipe.python.solutions.face_mesh", None)
    face = pictures(tmp_path / "face.mkv", 360, 288, sound=True)
    refused(ask(face), "picture of 360x288 needs mediapipe: pip install -r requirements-face.txt", "--box x,y,w,h",
            "--task asr")
    assert ask(face, "--task", "asr")[0] == 0 and ask(face, "--box", "130,170,96,96")[0] == 0


@pytest.mark.parametrize("kind", ["mkv", "mp4"])
def test_sound_that_begins_after_a_day(ask, tmp_path, kind):
    ffmpeg(*"-f lavfi -i testsrc=size=32x32:rate=25:duration=3 -itsoffset 90000 -f lavfi -i sine=duration=3 -c:a aac".split(),
           tmp_path / f"a.{kind}")
    refused(ask(tmp_path / f"a.{kind}"), f"a.{kind}: its time stamps span more than ")


def test_unknown_codec(ask, good, tmp_path):
    for old, new, name in ((b"FMP4", b"ZZZZ", "video.avi"), (b"avc1", b"zzzz", "video.mp4")):
        source = (good / f"clip.{name[-3:]}").read_bytes()
        assert old in source
        (tmp_path / name).write_bytes(source.replace(old, new))
        refused(ask(tmp_path / name), name, "ffmpeg says: ")


@pytest.mark.parametrize("box", (
    "", "1,2,3", "a,b,c,d", "0,0,0,0", "-1,0,96,96", "0,0,15,96", "1e3,0,96,96", "0,0,96,96,"))
def test_bad_boxes(ask, good, box):
    if box:
        refused(ask(good / "clip.mp4", f"--box={box}"), "--box", box)
    with pytest.raises(ValueError, match="--box"):
        mouth.parse_box(box)


# --- names -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", (
    "a b.mp4", "it's \"one\".mp4", "line\nfeed.mp4", "口を読む.mp4", "%d%03d.mp4", "-i.mp4", "http:x.mp4",
    "a:b,c;d.mp4", "*?[.mp4", "$HOME`x`.mp4", "\\.mp4", "concat:a|b.mp4", b"caf\xe9.mp4"))
def test_names(ask, good, tmp_path, name):
    path = os.path.join(os.fsencode(tmp_path), name) if isinstance(name, bytes) else str(tmp_path / name)
    with open(path, "wb") as file:
        file.write((good / "clip.mp4").read_bytes())
    code, text, lines = ask(os.fsdecode(path))
    assert (code, text, lines) == ask(good / "clip.mp4") and code == 0
    with open(path, "wb") as file:
        file.write(b"no media")
    refused(ask(os.fsdecode(path)), "not readable as media")


# --- files that cannot be written ------------------------------------------------------------------------------------

def test_files_that_cannot_be_written(trained, good, tmp_path, capsys):
    for flag in ("--srt", "--show-crop"):
        for path in (tmp_path / "missing" / "x", tmp_path):
            assert sample.main([str(good / "clip.mp4"), "--ckpt", str(trained), flag, str(path)]) == 2
            line, = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
            assert line.startswith("sample.py: ") and str(path) in line
    assert not list(tmp_path.rglob("*"))


# --- transcripts -----------------------------------------------------------------------------------------------------

NO_WORDS, NOT_UTF8, TOO_LONG = "no words in its transcript", "not UTF-8", "letters for"
TRANSCRIPTS = {
    "empty": (b"", NO_WORDS), "spaces": (b" \n\n", NO_WORDS), "no letters": (b"... !?\n", NO_WORDS),
    "latin": ("caf\xe9 noir".encode("latin-1"), NOT_UTF8), "utf-16": ("bin blue".encode("utf-16"), NOT_UTF8),
    "binary": (bytes(range(256)), NOT_UTF8), "1 MB": (b"bin blue at f two now " * 50_000, TOO_LONG),
    "one word of 1 MB": (b"a" * 1_000_000, TOO_LONG), "none": (None, "no transcript"), "nul": (b"\0\0\0\0", NOT_UTF8)}


@pytest.mark.parametrize("kind", TRANSCRIPTS)
def test_bad_transcripts(good, tmp_path, capsys, kind):
    text, reason = TRANSCRIPTS[kind]
    for name, content in (("good", b"bin blue at f two now"), ("bad", text)):
        (tmp_path / f"{name}.mp4").write_bytes((good / "clip.mp4").read_bytes())
        if content is not None:
            (tmp_path / f"{name}.txt").write_bytes(content)
    assert clips.main(["check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    line, = [line for line in out.splitlines() if line.startswith("bad: ")]
    assert "bad." in line and reason in line and len(line) < 400
    assert "1 clips can be used" in out and "1 cannot" in out


@pytest.mark.parametrize("text", (
    b"\xef\xbb\xbfBin blue at F two now\r\n", b"Text:  BIN BLUE AT F TWO NOW\nConf:  5\n",
    b"bin blue, at f\ntwo now!\n"))
def test_good_transcripts(good, tmp_path, text):
    (tmp_path / "a.mp4").write_bytes((good / "clip.mp4").read_bytes())
    (tmp_path / "a.txt").write_bytes(text)
    assert read_entry(Entry(tmp_path / "a.mp4", "", source=tmp_path / "a.txt")).text == "bin blue at f two now"


@pytest.mark.parametrize("content, reason", {
    b"": "no column 'path'", b"path:text\na.mp4:bin\n": "no column 'path'", b"path,text\ngood.mp4,hello, world\n": "line 2 has 3 columns", b"path\na.mp4\n": "no column 'text'",
    b"path,text,,\ngood.mp4,hello, world\n": "line 2 has 3 columns", b"path,text\nhttps://x.org/a.mp4,one\n": "is an address, not a file",
    b"path,text\ngood.mp4,hello\n./good.mp4,bye\n": "has another text on line 2",
    b"path,text,split\ngood.mp4,hello,train\n./good.mp4,hello,test\n": "has another split on line 2",
    b"path,text\n": "no clips", b"path,text\nmissing.mp4,bin blue\n": "missing.mp4: no such file",
    b"path,text\n,bin blue\n": "not a file", b"path,text\ngood.mp4\n": "no words in its transcript",
    b"path,text\ngood.mp4,caf\xe9\n": "not UTF-8 text", b"path,text\n\"good.mp4": "not a table",
    b"path,text\n\0,a\n": "\\x00"}.items())
def test_bad_manifests(good, tmp_path, capsys, content, reason):
    (tmp_path / "good.mp4").write_bytes((good / "clip.mp4").read_bytes())
    (tmp_path / "manifest.csv").write_bytes(content)
    code = clips.main(["check", str(tmp_path)])
    out, err = capsys.readouterr()
    lines = [line for line in (out + err).splitlines() if reason in line]
    assert code in (1, 2) and len(lines) == 1 and "Traceback" not in out + err
