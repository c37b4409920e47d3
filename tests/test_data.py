"""python -m pytest tests/test_data.py: the talker, babble, text, real clips."""
import random
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from conftest import SHARED

import data
import talker
from encoders import FPS, SAMPLES_PER_FRAME


# --- the talker ---

def test_grammar_and_lexicon():
    words = [word for row in talker.GRID for word in row]
    assert len(set(words)) == len(words) == 51 and set(words) == set(talker.LEXICON)
    phones = {phone for spelled in talker.LEXICON.values() for phone in spelled}
    for phone in phones:
        for part in talker.DIPHTHONGS.get(phone, (phone,)):
            assert part in talker.SOUNDS and talker.VISEME_OF[part] in talker.VISEMES, phone


def test_parts_share_no_sentence_and_no_talker():
    train, test = (set(talker.grid_sentences(part)) for part in ("train", "test"))
    assert len(train) + len(test) == 64_000 and not train & test and len(test) > 3000
    assert not set(talker.SPLITS["train"]) & set(talker.SPLITS["test"])
    for part in ("train", "test"):
        for i in range(50):
            text, person, _ = talker.random_job(part, i, seed=3)
            assert text in (train if part == "train" else test) and person in talker.SPLITS[part]


def test_sound_frames_and_phonemes_are_aligned(talker_clips):
    for clip in talker_clips:
        assert len(clip.wave) == SAMPLES_PER_FRAME * len(clip.frames) and clip.mel.shape == (80, 4 * len(clip.frames))
        assert clip.wave.dtype == np.float32 and np.abs(clip.wave).max() <= 1 and clip.frames.dtype == np.uint8
        ends = [end for _, end in clip.aligned]
        assert ends == sorted(ends) and len(clip.frames) - 1 < ends[-1] * FPS <= len(clip.frames) + 1e-6
        said = [phone for phone, _ in clip.aligned]
        assert [p for i, p in enumerate(said) if p != "rest" and p != said[i - 1]] == talker.spell(clip.text)
        quiet, loud = [], []  # the sound is where the timeline says that someone speaks
        for (phone, end), start in zip(clip.aligned, [0] + ends):
            part = clip.wave[int(start * 16000):int(end * 16000)]
            if len(part) > 800:
                (quiet if phone == "rest" else loud).append(np.sqrt(np.mean(part ** 2)))
        assert np.median(loud) > 5 * min(quiet)


def test_sounds_that_look_alike_look_alike():
    pictures = {word: talker.synthesize(word, 7, 1)[1] for word in ("b", "p", "d", "t", "v", "e")}
    assert np.array_equal(pictures["b"], pictures["p"]) and np.array_equal(pictures["d"], pictures["t"])
    for a, b in (("b", "d"), ("b", "v"), ("d", "e"), ("v", "d")):
        n = min(len(pictures[a]), len(pictures[b]))
        assert np.abs(pictures[a][:n].astype(int) - pictures[b][:n]).max() > 40, (a, b)
    sounds = {word: talker.synthesize(word, 7, 1)[0] for word in ("b", "p")}
    assert np.abs(sounds["b"] - sounds["p"]).max() > 0.01


def test_p_b_m_frames_are_equal(monkeypatch):
    for word in "pbm":
        monkeypatch.setitem(talker.LEXICON, word, [word.upper(), "IY"])
    pictures = [talker.synthesize(word, 7, 1)[1] for word in "pbm"]
    assert np.array_equal(pictures[0], pictures[1]) and np.array_equal(pictures[0], pictures[2])


def test_lips_close_and_open_when_the_timeline_says(monkeypatch):
    monkeypatch.setitem(talker.LEXICON, "papa", ["P", "AA", "P", "AA", "P"])
    for person in range(5):
        _, frames, aligned = talker.synthesize("papa", person)
        dark = (frames < 50).sum((1, 2))
        starts = [0] + [end for _, end in aligned]
        middles = {phone: [] for phone in ("P", "AA")}
        for (phone, end), start in zip(aligned, starts):
            if phone == "AA":
                middles["AA"].append(dark[round((start + end) / 2 * FPS - .5)])
        for closure, burst in ((1, 2), (4, 5), (7, 8)):  # each P is two aims, after the first rest
            assert aligned[closure][0] == aligned[burst][0] == "P"
            middles["P"].append(dark[round((starts[closure] + aligned[burst][1]) / 2 * FPS - .5)])
        assert min(middles["AA"]) > 3 * max(middles["P"]), (person, middles)


def test_an_open_mouth_shows_its_cavity():
    open_mouth, closed = (talker.draw([("x", 0, 1, talker.SOUNDS["rest"], talker.VISEMES[v][1:])] * 3, 3,
                                      talker.random_talker(1), np.random.default_rng(0), 32)[1] for v in ("AA", "P"))
    assert (open_mouth < 50).sum() > 100 and (closed < 50).sum() < 20


def test_talkers_differ_and_repeat():
    one, again, other = (talker.synthesize("bin blue", person, 4) for person in (1, 1, 2))
    assert np.array_equal(one[0], again[0]) and np.array_equal(one[1], again[1])
    assert len(one[0]) != len(other[0]) or not np.allclose(one[0], other[0], atol=1e-3)


def test_clips_do_not_depend_on_the_workers():
    alone = data.talker_clip(("train", 3, 5, 32, False))
    made = data.talker_clips("train", 4, 5)[3]
    assert made.name == alone.name and made.text == alone.text and np.array_equal(made.mel, alone.mel)
    assert made.wave is None and np.array_equal(made.frames, alone.frames)


# --- babble and batches ---

@pytest.mark.parametrize("snr", [10, 0, -5])
def test_babble_has_the_snr(talker_clips, snr):
    wave = talker_clips[0].wave
    noise = data.add_babble(wave, [clip.wave for clip in talker_clips[1:]], snr, random.Random(0)) - wave
    assert 10 * np.log10(np.mean(wave ** 2) / np.mean(noise ** 2)) == pytest.approx(snr, abs=0.1)


def test_clips_in_babble_repeat_and_leave_out_their_own_voice(talker_clips):
    def in_babble(clips, snr, voices=talker_clips):
        return [data.in_babble(clip, snr, voices) for clip in clips]

    noisy, again = in_babble(talker_clips, 0), in_babble(talker_clips, 0)
    for clip, a, b in zip(talker_clips, noisy, again):
        assert np.array_equal(a.wave, b.wave) and not np.allclose(a.wave, clip.wave, atol=1e-3)
        assert np.array_equal(a.frames, clip.frames) and a.mel.shape == clip.mel.shape
    assert all(a is b for a, b in zip(in_babble(talker_clips, None), talker_clips))
    own = talker_clips[0].wave
    twin = replace(talker_clips[0], name="twin", wave=own[::-1].copy())
    noise = data.in_babble(talker_clips[0], 0, [talker_clips[0], twin]).wave - own
    assert abs(np.corrcoef(noise, own)[0, 1]) < 0.1
    with pytest.raises(data.ClipError, match="no other clip"):
        in_babble(talker_clips[:1], 0, talker_clips[:1])


def test_cheap_babble_has_its_power(talker_clips):
    power = 10 ** torch.from_numpy(talker_clips[0].mel).float()
    for seed in range(20):
        mixed = data.noisy_power(power, talker_clips[1:], random.Random(seed))
        snr = 10 * torch.log10(power.mean() / (mixed - power).mean()).item()
        assert -7.1 < snr < 15.1


def test_batch_shapes_and_augmentation(talker_clips):
    plain = data.batch(talker_clips, ["audio", "video"])
    (mel, mel_lengths), (video, video_lengths) = plain["audio"], plain["video"]
    longest = max(len(clip.frames) for clip in talker_clips)
    assert mel.shape == (5, 80, 4 * longest) and video.shape == (5, 1, longest, 32, 32)
    assert mel_lengths.tolist() == (4 * video_lengths).tolist() == [4 * len(clip.frames) for clip in talker_clips]
    assert 0 <= video.min() and video.max() <= 1
    for b, n in enumerate(video_lengths):
        assert not video[b, :, n:].any() and not mel[b, :, 4 * n:].any()
    a, b, c = (data.batch(talker_clips, ["audio", "video"], random.Random(seed), talker_clips) for seed in (0, 0, 1))
    assert all(torch.equal(a[s][0], b[s][0]) and not torch.equal(a[s][0], c[s][0]) for s in a)
    assert list(data.batch(talker_clips, ["video"])) == ["video"]


def test_pace():
    x = torch.arange(20.0)[:, None]
    for pace in (0.85, 1.15, 1):
        y = data.at_pace(x, pace)
        assert len(y) == round(20 * pace) and (y[:, 0] - torch.arange(len(y)) / pace).abs().max() <= 1
    real = [data.Clip("real", "", mel=np.zeros((80, 200), np.float16), frames=np.zeros((50, 32, 32), np.uint8))] * 8
    lengths = {s: n.tolist() for s, (_, n) in data.batch(real, ["audio", "video"], random.Random(0)).items()}
    assert len(set(lengths["audio"])) > 4 and all(abs(a - 4 * v) <= 3 for a, v in zip(lengths["audio"], lengths["video"]))


# --- text ---

def test_normalize():
    assert data.normalize("  Bin BLUE, at F-2 (now)!\n") == "bin blue at f 2 now"
    assert data.normalize("It's naïve_é, isn’t it") == "it's naïve é isn't it"


def test_tokenizer(tmp_path):
    words = data.common_words(["bin blue now", "bin now", "now"])
    assert words == ["now", "bin", "blue"]
    data.save_tokenizer(words, tmp_path)
    for tokenizer in (data.make_tokenizer(words), data.load_tokenizer(tmp_path)):
        assert len(tokenizer.encode(" bin blue now")) == 3
        for text in ("bin blue", "never seen: ünïcode ☂ 12", "", " bin  <eos> "):
            assert tokenizer.decode(tokenizer.encode(text, disallowed_special=())) == text
        assert tokenizer.n_vocab == 256 + 3 + 3


def test_spell():
    assert talker.spell("bin xylophone") == ["B", "IH", "N", "xylophone"]


# --- real clips ---

@pytest.fixture(scope="session")
def media(tmp_path_factory, talker_clips):
    """One synthetic clip in many containers: {name: path}."""
    folder = tmp_path_factory.mktemp("media")
    data.write_clip(talker_clips[0], folder / "clip.mp4")
    paths = {"mp4": folder / "clip.mp4"}
    for name, options in {"mkv": "-c copy", "mov": "-c copy", "avi": "-c:v mpeg4 -c:a mp3", "webm": "-c:v vp8 -b:v 1M -c:a libopus",
                          "mpg": "-c:v mpeg2video -r 25 -q:v 2 -c:a mp2", "wav": "-vn", "flac": "-vn", "mp3": "-vn",
                          "fast.mp4": "-vf fps=50", "silent.mp4": "-an -c:v copy", "sound.mp4": "-vn -c:a copy"}.items():
        paths[name] = folder / f"{name.partition('.')[0]}.{name.rpartition('.')[2]}"
        data.ffmpeg(paths["mp4"], *options.split(), str(paths[name]))
    return paths


def test_media_reading(media, talker_clips):
    original = talker_clips[0]
    for name, path in media.items():
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


def test_written_clip_and_transcript(media, talker_clips):
    assert data.transcript(media["mp4"]) == talker_clips[0].text
    assert sorted(p.suffix for p in media["mp4"].parent.glob("clip.*")) == [".mp4", ".txt"]
    assert np.corrcoef(data.read_clip(media["mp4"]).wave, talker_clips[0].wave)[0, 1] > 0.99


def test_8_khz_and_stereo(tmp_path):
    tone = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    soundfile.write(tmp_path / "a.flac", np.stack([tone, tone], 1) / 2, 8000)
    wave = data.read_clip(tmp_path / "a.flac").wave
    assert len(wave) == 16000 and np.abs(np.fft.rfft(wave)).argmax() == 440


@pytest.mark.parametrize("content", [b"", b"no media at all" * 100])
def test_unreadable_media(tmp_path, content):
    (tmp_path / "bad.mp4").write_bytes(content)
    with pytest.raises(data.ClipError, match="bad.mp4.*ffmpeg says"):
        data.read_clip(tmp_path / "bad.mp4")
    with pytest.raises(data.ClipError, match="no such file"):
        data.read_clip(tmp_path / "missing.mp4")
    soundfile.write(tmp_path / "long.wav", np.zeros(8000 * 31), 8000)
    with pytest.raises(data.ClipError, match="long.wav: 31.0 s long"):
        data.read_clip(tmp_path / "long.wav")


def test_transcripts(tmp_path):
    clip, txt, align = tmp_path / "a.mp4", tmp_path / "a.txt", tmp_path / "a.align"
    with pytest.raises(data.ClipError, match="no transcript, expected a.txt or a.align"):
        data.transcript(clip)
    align.write_text("0 100 sil\n100 200 bin\n200 300 sp\n300 400 blue\n400 500 sil\n")
    assert data.transcript(clip) == "bin blue"
    txt.write_text("Text:  SO IT'S 5, ISN'T IT\nConf:  4\n")
    assert data.transcript(clip) == "so it's 5 isn't it"
    for content, message in ((b"", "no words"), (b"...\n", "no words"), (b"caf\xe9", "not UTF-8")):
        txt.write_bytes(content)
        with pytest.raises(data.ClipError, match=message):
            data.transcript(clip)


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
    assert names(data.folder_clips(tmp_path)) == {"train": ["a.wav"], "test": ["d.wav"]}
    told = capsys.readouterr().err
    assert "c.flac: no transcript" in told and "1 training clips" in told


def test_folder_splits_by_talker_or_stem(tmp_path):
    for talker_name in "pqrst":
        for i in range(3):
            write_tone(tmp_path / "many" / talker_name / f"{i}.wav", f"{talker_name} says {i}")
    clips = data.folder_clips(tmp_path / "many")
    people = {part: {clip.name.split("/")[-2] for clip in found} for part, found in clips.items()}
    assert len(people["test"]) == 1 and len(people["train"]) == 4 and not people["test"] & people["train"]
    for i in range(10):
        write_tone(tmp_path / "one" / f"{i}.wav", f"word {i}")
    one, again = data.folder_clips(tmp_path / "one"), data.folder_clips(tmp_path / "one")
    assert len(one["test"]) == 2 and len(one["train"]) == 8 and names(one) == names(again)


def test_a_talker_s_sessions_stay_together(tmp_path):
    for session in ("alice/day1", "alice/day2", "bob/day1", "carl/day1", "carl/day2"):
        write_tone(tmp_path / session / "a.wav", session)
    people = {part: {clip.name.split("/")[-3] for clip in found} for part, found in data.folder_clips(tmp_path).items()}
    assert not people["train"] & people["test"]


def test_folder_errors(tmp_path):
    with pytest.raises(data.ClipError, match="no clips here"):
        data.folder_clips(tmp_path)
    write_tone(tmp_path / "a.wav", "")
    with pytest.raises(data.ClipError, match="no usable clip"):
        data.folder_clips(tmp_path)


def test_fsdd_importer(tmp_path):
    for digit in range(10):
        for take in range(8):
            path = tmp_path / "recordings" / f"{digit}_ann_{take}.wav"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, 0.1 * np.random.default_rng(take).standard_normal(800), 8000)
    with pytest.raises(data.ClipError, match="_ann_.*no such recording"):
        data.cut_digit_strings(tmp_path / "recordings", tmp_path / "out", ["ann"], 0)  # takes 8 to 49 are missing
    assert data.main(["fsdd", str(tmp_path), str(tmp_path / "none"), "--talkers", "ann"]) == 2
    for digit in range(10):
        for take in range(8, 50):
            soundfile.write(tmp_path / "recordings" / f"{digit}_ann_{take}.wav", np.full(800, .1), 8000)
    assert data.main(["fsdd", str(tmp_path / "recordings"), str(tmp_path / "out"), "--talkers", "ann"]) == 0
    texts = {part: {p.read_text().strip() for p in (tmp_path / "out" / part).glob("*.txt")} for part in ("train", "test")}
    assert not texts["train"] & texts["test"] and len(list((tmp_path / "out/train").glob("*.flac"))) == 800
    assert all(3 <= len(text.split()) <= 6 for text in texts["test"]) and len(list((tmp_path / "out/test").glob("*.flac"))) == 200


@pytest.mark.skipif(not (SHARED / "grid").is_dir(), reason="needs the real GRID clips beside the project")
def test_grid_clips_have_75_frames():
    paths = sorted((SHARED / "grid").glob("*.mpg"))
    assert len(paths) == 8
    for path in paths:
        clip = data.read_clip(path)
        sound = data.ffmpeg(path, "-map", "0:a:0?", "-ac", "1", "-ar", "16000", "-f", "f32le", "pipe:1")
        assert len(clip.frames) == 75 and len(clip.wave) == 48000 and abs(len(sound) // 4 - 47600) <= 100
        assert len(data.transcript(path).split()) == 6
