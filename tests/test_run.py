"""python -m pytest tests/test_run.py: runs that are stopped and go on, their log, and what a kill leaves."""
import csv
import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, TRAINED, tiny_avsr
from safetensors.torch import load_file, save_file

import data
import sample
import train
from data import Clip
from mome import AVSR, Llama, LlamaConfig
from real import report, run
from real.checkpoint import load_model
from real.files import CheckpointError
from real.run import Run
from toy import pretrain
from toy.pretrain import clips_digest

STEPS = 6


def command(out, *more):
    return [*TRAINED, *"--snr clean --test-clips 3 --steps".split(), str(STEPS), "--device", "cpu", "--out", str(out), "--cache", str(out.parent / "cache"),
            *map(str, more)]


@pytest.fixture(scope="module", autouse=True)
def every_step_is_logged():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "LOG_EVERY", 1)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nobody stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(command(out)) == 0
    return out


def losses(out):
    return [float(row["loss"]) for row in csv.DictReader((out / "log.csv").read_text().splitlines())]


@pytest.fixture(scope="module")
def half(whole):
    """The folder of the same run, which was asked to stop by Ctrl-C in its second step, and ended after its third."""
    out, log = whole.parent / "half", Run.log

    def ask(run, step, *more):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        log(run, step, *more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", ask)
        with pytest.raises(KeyboardInterrupt):
            train.main(command(out))
    assert (out / "state.safetensors").is_file() and not (out / "model.safetensors").exists()
    return out


@pytest.fixture
def stopped(whole, half, request):
    """A copy of that folder."""
    return shutil.copytree(half, whole.parent / request.node.name.replace("[", "-").strip("]"))


def test_a_stopped_run_goes_on_bit_for_bit(whole, stopped, capsys):
    assert train.main(command(stopped)) == 0
    assert "goes on after step 3" in capsys.readouterr().err
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    rows = [json.loads((out / "metrics.json").read_text())["rows"] for out in (whole, stopped)]
    assert rows[0] == rows[1]


def test_after_the_end_nothing_is_trained(whole, capsys):
    before = (whole / "model.safetensors").read_bytes(), (whole / "log.csv").read_text()
    assert train.main(command(whole)) == 0
    assert "this training has ended; --fresh trains again" in capsys.readouterr().err
    assert ((whole / "model.safetensors").read_bytes(), (whole / "log.csv").read_text()) == before


def test_another_training_may_follow_in_the_same_folder(whole):
    """Here with one set of rates in each step: its loss is not the mean over all."""
    out = shutil.copytree(whole, whole.parent / "another")
    assert train.main(command(out, "--rates-per-step", 1)) == 0
    assert (out / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes()
    assert len(losses(out)) == STEPS and losses(out)[0] != losses(whole)[0]


def test_other_settings_are_refused_and_fresh_starts_anew(whole, stopped, capsys):
    record = (stopped / "run.json").read_bytes()
    assert train.main(command(stopped, "--lr", 1e-3)) == 2
    assert (stopped / "run.json").read_bytes() == record
    refusal = capsys.readouterr().err
    assert "of a run with other settings: --lr was 0.0, is 0.001" in refusal and "damaged" not in refusal
    assert train.main(command(stopped, "--fresh", "--lr", 1e-3)) == 0
    assert (stopped / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes()


FACTS = {"no keys": b"{}", "a list": b"[]", "no JSON": b"{", "not UTF-8": b"\xff{}", "settings": b'{"settings": 1, "step": 3}'}


def spoil(path, kind):
    content = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(content[:len(content) // 2])
    elif kind == "text":
        path.write_text("state")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"step": 3}))
    elif kind == "a byte":
        path.write_bytes(content[:9] + b"!" + content[10:])
    elif kind == "too long":
        path.write_bytes(content + b"0")
    elif kind == "header's size":
        path.write_bytes(b"\xff" * 8 + content[8:])
    elif kind == "LFS":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    else:
        tensors = load_file(path)
        if kind == "no facts":
            del tensors["facts"]
        elif kind in FACTS:
            tensors["facts"] = torch.tensor(list(FACTS[kind]), dtype=torch.uint8)
        elif kind == "facts of numbers":
            tensors["facts"] = torch.ones(5)
        elif kind in ("step", "kept"):
            facts = json.loads(bytes(tensors["facts"].tolist())) | {kind: 10 ** 6}
            tensors["facts"] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
        elif kind == "no moment":
            del tensors["0.exp_avg"]
        elif kind == "shape":
            tensors["0.param"] = torch.zeros(3)
        elif kind == "moment's shape":
            tensors["0.exp_avg"] = torch.zeros(3)
        elif kind == "a number":
            tensors["1.exp_avg_sq"][2] *= 1.5
        elif kind == "NaN":
            tensors["0.param"][0] = torch.nan
        elif kind == "integers":
            tensors["0.param"] = tensors["0.param"].int()
        elif kind == "extra":
            tensors["999.param"] = torch.zeros(3)
        elif kind == "no hash":
            del tensors["digest"]
        elif kind == "of a model":
            tensors = {"llm.norm.weight": torch.zeros(3)}
        save_file(tensors, path)


@pytest.mark.parametrize("kind", ["empty", "cut", "text", "pickle", "a byte", "too long", "header's size", "LFS", "no facts",
                                  *FACTS, "facts of numbers", "step", "kept", "no moment", "shape", "moment's shape",
                                  "a number", "NaN", "integers", "extra", "no hash", "of a model"])
def test_a_damaged_state_is_refused(tmp_path, kind):
    def begin():
        torch.manual_seed(0)
        trained = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))]
        optimizer = torch.optim.AdamW(trained)
        state = Run(train.TrainConfig(out=str(tmp_path)), [])
        return state, trained, optimizer, state.begin(trained, optimizer)

    state, trained, optimizer, first = begin()
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state.save(3)
    assert first == 0 and begin()[3] == 3 and torch.equal(begin()[1][0], trained[0])
    spoil(tmp_path / "state.safetensors", kind)
    with pytest.raises(CheckpointError, match="state.safetensors: damaged, start anew with --fresh"):
        begin()


def test_a_state_with_numbers_that_are_none_is_refused(tmp_path):
    """Its hash is right: the run itself has written it."""
    trained = [torch.nn.Parameter(torch.tensor([1., torch.nan]))]
    state = Run(train.TrainConfig(out=str(tmp_path)), [])
    state.begin(trained, torch.optim.AdamW(trained))
    state.save(3)
    with pytest.raises(CheckpointError, match="damaged, start anew with --fresh: it holds NaN"):
        state.begin(trained, torch.optim.AdamW(trained))


def test_the_state_is_written_every_so_many_minutes(tmp_path, monkeypatch):
    now, saved, trained = [0.], [], [torch.nn.Parameter(torch.ones(3))]
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: now[0]))
    state = Run(train.TrainConfig(out=str(tmp_path), save_every=5.), [])
    state.begin(trained, torch.optim.AdamW(trained))
    save = state.save
    state.save = lambda step: saved.append(step) or save(step)
    for step, now[0] in enumerate((10, 299, 301, 500, 600, 602), 1):
        state.after(step)
    assert saved == [3, 6]


def test_the_curve_and_the_losses_since_its_last_point_go_on(tmp_path):
    def begin():
        trained = [torch.nn.Parameter(torch.ones(3))]
        run = Run(train.TrainConfig(out=str(tmp_path)), [])
        return run, run.begin(trained, torch.optim.AdamW(trained))

    state, _ = begin()
    state.kept["curve"].append({"step": 2, "loss": 1.5, "rows": []})
    state.kept["recent"].append(1.25)
    state.save(4)
    again, step = begin()
    assert step == 4 and again.kept == state.kept != {"curve": [], "recent": []}


def test_a_state_with_other_frozen_parts_is_refused(tmp_path):
    def begin(frozen, size=3):
        trained = [torch.nn.Parameter(torch.ones(size))]
        run = Run(train.TrainConfig(out=str(tmp_path)), [], frozen)
        return run, run.begin(trained, torch.optim.AdamW(trained))

    run, _ = begin("a")
    run.save(4)
    assert begin("a")[1] == 4
    with pytest.raises(CheckpointError, match="the frozen parts, or what clips hold was 'a', is 'b'"):
        begin("b")
    with pytest.raises(CheckpointError, match="of a model of other sizes"):
        begin("a", 4)
    run.save(10, finished=True)
    assert begin("b")[1] == 0        # what has ended is followed by another training


def test_other_sound_under_the_same_name_is_another_training(tmp_path, talker_clips, capsys):
    for i, clip in enumerate(talker_clips):
        path = tmp_path / "clips" / ("test" if i == 4 else "train") / f"{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, clip.wave, 16000)
        path.with_suffix(".txt").write_text(clip.text)
    short = "--tasks asr --rates 4 --snr clean --clips 12 --audio-steps 1 --ctc-steps 1 --llm-steps 1 --steps 2".split()
    argv = ["--data", str(tmp_path / "clips"), "--out", str(tmp_path / "out"), *short]
    for content, has_ended in ((None, False), (None, True), (talker_clips[4].wave, False)):
        if content is not None:
            soundfile.write(tmp_path / "clips/train/1.wav", content, 16000)
        assert train.main(argv) == 0
        told = capsys.readouterr().err
        assert ("this training has ended" in told) is has_ended and ("another training has ended here" in told) is (content is not None)
    shutil.move(tmp_path / "clips", tmp_path / "elsewhere")
    assert train.main(["--data", str(tmp_path / "elsewhere"), *argv[2:]]) == 0
    assert "this training has ended" in capsys.readouterr().err


def test_a_closed_terminal_does_not_end_a_run(tmp_path, monkeypatch):
    """`train.py 2>&1 | tee log`: Ctrl-C ends tee too."""
    def broken(*_):
        raise BrokenPipeError
    with pytest.raises(KeyboardInterrupt), Run(train.TrainConfig(out=str(tmp_path)), []) as running:
        monkeypatch.setattr(run.os, "write", broken)
        signal.raise_signal(signal.SIGINT)
        assert running.asked


def test_a_second_ctrl_c_ends_a_run_at_once(tmp_path, monkeypatch):
    now, before = [100.], signal.signal(signal.SIGINT, signal.default_int_handler)     # a shell's background job ignores it
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    with pytest.raises(KeyboardInterrupt, match="^$"), Run(train.TrainConfig(out=str(tmp_path)), []) as running:
        for now[0] in (100., 101.):                    # torchrun repeats it within a second
            signal.raise_signal(signal.SIGINT)
        assert running.asked == 100
        now[0] = 103.
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")
    assert now[0] == 103
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_a_full_disk_at_the_log_names_the_file(whole, stopped, capsys, monkeypatch):
    monkeypatch.setattr(run, "COLUMNS", run.COLUMNS)
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    begin = Run.begin_log
    monkeypatch.setattr(Run, "begin_log", lambda *args: monkeypatch.setattr(run, "open", full, raising=False) or begin(*args))
    assert train.main(command(stopped)) == 2
    assert "log.csv" in capsys.readouterr().err.splitlines()[-1]


def test_an_edited_log(tmp_path):
    def begin():
        trained = [torch.nn.Parameter(torch.ones(3))]
        run = Run(train.TrainConfig(out=str(tmp_path)), [])
        return run, run.begin(trained, torch.optim.AdamW(trained))

    run, _ = begin()
    run.save(4)
    for content in (b"step;task\n0;asr\nof mine,1\n\xb2,2\n", b"step,task\n3,asr\n7,asr\n"):
        (tmp_path / "log.csv").write_bytes(content)
        assert begin()[1] == 4
    rows = (tmp_path / "log.csv").read_text().split()
    assert rows[0].startswith("step,task,loss") and rows[1:] == ["3,asr"]    # what the state is later than stays


def test_a_damaged_cache_is_one_line(whole, tmp_path, capsys):
    cache = next(path for path in whole.parent.rglob("llama-*.safetensors"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / cache.name).write_bytes(cache.read_bytes()[:1000])
    argv = command(tmp_path / "out")
    argv[argv.index("--cache") + 1] = str(tmp_path / "cache")
    assert train.main(argv) == 2
    assert f"{cache.name}: damaged, delete it and start again" in capsys.readouterr().err


def test_a_damaged_state_is_one_line(whole, stopped, capsys):
    spoil(stopped / "state.safetensors", "cut")
    assert train.main(command(stopped)) == 2
    line, = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert "state.safetensors: damaged, start anew with --fresh" in line


def test_a_full_disk_leaves_the_old_state(stopped, capsys):
    before = (stopped / "state.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, limits[1]))      # no file may be larger, as on a full disk
    try:
        assert train.main(command(stopped)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line, = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert "state.safetensors" in line and "File too large" in line
    assert (stopped / "state.safetensors").read_bytes() == before
    assert [path for path in stopped.iterdir() if path.name.startswith(".")] == []


def letters(text):
    """A stand-in for a tokenizer: one to four ids for a text."""
    return [5 + ord(letter) % 30 for letter in text[:len(text) % 4 + 1]]


def test_the_step_of_train_py_is_the_papers_loss(tiny, talker_clips, tmp_path, monkeypatch):
    """The mean over the sets of rates of cross-entropy + 0.01 * balance; its gradient is clipped to norm 1."""
    calls, steps, loss, augmented = [], [], tiny.loss, []
    tiny.loss = lambda *args: calls.append(args) or loss(*args)
    monkeypatch.setattr(train, "rows_of", lambda *args: augmented.append(args) or data.rows_of(*args))

    def clip(trained, norm):
        each = [cross_entropy + 0.01 * balance for cross_entropy, balance in (loss(*args) for args in calls)]
        expected = torch.autograd.grad(sum(each) / len(each), trained)
        torch.testing.assert_close([parameter.grad for parameter in trained], list(expected), atol=1e-5, rtol=1e-4)
        steps.append(([rates for _, _, rates in calls], norm))
        calls.clear()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    config = train.TrainConfig(out=str(tmp_path), steps=2, batch_size=2)
    state = Run(config, [])
    train.train_mome(tiny, talker_clips, ["avsr"], [(4, 2), (8, 8)], SimpleNamespace(encode=letters), config, state)
    assert steps == [([{"audio": 4, "video": 2}, {"audio": 8, "video": 8}], 1.0)] * 2
    assert state.optimizer.defaults["weight_decay"] == 0.1 and state.optimizer.defaults["betas"] == (0.9, 0.98)
    assert augmented and all(isinstance(rng, random.Random) and voices == talker_clips for _, _, rng, voices in augmented)


def test_parts_of_a_step_share_the_balancing_loss(tiny, talker_clips, tmp_path, monkeypatch):
    totals, weight = [], next(parameter for parameter in tiny.parameters() if parameter.requires_grad)
    tiny.loss = lambda *_: (0 * weight.sum(), 1 + 0 * weight.sum())
    monkeypatch.setattr(Run, "log", lambda run, step, drawn, total, *_: totals.append(total))
    for n_parts in (1, 2):
        config = train.TrainConfig(out=str(tmp_path), fresh=True, steps=1, accumulate=n_parts)
        train.train_mome(tiny, talker_clips, ["avsr"], [(4, 2)], SimpleNamespace(encode=letters), config, Run(config, []))
    assert totals == pytest.approx([0.01, 0.01])


def test_the_loss_of_the_curve_is_the_mean_since_its_last_point(tiny, talker_clips, tmp_path, monkeypatch):
    losses, points = iter((1., 2., 3., 4.)), []
    monkeypatch.setattr(Run, "sum_up", lambda *_: (next(losses), 0.))
    monkeypatch.setattr(Run, "log", lambda *_: None)
    config = train.TrainConfig(out=str(tmp_path), steps=4, batch_size=1, valid_every=2)
    job = tiny, talker_clips, ["vsr"], [(8, 8)], SimpleNamespace(encode=letters), config, Run(config, [])
    train.train_mome(*job, check=lambda *point: points.append(point))
    assert points == [(2, 1.5), (4, 3.5)]


@pytest.fixture
def without_work(monkeypatch):
    """train.train and train.train_and_test without stages, tests and files."""
    for name in ("train_mome", "write_samples", "prepare_layers", "save_model", "table", "write_json", "load_tokenizer"):
        monkeypatch.setattr(train, name, lambda *_, **__: None)
    monkeypatch.setattr(Run, "finish", lambda *_: None)


def test_an_adapter_does_not_depend_on_what_the_cache_had(without_work, talker_clips, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(train, "save_model", lambda model, *_, **__: found.append(model.llm.layers[0].self_attn.q_proj.lora[0].a.detach()))
    for n_drawn in (1, 2):
        def set_up(*_):
            model = tiny_avsr()
            torch.rand(n_drawn)              # stages 1 and 2 draw numbers if they are not in the cache
            return model, {"train": talker_clips, "test": []}, None, {"frozen": None}, None
        monkeypatch.setattr(train, "set_up", set_up)
        train.train(train.TrainConfig(out=str(tmp_path), method="lora"), ["avsr"], [(2, 2)], "cpu", report.Stopwatch())
    assert torch.equal(*found)


def test_beam_is_that_of_the_calibration_and_of_the_test(without_work, tiny, talker_clips, tmp_path, monkeypatch):
    beams, splits = [], dict.fromkeys(("train", "valid", "test"), talker_clips)
    monkeypatch.setattr(train, "set_up", lambda *_: (tiny, splits, None, {"frozen": None}, None))
    monkeypatch.setattr(train, "calibrate", lambda *args: beams.append(args[5:]) or {})
    monkeypatch.setattr(train, "evaluate", lambda *args: beams.append(args[5:]) or [])
    train.train_and_test(train.TrainConfig(out=str(tmp_path), device="cpu", beam=3))
    assert beams == [(3,), (3,)]


@pytest.fixture
def drawing(tiny, talker_clips, tmp_path, monkeypatch):
    """A function of settings -> (what train_mome draws for a step, without encoding it; the number of steps)."""
    def of(**more):
        seen, config = [], train.TrainConfig(out=str(tmp_path), fresh=True, **more)
        monkeypatch.setattr(train, "prefetched", lambda make, first, steps: seen.extend((make, steps)) or [])
        monkeypatch.setattr(train, "encode_parts", lambda model, clips, parts, *_: [None] * len(parts))
        tokenizer = SimpleNamespace(encode=letters)
        train.train_mome(tiny, talker_clips, list(data.TASKS), [(2, 2), (4, 8)], tokenizer, config, Run(config, []))
        return seen
    return of


def test_what_a_step_draws(drawing):
    draw, _ = drawing()
    drawn = [draw(step) for step in range(1000)]
    shares = [sum(task == name for task, *_ in drawn) / 1000 for name in train.TASK_SHARE]
    assert shares == pytest.approx([.3, .4, .3], abs=.05)                        # three standard deviations
    assert all(rate_sets == data.task_rates(task, [(2, 2), (4, 8)]) for task, _, rate_sets, _ in drawn)
    one, _ = drawing(rates_per_step="1")
    alone = Counter(str(rates) for step in range(1000) for rates in one(step)[2])
    assert alone.total() == 1000 and len(alone) == 6 and min(alone.values()) > 100
    coarse, _ = drawing(rates_per_step="coarse")
    lips = Counter(rates["video"] for task, _, (rates,), _ in map(coarse, range(4000)) if task == "vsr")
    assert lips[8] / lips[2] == pytest.approx(2, abs=.4)                         # the square root of 8 / 2
    other, _ = drawing(seed=1)
    assert [draw(step)[0] for step in range(50)] != [other(step)[0] for step in range(50)]
    _, clips, _, ((share, transcripts, _),) = draw(0)
    assert share == 1 and transcripts == [letters(f" {clip.text}") for clip in clips]


@pytest.mark.parametrize("more, steps", [({}, 1700), ({"data": "x"}, 3500), ({"data": "x", "llm": "y"}, 700),
                                         ({"epochs": 1.5}, 2), ({"epochs": 9., "steps": 3}, 3)])
def test_the_length_of_stage_3(drawing, more, steps):
    assert drawing(**more)[1] == steps                                           # 5 clips, 4 in a step


def test_the_learning_rate_warms_up_and_falls_to_a_twentieth():
    rates = [train.learning_rate(step, 1700, 2.) for step in (0, 14, 29, 850, 1699)]
    assert rates == pytest.approx([2 / 30, 1, 2, 1.05, 0.1], rel=1e-2)
    assert train.learning_rate(0, 6, 2.) == 2       # a short run hardly warms up
    peaks = [train.TrainConfig(**more).peak_lr for more in ({}, {"method": "lora"}, {"data": "x", "method": "lora"}, {"lr": 1.})]
    assert peaks == [3e-3, 4.5e-3, 1.5e-3, 1]


def test_log_and_facts(whole):
    rows = list(csv.DictReader((whole / "log.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(STEPS))
    assert all(float(row["loss"]) > 0 and float(row["max_load"]) >= 1 and float(row["tokens_per_s"]) > 0 for row in rows)
    rates = [train.learning_rate(step, STEPS, train.TrainConfig().peak_lr) for step in range(STEPS)]
    assert [float(row["lr"]) for row in rows] == pytest.approx(rates, rel=0.01)
    assert json.loads(bytes(load_file(whole / "state.safetensors")["facts"].tolist()))["kept"] == {"curve": [], "recent": []}
    facts = json.loads((whole / "run.json").read_text())
    assert facts["config"]["steps"] == STEPS and facts["versions"]["torch"] == torch.__version__


def children(process):
    """The numbers of the processes that descend from one."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout.split()
    parents = dict(zip(map(int, listed[::2]), map(int, listed[1::2])))
    found = {process}
    for _ in range(4):
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found - {process}


def heed_ctrl_c():
    """In a new process: Ctrl-C counts, also where pytest itself runs in the background and ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs ps")
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(kill, tmp_path):
    argv = [sys.executable, ROOT / "train.py", *TRAINED, "--clips", "3000", "--out", tmp_path / "out"]
    parent = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
                              preexec_fn=heed_ctrl_c)
    until = time.monotonic() + 60
    while len(workers := children(parent.pid)) < 2 and time.monotonic() < until:
        time.sleep(0.2)
    time.sleep(3)                        # the workers have begun to import
    workers |= children(parent.pid)
    if kill == signal.SIGKILL:
        parent.send_signal(kill)
    else:
        os.killpg(parent.pid, kill)      # as a terminal does: Ctrl-C reaches the workers too
    said = parent.communicate()[1]
    until = time.monotonic() + 60
    while any(os.path.isdir(f"/proc/{pid}") for pid in workers) and time.monotonic() < until:
        time.sleep(0.2)
    assert workers and not [pid for pid in workers if os.path.isdir(f"/proc/{pid}")]
    assert "Traceback" not in said and parent.returncode == (130 if kill == signal.SIGINT else -kill)


@pytest.mark.parametrize("script", ["train.py", "sample.py", "data.py"])
def test_ctrl_c_while_torch_is_imported(script, tmp_path):
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, ROOT / script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": str(tmp_path)}, preexec_fn=heed_ctrl_c)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "" and process.returncode == -signal.SIGINT


@pytest.mark.skipif(torch.cuda.is_available(), reason="here torch can use the GPU")
@pytest.mark.parametrize("module", [train, sample])
def test_a_gpu_that_torch_cannot_use_is_one_line(whole, module, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)     # torch itself says why it is not
    argv = command(whole.parent / "gpu") if module is train else ["--ckpt", str(whole)]
    assert module.main([*argv, "--device", "auto"]) == 2
    assert "--device auto: torch cannot use a GPU here (" in capsys.readouterr().err


def test_a_full_gpu_is_no_damaged_checkpoint(whole, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
    monkeypatch.setattr(AVSR, "to", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_model(str(whole))


# --- parts of a step, processes ---

def test_a_step_in_parts_has_the_same_loss(whole):
    outs, even = (whole.parent / "in-parts", whole.parent / "undivided"), ("--balance", 0)     # balance is that of a part
    assert train.main(command(outs[0], "--accumulate", 2, "--checkpointing", *even)) == train.main(command(outs[1], *even)) == 0
    assert losses(outs[0]) == pytest.approx(losses(outs[1]), abs=1e-4)


def test_layers_of_a_training_step_and_of_a_test(tiny, monkeypatch):
    """Training layers are compiled and computed again; tests use neither. Computing again replaces no routing, which has a graph."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: lambda *x, **attention: (compiled.append(1), forward(*x, **attention))[1])
    prefixes, labels = [torch.randn(6, 32, requires_grad=True) for _ in range(2)], [torch.tensor([3, 4]), torch.tensor([5])]

    def gradients():
        tiny.zero_grad()
        tiny.llm.transcript_loss(prefixes, labels).backward()
        return [p.grad.clone() for p in tiny.parameters() if p.grad is not None]
    usual = gradients()
    run.prepare_layers(tiny.llm.layers, SimpleNamespace(compile=True, checkpointing=True))
    with torch.no_grad():
        tiny.llm.transcript_loss(prefixes, labels)
    assert not compiled
    loss = tiny.llm.transcript_loss(prefixes, labels)
    routed = [layer.mome.routed for layer in tiny.llm.layers]
    assert len(compiled) == 2 and all(routed)
    tiny.zero_grad()
    loss.backward()
    assert len(compiled) == 4 and all(layer.mome.routed is kept for layer, kept in zip(tiny.llm.layers, routed))
    again = [p.grad for p in tiny.parameters() if p.grad is not None]
    assert len(usual) == len(again) and all(torch.allclose(x, y, atol=1e-6) for x, y in zip(usual, again))


def test_two_processes_compute_what_one_does(whole):
    out = whole.parent / "two"
    program = "import sys, train; from real import run; run.LOG_EVERY = 1; sys.exit(train.main(sys.argv[1:]))"
    (whole.parent / "program.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nif __name__ == '__main__':\n    {program}")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", whole.parent / "program.py",
                           *command(out)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(out) == pytest.approx(losses(whole), abs=1e-4)
    assert done.stdout.count("WER %") == 1
    rows = [json.loads((folder / "metrics.json").read_text())["rows"] for folder in (whole, out)]
    assert [row["words"] for row in rows[0]] == [row["words"] for row in rows[1]]
    assert json.loads((out / "run.json").read_text())["processes"] == 2


def test_processes_that_cannot_meet_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert train.main(command(tmp_path / "out")) == 2
    assert "WORLD_SIZE is set, but the processes cannot meet; use torchrun" in capsys.readouterr().err


def test_processes_that_never_come_are_not_waited_for_all_day(tmp_path, capsys, monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(run, "MEETING", 0.02)
    assert train.main(command(tmp_path / "out", "--device", "cpu")) == 2
    assert "WORLD_SIZE is set, but the processes cannot meet; use torchrun" in capsys.readouterr().err


def test_parts_of_a_step(monkeypatch):
    def clips(*seconds):
        return [Clip(str(i), "a", frames=np.zeros((25 * s, 1, 1), np.uint8)) for i, s in enumerate(seconds)]
    config, words = train.TrainConfig(), [[1, 2], [1], [1, 2, 3], [1, 2]]
    assert run.split_step(clips(3, 9, 1, 5), words, config) == [(1.0, [0, 1, 2, 3])]
    halves = run.split_step(clips(3, 9, 1, 5), words, replace(config, accumulate=2))
    assert [rows for _, rows in halves] == [[2, 0], [3, 1]] and sum(share for share, _ in halves) == 1
    assert halves[0][0] == 7 / 12
    short = run.split_step(clips(3, 9, 1, 5), words, replace(config, batch_seconds=10))
    assert sorted(row for _, rows in short for row in rows) == [0, 1, 2, 3]
    assert all(len(rows) == 1 or len(rows) * max((3, 9, 1, 5)[row] for row in rows) <= 10 for _, rows in short)
    assert run.split_step(clips(30), [[1]], replace(config, batch_seconds=1)) == [(1.0, [0])]
    monkeypatch.setattr(run, "place", lambda: (1, 2))
    assert [rows for _, rows in run.split_step(clips(3, 9, 1, 5), words, config)] == [[1, 3]]


def test_a_training_that_follows_owns_the_folder_from_its_start(whole, capsys, monkeypatch):
    """Stopped in its first step, it leaves no log of its own to the training before it."""
    out = shutil.copytree(whole, whole.parent / "followed")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(command(out, "--lr", 1e-3))
    assert train.main(command(out)) == 2 and "--lr was 0.001, is 0.0" in capsys.readouterr().err


def test_rows_of_the_log_are_on_the_disk_when_a_run_goes_on(tmp_path):
    """And its seconds count on."""
    rows = [f"{step},asr,1,1,1,1,1,1,{100 * step}.5" for step in range(30)]
    (tmp_path / "log.csv").write_text("\n".join([",".join(run.COLUMNS), *rows, ""]))
    going_on = Run(train.TrainConfig(out=str(tmp_path)), [])
    before = going_on.began
    assert going_on.begin_log(20) == 20 and going_on.began == before - 1900.5
    assert (tmp_path / "log.csv").read_text().splitlines() == [",".join(run.COLUMNS), *rows[:20]]


def test_padding_is_not_counted(tmp_path, monkeypatch):
    looking = Run.__new__(Run)
    looking.counts, looking.n_tokens, looking.looked, looking.began = {}, 0, 0, 0
    looking.out = tmp_path
    looking.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.)
    llm = Llama(LlamaConfig(30, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=16, n_routed=4, n_shared=0))
    llm.transcript_loss([torch.randn(2, 16), torch.randn(9, 16)], [torch.tensor([1]), torch.tensor([2])])
    looking.log(0, ("asr", [], [], []), 1., 1., llm)
    assert looking.counts[0].sum() == 11 * looking.top_k       # of 18 places
    monkeypatch.setattr(run, "LOOK_EVERY", 1)
    looking.log(1, ("asr", [], [], []), 1., 1., llm)
    assert looking.counts == {}                                # it has looked for experts without work


def test_the_log_has_the_worst_layer_and_the_tokens_at_all_rates(tmp_path, monkeypatch):
    looking = Run.__new__(Run)
    looking.counts, looking.n_tokens, looking.looked, looking.began, looking.out = {}, 0, 0, 0, tmp_path
    looking.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.)
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: 2.))
    even = torch.full((4, 4), .25), torch.arange(4)[:, None]                          # probabilities and choices of 4 tokens
    uneven = torch.eye(4)[[0, 0, 0, 1]], torch.tensor([[0], [0], [0], [1]])
    llm = SimpleNamespace(layers=[SimpleNamespace(mome=SimpleNamespace(routed=routed)) for routed in (even, uneven)])
    parts = [(1., [], {"audio": (None, torch.tensor([9, 2]))})]                       # 3 + 1 and 5 + 1 tokens in 2 s
    looking.log(0, ("asr", [], [{"audio": 4}, {"audio": 2}], parts), 1., 1., llm)
    row = dict(zip(run.COLUMNS, (tmp_path / "log.csv").read_text().split(",")))
    assert (row["max_load"], row["router_entropy"], row["tokens_per_s"]) == ("3.00", "0.562", "5")


def test_experts_without_work_are_named(capsys):
    looking = Run.__new__(Run)
    looking.top_k, looking.counts = 2, {0: torch.tensor([5., 5, 0, 5]), 1: torch.tensor([50., 50, 1, 1]), 2: torch.ones(4)}
    looking.look_at_experts()
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 2 and "layer 0: expert 2 got no token" in notes[0] and "layer 1: its router has collapsed" in notes[1]
    looking.counts = {0: torch.tensor([5., 5])}         # top_k is all there are
    looking.look_at_experts()
    assert not capsys.readouterr().err


def test_a_path_may_be_written_in_another_way(tmp_path, monkeypatch):
    """clips/ and the whole path are the folder clips, wherever it lies: a run goes on, and its stage 1 is found."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()

    def keys(folder, name="a.wav", text="bin"):
        clips = [Clip(os.path.join(folder, name), text, log_power=np.zeros((80, 9), np.float16))]
        return Run(train.TrainConfig(out="out", data=folder), clips).settings, clips_digest(clips)
    assert keys("clips") == keys("clips/") == keys(str(tmp_path / "clips")) == keys("/other/clips")
    for more in ({"name": "b.wav"}, {"text": "red"}):
        assert all(key != other for key, other in zip(keys("clips"), keys("clips", **more)))


@pytest.mark.parametrize("same, flags", [
    (True, {"out": "x", "cache": "x", "device": "cpu", "snr": "clean", "beam": 5, "test_clips": 3, "max_bad": "9%", "save_every": 1.,
            "accumulate": 2, "batch_seconds": 9., "checkpointing": True, "compile": True}),
    (False, {"batch_size": 2, "seed": 1, "copies": 1, "weight_decay": 0., "tasks": "asr", "valid_every": 9, "place": "ffn"})])
def test_which_flags_make_another_training(same, flags):
    usual = Run(train.TrainConfig(), []).settings
    for flag, value in flags.items():
        assert (Run(train.TrainConfig(**{flag: value}), []).settings == usual) == same, flag


def test_all_processes_stop_if_one_was_asked(tmp_path, monkeypatch):
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    monkeypatch.setattr(run, "place", lambda: (0, 2))
    for asked in (0, 1):
        state = Run(train.TrainConfig(out=str(tmp_path)), [])
        state.trained = [parameter]
        monkeypatch.setattr(run, "summed", lambda x: x + torch.tensor([0, 0, 0, 1, 0, asked]))      # what the other process has
        assert state.sum_up(1., 2.) == (2, 2) and state.stop == bool(asked) and parameter.grad.tolist() == [1, 1, 1]


def test_a_run_that_began_anew_says_how_to_go_on(tmp_path, capsys):
    for fresh in (True, False):
        state = Run(train.TrainConfig(out=str(tmp_path), fresh=fresh), [])
        state.begin([torch.nn.Parameter(torch.ones(2))], torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]))
        state.stop = True
        with pytest.raises(KeyboardInterrupt):
            state.after(1)
        said = "the same command without --fresh goes on" if fresh else "the same command goes on"
        assert said in capsys.readouterr().err


def test_metrics_of_an_earlier_model_do_not_stay(tmp_path):
    """A command that finds its training ended only tests, and then they are of this model."""
    def ended(**settings):
        state, trained = Run(train.TrainConfig(out=str(tmp_path), **settings), []), [torch.nn.Parameter(torch.ones(2))]
        step = state.begin(trained, torch.optim.AdamW(trained))
        state.save(step)
        state.finish()
    ended()
    (tmp_path / "metrics.json").write_text("{}")
    before = (tmp_path / "run.json").read_text()
    ended()
    assert (tmp_path / "metrics.json").is_file() and (tmp_path / "run.json").read_text() == before
    ended(lr=1.)
    assert not (tmp_path / "metrics.json").exists() and (tmp_path / "run.json").read_text() != before


def test_ctrl_c_after_the_last_step_is_heard(tmp_path):
    with pytest.raises(KeyboardInterrupt), Run(train.TrainConfig(out=str(tmp_path)), []):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(ValueError), Run(train.TrainConfig(out=str(tmp_path)), []):
        signal.raise_signal(signal.SIGINT)
        raise ValueError


def test_what_a_test_of_another_kind_says(trained, tmp_path, capsys):
    """Other rates than those of training, and the synthetic talker in place of clips of one's own."""
    out = shutil.copytree(trained, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"tested": ["/my/clips", "hash"]}))
    argv = ["--eval-only", "--out", str(out), "--tasks", "avsr", "--test-clips", "2", "--snr", "clean"]
    assert train.main([*argv, "--rates", "2:2,4:4"]) == 0
    notes = capsys.readouterr().err
    assert "trained on /my/clips, and tested on the synthetic talker" in notes
    assert "not trained for avsr at rate 4:4" in notes and "at rate 2:2" not in notes
    (out / "config.json").write_text(json.dumps(config))
    assert train.main([*argv, "--rates", "2:2"]) == 0
    assert "other test clips than those of the training: another --seed or --test-clips" in capsys.readouterr().err


def test_another_network_of_the_same_config_is_not_loaded_from_the_cache():
    with pytest.raises(CheckpointError, match="my/cache: its weights are of another network than Linear; name another --cache"):
        pretrain.load_cached(torch.nn.Linear(3, 3), {"other": torch.ones(3)}, "my/cache")


def test_stage_2_does_not_depend_on_the_experts(trained, tmp_path, capsys):
    """Where experts stand and how many a token passes is nothing to a plain Llama, which is then found in the cache."""
    argv = [*TRAINED, "--cache", str(trained / "cache"), "--out", str(tmp_path), "--place", "ffn", "--top-k", "1", "--bottleneck", "3"]
    assert train.main(argv) == 0
    assert "llama: found in" in capsys.readouterr().out
