"""python -m pytest tests/test_pretrain.py: what stages 1 and 2 learn from, and what names their results in the cache."""
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_avsr

import data
import train
from mome import AVSRConfig, Llama, LlamaConfig
from real.files import digest
from real.report import Stopwatch
from toy import pretrain
from toy.talker import grid_sentences
from toy.tokenizer import make_tokenizer


@pytest.fixture
def first_step(monkeypatch):
    """A function -> {"nll" or "ctc", "batch": the arguments of step 0 of stage 1; "loss": its loss; "is_training"}."""
    def of(clips, stream="audio", units=("AA", "B"), alignments={}):
        seen, encoder = {}, tiny_avsr().encoders[stream]

        def noted(name, function):
            return lambda *args, **options: seen.update({name: args}) or function(*args, **options)
        with monkeypatch.context() as patch:
            patch.setattr(pretrain, "fit", lambda name, parameters, loss_at, *_: seen.update(loss=loss_at(0), is_training=encoder.training))
            patch.setattr(pretrain.F, "nll_loss", noted("nll", pretrain.F.nll_loss))
            patch.setattr(pretrain.F, "ctc_loss", noted("ctc", pretrain.F.ctc_loss))
            patch.setattr(pretrain, "batch", noted("batch", data.batch))
            pretrain.train_encoder(stream, encoder, clips, list(units), 1, 0, torch.device("cpu"), alignments)
        return seen
    return of


def test_stage_1_learns_no_padding_and_hears_babble(talker_clips, first_step):
    seen = first_step(talker_clips)
    (_, targets), (chosen, streams, rng, voices) = seen["nll"], seen["batch"]
    n_tokens = [2 * len(clip.frames) for clip in chosen]
    assert (targets.view(len(chosen), -1) != -100).sum(1).tolist() == n_tokens and len(set(n_tokens)) > 1
    assert streams == ["audio"] and isinstance(rng, random.Random) and voices == talker_clips
    assert seen["is_training"]                               # else BatchNorm keeps its first statistics


def test_ctc_reads_no_padding_and_passes_over_clips_that_are_too_short(talker_clips, first_step):
    clips = [replace(clip, aligned=None) for clip in talker_clips]
    units = {unit for clip in clips for unit in pretrain.spell(clip.text)} | {"aa"}
    seen = first_step(clips + [replace(clips[0], name="x", text="aa " * 300)] * 5, units=sorted(units))
    log_probs, _, lengths, _ = seen["ctc"]
    assert seen["loss"].isfinite() and lengths.max() == len(log_probs) and lengths.min() < len(log_probs)


def test_a_taught_clip_of_another_pace_has_its_units_at_that_pace(talker_clips, first_step):
    clips = [replace(clip, aligned=None) for clip in talker_clips]
    halves = {clip.name: [("AA", clip.duration / 2), ("B", clip.duration)] for clip in clips}
    _, targets = first_step(clips, "video", alignments=halves)["nll"]
    assert all(abs((row == 1).sum() - (row == 2).sum()) <= 1 for row in targets.view(8, -1))


def test_alignments_are_used_if_most_clips_have_one(talker_clips, first_step):
    clips = [replace(clip, aligned=None) for clip in talker_clips]
    alignments = [(clip.name, [("AA", 1.), ("B", clip.duration)]) for clip in clips]
    few, most = (first_step(clips, "video", alignments=dict(alignments[:n])) for n in (2, 3))
    assert "ctc" in few and "nll" in most
    assert {clip.name for clip in most["batch"][0]} == dict(alignments[:3]).keys()


def test_fit_clips_gradients_and_lowers_the_learning_rate():
    weight, places, norms = torch.nn.Parameter(torch.zeros(1)), [0.], []

    def loss_at(step):
        places.append(weight.item())
        norms.append(0 if weight.grad is None else weight.grad.norm().item())
        return 100 * weight.sum()
    pretrain.fit("test", [weight], loss_at, 100, 0.1)
    moves = -np.diff(places)
    assert max(norms) == pytest.approx(1, abs=1e-3) and moves[-1] < .1 * max(moves) and moves[2] < .2 * max(moves)


def test_each_step_of_stage_2_has_sentences_of_its_own(monkeypatch):
    tokenizer, met, draw = make_tokenizer(["bin", "blue", "now"]), [], pretrain.random_sentence
    config = AVSRConfig(LlamaConfig(tokenizer.n_vocab, 16, 1, 2, 2, 16), bos=259, eos=260, prompt=(261,))
    monkeypatch.setattr(pretrain, "random_sentence", lambda *args: met.append(draw(*args)) or met[-1])
    pretrain.train_llm(Llama(config.llm), ["bin blue", "blue now"], set(), tokenizer, config, 2, 0, "cpu")
    assert met[:pretrain.LLM_BATCH] != met[pretrain.LLM_BATCH:]


def test_all_that_training_reads_of_a_clip_is_in_its_key(talker_clips):
    clip = talker_clips[0]
    others = {"frames": clip.frames + 1, "text": "x", "log_power": clip.log_power + 1, "aligned": None, "name": "b"}
    keys = {pretrain.clips_digest([replace(clip, **{name: value})]) for name, value in others.items()}
    assert len(keys | {pretrain.clips_digest([clip])}) == 6


def test_what_names_the_results_in_the_cache(talker_clips, monkeypatch):
    """A key has all that training depends on. The last key of an encoder counts; before it may come one on the talker."""
    keys, sentence = [], grid_sentences("train")[0]
    model, device = tiny_avsr(), torch.device("cpu")
    llama = {name: tensor for name, tensor in model.llm.state_dict().items() if ".mome." not in name}
    monkeypatch.setattr(pretrain, "cached", lambda folder, name, key, make: keys.append(digest([name, key])) or dict(llama))
    monkeypatch.setattr(pretrain, "load_cached", lambda *_: None)
    monkeypatch.setattr(pretrain, "cache_file", lambda *_: Path(__file__))              # it is there, so no process begins

    def encoder_key(heard, of_clips="x", alignments={}, tested=(), **config):
        job = "audio", model.encoders["audio"], heard, ["AA"], of_clips, alignments, set(tested), train.TrainConfig(**config)
        pretrain.learn_encoder(*job, None, device, False)
        return keys[-1]

    def llama_key(texts=("a",), tested=(), **config):
        job = model, {"audio", "video"}, talker_clips, list(texts), set(tested), None, train.TrainConfig(**config)
        pretrain.pretrain(*job, None, Stopwatch())
        return keys[-1]

    of_all = [{}, {"seed": 1}, {"audio_steps": 9}, {"of_clips": "y"}]
    of_real = [{"ctc_steps": 9}, {"alignments": {"a": []}}, {"tested": [sentence]}, {"clips": 9}]
    real = [replace(clip, aligned=None) for clip in talker_clips]
    found = [encoder_key(talker_clips, **change) for change in of_all]
    found += [encoder_key(real, **change) for change in (*of_all, *of_real)]
    found += [llama_key(**change) for change in ({}, {"texts": ["b"]}, {"tested": [sentence]}, {"seed": 1}, {"llm_steps": 9})]
    assert len(set(found)) == len(found) == 17


def test_each_step_of_stage_1_augments_anew(talker_clips, monkeypatch):
    states = []
    monkeypatch.setattr(pretrain, "fit", lambda name, parameters, loss_at, *_: [loss_at(step) for step in range(2)])
    monkeypatch.setattr(pretrain, "batch", lambda clips, streams, rng, voices: states.append(rng.getstate()) or data.batch(
        clips, streams, rng, voices))
    pretrain.train_encoder("audio", tiny_avsr().encoders["audio"], talker_clips, ["AA"], 2, 0, torch.device("cpu"), {})
    assert states[0] != states[1]
