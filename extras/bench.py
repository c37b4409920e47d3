"""What MoME and decoding cost, as ratios of two ways to do the same thing.

    python -m extras.bench                    all sections, about a quarter of an hour on 2 cores
    python -m extras.bench --quick            smaller shapes, under a minute
    python -m extras.bench --plot paths.png   a picture: which path of MoME is fastest at which width of the experts
    python -m extras.bench --out DIR          also the seconds of the training run in DIR, by stage

The two ways are timed in turn, in one process on one machine. Each row gives the median over the pairs of the ratio of
their times (or memory): above 1, the second way is better. Rows of `paper` and `main` give seconds. On a GPU the same is
measured in bf16 by CUDA events. Some rows compare with transformers (requirements-test.txt) or with peft. peft, and
matplotlib for --plot, are in extras/requirements.txt.
"""
import argparse
import copy
import ctypes
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import parse_rates, task_rates
from extras.baselines import TARGETS, add_lora, lora_rank
from extras.cost import OUTPUT_TOKENS_PER_SECOND, costs, encoder_inputs, model_of, prompt_tokens
from mome import Llama, LlamaConfig, MoME
from real.run import prepare_layers
from real.script import run_script
from real.weights import speed_up
from sample import KVCache, generate
from train import PRESETS, TrainConfig

LLAMA_1B = dict(dim=2048, n_heads=32, n_kv_heads=8, ffn_dim=8192, rope_theta=500_000.0)   # Llama 3.2 1B's layers
SMOLLM2 = dict(vocab_size=49152, dim=576, n_layers=30, n_heads=9, n_kv_heads=3, ffn_dim=1536, rope_theta=100_000.0)
MOME_23_4 = dict(n_routed=23, top_k=4, n_shared=1, bottleneck=12)                         # the paper's experts


# --- measuring -------------------------------------------------------------------------------------------------------

@dataclass
class Bench:
    device: torch.device
    dtype: torch.dtype
    pairs: int                    # measured pairs of each row
    quick: bool = False
    compile: bool = False
    out: str = "out"
    table: object = sys.stdout    # the file that rows are printed to

    def seconds(self, work):
        """Seconds that the call work() takes."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def compare(self, first, second):
        """Time two calls in turn -> (median seconds of `first`, of `second`, median of first / second)."""
        for work in (first, second, first, second):  # a warm-up
            work()
        times = []
        for i in range(self.pairs):  # each of the two goes first in every other pair
            pair = [self.seconds(work) for work in ((first, second) if i % 2 else (second, first))]
            times.append(pair if i % 2 else pair[::-1])
        ones, twos = zip(*times)
        return statistics.median(ones), statistics.median(twos), statistics.median(a / b for a, b in times)

    def peak_memory(self, work):
        """Bytes that work() takes at most beyond those in use before: on a GPU or by Linux's count, else None."""
        work()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            return torch.cuda.max_memory_allocated() - before
        try:
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory; work() would reuse it without a trace
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is in use now
            before = process_memory("VmRSS")
            work()
            return process_memory("VmHWM") - before
        except (OSError, AttributeError):
            return None

    def print_row(self, section, case, text):
        print(f"{section:9} {case:51} {text}", file=self.table, flush=True)

    def row(self, section, case, first, second, names):
        """Compare two calls, print the row and return it as a dict."""
        one, two, ratio = self.compare(first, second)
        self.print_row(section, case, f"{names[0]:>11} {1e3 * one:9.2f} ms  "
                                      f"{names[1]:>14} {1e3 * two:9.2f} ms {ratio:7.3f}x")
        return {"section": section, "what": case, "first": names[0], "second": names[1], "first_seconds": one,
                "second_seconds": two, "ratio": ratio, "pairs": self.pairs}

    def missing(self, section, case, reason):
        """Print and return the row of a case that cannot be measured."""
        self.print_row(section, case, reason)
        return {"section": section, "what": case, "missing": reason}


def process_memory(name):
    """Bytes in a field of /proc/self/status: VmRSS is the memory in use, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def randomised(mome):
    """The same MoME with weights that are not zero, so that no way can skip them."""
    for p in (mome.up, mome.up_bias, mome.down_bias):
        nn.init.normal_(p, std=0.02)
    return mome


def step_of(module, x, backward):
    """A function that runs forward, or forward and backward with gradients for x and all parameters."""
    upstream = torch.randn_like(x)

    def forward():
        with torch.no_grad():
            module(x)

    def both():
        for p in module.parameters():
            p.grad = None
        module(x).backward(upstream)
    return both if backward else forward


# --- sections --------------------------------------------------------------------------------------------------------

def layer_paths(bench):
    """One MoME: `auto` (its choice in brackets) and `grouped` against `loop`, and Mixtral's experts against `auto`.

    The shapes are the paper's with and without the shared expert, and one so wide that moving tokens pays."""
    shapes = [(2048, 1, 12), (3072, 1, 12), (2048, 0, 12), (3072, 0, 12), (512, 1, 192)]
    token_counts = (1, 15, 256, 2048)
    if bench.quick:
        shapes, token_counts = [(512, 1, 12), (256, 1, 96)], (15, 256)
    for D, n_shared, R in shapes:
        mome = randomised(MoME(D, 23, 4, n_shared, R)).to(bench.device, bench.dtype)
        peer, reason = mixtral(D, 23, 4, R, bench)
        peer_name = "Mixtral" if whole_rows(R, bench.dtype) else "Mixtral, loop"
        for n_tokens in token_counts:
            x = torch.randn(1, n_tokens, D, device=bench.device, dtype=bench.dtype, requires_grad=True)
            for backward in (False, True):
                direction = "forward + backward" if backward else "forward"
                case = f"{D}, 23/4+{n_shared} of {R}, {n_tokens} tokens, {direction}"
                step = step_of(mome, x, backward)

                def path(name):
                    def work():
                        mome.path = name
                        step()
                    return work
                auto = f"auto ({mome.best_path(x[0])})"
                yield bench.row("layer", case, path("loop"), path("auto"), ("loop", auto))
                yield bench.row("layer", case, path("loop"), path("grouped"), ("loop", "grouped"))
                if peer is not None:
                    yield bench.row("layer", case, step_of(peer, x, backward), path("auto"), (peer_name, auto))
        if peer is None:
            yield bench.missing("layer", "Mixtral's experts as a peer", reason)


def whole_rows(width, dtype):
    """Whether rows of so many numbers are whole 16 bytes, as grouped_mm wants them. Else Mixtral loops over its experts."""
    return width * dtype.itemsize % 16 == 0


def mixtral(dim, n_experts, top_k, width, bench):
    """(Mixtral's sparse block, None) or (None, why there is none).

    Its experts have three matrices and SwiGLU; ours have two and GELU."""
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError as error:
        return None, f"transformers 5 is not installed ({error})"
    config = MixtralConfig(hidden_size=dim, intermediate_size=width, num_local_experts=n_experts,
                           num_experts_per_tok=top_k)
    config._experts_implementation = "grouped_mm" if whole_rows(width, bench.dtype) else "eager"  # as in a whole Mixtral
    block = MixtralSparseMoeBlock(config)
    for p in block.parameters():
        nn.init.normal_(p, std=0.02)
    return block.to(bench.device, bench.dtype), None


def overhead(bench):
    """What MoME adds to frozen layers of Llama 3.2 1B, in a prefix and in one step of decoding with a cache."""
    llm = speed_up(Llama(LlamaConfig(vocab_size=64, n_layers=1 if bench.quick else 4, **LLAMA_1B, **MOME_23_4)))
    llm.requires_grad_(False).to(bench.device, bench.dtype)
    for layer in llm.layers:
        randomised(layer.mome)
    hidden_states = torch.compile(llm.hidden_states) if bench.compile else llm.hidden_states

    def embeddings(*shape):
        return torch.randn(*shape, LLAMA_1B["dim"], device=bench.device, dtype=bench.dtype)

    def with_place(place, work):
        def timed():
            for layer in llm.layers:
                layer.place = place
            with torch.no_grad():
                work()
        return timed

    def compare(case, work):
        case = f"{len(llm.layers)} layers, {case}{', compiled' if bench.compile else ''}"
        with_mome, without = (with_place(place, work) for place in ("attn", None))
        return bench.row("overhead", case, with_mome, without, ("with MoME", "without"))

    lengths = [64] if bench.quick else [256, 4096] if bench.device.type == "cuda" else [256]
    for n_tokens in lengths:
        x = embeddings(1, n_tokens)
        yield compare(f"prefix of {n_tokens}", lambda: hidden_states(x))
    for batch in (1, 15):
        cache = KVCache(llm.config, torch.full((batch,), 128, device=bench.device), 136, embeddings(1))
        with torch.no_grad():
            llm.hidden_states(embeddings(batch, 128), cache=cache)
        x, positions = embeddings(batch, 1), torch.full((batch, 1, 1), 128, device=bench.device)

        def step():
            cache.filled = 128  # forget the token of the last call
            hidden_states(x, positions=positions, cache=cache)
        yield compare(f"a step of decoding, batch {batch}", step)


def decoding(bench):
    """Greedy decoding against the `generate` of transformers with each of its caches: same weights, same tokens."""
    sizes, prefix, n_new = (SMOLLM2 | {"n_layers": 2}, 32, 8) if bench.quick else (SMOLLM2, 128, 64)
    case = f"SmolLM2-135M's shapes{', 2 layers' if bench.quick else ''}, {n_new} tokens after {prefix}"
    llm = speed_up(Llama(LlamaConfig(**sizes))).to(bench.device, bench.dtype)
    try:
        import transformers
    except ImportError as error:
        yield bench.missing("decoding", case, f"transformers is not installed ({error})")
        return
    peer = transformer(llm, transformers, bench)
    ids = torch.randint(sizes["vocab_size"], (1, prefix), device=bench.device)
    tokens = {}

    def ours():
        tokens["ours"] = generate(llm, [llm.embed_tokens(ids[0]).detach()], eos=-1, max_tokens=n_new)[0][0]

    for cache in ("dynamic", "static"):
        def theirs():
            output = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, do_sample=False,
                                   cache_implementation=cache)
            tokens["theirs"] = output[0, prefix:].tolist()
        row = bench.row("decoding", case, theirs, ours, (f"HF, {cache}", "ours"))
        same = tokens["ours"] == tokens["theirs"]
        if not same:
            bench.print_row("decoding", "", "their tokens differ")
        yield row | {"same_tokens": same, "tokens_per_second": n_new / row["second_seconds"]}


def training(bench):
    """Forward + backward of a step against transformers with peft's LoRA: same frozen weights, inputs and labels.

    All gradients are computed that training needs: of the adapter, and of the inputs, where the projectors are. LoRA has
    as many parameters as MoME has active ones. transformers computes logits at all positions."""
    sizes, B, T, n_labels = (SMOLLM2 | {"n_layers": 2}, 2, 40, 8) if bench.quick else (SMOLLM2, 4, 160, 16)
    case = f"SmolLM2-135M's shapes{', 2 layers' if bench.quick else ''}, {B} x {T} tokens, {n_labels} labels each"
    try:
        import peft
        import transformers
    except ImportError as error:
        yield bench.missing("training", case, f"peft or transformers is not installed ({error})")
        return
    plain = Llama(LlamaConfig(**sizes)).to(bench.device, bench.dtype).requires_grad_(False)
    peer = transformer(plain, transformers, bench)
    with_mome, with_lora = copy.deepcopy(plain), copy.deepcopy(plain)
    with_mome.add_mome(**MOME_23_4)
    for layer in with_mome.layers:
        randomised(layer.mome).to(bench.device)
    rank = lora_rank(plain.config, LlamaConfig(**sizes | MOME_23_4))
    add_lora(with_lora, rank)
    peer = peft.get_peft_model(peer, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)))
    x = 0.02 * torch.randn(B, T - n_labels + 1, plain.config.dim, device=bench.device, dtype=bench.dtype)
    x.requires_grad_()
    labels = torch.randint(plain.config.vocab_size, (B, n_labels), device=bench.device)
    losses = {}

    def ours(llm):
        def work():
            loss = llm.transcript_loss(list(x), list(labels))
            loss.backward()
            losses[llm] = loss.item()
        return work

    def theirs():
        table = peer.get_input_embeddings()
        inputs = torch.cat([x, table(labels[:, :-1])], 1)
        targets = F.pad(labels, (T - n_labels, 0), value=-100)
        loss = peer(inputs_embeds=inputs, labels=targets).loss
        loss.backward()
        losses["theirs"] = loss.item()

    names = {"LoRA": with_lora, "MoME-23/4+1": with_mome}
    peaks = {name: bench.peak_memory(work) for name, work in [("peft", theirs)] + [(n, ours(m)) for n, m in names.items()]}
    for name, llm in names.items():
        row = bench.row("training", f"{case}, {name}", theirs, ours(llm), ("peft's LoRA", f"ours, {name}"))
        if None not in peaks.values():
            row |= {"first_bytes": peaks["peft"], "second_bytes": peaks[name]}
            bench.print_row("training", "  peak memory beyond the weights", f"peft {peaks['peft'] / 2**20:.0f} MiB  "
                                                                              f"ours {peaks[name] / 2**20:.0f} MiB")
        yield row | {"first_loss": losses["theirs"], "second_loss": losses[llm]}


def transformer(llm, transformers, bench):
    """The LlamaForCausalLM of transformers with the weights of `llm`."""
    c = llm.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    peer = transformers.LlamaForCausalLM(config).to(bench.device, bench.dtype).eval()
    peer.model.load_state_dict(llm.state_dict())
    return peer


def logits_memory(bench):
    """Memory of the logits and their gradients, at all positions and at labels only, beyond the layers' own memory."""
    V, B, T, n_labels = 128_256, 4, 300, 25
    case = f"vocabulary {V:,}, {B} x {T} tokens, {n_labels} labels each"
    llm = Llama(LlamaConfig(V, dim=64, n_layers=1)).to(bench.device, bench.dtype)
    llm.embed_tokens.requires_grad_(False)
    prefixes = [torch.randn(T - n_labels + 1, 64, device=bench.device, dtype=bench.dtype) for _ in range(B)]
    labels = [torch.randint(V, (n_labels,), device=bench.device) for _ in range(B)]

    def hidden_states():
        rows = [torch.cat([prefix, llm.embed_tokens(y[:-1])]) for prefix, y in zip(prefixes, labels)]
        return llm.hidden_states(pad_sequence(rows, batch_first=True))

    def layers_only():
        hidden_states().sum().backward()

    def everywhere():
        targets = torch.full((B, T), -100, device=bench.device)
        targets[:, -n_labels:] = torch.stack(labels)
        F.cross_entropy(llm.logits(hidden_states()).float().flatten(0, 1), targets.flatten()).backward()

    def labels_only():
        llm.transcript_loss(prefixes, labels).backward()

    peaks = [bench.peak_memory(work) for work in (layers_only, everywhere, labels_only)]
    if None in peaks:
        yield bench.missing("memory", case, "this system does not tell a process's peak memory")
        return
    base, full, ours = peaks
    ratio = (full - base) / (ours - base)
    bench.print_row("memory", case, f"everywhere {(full - base) / 2**20:8.1f} MiB  "
                                    f"labels only {(ours - base) / 2**20:8.1f} MiB {ratio:7.3f}x")
    yield {"section": "memory", "what": case, "first": "everywhere", "second": "labels only",
           "first_bytes": full - base, "second_bytes": ours - base, "ratio": ratio}


def paper_step(bench):
    """Optimization steps of --preset paper at its real shapes, with random weights: clips of 10 s, all sets of rates.

    "recomputed" is --checkpointing. The last column counts the products of one forward and one backward pass of the LLM,
    and of the encoders' forward pass. What is recomputed is not counted."""
    seconds, preset = (2, "") if bench.quick else (10, "paper")
    config = TrainConfig(**PRESETS["paper"], preset=preset, compile=bench.compile)
    case = "stand-ins" if bench.quick else "Llama 3.2 3B, Whisper medium, AV-HuBERT Large"
    if preset and bench.device.type != "cuda":
        yield bench.missing("paper", case, "needs a GPU of 24 GiB or more")
        return
    rate_sets, n_output = task_rates("avsr", parse_rates(config.rates)), int(OUTPUT_TOKENS_PER_SECOND * seconds)
    empty = model_of(config)
    counted = [costs(empty, seconds, rates, 1, prompt_tokens(config)) for rates in rate_sets]
    products = counted[0]["encoder_flops"] + 2 * sum(row["llm_flops"] for row in counted)      # of a clip
    model = model_of(config, bench.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    usual = [layer.forward for layer in model.llm.layers]

    def step():
        encoded = model.encode(inputs)
        for rates in rate_sets:
            cross_entropy, balance = model.loss(encoded, transcripts, rates)
            ((cross_entropy + config.balance * balance) / len(rate_sets)).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for n_clips, checkpointing in ((1, False), (1, True)) if bench.quick else ((4, False), (16, False), (16, True)):
        inputs = {}
        for stream, (x, _) in encoder_inputs(model, seconds).items():
            x = torch.randn(n_clips, *x.shape[1:], device=bench.device, dtype=x.dtype)
            length = x.shape[-1] if stream == "audio" else x.shape[2]
            inputs[stream] = x, torch.full((n_clips,), length, device=bench.device)
        transcripts = [torch.randint(model.llm.config.vocab_size, (n_output,)).tolist() for _ in range(n_clips)]
        for layer, forward in zip(model.llm.layers, usual):
            layer.forward = forward                 # without what the row before added
        prepare_layers(model.llm.layers, replace(config, checkpointing=checkpointing))
        step()                                      # a warm-up: the optimizer makes its moments, layers are compiled
        weights = torch.cuda.memory_allocated() if bench.device.type == "cuda" else 0
        peak = bench.peak_memory(step)
        took = statistics.median(bench.seconds(step) for _ in range(bench.pairs))
        how = ", recomputed" * checkpointing + ", compiled" * bench.compile
        row = {"section": "paper", "what": f"{case}, {n_clips} x {seconds} s{how}", "step_seconds": took,
               "clips_per_second": n_clips / took, "weights_bytes": weights, "step_bytes": peak,
               "tflops": n_clips * products / took / 1e12}
        bench.print_row("paper", row["what"], f"{took:.3f} s a step, {n_clips / took:.2f} clips/s, {weights / 2**30:.1f} + "
                                              f"{(peak or 0) / 2**30:.1f} GiB, {row['tflops']:.3g} TFLOPs/s")
        yield row


def main_job(bench):
    """The seconds that a training run wrote down, by stage."""
    path = Path(bench.out) / "metrics.json"
    if not path.is_file():
        command = "python train.py --rates 2,4,8"
        yield bench.missing("main job", command, f"no {path}: run it, or name its folder by --out")
        return
    seconds = json.loads(path.read_text("utf-8"))["seconds"]
    stages = ", ".join(f"{stage} {s:.0f} s" for stage, s in seconds.items())
    bench.print_row("main job", str(path), f"{stages}, in all {sum(seconds.values()):.0f} s")
    yield {"section": "main job", "what": str(path), "seconds": seconds}


# --- the picture -----------------------------------------------------------------------------------------------------

def plot(bench, path):
    """Draw the time of each path, forward + backward, over the experts' width and over the number of tokens."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise SystemExit("--plot: matplotlib is not installed: pip install -r extras/requirements.txt") from None

    def milliseconds(n_tokens, width):
        mome = randomised(MoME(512, 23, 4, 1, width)).to(bench.device, bench.dtype)
        x = torch.randn(n_tokens, 512, device=bench.device, dtype=bench.dtype, requires_grad=True)
        step, seconds = step_of(mome, x, True), {"loop": [], "grouped": [], "wide": []}
        for _ in range(bench.pairs // 3 + 2):
            for mome.path in seconds:
                seconds[mome.path].append(bench.seconds(step))
        times = {name: 1e3 * statistics.median(values[1:]) for name, values in seconds.items()}
        return times | {"auto": times[mome.best_path(x)]}

    widths, token_counts = (4, 8, 12, 24, 48, 96, 192, 384), (1, 4, 16, 64, 256, 1024, 4096)
    contents = [("width R of an expert (1024 tokens)", widths, lambda width: milliseconds(1024, width)),
                ("tokens (R = 12)", token_counts, lambda n_tokens: milliseconds(n_tokens, 12))]
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for panel, (label, xs, measure) in zip(panels, contents):
        xs = xs[:2] if bench.quick else xs
        times = [measure(x) for x in tqdm(xs, label, leave=False)]
        for name, marker in (("loop", "o"), ("grouped", "s"), ("wide", "^")):
            panel.loglog(xs, [t[name] for t in times], marker=marker, label=name)
        panel.loglog(xs, [t["auto"] for t in times], "o", markersize=13, fillstyle="none", color="black",
                     label="auto's choice")
        panel.set_xlabel(label)
        panel.grid(alpha=.3)
    panels[0].set_ylabel("forward + backward, ms")
    panels[0].legend()
    figure.suptitle(f"One MoME layer, D = 512, 23 experts, top 4, 1 shared; {machine(bench.device)}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# --- the command line ------------------------------------------------------------------------------------------------

def machine(device):
    """The machine in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, bf16, torch {torch.__version__}"
    name, cpuinfo = platform.processor(), Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{torch.get_num_threads()} threads of {name or platform.machine()}, fp32, torch {torch.__version__}"


SECTIONS = {"layer": layer_paths, "overhead": overhead, "decoding": decoding, "training": training,
            "memory": logits_memory, "paper": paper_step, "main": main_job}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m extras.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sections", default=",".join(SECTIONS), help="comma-separated (default %(default)s)")
    add("--quick", action="store_true", help="small shapes, under a minute")
    add("--pairs", type=int, default=21, help="measured pairs of each row (default %(default)s)")
    add("--compile", action="store_true", help="torch.compile in the overhead and paper sections")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", default="out", help="folder of a training run, for its seconds (default %(default)s)")
    add("--json", action="store_true", help="one JSON document on stdout, the table on stderr")
    add("--plot", metavar="FILE", help="draw the layer's paths and nothing else")
    args = parser.parse_args(argv)
    sections = args.sections.split(",")
    if not set(sections) <= set(SECTIONS) or args.pairs < 1:
        parser.error(f"--sections are some of {','.join(SECTIONS)}, --pairs 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU that torch can use")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    table = sys.stderr if args.json else sys.stdout
    bench = Bench(device, dtype, args.pairs, args.quick, args.compile, args.out, table)
    torch.manual_seed(0)
    if args.plot:
        Path(args.plot).parent.mkdir(parents=True, exist_ok=True)
        plot(bench, args.plot)
        return 0
    print(machine(device), file=bench.table)
    rows = [row for name in sections for row in SECTIONS[name](bench)]
    if args.json:
        print(json.dumps({"machine": machine(device), "rows": rows}, indent=2))
    return 0


if __name__ == "__main__":
    run_script(main)
