"""What a model costs before it exists: parameters, tokens, FLOPs and memory at every rate, from tensors without values.

    python train.py --preset paper --dry-run                  Llama 3.2 3B, Whisper medium, AV-HuBERT Large
    python train.py --llm DIR --audio-encoder DIR --dry-run   any other model

FLOPs are torch's own count of the products in one forward pass, two for each multiply-and-add. They are those of the
encoders, of the LLM over the prefix, and of one greedy step for every output token. All experts are computed (`wide`),
which adds little to the LLM's FLOPs. Memory is that of the weights and of the cache of keys and values. The last column
is what a training step keeps for its backward pass, for one clip at one set of rates.
"""
import math
from dataclasses import replace

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from data import TASKS, parse_rates, task_rates, task_streams
from encoders import FPS, HOP_LENGTH, SAMPLE_RATE, AudioConfig, VideoConfig
from extras.baselines import RATES, add_adapter, count_parameters
from mome import AVSR, AVSRConfig, LlamaConfig, MoME
from real import weights
from sample import KVCache

WHISPER_MEDIUM = AudioConfig(dim=1024, n_layers=24, n_heads=16, pos_kernel=0)
AVHUBERT_LARGE = VideoConfig(
    size=88, picture=96, stem_channels=64, stem_kernel=7, channels=(64, 128, 256, 512), blocks_per_stage=2,
    dim=1024, n_layers=24, n_heads=16, pos_kernel=128, pos_groups=16)
LLAMA_3B = LlamaConfig(128_256, dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, ffn_dim=8192, head_dim=128,
                       rope_theta=500_000.0)
PAPER = {"llm": LLAMA_3B, "audio": WHISPER_MEDIUM, "video": AVHUBERT_LARGE}
STAND_INS = {"llm": LlamaConfig(310), "audio": AudioConfig(), "video": VideoConfig()}
OUTPUT_TOKENS_PER_SECOND = 3.0  # about: people speak two to three words a second


def sizes(config):
    """A TrainConfig -> the AVSRConfig of the parts that it names, else of the preset, else of the stand-ins."""
    parts = dict(PAPER if config.preset else STAND_INS)
    if config.llm:
        parts["llm"] = LlamaConfig(**weights.llama_config(config.llm))
    if config.audio_encoder:
        parts["audio"] = AudioConfig(**weights.whisper_config(config.audio_encoder))
    if config.video_encoder:
        tensors = weights.avhubert_tensors(config.video_encoder)
        parts["video"] = VideoConfig(**weights.avhubert_config(tensors))
    parts["llm"] = replace(parts["llm"], **config.experts)
    parts["audio"] = replace(parts["audio"], padded=config.pad_audio)
    for stream in {"audio", "video"} - task_streams(config.tasks.split(",")):
        parts[stream] = None
    return AVSRConfig(**parts, projector_dim=config.projector_dim or max(256, parts["llm"].dim))


def encoder_inputs(model, seconds):
    """A clip of so many seconds -> {stream: (encoder input on the meta device, number of tokens at rate 1)}."""
    inputs = {}
    for stream, encoder in model.encoders.items():
        if stream == "audio":
            length = int(seconds * SAMPLE_RATE / HOP_LENGTH)
            shape = (1, encoder.config.n_mels, 2 * encoder.config.max_tokens if encoder.config.padded else length)
        else:
            length = int(seconds * FPS)
            shape = (1, 1, length, encoder.config.picture, encoder.config.picture)
        x = torch.empty(shape, device="meta", dtype=encoder.norm.weight.dtype)
        inputs[stream] = x, encoder.n_tokens(length)
    return inputs


def prefix_tokens(inputs, rates, n_prompt):
    """Tokens that the LLM reads before the first word: <bos>, each stream between two markers, the prompt."""
    return 1 + sum(2 + math.ceil(inputs[stream][1] / rate) for stream, rate in rates.items()) + n_prompt


def prompt_tokens(config):
    """How many tokens the prompt has: about those of real/setup.PROMPT, or the stand-in's one."""
    return 7 if config.llm or config.preset else 1


def flops(work):
    """FLOPs of the call work()."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


class Fused(torch.autograd.Function):
    """Attention that keeps its inputs and its output, as the fused kernels of CPUs and GPUs do, not the (T, T) matrices."""

    @staticmethod
    def forward(context, q, k, v):
        out = torch.empty_like(q)
        context.save_for_backward(q, k, v, out)
        return out


class FusedAttention(TorchFunctionMode):
    """Inside it, attention is Fused: on the meta device torch has no fused kernel."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return Fused.apply(*args[:3])
        return function(*args, **(kwargs or {}))


def bytes_for_backward(work, model):
    """Bytes of the tensors, other than the model's parameters, that work() saves for its backward pass."""
    parameters, saved = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage  # a reference, so that no other storage gets this address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), FusedAttention():
        loss = work()
    return sum(storage.nbytes() for storage in saved.values()) if loss.requires_grad else 0


def costs(model, seconds, rates, beam, n_prompt):
    """One clip at these rates -> dict of tokens, encoder_flops, llm_flops, cache_bytes, step_bytes."""
    inputs, n_output, llm = encoder_inputs(model, seconds), math.ceil(OUTPUT_TOKENS_PER_SECOND * seconds), model.llm
    n_tokens = prefix_tokens(inputs, rates, n_prompt)

    def embeddings(n):
        return torch.empty(1, n, llm.config.dim, device="meta", dtype=llm.embed_tokens.weight.dtype)

    def encode():
        for stream in rates:
            model.encoders[stream](inputs[stream][0])

    def decode():
        for stream, rate in rates.items():
            projector = model.projectors[stream]
            width = next(module.in_features for module in projector.modules() if isinstance(module, torch.nn.Linear))
            projector(torch.empty(math.ceil(inputs[stream][1] / rate), width, device="meta"))
        llm.logits(llm.hidden_states(embeddings(n_tokens + n_output))[:, -n_output:])

    def loss():
        labels = torch.zeros(n_output, dtype=torch.long, device="meta")
        return llm.transcript_loss([embeddings(n_tokens)[0].requires_grad_()], [labels])

    cache = KVCache(llm.config, torch.tensor([n_tokens]), n_tokens + n_output, embeddings(1), beam)
    return {"tokens": n_tokens, "encoder_flops": flops(encode), "llm_flops": flops(decode),
            "cache_bytes": cache.k.nbytes + cache.v.nbytes, "step_bytes": bytes_for_backward(loss, model)}


def model_of(config, device="meta"):
    """The AVSR of a TrainConfig with its adapter and random weights: on the meta device to be counted."""
    with torch.device(device):
        model = AVSR(sizes(config))
        add_adapter(model, config, config.tasks.split(","), parse_rates(config.rates))
    for mome in (module for module in model.modules() if isinstance(module, MoME)):
        mome.path = "wide"  # torch does not count the products of the other paths
    model.encoders.bfloat16()
    for p in model.llm.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16()
    return model


def report(config):
    """Print what the model of a TrainConfig would cost -> ({owner: parameters}, the rows of the table)."""
    model = model_of(config)
    counts = count_parameters(model)
    print_parameters(counts, "LoRA" if config.method.startswith("lora") else "MoME")
    n_prompt = prompt_tokens(config)
    task = next(task for task in TASKS if task in config.tasks.split(","))
    rate_sets = task_rates(task, [(1, 1)]) + task_rates(task, parse_rates(config.rates))
    RATES.set(rate_sets[-1])    # of a module with a copy for each set of rates: all copies cost the same
    rows = []
    for seconds, shown in ((10, rate_sets), (23, [rate_sets[0], rate_sets[-1]])):  # the paper's clip has 23 s
        part = [{"seconds": seconds, "rates": rates, **costs(model, seconds, rates, config.beam, n_prompt)}
                for rates in shown]
        for row in part:
            row["flops"] = row["encoder_flops"] + row["llm_flops"]
        print_rows(task, part, config.beam)
        rows += part
    if config.preset:
        print("\nthe paper, on 23 s of speech: 8x fewer TFLOPs at (16, 5) than without compression")
    return counts, rows


def print_parameters(counts, adapter):
    frozen, trained = counts["encoders"] + counts["LLM"], counts["adapter"] + counts["projectors and markers"]
    experts = ": its experts and the router" if adapter == "MoME" else ""
    millions = {owner: f"{n / 1e6:,.1f}M" for owner, n in counts.items()}
    print(f"parameters: {(frozen + trained) / 1e6:,.1f}M in all\n"
          f"  frozen   {frozen / 1e6:9,.1f}M: encoders {millions['encoders']}, LLM {millions['LLM']}; "
          f"{2 * frozen / 2**30:.1f} GiB in bf16\n"
          f"  trained  {trained / 1e6:9,.1f}M: {adapter} {millions['adapter']}, projectors and markers "
          f"{millions['projectors and markers']}; {16 * trained / 2**30:.1f} GiB with gradients and AdamW in fp32\n"
          f"  active   {counts['active'] / 1e6:9,.1f}M of {adapter} for a token{experts}")


def print_rows(task, rows, beam):
    """A line for each set of rates. "fewer": the first row's FLOPs over those of this row."""
    seconds, first = rows[0]["seconds"], rows[0]
    print(f"\n{task}, a clip of {seconds} s, {math.ceil(OUTPUT_TOKENS_PER_SECOND * seconds)} tokens of output\n"
          f"{'rates':>9} {'tokens':>7} {'TFLOPs':>8} {'of them LLM':>12} {'fewer':>6} {'LLM alone':>10} "
          f"{f'cache at beam {beam}':>18} {'training, per clip':>19}")
    for row in rows:
        rates = ":".join(map(str, row["rates"].values()))
        print(f"{rates:>9} {row['tokens']:7} {row['flops'] / 1e12:8.3g} {row['llm_flops'] / 1e12:12.3g} "
              f"{first['flops'] / row['flops']:5.1f}x {first['llm_flops'] / row['llm_flops']:9.1f}x "
              f"{row['cache_bytes'] / 2**20:14.0f} MiB {row['step_bytes'] / 2**30:15.3g} GiB")
