"""What MoME and decoding cost, as ratios of two ways of doing the same thing.

    python -m extras.bench                    all sections, about a quarter of an hour on 2 cores
    python -m extras.bench --quick            smaller shapes, under a minute
    python -m extras.bench --plot paths.png   the picture of README.md: which path wins at which width of the experts
    python -m extras.bench --out DIR          beside it the seconds of the training run in DIR, by stage

The two ways are timed in turn, in one process, on one machine, and what is printed is the median over the pairs of the
ratio of their times (or memory): above 1, the second is better. On a GPU the same is measured in bf16 by CUDA events. Peers
from `transformers` stand beside where it is installed (requirements-test.txt); --plot needs matplotlib (extras/requirements.txt).
"""
import argparse
import ctypes
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from mome import KVCache, Llama, LlamaConfig, MoME

LLAMA_1B = dict(dim=2048, n_heads=32, n_kv_heads=8, ffn_dim=8192, rope_theta=500_000.0)       # Llama 3.2 1B's layers
SMOLLM2 = dict(vocab_size=49152, dim=576, n_layers=30, n_heads=9, n_kv_heads=3, ffn_dim=1536, rope_theta=100_000.0)
EXPERTS = dict(n_routed=23, top_k=4, n_shared=1, bottleneck=12)                               # the paper's MoME-23/4


# --- measuring -------------------------------------------------------------------------------------------------------

@dataclass
class Bench:
    device: torch.device
    dtype: torch.dtype
    pairs: int
    quick: bool = False
    compile: bool = False
    out: str = "out"
    table: object = sys.stdout

    def seconds(self, work):
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def compare(self, first, second):
        """-> (median seconds of `first`, of `second`, median of first / second), measured in turn after a warm-up."""
        for work in (first, second, first, second):
            work()
        times = []
        for i in range(self.pairs):  # each goes first in every other pair
            pair = [self.seconds(work) for work in ((first, second) if i % 2 else (second, first))]
            times.append(pair if i % 2 else pair[::-1])
        ones, twos = zip(*times)
        return statistics.median(ones), statistics.median(twos), statistics.median(a / b for a, b in times)

    def peak_memory(self, work):
        """Bytes that work() takes at most above what is in use before it: the GPU's, else Linux's own count, else None."""
        work()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            return torch.cuda.max_memory_allocated() - before

        def told(field):
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))
        try:
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed, and what work() takes of that would not be seen
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is in use
            before = told("VmRSS")
            work()
            return told("VmHWM") - before
        except (OSError, AttributeError):
            return None

    def say(self, section, what, text):
        print(f"{section:9} {what:51} {text}", file=self.table, flush=True)

    def row(self, section, what, first, second, names):
        """Compare, print and return a row."""
        one, two, ratio = self.compare(first, second)
        self.say(section, what, f"{names[0]:>11} {1e3 * one:9.2f} ms  {names[1]:>14} {1e3 * two:9.2f} ms {ratio:7.3f}x")
        return {"section": section, "what": what, "first": names[0], "second": names[1], "first_seconds": one,
                "second_seconds": two, "ratio": ratio, "pairs": self.pairs}

    def missing(self, section, what, why):
        self.say(section, what, why)
        return {"section": section, "what": what, "missing": why}


def randomised(mome):
    """Up-projections that are not zero: nothing may be skipped."""
    for p in (mome.up, mome.down_bias):
        nn.init.normal_(p, std=0.02)
    return mome


def step_of(module, x, backward):
    """A call of forward, or of forward and backward with gradients for the input and all parameters."""
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
    """`auto` (its choice in brackets) and `grouped` against the loop, Mixtral's experts against `auto`: at the paper's
    bottleneck with and without its shared expert, and at one so wide that moving tokens pays."""
    shapes = [(512, 1, 12), (256, 1, 96)] if bench.quick else [(2048, 1, 12), (3072, 1, 12), (2048, 0, 12), (3072, 0, 12), (512, 1, 192)]
    for D, n_shared, R in shapes:
        mome = randomised(MoME(D, 23, 4, n_shared, R)).to(bench.device, bench.dtype)
        peer, why = mixtral(D, 23, 4, R, bench)
        for n_tokens in (15, 256) if bench.quick else (1, 15, 256, 2048):
            x = torch.randn(1, n_tokens, D, device=bench.device, dtype=bench.dtype, requires_grad=True)
            for backward in (False, True):
                what = f"{D}, 23/4+{n_shared} of {R}, {n_tokens} tokens, {'forward + backward' if backward else 'forward'}"
                run = step_of(mome, x, backward)

                def path(name):
                    def work():
                        mome.path = name
                        run()
                    return work
                auto = f"auto ({mome.best_path(x[0])})"
                yield bench.row("layer", what, path("loop"), path("auto"), ("loop", auto))
                yield bench.row("layer", what, path("loop"), path("grouped"), ("loop", "grouped"))
                if peer is not None:
                    yield bench.row("layer", what, step_of(peer, x, backward), path("auto"), ("Mixtral", auto))
        if peer is None:
            yield bench.missing("layer", "Mixtral's experts as a peer", why)


def mixtral(dim, n_experts, top_k, width, bench):
    """-> (Mixtral's sparse block: three matrices and SwiGLU where ours has two and GELU, None) or (None, why not)."""
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError as error:
        return None, f"transformers 5 is not installed ({error})"
    config = MixtralConfig(hidden_size=dim, intermediate_size=width, num_local_experts=n_experts, num_experts_per_tok=top_k)
    config._experts_implementation = "grouped_mm"  # what a whole Mixtral uses
    block = MixtralSparseMoeBlock(config)
    for p in block.parameters():
        nn.init.normal_(p, std=0.02)
    return block.to(bench.device, bench.dtype), None


def overhead(bench):
    """What MoME adds to frozen layers of Llama 3.2 1B: a prefix, then one step of decoding with a cache."""
    llm = Llama(LlamaConfig(vocab_size=64, n_layers=1 if bench.quick else 4, **LLAMA_1B, **EXPERTS))
    llm.requires_grad_(False).to(bench.device, bench.dtype)
    for layer in llm.layers:
        randomised(layer.mome)
    trunk = torch.compile(llm.trunk) if bench.compile else llm.trunk

    def embeddings(*shape):
        return torch.randn(*shape, LLAMA_1B["dim"], device=bench.device, dtype=bench.dtype)

    def run(place, work):
        def timed():
            for layer in llm.layers:
                layer.place = place
            with torch.no_grad():
                work()
        return timed

    compiled = ", compiled" if bench.compile else ""
    for n_tokens in (64,) if bench.quick else (256, 4096) if bench.device.type == "cuda" else (256,):
        x = embeddings(1, n_tokens)
        yield bench.row("overhead", f"{len(llm.layers)} layers, prefix of {n_tokens}{compiled}",
                        *(run(place, lambda: trunk(x)) for place in ("attn", None)), ("with MoME", "without"))
    for batch in (1, 15):
        cache = KVCache(llm.config, batch, 136, embeddings(1))
        with torch.no_grad():
            llm.trunk(embeddings(batch, 128), cache=cache)
        x, positions = embeddings(batch, 1), torch.full((batch,), 128, device=bench.device)

        def step():
            cache.filled = 128
            trunk(x, positions=positions, cache=cache)
        yield bench.row("overhead", f"{len(llm.layers)} layers, a step of decoding, batch {batch}{compiled}",
                        *(run(place, step) for place in ("attn", None)), ("with MoME", "without"))


def decoding(bench):
    """Greedy decoding against transformers' generate with each of its caches: same weights, same tokens."""
    sizes, prefix, new = (SMOLLM2 | {"n_layers": 2}, 32, 8) if bench.quick else (SMOLLM2, 128, 64)
    what = f"SmolLM2-135M's shapes{', 2 layers' if bench.quick else ''}, {new} tokens after {prefix}"
    llm = Llama(LlamaConfig(**sizes)).to(bench.device, bench.dtype)
    try:
        import transformers
    except ImportError as error:
        yield bench.missing("decoding", what, f"transformers is not installed ({error})")
        return
    config = transformers.LlamaConfig(
        vocab_size=llm.config.vocab_size, hidden_size=llm.config.dim, intermediate_size=llm.config.ffn_dim,
        num_hidden_layers=llm.config.n_layers, num_attention_heads=llm.config.n_heads, rms_norm_eps=llm.config.norm_eps,
        num_key_value_heads=llm.config.n_kv_heads, rope_theta=llm.config.rope_theta, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=0)
    peer = transformers.LlamaForCausalLM(config).to(bench.device, bench.dtype).eval()
    peer.model.load_state_dict(llm.state_dict())
    ids = torch.randint(llm.config.vocab_size, (1, prefix), device=bench.device)
    answers = {}

    def ours():
        answers["ours"] = llm.generate([llm.embed_tokens(ids[0]).detach()], eos=-1, max_tokens=new)[0][0]

    for cache in ("dynamic", "static"):
        def theirs():
            answers["theirs"] = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                                              cache_implementation=cache)[0, prefix:].tolist()
        row = bench.row("decoding", what, theirs, ours, (f"HF, {cache}", "ours"))
        same = answers["ours"] == answers["theirs"]
        if not same:
            bench.say("decoding", "", "their tokens differ")
        yield row | {"same_tokens": same, "tokens_per_second": new / row["second_seconds"]}


def logits_memory(bench):
    """Memory that logits and their gradients take above the trunk's own: all positions against those of labels."""
    V, B, T, n_labels = 128_256, 4, 300, 25
    what = f"vocabulary {V:,}, {B} x {T} tokens, {n_labels} labels each"
    llm = Llama(LlamaConfig(V, dim=64, n_layers=1)).to(bench.device, bench.dtype)
    llm.embed_tokens.requires_grad_(False)
    prefixes = [torch.randn(T - n_labels + 1, 64, device=bench.device, dtype=bench.dtype) for _ in range(B)]
    labels = [torch.randint(V, (n_labels,), device=bench.device) for _ in range(B)]

    def rows():
        return pad_sequence([torch.cat([p, llm.embed_tokens(y[:-1])]) for p, y in zip(prefixes, labels)], True)

    def trunk_only():
        llm.trunk(rows()).sum().backward()

    def everywhere():
        targets = torch.full((B, T), -100, device=bench.device)
        targets[:, -n_labels:] = torch.stack(labels)
        F.cross_entropy(llm.logits(llm.trunk(rows())).float().flatten(0, 1), targets.flatten()).backward()

    def labels_only():
        llm.transcript_loss(prefixes, labels).backward()

    peaks = [bench.peak_memory(work) for work in (trunk_only, everywhere, labels_only)]
    if None in peaks:
        yield bench.missing("memory", what, "this system does not tell a process's peak memory")
        return
    base, full, ours = peaks
    bench.say("memory", what, f"everywhere {(full - base) / 2**20:8.1f} MiB  labels only {(ours - base) / 2**20:8.1f} MiB "
                              f"{(full - base) / (ours - base):7.3f}x")
    yield {"section": "memory", "what": what, "first": "everywhere", "second": "labels only", "first_bytes": full - base,
           "second_bytes": ours - base, "ratio": (full - base) / (ours - base)}


def main_job(bench):
    """The seconds that a training run wrote down."""
    path = Path(bench.out) / "metrics.json"
    if not path.is_file():
        yield bench.missing("main job", "python train.py --rates 2,4,8", f"no {path}: run it, or name its folder by --out")
        return
    seconds = json.loads(path.read_text("utf-8"))["seconds"]
    bench.say("main job", str(path), ", ".join(f"{stage} {s:.0f} s" for stage, s in seconds.items())
              + f", in all {sum(seconds.values()):.0f} s")
    yield {"section": "main job", "what": str(path), "seconds": seconds}


# --- the picture -----------------------------------------------------------------------------------------------------

def plot(bench, path):
    """Time of each path, forward + backward, over the experts' width and over the number of tokens -> an image at `path`."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise SystemExit("--plot: matplotlib is not installed: pip install -r extras/requirements.txt") from None

    def times(n_tokens, width):
        mome = randomised(MoME(512, 23, 4, 1, width)).to(bench.device, bench.dtype)
        x = torch.randn(n_tokens, 512, device=bench.device, dtype=bench.dtype, requires_grad=True)
        work, taken = step_of(mome, x, True), {"loop": [], "grouped": [], "wide": []}
        for _ in range(bench.pairs // 3 + 2):
            for mome.path in taken:
                taken[mome.path].append(bench.seconds(work))
        mome.path = "auto"
        return {name: 1e3 * statistics.median(t[1:]) for name, t in taken.items()} | {"auto": mome.best_path(x)}

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for panel, label, points in ((panels[0], "width R of an expert (1024 tokens)", [(1024, r) for r in (4, 8, 12, 24, 48, 96, 192, 384)]),
                                 (panels[1], "tokens (R = 12)", [(n, 12) for n in (1, 4, 16, 64, 256, 1024, 4096)])):
        points = points[:2] if bench.quick else points
        found = [times(*point) for point in tqdm(points, label, leave=False)]
        xs = [point[1] if panel is panels[0] else point[0] for point in points]
        for name, marker in (("loop", "o"), ("grouped", "s"), ("wide", "^")):
            panel.loglog(xs, [f[name] for f in found], marker=marker, label=name)
        panel.loglog(xs, [f[f["auto"]] for f in found], "o", markersize=13, fillstyle="none", color="black", label="auto's choice")
        panel.set_xlabel(label)
        panel.grid(alpha=.3)
    panels[0].set_ylabel("forward + backward, ms")
    panels[0].legend()
    figure.suptitle(f"One MoME layer, D = 512, 23 experts, top 4, 1 shared; {machine(bench.device)}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def machine(device):
    """The machine in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, bf16, torch {torch.__version__}"
    name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")), "") if Path("/proc/cpuinfo").is_file() else platform.processor()
    return f"{torch.get_num_threads()} threads of {name or platform.machine()}, fp32, torch {torch.__version__}"


SECTIONS = {"layer": layer_paths, "overhead": overhead, "decoding": decoding, "memory": logits_memory, "main": main_job}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m extras.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small shapes, under a minute")
    parser.add_argument("--pairs", type=int, default=21, help="measured pairs of each row (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile both sides of the overhead section")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", default="out", help="folder of a training run, for its seconds (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, the table on stderr")
    parser.add_argument("--plot", metavar="FILE", help="draw the layer's paths and nothing else")
    args = parser.parse_args(argv)
    sections = args.sections.split(",")
    if not set(sections) <= set(SECTIONS) or args.pairs < 1:
        parser.error(f"--sections are some of {','.join(SECTIONS)}, --pairs 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU that torch can use")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    bench = Bench(device, torch.bfloat16 if device.type == "cuda" else torch.float32, args.pairs, args.quick, args.compile,
                  args.out, sys.stderr if args.json else sys.stdout)
    torch.manual_seed(0)
    if args.plot:
        plot(bench, args.plot)
        return 0
    print(machine(device), file=bench.table)
    rows = [row for name in sections for row in SECTIONS[name](bench)]
    if args.json:
        print(json.dumps({"machine": machine(device), "rows": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
