"""Looking after a training run: its processes and threads, its folder, its log, and the state from which it goes on."""
import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from hashlib import sha256
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch.nn.utils import get_total_norm, parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint

from mome import MoME
from real.files import (HALF, CheckpointError, TrainingError, digest, is_first, make_folder, note, plain, write_json,
                        write_together)
from real.folders import stamp

CORES = torch.get_num_threads()          # what torch takes when nobody asks it to share
# A run may go on with other values of these flags.
NOT_SETTINGS = {"out", "cache", "eval_only", "dry_run", "fresh", "save_every", "device", "snr", "beam", "test_clips",
                "accumulate", "batch_seconds", "checkpointing", "compile", "max_bad"}
PATHS = "data", "llm", "audio_encoder", "video_encoder"       # a run may go on wherever these lie by now
COLUMNS = ["step", "task", "loss", "balance", "max_load", "router_entropy", "lr", "tokens_per_s", "seconds"]
WRITTEN = "config.json", "model.safetensors", "tokenizer.json", "metrics.json", "log.csv", "samples/sample[123]_*"
LOG_EVERY, LOOK_EVERY = 10, 500          # steps between rows of log.csv, between looks for experts without work
MEETING = 10                             # minutes in which the processes of torchrun must meet


# --- processes and threads -------------------------------------------------------------------------------------------

@contextmanager
def threads(share):
    """In this block a thread uses this share of the cores that torch takes by itself, at least one."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(share * CORES)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_device(name):
    """--device (auto, cpu or cuda) -> torch.device. Raises TrainingError for a GPU that torch cannot use."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    try:
        torch.ones(1, device=device).add_(1).item()
        torch.cuda.set_device(device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"--device {name}: torch cannot use a GPU here ({reason}); use --device cpu") from None
    return torch.device("cuda")


@contextmanager
def processes(device):
    """In this block the processes of torchrun work together, and only the first prints. Alone, nothing changes."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    backend = "gloo" if choose_device(device).type == "cpu" else "nccl"
    try:
        store, rank, n_processes = next(dist.rendezvous("env://", timeout=timedelta(minutes=MEETING)))
        store.set_timeout(timedelta(days=1))
        dist.init_process_group(backend, store=store, rank=rank, world_size=n_processes, timeout=timedelta(days=1))
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"WORLD_SIZE is set, but the processes cannot meet; use torchrun ({reason})") from None
    with (open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if is_first() else nowhere),
          redirect_stderr(sys.stderr if is_first() else nowhere),
          patch.object(MoME, "sum_counts", staticmethod(summed))):
        yield
    dist.destroy_process_group()


def summed(x):
    """The sum of a tensor over all processes."""
    x = x.clone()
    together(dist.all_reduce, x)
    return x


def place():
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def together(operation, *arguments):
    """One operation of torch.distributed, which all processes do. Raises TrainingError if one of them has ended."""
    try:
        operation(*arguments)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"another process of this run has ended; what it wrote says why ({reason})") from None


@contextmanager
def first_alone():
    """The first process does this block before the others, who then find its results in the cache."""
    if not is_first():
        together(dist.barrier)
    yield
    if is_first() and dist.is_initialized():
        together(dist.barrier)


def over_processes(work, items):
    """The results of work(items), a list. Each process of torchrun works on its share and gets the results of all."""
    rank, n_processes = place()
    results = list(work(items[rank::n_processes]))
    if n_processes == 1:
        return results
    of_all = [None] * n_processes
    together(dist.all_gather_object, of_all, results)
    return [result for results in of_all for result in results]


def split_step(clips, transcripts, config):
    """What this process computes of a step, in parts that follow one another -> [(share of tokens to predict, rows)].

    Clips are dealt to the processes in turn. All processes have the same number of parts, at least --accumulate.
    No part of several clips is longer than --batch-seconds, padding included. Each part's cross-entropy times its
    share of the tokens, summed over all parts, is the mean over the tokens of the step."""
    def parts(rows, n):
        rows = sorted(rows, key=lambda row: clips[row].duration) if n > 1 else rows
        return [rows[i * len(rows) // n:(i + 1) * len(rows) // n] for i in range(n)]

    def fits(part):
        return len(part) == 1 or len(part) * max(clips[row].duration for row in part) <= config.batch_seconds

    rank, n_processes = place()
    shares = [range(i, len(clips), n_processes) for i in range(n_processes)]
    most = len(clips) // n_processes
    n_parts = next(n for n in range(min(config.accumulate, most), most + 1)
                   if all(fits(part) for rows in shares for part in parts(rows, n)))
    n_tokens = [len(ids) + 1 for ids in transcripts]             # with <eos>
    return [(sum(n_tokens[row] for row in part) / sum(n_tokens), list(part)) for part in parts(shares[rank], n_parts)]


def prepare_layers(layers, config):
    """In training --compile computes a layer by torch.compile; --checkpointing computes it again in the backward pass.

    Tests use neither: decoding would compile a layer for each number of stored tokens."""
    def in_turn(usual, trained):
        return lambda *x, **attention: (trained if torch.is_grad_enabled() else usual)(*x, **attention)

    for layer in layers:
        usual = trained = layer.forward
        if config.compile:
            torch._dynamo.config.recompile_limit = 64       # a layer is compiled for each number of clips in a part
            trained = torch.compile(trained, dynamic=True)
        if config.checkpointing:                            # no layer draws random numbers
            trained = partial(checkpoint, trained, use_reentrant=False, preserve_rng_state=False,
                              context_fn=lambda mome=layer.mome: (nullcontext(), routing_kept(mome)))
        layer.forward = in_turn(usual, trained)


@contextmanager
def routing_kept(mome):
    """In this block a layer is computed again. What `balance_loss` has read stays: new tensors would keep a graph."""
    routed = mome and mome.routed
    try:
        yield
    finally:
        if mome:
            mome.routed = routed


def prefetched(make, first, steps, ahead=4):
    """Yield make(first), ... make(steps - 1). A thread works on up to `ahead` of them in advance."""
    worker = ThreadPoolExecutor(1)
    try:
        waiting = deque(worker.submit(make, step) for step in range(first, min(first + ahead, steps)))
        for step in range(first, steps):
            yield waiting.popleft().result()
            if step + ahead < steps:
                waiting.append(worker.submit(make, step + ahead))
    finally:
        worker.shutdown(cancel_futures=True)                 # after the batch at hand


def begin_worker(n_threads):
    """A worker process calls this first. It takes so many threads, and it ends when its parent ends in any way."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    torch.set_num_threads(n_threads)
    threading.Thread(target=wait, daemon=True).start()


# --- the folder ------------------------------------------------------------------------------------------------------

@contextmanager
def own_folder(folder):
    """In this block the folder exists, can be written, and belongs to this process. Raises OSError, CheckpointError."""
    if not is_first():
        yield
        return
    folder, lock = Path(folder), Path(folder, ".lock")
    is_new = not folder.exists()
    make_folder(folder, "--out")
    refuse_foreign(folder)
    owner = lock.read_text(errors="replace") if lock.is_file() else ""
    if owner.isdecimal() and int(owner) != os.getpid() and is_running(int(owner)):
        raise CheckpointError(f"{folder}: process {owner} trains into it; wait, or name another --out; "
                              f"if it is another program by now, delete {lock}")
    if lock.is_file():                              # its process has ended
        lock.unlink()
    try:
        with lock.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        raise CheckpointError(f"{folder}: another process has just begun to train into it; name another --out") from None
    for path in folder.glob(f".*{HALF}"):           # of processes that were killed
        owner = path.stem.rpartition(".")[2]
        if owner.isdecimal() and not is_running(int(owner)):
            path.unlink()
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def refuse_foreign(folder):
    """Raises CheckpointError if training would replace what it did not write.

    It wrote a folder that has a run.json, or a config.json with a format."""
    for path in folder.glob("*"):
        if (path.suffix in (".json", ".safetensors", ".csv")) if path.is_dir() else path.name == "samples":
            raise CheckpointError(f"{path}: stands where training writes; move it, or name another --out")
    found = [path for name in WRITTEN for path in sorted(folder.glob(name))]
    try:
        is_ours = (folder / "run.json").is_file() or "format" in json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, TypeError):
        is_ours = False
    if found and not is_ours:
        raise CheckpointError(f"{found[0]}: training would replace it, and did not write it; name another --out")


def is_running(process):
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


# --- the state -------------------------------------------------------------------------------------------------------

class Run:
    """Stage 3 of one training: its state in OUT/state.safetensors, its log in OUT/log.csv, its facts in OUT/run.json.

    The state holds the trained tensors, the optimizer's moments and the step. A batch is a function of the step, so the
    run goes on bit for bit. The state is written every --save-every minutes and at Ctrl-C or SIGTERM, and replaced as a
    whole. After the end the state stays: the same command then finds nothing left to train. The state also holds
    `kept`, a dict for JSON. frozen: a hash of the frozen parts, which other sound in the same files changes too."""

    def __init__(self, config, clips, frozen=None):
        self.out, self.minutes = Path(config.out), config.save_every
        self.path = self.out / "state.safetensors"
        self.settings = {name: value for name, value in asdict(config).items() if name not in NOT_SETTINGS}
        self.settings |= {name: bool(self.settings[name]) for name in PATHS}
        names = [(os.path.relpath(clip.name, config.data or "."), clip.text, stamp(clip).decode()) for clip in clips]
        self.settings |= {"clips": digest(names)[:12], "frozen": frozen}
        self.kept, self.asked, self.stop = {"curve": [], "recent": []}, 0, False    # asked: when, in s
        self.n_tokens, self.counts = 0, {}
        self.fresh, self.ended = config.fresh, False
        self.began = self.saved = self.looked = time.monotonic()
        if config.fresh and is_first():
            self.path.unlink(missing_ok=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "mome": revision()}
        self.facts = {"command": sys.argv, "config": asdict(config), "versions": versions, "processes": place()[1]}

    def __enter__(self):
        def ask_to_stop(number, _):
            if not self.asked:
                self.asked = time.monotonic()
                told = b"\nnote: the run saves its state after this step and stops; a second Ctrl-C ends it unsaved\n"
                with suppress(OSError):                          # a closed pipe, as of `| tee`, must not end the run
                    os.write(2, told * is_first())
            elif time.monotonic() > self.asked + 2:              # torchrun repeats the first one at once
                signal.signal(number, self.handlers[number])
                signal.raise_signal(number)

        self.handlers = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, error, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.asked and error is None:                         # after the last step, whose state is saved
            raise KeyboardInterrupt

    def begin(self, trained, optimizer):
        """Put the stored state, if there is one, into the trained tensors and the optimizer -> the step to begin with.

        Raises CheckpointError if the state is damaged or of a run with other settings."""
        self.trained, self.optimizer = trained, optimizer
        with first_alone():                                      # it also does what --fresh asks
            found = self.path.read_bytes() if self.path.is_file() else None
        if found is None:
            return self.begin_log(0)
        try:
            tensors = load(found)
            stored = tensors.pop("digest", torch.empty(0)).numpy().tobytes()
            if stored != sha256(save(tensors)).digest():
                raise ValueError("its content is not what this version has written")
            facts = json.loads(tensors.pop("facts").numpy().tobytes())
            if not all(x.isfinite().all() for x in tensors.values()):
                raise ValueError("it holds NaN or infinity")
        except (SafetensorError, ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"{self.path}: damaged, start anew with --fresh: {error}") from None
        if facts["finished"] and facts["settings"] != self.settings:
            note(f"{self.path}: another training has ended here; this one replaces its state and its model")
            self.save(0)
            return self.begin_log(0)
        self.refuse_other(facts["settings"])
        if facts["shapes"] != [list(parameter.shape) for parameter in trained]:
            raise CheckpointError(f"{self.path}: of a model of other sizes; start anew with --fresh")
        with torch.no_grad():
            for i, parameter in enumerate(trained):
                parameter.copy_(tensors[f"{i}.param"])
                if f"{i}.step" in tensors:                       # otherwise it has had no gradient yet
                    moments = {key: tensors[f"{i}.{key}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
                    optimizer.state[parameter] = {"step": tensors[f"{i}.step"], **moments}
        self.kept, self.ended = facts["kept"], facts["finished"]
        note(f"{self.path}: " + ("this training has ended; --fresh trains again" if facts["finished"] else
                                 f"goes on after step {facts['step']}"))
        return self.begin_log(facts["step"])

    def refuse_other(self, settings):
        """Raises CheckpointError if the stored settings are not those of this run."""
        names = self.settings.keys() | settings.keys()
        for name in sorted(names, key=lambda name: (name in ("clips", "frozen"), name)):    # they follow from others
            if self.settings.get(name) != settings.get(name):
                others = {"clips": "the training clips (of a large folder the times of their files count)",
                          "frozen": "the frozen parts, or what clips hold"}
                flag = others.get(name, f"--{name.replace('_', '-')}")
                then, now = settings.get(name), self.settings.get(name)
                raise CheckpointError(f"{self.path}: of a run with other settings: {flag} was {then!r}, is {now!r}; "
                                      "repeat that command, or start anew with --fresh")

    def sum_up(self, loss, balance):
        """The loss and balancing loss of this process -> those of all. Adds up the gradients too.

        Only the gradients of what is trained travel; with them the loss and whether a process was asked to stop."""
        self.stop, balance = bool(self.asked), float(torch.as_tensor(balance).detach())
        if place()[1] == 1:
            return loss, balance
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        numbers = gradients[0].new_tensor([loss, balance, self.stop])
        vector_to_parameters(summed(parameters_to_vector([*gradients, numbers])), [*gradients, numbers])
        loss, balance, asked = numbers.tolist()
        self.stop = asked > 0
        return loss, balance

    def after(self, step):
        """Call it with the number of steps done, after each. It saves when it is time, and ends a stopped run."""
        if self.stop or time.monotonic() - self.saved > 60 * self.minutes:
            self.save(step)
        if self.stop:
            note(f"{self.path}: holds the state after step {step}; the same command"
                 f"{' without --fresh' * self.fresh} goes on from there")
            raise KeyboardInterrupt

    def save(self, step, finished=False):
        """Write the state after `step` steps. finished: the model has been written as well."""
        facts = {"step": step, "finished": finished, "settings": self.settings, "kept": self.kept,
                 "shapes": [list(parameter.shape) for parameter in self.trained]}
        tensors = {"facts": torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)}
        for i, parameter in enumerate(self.trained):
            tensors[f"{i}.param"] = parameter.detach().cpu().contiguous()
            for key, x in self.optimizer.state[parameter].items():
                tensors[f"{i}.{key}"] = x.cpu().contiguous()
        tensors["digest"] = torch.tensor(list(sha256(save(tensors)).digest()), dtype=torch.uint8)
        write_together({self.path: save(tensors)})
        self.saved, self.step = time.monotonic(), step

    def finish(self):
        """The model is on the disk. Write the curve of held-out clips, and a state that says that the run has ended."""
        if self.kept["curve"]:
            write_json(self.out / "curve.json", self.kept["curve"])
        elif is_first():
            (self.out / "curve.json").unlink(missing_ok=True)            # of an earlier model
        if is_first() and not self.ended:
            (self.out / "metrics.json").unlink(missing_ok=True)          # of an earlier model too
        self.save(self.step, finished=True)
        if dist.is_initialized():
            together(dist.barrier)                 # the other processes read these files next

    # --- the log

    def begin_log(self, step):
        """Keep the rows of an earlier part of this run, up to `step` -> `step`."""
        if not self.ended:                                               # else this command only tests
            write_json(self.out / "run.json", self.facts)
        path = self.out / "log.csv"
        rows = path.read_text(errors="replace").splitlines() if step and path.is_file() else []
        rows = [row for row in rows if (number := row.partition(",")[0]).isdecimal() and int(number) < step]
        with suppress(IndexError, ValueError):                           # no row, or an edited one
            self.began -= float(rows[-1].rpartition(",")[2])             # seconds count on from the earlier part
        write_together({path: "\n".join([",".join(COLUMNS), *rows, ""]).encode()})
        return step

    def log(self, step, drawn, loss, balance, llm):
        """A line of log.csv, every LOG_EVERY steps. drawn: what train.train_mome draws for a step.

        balance: of the last set of rates. max_load: the most tokens of an expert over the mean, in the worst layer.
        router_entropy: of a router's mean probabilities, in the worst layer. tokens_per_s: pooled tokens of this
        process, all rates. Raises TrainingError if the loss or a gradient is not a number: no weight gets it."""
        task, clips, rate_sets, parts = drawn
        trained = self.optimizer.param_groups[0]["params"]
        norm = get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None]).item()
        if not math.isfinite(loss + norm):
            names = ", ".join(clip.name for clip in clips)
            raise TrainingError(f"step {step}: the loss is {loss}, the norm of its gradient {norm}; try a smaller --lr; "
                                f"the clips of this step: {names}")
        for rates, (_, _, encoded) in product(rate_sets, parts):
            self.n_tokens += sum(int((encoded[stream][1] / rate).ceil().sum()) for stream, rate in rates.items())
        if step % LOG_EVERY or not is_first():
            return
        loads, entropies = [], []
        for number, layer in enumerate(llm.layers):
            if layer.mome is not None and layer.mome.routed is not None:
                probs, chosen = layer.mome.routed
                counts = torch.bincount(chosen.flatten(), minlength=probs.shape[1]).cpu().float()
                loads.append((counts.max() / counts.mean()).item())
                mean = probs.mean(0)
                entropies.append(-(mean * mean.clamp(min=1e-9).log()).sum().item())
                self.counts[number] = self.counts.get(number, 0) + counts
                self.top_k = chosen.shape[1]
        now = time.monotonic()
        speed, self.n_tokens, self.looked = self.n_tokens / (now - self.looked), 0, now
        lr = self.optimizer.param_groups[0]["lr"]
        row = (f"{step},{task},{loss:.6f},{balance:.4f},{max(loads, default=1):.2f},{min(entropies, default=0):.3f},{lr:.2e},"
               f"{speed:.0f},{now - self.began:.1f}\n")
        try:
            with open(path := self.out / "log.csv", "a") as file:
                file.write(row)
        except OSError as error:
            raise plain(error, path) from None
        if step and step % LOOK_EVERY == 0:
            self.look_at_experts()

    def look_at_experts(self):
        """Say which experts had no work since the last look, and where a router always chooses the same ones."""
        for number, counts in self.counts.items():
            idle = [str(expert) for expert, count in enumerate(counts.tolist()) if count == 0]
            share = counts.topk(self.top_k).values.sum() / counts.sum()
            if self.top_k < len(counts) and share > 0.95:
                note(f"layer {number}: its router has collapsed: the same {self.top_k} experts get {share:.0%} of the tokens")
            elif idle:
                note(f"layer {number}: expert {', '.join(idle)} got no token in the last {LOOK_EVERY // LOG_EVERY} steps "
                     f"that were looked at, at their last set of rates")
        self.counts = {}


def revision():
    """The commit of this code, with a + if files have changed since; None outside a git checkout."""
    words = "describe --always --dirty=+ --abbrev=40 --exclude=*".split()
    try:
        return subprocess.check_output(["git", *words], cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
