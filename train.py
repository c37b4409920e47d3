"""Train MoME on frozen encoders and a frozen LLM. Then test it at every rate and print the table.

    python train.py --rates 2,4,8                                         the main job: a synthetic talker
    python train.py --data DIR --tasks asr --rates 4,8,16                 your own clips
    python train.py --llm DIR --audio-encoder DIR --data DIR --tasks asr  a real LLM and a real encoder
    python train.py --method lora                                         a baseline (extras/baselines.py)
    python train.py --preset paper --dry-run                              what the paper's model costs

    stage 1  the two encoders   small stand-ins (toy/pretrain.py), or --audio-encoder, --video-encoder
    stage 2  the Llama          a small stand-in, or --llm
    stage 3  the paper          encoders and Llama frozen; projectors, markers and MoME learn from all rates

--cache keeps stages 1 and 2 and real encoders' outputs. No stage meets the toy's test sentences or talkers.
"""
from real.script import in_one_line, run_script  # before torch: Ctrl-C then ends quietly at any time
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from data import TASKS, ClipError, load_tokenizer, padded, parse_rates, rows_of
from data import task_rates, task_streams, to_device, to_inputs
from extras.auto import auto_plan, calibrate
from extras.baselines import METHODS, add_adapter
from mome import PLACES, LlamaConfig
from real.checkpoint import EXPERTS, save_model
from real.clips import limits
from real.files import ERRORS, write_json
from real.folders import read_drawn
from real.options import flag, parse_options, parse_snrs
from real.report import Stopwatch, parameter_line, table
from real.run import Run, choose_device, first_alone, own_folder, prefetched, prepare_layers, processes
from real.run import split_step, threads
from real.setup import check_config, load_for_test, set_up, write_samples
from sample import evaluate, fixed_plan

TASK_SHARE = {"avsr": 0.3, "asr": 0.4, "vsr": 0.3}  # of steps; one model for all tasks is not in the paper
PRESETS = {"": {}, "paper": dict(
    rates="4,16x2,5", tasks="avsr", n_routed=23, top_k=4, n_shared=1, bottleneck=12,
    rank=48, lr=1e-3, weight_decay=0.1, epochs=10, beam=15)}


# --- configuration: one dataclass owns every default, and the flags are made from it ----------------------
@dataclass(frozen=True)
class TrainConfig:
    rates: str = flag("2,4,8", "compression rates: '2,4,8' both streams at each; "
                               "'4:2,16:5' audio:video pairs; '4,16x2,5' every pair")
    out: str = flag("out", "folder for the model, its metrics and samples")
    tasks: str = flag("avsr,asr,vsr", "what to train and test: audio-visual, audio-only, video-only")
    method: str = flag("mome", "what is trained in the LLM, see extras/baselines.py", choices=METHODS)
    data: str = flag("", "folder of clips with transcripts, see docs/real.md (default: the synthetic talker)")
    max_bad: str = flag("1%", "share of the clips of --data that may be bad")
    disjoint: bool = flag(False, "leave out training clips that say the sentence of a test clip")
    box: str = flag("", "x,y,w,h of the mouth (default: small squares are mouths, else searched)")
    seed: int = flag(0, "seed of everything random", least=0)
    steps: int = flag(0, "steps of stage 3; 0: by --epochs, else 1700, --data 3500, --llm 700", least=0)
    epochs: float = flag(0., "length of stage 3 in passes over the training clips, if --steps is 0", least=0)
    snr: str = flag("clean,0,-5", "noise in the test: dB of speech over babble")
    eval_only: bool = flag(False, "test the model in --out, train nothing")
    device: str = flag("auto", "auto takes a GPU if there is one", choices=("auto", "cpu", "cuda"))
    cache: str = flag("", "folder for stages 1 and 2 (default OUT/cache); runs may share it")
    preset: str = flag("", "paper: its rates, experts and recipe", choices=PRESETS)
    dry_run: bool = flag(False, "print parameters, tokens, FLOPs and memory; needs no weights")
    llm: str = flag("", "folder of a Llama in HF's layout")
    audio_encoder: str = flag("", "folder of a Whisper in HF's layout")
    video_encoder: str = flag("", "file of an AV-HuBERT")
    pad_audio: bool = flag(False, "pad clips to 30 s for Whisper, as it was trained; slow")
    copies: int = flag(5, "augmented copies of each training clip that real encoders read", least=0)
    n_routed: int = flag(8, "routed experts in each layer", least=0)
    top_k: int = flag(LlamaConfig.top_k, "routed experts that a token is sent to", least=1)
    n_shared: int = flag(1, "experts that every token passes through", least=0)
    bottleneck: int = flag(LlamaConfig.bottleneck, "width of an expert", least=1)
    place: str = flag(LlamaConfig.place, "MoME stands beside attention, feed-forward, layer", choices=PLACES)
    balance: float = flag(0.01, "weight of the balancing loss", least=0)
    rank: int = flag(0, "rank of LoRA; 0: as many parameters as MoME has active", least=0)
    projector_per_rate: bool = flag(False, "a projector for each rate of a stream")
    batch_size: int = flag(4, "clips in a step of stage 3, of all processes of torchrun together", least=1)
    batch_seconds: float = flag(120., "seconds of clips that a process computes at a time", least=1)
    accumulate: int = flag(1, "parts in which a process computes its clips of a step; saves memory", least=1)
    rates_per_step: str = flag("all", "sets of rates in a step; 1: drawn at random; "
                               "coarse: 1, and rate 16 twice as often as 4", choices=("all", "1", "coarse"))
    checkpointing: bool = flag(False, "compute activations of the LLM twice, to save memory")
    compile: bool = flag(False, "compile the layers of the LLM by torch.compile")
    lr: float = flag(0., "peak learning rate; 0: 3e-3, lora 4.5e-3, projectors 2e-3; --data 1.5e-3", least=0)
    weight_decay: float = flag(0.1, "weight decay of stage 3", least=0)
    clips: int = flag(3000, "training clips of the synthetic talker", least=1)
    valid_clips: int = flag(200, "talker clips that set the threshold of sample.py --rate auto", least=1)
    test_clips: int = flag(500, "test clips of the talker", least=1)
    audio_steps: int = flag(650, "steps of stage 1, audio encoder", least=1)
    video_steps: int = flag(600, "steps of stage 1, video encoder", least=1)
    ctc_steps: int = flag(1500, "further steps of stage 1 on the clips of --data, each encoder", least=1)
    llm_steps: int = flag(1000, "steps of stage 2", least=1)
    projector_dim: int = flag(0, "hidden width of the projectors; 0: the LLM's width, at least 256", least=0)
    valid_every: int = flag(0, "steps between tests on held-out clips; 0: no test, no clip held out", least=0)
    save_every: float = flag(5., "minutes between states of stage 3 in --out, from which it goes on", least=0)
    fresh: bool = flag(False, "start anew, although --out has the state of a run that was stopped")
    beam: int = flag(1, "beam width in the test; 1 is greedy", least=1)

    @property
    def peak_lr(self):
        return self.lr or (1.5e-3 if self.data else METHODS[self.method])

    @property
    def experts(self):
        """The fields of LlamaConfig that describe MoME."""
        none = {} if self.method.startswith("mome") else {"n_routed": 0, "n_shared": 0}
        return {name: getattr(self, name) for name in EXPERTS} | none

    @property
    def real_paths(self):
        """{part: path} of the real frozen parts that the tasks use."""
        streams = {"llm"} | task_streams(self.tasks.split(","))
        paths = {"llm": self.llm, "audio": self.audio_encoder, "video": self.video_encoder}
        return {part: path for part, path in paths.items() if path and part in streams}


# --- stage 3: the paper -----------------------------------------------------------------------------------
def encode_parts(model, clips, shares, task, rng, voices, features):
    """Augment clips and encode them once for all rates. Yields {stream: (tokens (B, T, D), lengths (B,))} for
    each of `shares`, see real.run.split_step. features: real.features.Features of real encoders, or None."""
    streams = TASKS[task]
    of_clips = features.rows(clips, streams, rng) if features else rows_of(clips, streams, rng, voices)
    for _, rows in shares:
        of_part = {stream: [xs[row] for row in rows] for stream, xs in of_clips.items()}
        inputs = to_device(padded(of_part) if features else to_inputs(of_part), model.device)
        yield inputs if features else model.encode(inputs)


def learning_rate(step, steps, peak):
    """A linear warm-up (not in the paper), then half a cosine from `peak` to 5 % of it."""
    warmup = (step + 1) / min(30, steps // 10 + 1)
    cosine = 0.525 + 0.475 * math.cos(math.pi * step / steps)
    return peak * min(warmup, cosine)


def train_mome(model, clips, tasks, pairs, tokenizer, config, run, features=None, check=None):
    """Train projectors, markers and MoME on all rates at once. Encoders and Llama stay frozen.
    pairs: see data.parse_rates. run: real.run.Run. check(step, mean loss) runs every --valid-every steps."""
    seed = config.seed
    by_epochs = math.ceil(config.epochs * len(clips) / config.batch_size)
    steps = config.steps or by_epochs or (700 if config.llm else 3500 if config.data else 1700)
    usable = {task: [clip for clip in clips if set(TASKS[task]) <= set(clip.streams)] for task in tasks}
    voices = [clip for clip in clips if clip.log_power is not None]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=config.weight_decay)

    def batch_of(step):
        """A function of (seed, step) -> task, clips, sets of rates, and the parts of this process. A part is
        (share of all tokens to predict, transcripts, {stream: (tokens, lengths)})."""
        rng = random.Random(f"{seed} {step}")
        task = rng.choices(tasks, [TASK_SHARE[task] for task in tasks])[0]
        chosen = read_drawn(usable[task], TASKS[task], config.batch_size, seed, step)
        rate_sets = task_rates(task, pairs)
        if config.rates_per_step != "all":
            power = 0.5 if config.rates_per_step == "coarse" else 0             # coarse: not in the paper
            weights = [max(rates.values()) ** power for rates in rate_sets]
            rate_sets = random.Random(f"{seed} {step} rates").choices(rate_sets, weights)
        transcripts = [tokenizer.encode(f" {clip.text}") for clip in chosen]
        shares = split_step(chosen, transcripts, config)
        encoded = encode_parts(model, chosen, shares, task, rng, voices, features)
        parts = [(share, [transcripts[row] for row in rows], x) for (share, rows), x in zip(shares, encoded)]
        return task, chosen, rate_sets, parts

    first = run.begin(trained, optimizer)
    recent = run.kept["recent"]                             # losses since the last check
    progress = tqdm(prefetched(batch_of, first, steps), f"stage 3, {config.method}", steps, initial=first)
    for step, drawn in enumerate(progress, first):
        _, _, rate_sets, parts = drawn
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, config.peak_lr)
        total = 0
        for share, transcripts, encoded in parts:           # one or more, see real.run.split_step
            for rates in rate_sets:                         # one backward each: memory for one set of rates
                cross_entropy, balance = model.loss(encoded, transcripts, rates)
                loss = (share * cross_entropy + config.balance * balance / len(parts)) / len(rate_sets)
                loss.backward()
                total += loss.item()
        total, balance = run.sum_up(total, balance)         # over processes; balance: the last set's
        run.log(step, drawn, total, balance, model.llm)
        nn.utils.clip_grad_norm_(trained, 1.0)              # not in the paper
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{total:.3f}", refresh=False)
        if config.valid_every:
            recent.append(total)
            if (step + 1) % config.valid_every == 0:
                check(step + 1, sum(recent) / len(recent))
                recent.clear()
        run.after(step + 1)
    run.save(steps)


# --- main -------------------------------------------------------------------------------------------------
def train(config, tasks, pairs, device, watch):
    """Stages 1 to 3 -> model, the dict of config.json, test clips. Writes the checkpoint and samples."""
    out = Path(config.out)
    with first_alone():
        model, clips, tokenizer, origin, features = set_up(config, tasks, device, watch)
    torch.manual_seed(config.seed)
    saved = add_adapter(model, config, tasks, pairs) | limits(clips["train"])
    print(parameter_line(saved))
    run = Run(config, clips["train"], origin["frozen"])
    prepare_layers(model.llm.layers, config)

    def test_held_out(step, loss):
        rows = evaluate(model, clips["valid"], fixed_plan(tasks, pairs), [None], tokenizer)
        rows = [row | {"split": "valid"} for row in rows]
        run.kept["curve"].append({"step": step, "loss": loss, "rows": rows})
        tqdm.write(f"step {step}: loss {loss:.3f}\n{table(rows)}")
        model.train()

    model.train()
    with run, threads(1 if features else 0.5):              # cached features leave all cores to the step
        train_mome(model, clips["train"], tasks, pairs, tokenizer, config, run, features, test_held_out)
    watch.lap("stage 3")
    if "valid" in clips:
        saved["auto"] = calibrate(model.eval(), clips["valid"], tasks, pairs, tokenizer, config.beam)
        watch.lap("calibration")
    save_model(model, out, **origin, **saved)
    run.finish()
    write_samples(config, clips["test"], out / "samples")
    return model, saved | {"paths": config.real_paths}, clips["test"]


def train_and_test(config):
    """Train, or load for --eval-only; then test, print the table and write metrics.json."""
    if config.dry_run:
        from extras.cost import report
        report(config)
        return
    out, watch = Path(config.out), Stopwatch()
    tasks = list(dict.fromkeys(config.tasks.split(",")))
    pairs = parse_rates(config.rates)
    device = choose_device(config.device)
    if config.eval_only:
        model, saved, clips, config = load_for_test(config, tasks, device)
        watch.lap("clips")
    else:
        with own_folder(out):
            model, saved, clips = train(config, tasks, pairs, device, watch)
    tokenizer = load_tokenizer(saved["paths"].get("llm", out))
    plan = fixed_plan(tasks, pairs) | auto_plan(tasks, pairs, saved)
    rows = evaluate(model, clips, plan, parse_snrs(config.snr), tokenizer, config.beam)
    watch.lap("test")
    print(table(rows), watch, sep="\n")
    write_json(out / "metrics.json", {
        "rows": [row for row in rows if row["audio_rate"] != "auto"],
        "auto": [row for row in rows if row["audio_rate"] == "auto"],
        "seconds": watch, "config": asdict(config)})


@in_one_line("train.py", *ERRORS, ClipError)
def main(argv=None):
    config = parse_options(TrainConfig, argv, __doc__, "train.py [--rates 2,4,8] ...", PRESETS, check_config)
    with threads(0.5), processes(config.device):            # two things run side by side in every stage
        train_and_test(config)


if __name__ == "__main__":
    run_script(main)
