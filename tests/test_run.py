"""python -m pytest tests/test_run.py: runs that are stopped and go on, their log, and what a kill leaves."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TRAINED
from safetensors.torch import load_file, save_file

import sample
import train
from real.run import Run

STEPS = 6


def command(out, *more):
    return [*TRAINED, "--steps", str(STEPS), "--out", str(out), "--cache", str(out.parent / "cache"), *map(str, more)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nobody stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(command(out)) == 0
    return out


@pytest.fixture(scope="module")
def half(whole):
    """The folder of the same run, which was asked to stop after three steps, as by Ctrl-C or SIGTERM."""
    out, after = whole.parent / "half", Run.after

    def ask(run, step):
        run.stop = step == 3
        after(run, step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "after", ask)
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
    assert rows[0] == rows[1] and not (stopped / "state.safetensors").exists()


def test_other_settings_are_refused_and_fresh_starts_anew(whole, stopped, capsys):
    assert train.main(command(stopped, "--lr", 1e-3)) == 2
    refusal = capsys.readouterr().err
    assert "of a run with other settings: --lr was 0.0, is 0.001" in refusal and "damaged" not in refusal
    assert train.main(command(stopped, "--fresh", "--lr", 1e-3)) == 0
    assert (stopped / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes()


def spoil(path, kind):
    content = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(content[:len(content) // 2])
    elif kind == "text":
        path.write_text("state")
    else:
        tensors = load_file(path)
        if kind == "no facts":
            del tensors["facts"]
        elif kind == "facts":
            tensors["facts"] = torch.tensor(list(b"{}"), dtype=torch.uint8)
        elif kind == "no moment":
            del tensors["0.exp_avg"]
        elif kind == "shape":
            tensors["0.param"] = torch.zeros(3)
        elif kind == "extra":
            tensors["999.param"] = torch.zeros(3)
        save_file(tensors, path)


@pytest.mark.parametrize("kind", ["empty", "cut", "text", "no facts", "facts", "no moment", "shape", "extra"])
def test_a_damaged_state_is_refused(whole, stopped, capsys, kind):
    spoil(stopped / "state.safetensors", kind)
    assert train.main(command(stopped)) == 2
    line, = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert "state.safetensors: damaged, start anew with --fresh" in line


def test_log_and_facts(whole):
    rows = list(csv.DictReader((whole / "log.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["0"] and float(rows[0]["loss"]) > 0 and float(rows[0]["max_load"]) >= 1
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


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs ps")
def test_workers_end_with_a_killed_parent(tmp_path):
    argv = [sys.executable, ROOT / "train.py", *TRAINED, "--clips", "3000", "--out", tmp_path / "out"]
    parent = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(workers := children(parent.pid)) < 2 and time.monotonic() < until:
        time.sleep(0.2)
    time.sleep(3)                        # the workers have begun to import
    workers |= children(parent.pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 60
    while any(os.path.isdir(f"/proc/{pid}") for pid in workers) and time.monotonic() < until:
        time.sleep(0.2)
    assert workers and not [pid for pid in workers if os.path.isdir(f"/proc/{pid}")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here torch can use the GPU")
@pytest.mark.parametrize("module", [train, sample])
def test_a_gpu_that_torch_cannot_use_is_one_line(whole, module, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)     # torch itself says why it is not
    argv = command(whole.parent / "gpu") if module is train else ["--ckpt", str(whole)]
    assert module.main([*argv, "--device", "auto"]) == 2
    assert "--device auto: torch cannot use a GPU here (" in capsys.readouterr().err
