"""What a model costs before there is one: parameters, tokens, FLOPs and memory at every rate, from tensors without contents.

    python train.py --preset paper --dry-run                  the paper's largest: Llama 3.2 3B, Whisper medium, AV-HuBERT Large
    python train.py --llm DIR --audio-encoder DIR --dry-run   any other

FLOPs are torch's own count of the products (two for each multiply-and-add) in one forward pass: the encoders, the LLM over
the prefix and one step for every output token, greedy; all experts are computed (`wide`), which is little more than those
chosen. Memory is that of the weights, of the cache of keys and values, and of the tensors that a training step keeps for
its backward pass, for one clip at one of the rates.
"""
import math
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

import weights
from encoders import FPS, HOP_LENGTH, SAMPLE_RATE, AudioConfig, VideoConfig
from mome import AVSR, AVSRConfig, KVCache, LlamaConfig, MoME
from sample import EXPERTS, TASKS, parse_rates, task_rates, task_streams

LLAMA_3B = LlamaConfig(128_256, dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, ffn_dim=8192, head_dim=128, rope_theta=500_000.0)
WHISPER_MEDIUM = AudioConfig(80, 1024, 24, 16, pos_kernel=0)
AVHUBERT_LARGE = VideoConfig(88, 96, 64, 7, (64, 128, 256, 512), 2, 1024, 24, 16, 128, 16)
PAPER = {"llm": LLAMA_3B, "audio": WHISPER_MEDIUM, "video": AVHUBERT_LARGE}
STAND_INS = {"llm": LlamaConfig(310), "audio": AudioConfig(), "video": VideoConfig()}
WORDS_PER_SECOND = 3.0  # of output tokens, about; people speak two to three words in a second


def sizes(config):
    """A TrainConfig -> AVSRConfig: of the parts that are named, else of the preset's, else of the stand-ins."""
    known = dict(PAPER if config.preset else STAND_INS)
    if config.llm:
        known["llm"] = LlamaConfig(**weights.llama_config(config.llm))
    if config.audio_encoder:
        known["audio"] = AudioConfig(**weights.whisper_config(config.audio_encoder))
    if config.video_encoder:
        known["video"] = VideoConfig(**weights.avhubert_config(config.video_encoder, weights.avhubert_tensors(config.video_encoder)))
    streams = task_streams(config.tasks.split(","))
    llm = replace(known["llm"], **{name: getattr(config, name) for name in EXPERTS})
    return AVSRConfig(llm, replace(known["audio"], padded=config.pad_audio) if "audio" in streams else None,
                      known["video"] if "video" in streams else None, projector_dim=config.projector_dim or max(256, llm.dim))


def parameters(model):
    """-> {what: number of parameters}; `active` are those of MoME that one token meets: its experts and the router."""
    count = {"encoders": 0, "LLM": 0, "MoME": 0, "projectors and markers": 0}
    for name, p in model.named_parameters():
        owner = {"encoders": "encoders", "llm": "LLM"}.get(name.split(".")[0], "projectors and markers")
        count["MoME" if ".mome." in name else owner] += p.numel()
    active = 0
    for mome in (m for m in model.modules() if isinstance(m, MoME)):
        E, K = len(mome.down), mome.n_shared + (mome.top_k if mome.n_routed else 0)
        active += K * sum(p.numel() for p in (mome.down, mome.down_bias, mome.up)) // E
        active += mome.router.weight.numel() if mome.router is not None else 0
    return count | {"active": active}


def encoder_tokens(model, seconds):
    """-> {stream: (encoder input on the meta device, number of tokens that come of it)}."""
    frames, pictures, inputs = int(seconds * SAMPLE_RATE / HOP_LENGTH), int(seconds * FPS), {}
    for stream, encoder in model.encoders.items():
        shape = (1, encoder.config.n_mels, frames) if stream == "audio" else (1, 1, pictures, *2 * [encoder.config.picture])
        x = torch.empty(shape, device="meta", dtype=encoder.norm.weight.dtype)
        inputs[stream] = x, encoder.n_tokens(frames if stream == "audio" else pictures)
    return inputs


def prefix_tokens(inputs, rates, n_prompt):
    """What the LLM reads before the first word: <bos>, two markers and the pooled tokens of each stream, the prompt."""
    return 1 + sum(2 + math.ceil(inputs[stream][1] / rate) for stream, rate in rates.items()) + n_prompt


def flops(work):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


def kept_for_backward(work, model):
    """Bytes of the tensors, other than the parameters, that work() keeps for its backward pass."""
    parameters, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage  # held, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = work()
    return sum(storage.nbytes() for storage in kept.values()) if loss.requires_grad else 0


def costs(model, seconds, rates, beam, n_prompt):
    """One clip of so many seconds at these rates -> dict of tokens, encoder_flops, llm_flops, cache_bytes, step_bytes."""
    inputs, n_words, llm = encoder_tokens(model, seconds), math.ceil(WORDS_PER_SECOND * seconds), model.llm
    n_tokens = prefix_tokens(inputs, rates, n_prompt)

    def embeddings(n):
        return torch.empty(1, n, llm.config.dim, device="meta", dtype=llm.embed_tokens.weight.dtype)

    def read():
        for stream, rate in rates.items():
            model.projectors[stream](torch.empty(math.ceil(inputs[stream][1] / rate), model.encoders[stream].config.dim, device="meta"))
        llm.logits(llm.trunk(embeddings(n_tokens + n_words))[:, -n_words:])

    def learn():
        return llm.transcript_loss([embeddings(n_tokens)[0].requires_grad_()], [torch.zeros(n_words, dtype=torch.long, device="meta")])

    cache = KVCache(llm.config, 1, n_tokens + n_words, embeddings(1), beam)
    return {"tokens": n_tokens, "encoder_flops": flops(lambda: [model.encoders[s](inputs[s][0]) for s in rates]),
            "llm_flops": flops(read), "cache_bytes": cache.k.nbytes + cache.v.nbytes, "step_bytes": kept_for_backward(learn, model)}


def report(config):
    """Print what the model of a TrainConfig would cost; returns the figures."""
    with torch.device("meta"):
        model = AVSR(sizes(config))
    for mome in (m for m in model.modules() if isinstance(m, MoME)):
        mome.path = "wide"  # the other paths' products are not in torch's count
    model.encoders.bfloat16()
    for p in model.llm.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16()
    count, pairs = parameters(model), parse_rates(config.rates)
    frozen, trained = count["encoders"] + count["LLM"], count["MoME"] + count["projectors and markers"]
    print(f"parameters: {(frozen + trained) / 1e6:,.1f}M in all\n  frozen   {frozen / 1e6:9,.1f}M: encoders {count['encoders'] / 1e6:,.1f}M, "
          f"LLM {count['LLM'] / 1e6:,.1f}M; {2 * frozen / 2**30:.1f} GiB in bf16\n  trained  {trained / 1e6:9,.1f}M: MoME {count['MoME'] / 1e6:,.1f}M, "
          f"projectors and markers {count['projectors and markers'] / 1e6:,.1f}M; {16 * trained / 2**30:.1f} GiB with gradients and AdamW in fp32\n"
          f"  active   {count['active'] / 1e6:9,.1f}M of MoME for a token: its experts and the router")
    n_prompt = 7 if config.llm or config.preset else 1
    task = next(task for task in TASKS if task in config.tasks.split(","))
    rows, streams = [], task_rates(task, [(1, 1)]) + task_rates(task, pairs)
    for seconds, some in ((10, streams), (23, [streams[0], streams[-1]])):  # the paper's figure of 8 is for 23 s
        print(f"\n{task}, a clip of {seconds} s, {math.ceil(WORDS_PER_SECOND * seconds)} tokens of output\n{'rates':>9} {'tokens':>7} {'TFLOPs':>8} {'of them LLM':>12} "
              f"{'span':>6} {'LLM alone':>10} {'cache at beam ' + str(config.beam):>18} {'training, per clip':>19}")
        for rates in some:
            row = {"seconds": seconds, "rates": rates} | costs(model, seconds, rates, config.beam, n_prompt)
            row["flops"] = row["encoder_flops"] + row["llm_flops"]
            rows.append(row)
            whole, llm = ([r for r in rows if r["seconds"] == seconds][0][key] / row[key] for key in ("flops", "llm_flops"))
            print(f"{':'.join(map(str, rates.values())):>9} {row['tokens']:7} {row['flops'] / 1e12:8.3g} {row['llm_flops'] / 1e12:12.3g} {whole:5.1f}x "
                  f"{llm:9.1f}x {row['cache_bytes'] / 2**20:14.0f} MiB {row['step_bytes'] / 2**30:15.3g} GiB")
    if config.preset:
        print("\nthe paper, on 23 s of speech: 8x fewer TFLOPs at (16, 5) than without compression")
    return count, rows
