"""python -m pytest tests/test_sample.py: beams, error rates, what sample.transcribe says, and when auto decodes twice."""
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import sample
from extras import auto
from real import media
from toy.talker import talker_clip

NUMBERS = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))       # a tokenizer


@pytest.fixture
def widths(monkeypatch):
    """The widths of all beams that are searched."""
    found, generate = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda llm, prefixes, eos, beam=1, *most: found.append(beam) or generate(
        llm, prefixes, eos, beam, *most))
    return found


def test_a_test_searches_the_beam_that_is_asked_for(tiny, talker_clips, widths):
    for n_calls, search in enumerate((
            lambda: sample.evaluate(tiny, talker_clips, sample.fixed_plan(["asr"], [(4, 4)]), [None], NUMBERS, beam=3),
            lambda: auto.calibrate(tiny, talker_clips, ["asr"], [(4, 4), (8, 8)], NUMBERS, beam=3),
            lambda: auto.decode_ladder(tiny, tiny.encode(data.batch(talker_clips, ["audio"])), [({"audio": 8}, 9.)], beam=3))):
        search()
        assert len(widths) > n_calls and set(widths) == {3}


def test_a_test_encodes_lips_once_and_sound_once_for_each_noise(tiny, talker_clips, monkeypatch):
    encoded, encode = [], tiny.encode
    monkeypatch.setattr(tiny, "encode", lambda inputs: encoded.append(list(inputs)) or encode(inputs))
    sample.evaluate(tiny, talker_clips, sample.fixed_plan(["avsr"], [(8, 8), (4, 4)]), [None, 0., -5.], NUMBERS)
    assert encoded == [["audio", "video"], ["audio"], ["audio"]]


def test_sample_py_searches_the_beam_that_is_asked_for(trained, widths):
    clip = next((trained / "samples").glob("*.mp4"))
    assert sample.main(["--ckpt", str(trained), str(clip), "--beam", "3"]) == 0 and widths == [3]


def test_the_finest_rate_is_that_of_the_most_tokens():
    """Sound has twice as many tokens as lips."""
    coarse, fine = sample.trained_rates("avsr", {"rates": [(2, 8), (8, 2)]})
    assert (coarse, fine) == ({"audio": 8, "video": 2}, {"audio": 2, "video": 8})


def test_a_transcript_has_at_most_the_tokens_of_the_config(tiny, talker_clips):
    encoded = tiny.encode(data.batch(talker_clips, ["audio"]))
    for most in (3, 40):
        tiny.config = replace(tiny.config, max_tokens=most, eos=-1)         # it never ends by itself
        assert [len(ids) for ids, *_ in sample.decode(tiny, encoded, {"audio": 8})] == [most] * 5


def test_errors_are_counted_over_the_words_of_the_reference(tiny, talker_clips):
    one = SimpleNamespace(decode=lambda ids: "one")
    row, = sample.evaluate(tiny, talker_clips, sample.fixed_plan(["asr"], [(8, 8)]), [None], one)
    assert row["wer"] == 1 and row["words"] == 30              # a substitution and five deletions in each of five clips
    answers = sample.decode(tiny, tiny.encode(data.batch(talker_clips, ["audio"])), {"audio": 8})
    assert row["tokens"] == pytest.approx(np.mean([n_tokens for *_, n_tokens in answers]))


@pytest.fixture
def said(monkeypatch):
    """A function that lets sample.decode answer with each (bytes, logprob) in turn, again and again -> its answers."""
    def answering(*texts):
        answers = []

        def decode(model, encoded, beam=1, rates=None):
            for _ in next(iter(encoded.values()))[1]:
                text, logprob = texts[len(answers) % len(texts)]
                answers.append(([*text], logprob, rates, 9))
            return answers[-len(next(iter(encoded.values()))[1]):]
        monkeypatch.setattr(sample, "decode", decode)
        return answers
    return answering


def test_transcribe_gives_normalised_text(trained, said):
    said((b" Bin BLUE,", -1.))
    assert sample.transcribe(next((trained / "samples").glob("*.mp4")), trained, rate="4:8")["text"] == "bin blue"


def test_the_logprob_of_a_long_clip_is_the_mean_over_its_tokens(trained, tmp_path, said):
    clips, answers = [talker_clip(("test", i, 0, 64, True)) for i in range(4)], said((b"a", -1.), (b"bin", -2.), (b"seven", -4.))
    media.write_mp4(tmp_path / "long.mp4", *(np.concatenate([getattr(clip, stream) for clip in clips]) for stream in ("frames", "wave")))
    answer = sample.transcribe(tmp_path / "long.mp4", trained, rate="4:8")
    n_tokens = [len(ids) + 1 for ids, *_ in answers]                        # with <eos>
    mean = np.average([logprob for _, logprob, *_ in answers], weights=n_tokens)
    assert len(answers) > 1 and answer["logprob"] == pytest.approx(mean, abs=1e-3)


# --- --rate auto

def test_the_two_rates_of_auto():
    """The coarsest, and 3/2 of the finest, rounded up; never coarser than the coarsest."""
    def finer(*pairs):
        coarse, fine = auto.two_rates("avsr", {"rates": pairs})
        assert coarse == {"audio": 8, "video": 8}
        return tuple(fine.values())
    assert (finer((2, 2), (8, 8)), finer((1, 3), (8, 8)), finer((7, 2), (8, 8)), finer((8, 8))) == ((3, 3), (2, 5), (8, 3), (8, 8))


def test_a_model_of_one_rate_decodes_once():
    decoder = auto.auto_decoder("asr", {"rates": [(4, 4)], "auto": {"asr": 9.}})
    assert decoder.keywords["ladder"] == [({"audio": 4}, -math.inf)]


def test_a_calibration_with_one_voice_has_no_babble(tiny, talker_clips):
    assert list(auto.calibrate(tiny, talker_clips[:1], ["asr"], [(4, 4), (8, 8)], NUMBERS)) == ["asr"]


GOOD, BAD, EXTRA = ("a b", "a b"), ("a b", "a c"), ("a b", "a b c")          # reference, hypothesis


@pytest.mark.parametrize("coarse, fine, threshold", [
    ([GOOD] * 3, [GOOD] * 3, -2), ([GOOD, BAD, GOOD], [GOOD] * 3, 0), ([GOOD, GOOD, BAD, GOOD], [GOOD] * 4, -1),
    ([GOOD, BAD, GOOD], [GOOD, BAD, GOOD], -2),                              # wrong at both rates: nothing is lost
    ([GOOD, BAD, GOOD], [GOOD, GOOD, BAD], 0),                               # a word won below makes up for none lost above
    ([GOOD, EXTRA, GOOD], [GOOD] * 3, 0),
    ([BAD, GOOD], [GOOD] * 2, 0),                                            # every clip is decoded twice
    ([GOOD] * 397 + [BAD] * 3, [GOOD] * 400, -397)])                         # 1 of 800 words is less than MAX_LOSS, 2 are more
def test_the_threshold_of_auto(monkeypatch, talker_clips, coarse, fine, threshold):
    """The coarse rate's answers are in falling order of log-probability, 0, -1, -2 ..."""
    answers = [(*texts, -float(i), 9) for i, texts in enumerate(coarse)], [(*texts, -.5, 9) for texts in fine]
    monkeypatch.setattr(auto, "decode_all", lambda model, clips, plan, *_: {(key, None): answers[key[1]] for key in plan})
    assert auto.calibrate(torch.nn.Module(), talker_clips, ["asr"], [(2, 2), (8, 8)], None) == {"asr": threshold}
