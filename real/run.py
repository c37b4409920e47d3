"""Looking after a training run: its threads, its folder, its log, and the state from which it goes on."""
import csv
import hashlib
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from real.files import CheckpointError, TrainingError, note, write_json, write_together

CORES = torch.get_num_threads()          # what torch takes when nobody asks it to share
NOT_SETTINGS = {"out", "cache", "eval_only", "dry_run", "fresh", "save_every", "device", "snr", "beam", "test_clips"}
STATE = ("param", "step", "exp_avg", "exp_avg_sq")     # of each trained parameter; the last three are AdamW's
LOG_EVERY = 10                           # steps


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
    try:
        torch.ones(1, device="cuda").add_(1).item()
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"--device {name}: torch cannot use a GPU here ({reason}); use --device cpu") from None
    return torch.device("cuda")


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
    lock = Path(folder, ".lock")
    if Path(folder).exists() and not Path(folder).is_dir():
        raise CheckpointError(f"{folder}: a file, not a folder; name another --out")
    is_new = not Path(folder).exists()
    Path(folder).mkdir(parents=True, exist_ok=True)
    owner = lock.read_text() if lock.is_file() else ""
    if owner.isdigit() and int(owner) != os.getpid() and is_running(int(owner)):
        raise CheckpointError(f"{folder}: process {owner} trains into it; wait, or name another --out")
    write_together({lock: str(os.getpid()).encode()})
    for left in Path(folder).glob(".*.*"):     # half-written files of processes that were killed
        if left.suffix[1:].isdigit() and not is_running(int(left.suffix[1:])):
            left.unlink()
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        if is_new and not any(Path(folder).iterdir()):
            Path(folder).rmdir()


def is_running(process):
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# --- the state -------------------------------------------------------------------------------------------------------

class Run:
    """Stage 3 of one training: its state in OUT/state.safetensors, its log in OUT/log.csv, its facts in OUT/run.json.

    The state holds the trained tensors, the optimizer's moments and the step. A batch is a function of the step, so the
    run goes on bit for bit. The state is written every --save-every minutes and at Ctrl-C or SIGTERM, and replaced as a
    whole. `kept` is a dict for JSON that is stored with it."""

    def __init__(self, config, clips):
        self.out, self.minutes = Path(config.out), config.save_every
        self.path = self.out / "state.safetensors"
        self.settings = {name: value for name, value in asdict(config).items() if name not in NOT_SETTINGS}
        texts = json.dumps([(clip.name, clip.text) for clip in clips])
        self.settings["clips"] = hashlib.sha256(texts.encode()).hexdigest()[:12]
        self.kept, self.stop, self.log_file = {"curve": [], "recent": []}, False, None
        self.began = self.saved = time.monotonic()
        if config.fresh:
            self.path.unlink(missing_ok=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        facts = {"command": sys.argv, "config": asdict(config), "versions": versions}
        write_json(self.out / "run.json", facts)

    def __enter__(self):
        def ask_to_stop(*_):
            self.stop = True

        self.handlers = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.log_file:
            self.log_file.close()

    def begin(self, trained, optimizer):
        """Put the stored state, if there is one, into the trained tensors and the optimizer -> the step to begin with.

        Raises CheckpointError if the state is damaged or of a run with other settings."""
        self.trained, self.optimizer, step = trained, optimizer, 0
        if self.path.is_file():
            try:
                tensors = load(self.path.read_bytes())
                facts = json.loads(bytes(tensors.pop("facts").tolist()))
                self.refuse_other(facts["settings"])
                states = [{key: tensors.pop(f"{i}.{key}") for key in STATE if f"{i}.{key}" in tensors}
                          for i in range(len(trained))]
                complete = all(set(state) in (set(STATE), {"param"}) for state in states)    # unused: no gradient yet
                if tensors or not complete or any(state["param"].shape != p.shape for state, p in zip(states, trained)):
                    raise ValueError("it has other tensors than this model")
            except CheckpointError:
                raise
            except (SafetensorError, ValueError, LookupError, TypeError) as error:
                raise CheckpointError(f"{self.path}: damaged, start anew with --fresh: {error}") from None
            with torch.no_grad():
                for parameter, state in zip(trained, states):
                    parameter.copy_(state.pop("param"))
                    if state:
                        moments = {key: state[key].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
                        optimizer.state[parameter] = {"step": state["step"], **moments}
            step, self.kept = facts["step"], facts["kept"]
            note(f"{self.path}: goes on after step {step}")
        self.begin_log(step)
        return step

    def refuse_other(self, settings):
        """Raises CheckpointError if the stored settings are not those of this run."""
        for name in self.settings.keys() | settings.keys():
            if self.settings.get(name) != settings.get(name):
                flag = "the training clips" if name == "clips" else f"--{name.replace('_', '-')}"
                then, now = settings.get(name), self.settings.get(name)
                raise CheckpointError(f"{self.path}: of a run with other settings: {flag} was {then!r}, is {now!r}; "
                                      "repeat that command, or start anew with --fresh")

    def after(self, step):
        """Call it with the number of steps done, after each. It saves when it is time, and ends a run that is to end."""
        if self.stop or time.monotonic() - self.saved > 60 * self.minutes:
            self.save(step)
        if self.stop:
            note(f"{self.path}: holds the state after step {step}; the same command goes on from there")
            raise KeyboardInterrupt

    def save(self, step):
        """Write the state after `step` steps."""
        facts = json.dumps({"step": step, "settings": self.settings, "kept": self.kept}).encode()
        tensors = {"facts": torch.tensor(list(facts), dtype=torch.uint8)}
        for i, parameter in enumerate(self.trained):
            tensors[f"{i}.param"] = parameter.detach().cpu().contiguous()
            for key, x in self.optimizer.state[parameter].items():
                tensors[f"{i}.{key}"] = x.cpu().contiguous()
        write_together({self.path: save(tensors)})
        self.saved = time.monotonic()

    def finish(self):
        """The model is on the disk: the state is not needed any more."""
        self.path.unlink(missing_ok=True)

    # --- the log

    def begin_log(self, step):
        """Keep the rows of an earlier part of this run, up to `step`."""
        path = self.out / "log.csv"
        rows = []
        if step and path.is_file():
            rows = [row for row in csv.reader(path.read_text().splitlines()[1:]) if row and int(row[0]) < step]
        self.log_file = path.open("w", newline="")
        self.log_rows = csv.writer(self.log_file)
        self.log_rows.writerow(["step", "task", "loss", "balance", "max_load", "router_entropy", "lr", "seconds"])
        self.log_rows.writerows(rows)

    def log(self, step, task, clips, loss, balance, llm):
        """A line of log.csv, every LOG_EVERY steps. max_load: the most tokens of an expert of a layer over the mean.

        Raises TrainingError if the loss is not a number."""
        if not math.isfinite(loss):
            names = ", ".join(clip.name for clip in clips)
            raise TrainingError(f"step {step}: the loss is {loss}; try a smaller --lr; the clips of this step: {names}")
        if step % LOG_EVERY:
            return
        loads, entropies = [1.0], [0.0]
        for layer in llm.layers:
            if layer.mome is not None and layer.mome.routed is not None:
                probs, chosen, _ = layer.mome.routed
                counts = torch.bincount(chosen.flatten(), minlength=probs.shape[1]).float()
                loads.append((counts.max() / counts.mean()).item())
                entropies.append(-(probs.mean(0) * probs.mean(0).clamp(min=1e-9).log()).sum().item())
        balance = float(torch.as_tensor(balance).detach())
        lr, seconds = self.optimizer.param_groups[0]["lr"], time.monotonic() - self.began
        numbers = f"{loss:.4f} {balance:.4f} {max(loads):.2f} {max(entropies):.3f} {lr:.2e} {seconds:.1f}"
        self.log_rows.writerow([step, task, *numbers.split()])
        self.log_file.flush()
