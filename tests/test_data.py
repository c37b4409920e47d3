"""python -m pytest tests/test_data.py: the talker, babble, text, real clips."""
import random
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

import data
from extras import digits
from real.files import write_json
from real.run import prefetched
from toy import talker
from toy.pretrain import spell
from toy.tokenizer import common_words, make_tokenizer
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
    people = [person for part in talker.SPLITS.values() for person in part]
    assert len(set(people)) == len(people) == 600
    for part in ("train", "test"):
        for i in range(50):
            rng = random.Random(f"{part} 3 {i}")
            text, person = rng.choice(talker.grid_sentences(part)), rng.choice(talker.SPLITS[part])
            assert text in (train if part == "train" else test) and person in talker.SPLITS[part]
            if i < 3:
                clip = talker.talker_clip((part, i, 3, 32, False))
                assert clip.text == text and clip.name.startswith(f"talker{person:04d}_")


def test_sound_frames_and_phonemes_are_aligned(talker_clips):
    for clip in talker_clips:
        assert len(clip.wave) == SAMPLES_PER_FRAME * len(clip.frames) and clip.log_power.shape == (80, 4 * len(clip.frames))
        assert clip.wave.dtype == np.float32 and np.abs(clip.wave).max() <= 1 and clip.frames.dtype == np.uint8
        ends = [end for _, end in clip.aligned]
        assert ends == sorted(ends) and len(clip.frames) - 1 < ends[-1] * FPS <= len(clip.frames) + 1e-6
        said = [phone for phone, _ in clip.aligned]
        assert [p for i, p in enumerate(said) if p != "rest" and p != said[i - 1]] == spell(clip.text)
        quiet, loud = [], []  # the sound is where the timeline says that someone speaks
        for (phone, end), start in zip(clip.aligned, [0] + ends):
            part = clip.wave[int(start * 16000):int(end * 16000)]
            if len(part) > 800:
                (quiet if phone == "rest" else loud).append(np.sqrt(np.mean(part ** 2)))
        assert np.median(loud) > 5 * min(quiet)


def test_sounds_that_look_alike_look_alike():
    pictures = {word: talker.synthesize(word, 7, 1)[1] for word in ("b", "p", "d", "t", "v", "e")}
    assert np.array_equal(pictures["d"], pictures["t"])
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
    alone = talker.talker_clip(("train", 3, 5, 32, False))
    clips = talker.talker_clips({"valid": 2, "train": 4}, 5)
    made = clips["train"][3]
    assert made.name == alone.name and made.text == alone.text and np.array_equal(made.log_power, alone.log_power)
    assert made.wave is None and np.array_equal(made.frames, alone.frames)
    assert len(clips["train"]) == 4 and [clip.wave is None for clip in clips["valid"]] == [False] * 2  # babble is made of them


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
        assert np.array_equal(a.frames, clip.frames) and a.log_power.shape == clip.log_power.shape
    here, elsewhere, other = (data.in_babble(replace(talker_clips[0], name=name), 0, talker_clips[1:]).wave
                              for name in ("clips/test/1.wav", "/elsewhere/test/1.wav", "clips/s2/1.wav"))
    assert np.array_equal(here, elsewhere) and not np.array_equal(here, other)
    assert all(a is b for a, b in zip(in_babble(talker_clips, None), talker_clips))
    own = talker_clips[0].wave
    twin = replace(talker_clips[0], name="twin", wave=own[::-1].copy())
    noise = data.in_babble(talker_clips[0], 0, [talker_clips[0], twin]).wave - own
    assert abs(np.corrcoef(noise, own)[0, 1]) < 0.1
    with pytest.raises(data.ClipError, match="no other clip"):
        in_babble(talker_clips[:1], 0, talker_clips[:1])
    with pytest.raises((TypeError, AttributeError)):  # sound without its wave never passes for noisy
        in_babble([replace(talker_clips[0], wave=None)], 0)


def test_cheap_babble_has_its_power(talker_clips):
    power = 10 ** torch.from_numpy(talker_clips[0].log_power).float()
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
        y = data.stretch(x, pace)
        assert len(y) == round(20 * pace) and (y[:, 0] - torch.arange(len(y)) / pace).abs().max() <= 1
    real = [data.Clip("real", "", log_power=np.zeros((80, 200), np.float16), frames=np.zeros((50, 32, 32), np.uint8))] * 8
    lengths = {s: n.tolist() for s, (_, n) in data.batch(real, ["audio", "video"], random.Random(0)).items()}
    assert len(set(lengths["audio"])) > 4 and all(abs(a - 4 * v) <= 3 for a, v in zip(lengths["audio"], lengths["video"]))


def test_clips_of_a_step_are_a_function_of_seed_and_step():
    clips = list(range(10))
    steps = [data.drawn_clips(clips, 4, 0, step) for step in range(5)]
    assert sorted(sum(steps, [])) == sorted(clips * 2)  # two epochs of ten
    assert sorted(sum(steps, [])[:10]) == clips
    assert data.drawn_clips(clips, 4, 0, 3) == steps[3] and data.drawn_clips(clips, 4, 1, 3) != steps[3]
    assert len(data.drawn_clips(clips[:3], 8, 0, 0)) == 8  # more than there are
    assert len({tuple(data.drawn_clips(clips, 10, 0, epoch)) for epoch in range(4)}) == 4      # each epoch has its own order


def test_voices_of_babble_are_equally_loud():
    def tone(hz, loudness):
        return (loudness * np.sin(2 * np.pi * hz * np.arange(16000) / 16000)).astype(np.float32)
    heard = np.abs(np.fft.rfft(data.add_babble(tone(1000, .1), [tone(500, .5), tone(3000, .01)], 0, random.Random(0))))
    assert heard[500] == pytest.approx(heard[3000], rel=.05)


def test_babble_is_four_voices_whether_or_not_the_clips_own_is_drawn(talker_clips, monkeypatch):
    heard, voices = [], talker_clips + [replace(clip, name=f"{clip.name} again") for clip in talker_clips]
    monkeypatch.setattr(data, "add_babble", lambda wave, others, *_: heard.append(len(others)) or wave)
    for clip in voices:
        data.in_babble(clip, 0, voices)
    assert heard == [4] * 10


def test_babble_for_training_is_of_2_to_5_equally_loud_voices_at_minus_7_to_15_db():
    """Each voice is one mel band, so that the bands of the noise tell the voices apart."""
    def voice(band, level):
        power = np.full((80, 50), -10, np.float16)
        power[band] = level
        return data.Clip(str(band), "", log_power=power)
    voices = [voice(band, level) for band, level in enumerate((0, 3, -2, 1, 2, -1))]
    power, snrs, counts = torch.ones(80, 100), [], Counter()
    for seed in range(200):
        bands = (data.noisy_power(power, voices, random.Random(seed)) - power).mean(1)[:6]
        heard = bands[bands > bands.max() / 2]
        assert heard.sum() > .99 * bands.sum() and heard.min() > .95 * heard.max()
        counts[len(heard)] += 1
        snrs.append(-10 * torch.log10(bands.sum() / 80).item())
    assert set(counts) == {2, 3, 4, 5} and -7.1 < min(snrs) < -6 and 14 < max(snrs) < 15.1


def test_half_of_the_talkers_clips_get_babble_and_a_quarter_of_others(talker_clips, monkeypatch):
    seeds = []
    monkeypatch.setattr(data, "noisy_power", lambda power, voices, rng: seeds.append(rng.random()) or power)
    for aligned, share in ((True, .5), (None, .25)):
        seeds.clear()
        clip = replace(talker_clips[0], aligned=aligned)
        for seed in range(300):
            data.augmented_mel(clip, random.Random(seed), talker_clips)
        assert len(seeds) / 300 == pytest.approx(share, abs=.09) and len(set(seeds)) == len(seeds)     # no two alike


def test_a_band_and_a_moment_are_masked_and_seldom_the_high_bands():
    clip, n_cut, widest = data.Clip("flat", "", log_power=np.ones((80, 200), np.float16)), 0, [0, 0]
    plain = data.clip_mel(clip)
    for seed in range(300):
        changed = data.augmented_mel(clip, random.Random(seed), ()) != plain
        low = changed[:62]                                     # the bands from 0.78 of them on may be lost
        bands, moments = low.all(1), low.all(0)
        assert not low[~bands][:, ~moments].any()
        widest = [max(widest[0], bands.sum().item()), max(widest[1], moments.sum().item())]
        n_cut += changed[79].all().item()
    assert widest == [9, 11] and 10 < n_cut < 40               # 8 %


def test_frames_are_shifted_mirrored_and_seldom_late():
    frames, before, n_mirrored, late = torch.randint(0, 256, (20, 12, 12), dtype=torch.uint8), [0, *range(19)], 0, []
    views = [(mirror, frames.roll((dy, dx), (1, 2)).flip(2) if mirror else frames.roll((dy, dx), (1, 2)))
             for dy in range(-2, 3) for dx in range(-2, 3) for mirror in (False, True)]
    for seed in range(300):
        out = data.augmented_frames(frames, random.Random(seed))
        on_time = [(mirror, (out == view).all((1, 2)), (out == view[before]).all((1, 2))) for mirror, view in views]
        (mirror, n_late), = [(mirror, 20 - now.sum().item()) for mirror, now, then in on_time if (now | then).all()]
        n_mirrored += mirror
        late += [n_late] * (n_late > 0)
    assert 110 < n_mirrored < 190 and 14 < len(late) < 46 and sum(late) / len(late) == pytest.approx(.2 * 19, abs=1.2)


def test_clips_of_the_talker_keep_their_pace(talker_clips):
    rows = data.rows_of(talker_clips, ["audio", "video"], random.Random(0))
    assert [len(x) for x in rows["video"]] == [len(clip.frames) for clip in talker_clips]


@pytest.mark.parametrize("steps", [0, 1, 3, 9])
def test_prefetched_gives_all_steps_in_order_and_passes_on_errors(steps):
    for first in (0, 2):
        assert list(prefetched(lambda step: step ** 2, first, steps)) == [step ** 2 for step in range(first, steps)]

    def fail(step):
        if step == 2:
            raise ValueError("step 2")
        return step
    if steps > 2:
        with pytest.raises(ValueError, match="step 2"):
            list(prefetched(fail, 0, steps))


def test_what_is_not_needed_any_more_is_not_made():
    """As after Ctrl-C; a batch may take seconds."""
    made, may_go_on = [], threading.Event()

    def make(step):
        made.append(step)
        assert step == 0 or may_go_on.wait(10)
    steps = prefetched(make, 0, 99)
    next(steps)
    threading.Timer(0.2, may_go_on.set).start()
    steps.close()
    assert len(made) <= 2


# --- text ---

def test_normalize():
    assert data.normalize("  Bin BLUE, at F-2 (now)!\n") == "bin blue at f 2 now"
    assert data.normalize("It's naïve_é, isn’t it") == "it's naïve é isn't it"
    assert data.normalize("'Yes,' don`t say rock 'n' roll, dogs' o’clock") == "yes don't say rock n roll dogs o'clock"
    for text in ("हिन्दी भाषा", "ไทยที่", "مُحَمَّد", "می‌خواهم"):
        assert data.normalize(text) == text
    assert data.normalize("cafe\u0301") == data.normalize("CAFÉ") == "café"
    for form, word in (("ﬁrst oﬃce", "first office"), ("ＡＢＣ１２", "abc12"), ("ｶﾞｷﾞ", "ガギ"), ("ﻣﺮﺣﺒﺎ", "مرحبا"), ("مـــرحبا", "مرحبا"),
                       ("don＇t", "don't"), ("น้ำ", "น้ำ")):
        assert data.normalize(form) == word
    assert data.normalize("İstanbul") == data.normalize("I\u0307stanbul") and " " not in data.normalize("İstanbul")
    assert data.normalize("ג׳ורג׳ צה״ל o′clock COL·LECCIÓ 威廉·莎士比亚") == "ג'ורג צה״ל o'clock col·lecció 威廉 莎士比亚"
    for written, also in (("İyi", "iyi"), ("‘사과’를", "사과를"), ('"사과"를', "사과를"), ("他说‘你好’吗", "他说你好吗"), ('צה"ל', "צה״ל"),
                          ('ב"הארץ"', "ב הארץ"), ('"コンピューター"を', "コンピューターを"), ("「日本語」で", "日本語で"), ("漢`字", "漢字"),
                          ("oʻzbek", "o‘zbek"), ("ŉ", "'n"), ("Ĳs", "ijs"), ("coŀlecció", "col·lecció"), ("ẛ", "ṡ"),
                          ("a\ufe77b", "a\u064eb"), ("⼀⼆ ⾨", "一二 門")):
        assert data.normalize(written) == data.normalize(also) == data.normalize(data.normalize(also)) != ""
    assert data.normalize('say "yes"') == data.normalize("'say' “yes”") == "say yes"
    assert data.normalize("ΛΌΓΟΣ.ΑΛΛΑ") == "λόγος αλλα"
    assert data.normalize("co\u00adop") == "coop" and data.normalize("e\u00ad\u0301") == "é"
    assert data.normalize("I ❤️ you 👨‍👩‍👧, 1️⃣ of you") == "i you 1 of you" and data.normalize("❤️") == ""
    assert data.normalize("می\u200c x") == data.normalize("می x") and data.normalize("葛\U000e0100") == "葛"


def test_tokenizer(tmp_path):
    words = common_words(["bin blue now", "bin now", "now"])
    assert words == ["now", "bin", "blue"]
    write_json(tmp_path / "tokenizer.json", {"words": words})
    for tokenizer in (make_tokenizer(words), data.load_tokenizer(tmp_path)):
        assert len(tokenizer.encode(" bin blue now")) == 3
        for text in ("bin blue", "never seen: ünïcode ☂ 12", "", " bin  <eos> "):
            assert tokenizer.decode(tokenizer.encode(text, disallowed_special=())) == text
        assert tokenizer.n_vocab == 256 + 3 + 3


def test_spell():
    assert spell("bin xylophone") == ["B", "IH", "N", "xylophone"]


# --- real voices ---

def test_fsdd_importer(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "SPLITS", {split: (takes, n_clips // 10) for split, (takes, n_clips) in digits.SPLITS.items()})
    for digit in range(10):
        for take in range(8):
            path = tmp_path / "recordings" / f"{digit}_ann_{take}.wav"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, 0.1 * np.random.default_rng(take).standard_normal(800), 8000)
    with pytest.raises(data.ClipError, match="_ann_.*no such recording"):
        digits.cut_digit_strings(tmp_path / "recordings", tmp_path / "out", ["ann"], 0)  # takes 8 to 49 are missing
    assert digits.main([str(tmp_path), str(tmp_path / "none"), "--talkers", "ann"]) == 2
    for digit in range(10):
        for take in range(8, 50):
            soundfile.write(tmp_path / "recordings" / f"{digit}_ann_{take}.wav", np.full(800, .1), 8000)
    assert digits.main([str(tmp_path / "recordings"), str(tmp_path / "out"), "--talkers", "ann"]) == 0
    texts = {part: {p.read_text().strip() for p in (tmp_path / "out" / part).glob("*.txt")} for part in ("train", "test")}
    assert not texts["train"] & texts["test"] and len(list((tmp_path / "out/train").glob("*.flac"))) == 80
    assert all(3 <= len(text.split()) <= 6 for text in texts["test"]) and len(list((tmp_path / "out/test").glob("*.flac"))) == 20
