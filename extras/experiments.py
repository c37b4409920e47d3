"""The runs behind the tables of README.md and docs/: named lists of commands. Results go to extras/results.csv.

    python -m extras.experiments --list               every run: its command, and its time or "not run"
    python -m extras.experiments main                 do the runs of a list that are not in results.csv yet
    python -m extras.experiments main --seeds 0       only some seeds
    python -m extras.plot                             make the tables and pictures from results.csv

A run that was stopped goes on where it was (real/run.py). Stages 1 and 2 and encoded clips are shared in RUNS/cache.
Lists of real clips need their folders in --shared, and those of a real LLM and Whisper need --llm and --audio-encoder.

A row of results.csv is one WER of one run. Its columns:

    variant      what differs from the defaults
    train_rates  --rates
    rates        audio:video, or the rate of the one stream, or auto
    trained_params, active_params   of the adapter in the LLM, in all and for one token; projectors do not count
    tokens       that the LLM reads before the first word, mean over clips
    flops        of a clip of 3 s at these rates, encoders and LLM (extras/cost.py)
    seconds      of stage 3 in all processes of the run, of the rest in the last one, without what the cache had (rows
                 made before 28 November 2026: of the last process alone)
    split        test, or valid for what was still being chosen
"""
import argparse
import csv
import io
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from data import TASKS
from extras.baselines import METHODS, RATES
from extras.cost import costs, model_of, prompt_tokens
from extras.ideas import IDEAS
from real.files import read_json, write_whole
from real.script import in_one_line, run_script
from train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "extras/results.csv"
COLUMNS = ("method,variant,data,train_rates,rates,task,snr_db,seed,wer,words,trained_params,active_params,tokens,flops,"
           "seconds,split").split(",")
KEY = "method", "variant", "data", "train_rates", "seed", "split"        # tell runs apart
CLIP_SECONDS = 3                                                         # of the clip whose FLOPs are counted


@dataclass(frozen=True)
class Trial:
    """One run of train.py. {shared}, {llm}, {whisper} in its flags are what the command line says."""
    method: str
    rates: str
    variant: str = ""
    flags: str = ""
    data: str = "synthetic"
    seeds: tuple[int, ...] = (0, 1, 2)
    again: str = ""          # flags that test once more what the variant without "beam 5" has trained
    split: str = "test"      # valid: the validation clips after the last step; for what is still being chosen


def toy_lists():
    """The lists with the synthetic talker: three seeds each, of `ideas` one."""
    both = "2,4,8", "4,16x2,5"
    methods = [("mome", "", ""), ("lora", "", ""), ("lora-ms", "", ""), ("lora-mss", "", ""), ("projectors", "", ""),
               ("lora", "parameters of all experts", "--rank 23")]
    older = "--lr 4.5e-3"        # MoME's rate before a lower one was tried; these rows were made with it
    experts = [("no shared expert", "--n-shared 0"), ("2 shared experts", "--n-shared 2"),
               ("bottleneck 1", "--bottleneck 1"), ("bottleneck 48", "--bottleneck 48"),
               ("1 expert of 48", "--n-routed 0 --bottleneck 48"),
               ("beside feed-forward", "--place ffn"), ("beside the layer", "--place layer")]
    length = [("one set of rates in a step", "--rates-per-step 1"), ("8 clips in a step", "--batch-size 8"),
              ("3,400 steps", "--steps 3400")]                # asked of LoRA too
    causes = [("no balancing loss", "--balance 0"), ("lr 4.5e-3", older), ("lr 6e-3", "--lr 6e-3"),
              ("16 routed experts", "--n-routed 16")]
    valid = dict(flags="--valid-every 1700", split="valid", seeds=(0,))
    pairs = "2:2", "4:4", "8:8", "4:2", "4:5", "16:2", "16:5"
    return {
        "main": [Trial(method, both[0], *more) for method, *more in methods],
        "paper-rates": [Trial(method, both[1], *more) for method, *more in methods],
        "pairs": [Trial(method, pair) for method in ("lora", "mome") for pair in pairs],
        "sharing": [Trial("mome-routers", both[0]), Trial("mome-routers", both[0], "lr 4.5e-3", older),
                    Trial("mome", both[0], "projector per rate", f"--projector-per-rate {older}")],
        "experts": [Trial("mome", both[0], variant, f"{flags} {older}") for variant, flags in experts],
        "ideas": [Trial(method, both[0], **valid) for method in ("mome", *IDEAS)],     # none won, so one seed
        "causes": [*(Trial("mome", both[0], *more) for more in causes),
                   *(Trial(method, both[0], *more) for more in length for method in ("mome", "lora")),
                   *(Trial(method, both[0], f"one set of rates in a step, lr {lr}", f"--rates-per-step 1 --lr {lr}")
                     for method, lr in (("mome", "2e-3"), ("lora", "3e-3"), ("lora", "2e-3")))]}


def real_lists():
    """The lists with real voices and faces, and the list `gpu`: one seed each, of one run two."""
    frozen = "--tasks asr --llm {llm} --audio-encoder {whisper}"
    methods, one = ("mome", "lora", "projectors"), dict(seeds=(0,))
    digits = "--data {shared}/digits"
    an4 = f"--data {{shared}}/an4 {frozen} --snr clean --rates-per-step 1 --copies"
    both = f"--data {{runs}}/open {frozen} --snr clean --rates-per-step 1 --copies 1 --valid-every 500 --steps"
    gpu = "--device cuda"
    beam_5 = "--eval-only --beam 5"
    return {
        "digits": [Trial("mome", "4,8,16", "stand-ins", f"{digits} --tasks asr", "digits", **one),
                   *(Trial(method, "4,8,16", "", f"{digits} {frozen} --valid-every 100", "digits", **one)
                     for method in ("mome", "projectors"))],
        "an4": [*(Trial(method, "4,8,16", "", f"{an4} 2 --steps 3000", "an4", **one) for method in methods),
                Trial("mome", "4,8,16", "beam 5", f"{an4} 2 --steps 3000", "an4", again=beam_5, **one),
                Trial("mome", "4,8,16", "coarse rates more often",
                      f"{an4} 2 --steps 3000 --rates-per-step coarse --valid-every 1500", "an4", seeds=(0, 1)),
                Trial("mome", "4,8,16", "2,200 steps", f"{an4} 2 --steps 2200", "an4", **one),
                Trial("mome", "4,8,16", "5 copies", f"{an4} 5 --steps 3000", "an4", **one)],
        "open": [Trial(method, "4,8,16", variant, f"{both} {steps}", "librispeech", again=again, **one)
                 for steps, variant, again in ((3000, "3,000 steps", ""), (3000, "3,000 steps, beam 5", beam_5),
                                               (6000, "", ""), (6000, "beam 5", beam_5))
                 for method in ("mome", "projectors")],
        "grid": [Trial(method, "2,4,8", "", "--data {shared}/grid_s1", "grid_s1", **one)
                 for method in ("mome", "projectors")],
        "gpu": [Trial("mome", "2,4,8", "on a GPU", gpu, **one),
                Trial("mome", "4,8,16", "on a GPU", f"{an4} 2 --steps 3000 {gpu}", "an4", **one),
                Trial("mome", "4,8,16", "on a GPU, compiled", f"{an4} 2 --steps 3000 {gpu} --compile", "an4", **one)]}


LISTS = toy_lists() | real_lists()


def name_of(trial, seed):
    """The name of a run's folder."""
    split, variant = trial.split.removeprefix("test"), trial.variant
    if trial.again:
        variant = variant.removesuffix("beam 5").removesuffix(", ")
    words = [trial.data, split, trial.method, trial.rates.replace(":", "-"), variant, f"seed {seed}"]
    return "_".join(filter(None, words)).replace(" ", "-").replace(",", ".")


def command(trial, seed, places):
    """The command of a run, as a list."""
    out = f"{places['runs']}/{name_of(trial, seed)}"
    flags = [word.format(**places) for word in shlex.split(f"{trial.flags} {trial.again}")]
    return ["python", "train.py", "--rates", trial.rates, "--method", trial.method, "--seed", str(seed), *flags,
            "--cache", f"{places['runs']}/cache", "--out", out]


def read_results(path):
    """results.csv -> its rows, each a dict of strings."""
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8")))) if path.is_file() else []


def key_of(trial, seed):
    """What tells the rows of this run from those of others."""
    return trial.method, trial.variant, trial.data, trial.rates, str(seed), trial.split


def done(path):
    """{key of a run: the seconds that it took}."""
    return {tuple(row[name] for name in KEY): float(row["seconds"]) for row in read_results(path)}


@lru_cache
def flops_at(config, rates):
    """FLOPs of a clip of CLIP_SECONDS with the model of a TrainConfig at these rates, ((stream, rate), ...)."""
    model, rates = model_of(config), dict(rates)
    RATES.set(rates)
    cost = costs(model, CLIP_SECONDS, rates, 1, prompt_tokens(config))
    return cost["encoder_flops"] + cost["llm_flops"]


def rows_of_run(trial, seed, out):
    """The rows of results.csv of a finished run, from its metrics.json and config.json, or from curve.json."""
    metrics, counts = read_json(Path(out, "metrics.json")), read_json(Path(out, "config.json"))["parameters"]
    config, rows = TrainConfig(**metrics["config"]), []
    key = dict(zip(KEY, key_of(trial, seed)))
    is_test = trial.split == "test"
    seconds = dict(metrics["seconds"])
    if "stage 3" in seconds:                                        # log.csv counts on where a run was stopped
        logged = Path(out, "log.csv").read_text("utf-8").splitlines()[-1].rpartition(",")[2]
        seconds["stage 3"] = max(seconds["stage 3"], float(logged))
    for row in metrics["rows"] + metrics["auto"] if is_test else read_json(Path(out, "curve.json"))[-1]["rows"]:
        rates = {"audio": row["audio_rate"], "video": row["video_rate"]}
        rates = {stream: rates[stream] for stream in TASKS[row["task"]]}
        is_auto = row["audio_rate"] == "auto"
        rows.append(key | {
            "rates": "auto" if is_auto else ":".join(map(str, rates.values())), "task": row["task"],
            "snr_db": "clean" if row["snr_db"] is None else f"{row['snr_db']:g}",
            "wer": f"{row['wer']:.5f}", "words": row["words"], "trained_params": counts["adapter"],
            "active_params": counts["active"], "tokens": f"{row['tokens']:.1f}",
            "flops": "" if is_auto else f"{flops_at(config, tuple(rates.items())):.3g}",
            "seconds": f"{sum(seconds.values()):.0f}"})
    return rows


def append(rows, path):
    """Add rows to results.csv, which is written as a whole."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(read_results(path) + rows)
    write_whole(path, lambda temporary: temporary.write_text(text.getvalue(), "utf-8"))


def link_open(shared, folder):
    """The folder of list `open`: two corpora to train, the other talkers of LibriSpeech to test, as links."""
    for split, corpus in (("train", "librispeech"), ("train", "speechocean"), ("test", "librispeech")):
        link, source = Path(folder, split, corpus), Path(shared, corpus, split).resolve()
        if not source.is_dir():
            raise FileNotFoundError(f"{source}: no such folder; name the folder of the corpora by --shared")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(source)


def show(places, results):
    """Print each run: how many of its seeds are done, the minutes of one, and the command of its first seed."""
    known = done(results)
    for name, trials in LISTS.items():
        print(f"\n{name}")
        for trial in trials:
            seconds = [known[key_of(trial, seed)] for seed in trial.seeds if key_of(trial, seed) in known]
            minutes = f"{sum(seconds) / len(seconds) / 60:.0f} min" if seconds else "not run"
            text = shlex.join(command(trial, trial.seeds[0], places))
            print(f"  {len(seconds)} of {len(trial.seeds)} seeds  {minutes:>7}  {text}")


@in_one_line("experiments.py", OSError)
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", nargs="*", metavar="LIST", help=", ".join(LISTS))
    parser.add_argument("--list", action="store_true", help="print every run, its command and its time")
    parser.add_argument("--seeds", help="only these, like 0,1")
    parser.add_argument("--methods", help=f"only these, of {', '.join(METHODS)}")
    parser.add_argument("--runs", default="runs", help="folder of the runs (default %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table to add to (extras/results.csv)")
    parser.add_argument("--shared", default="../shared", help="folder of the real clips (default %(default)s)")
    parser.add_argument("--llm", default="smollm2", help="folder of a Llama (default %(default)s)")
    parser.add_argument("--audio-encoder", default="whisper-base", help="folder of a Whisper (default %(default)s)")
    args = parser.parse_args(argv)
    if unknown := set(args.lists) - set(LISTS):
        parser.error(f"no list {', '.join(sorted(unknown))}; there are {', '.join(LISTS)}")
    places = {"runs": args.runs, "shared": args.shared, "llm": args.llm, "whisper": args.audio_encoder}
    if args.list or not args.lists:
        show(places, args.results)
        return 0
    runs = [(trial, seed) for name in args.lists for seed in range(3) for trial in LISTS[name] if seed in trial.seeds]
    known = {str(seed) for _, seed in runs}, {trial.method for trial, _ in runs}
    seeds, methods = (set(text.split(",")) if text else every for text, every in zip((args.seeds, args.methods), known))
    if unknown := (seeds | methods) - set.union(*known):
        parser.error(f"no run of {', '.join(args.lists)} has {', '.join(sorted(unknown))}")
    wanted = [(trial, seed) for trial, seed in runs if str(seed) in seeds and trial.method in methods]
    if not wanted:
        parser.error(f"no run of {', '.join(args.lists)} has these seeds and methods together")
    if "open" in args.lists:
        link_open(args.shared, Path(args.runs, "open"))
    for number, (trial, seed) in enumerate(wanted, 1):
        if key_of(trial, seed) in done(args.results):
            continue
        run = command(trial, seed, places)
        print(f"\nrun {number} of {len(wanted)}: {shlex.join(run)}", flush=True)
        handler = signal.signal(signal.SIGINT, lambda *_: None)      # Ctrl-C reaches train.py, which writes its state
        code = subprocess.run([sys.executable, *run[1:]]).returncode
        signal.signal(signal.SIGINT, handler)
        if code:
            print(f"experiments.py: that command ended with {code}; the same call goes on from here", file=sys.stderr)
            return code
        append(rows_of_run(trial, seed, run[-1]), args.results)
    return 0


if __name__ == "__main__":
    run_script(main)
