"""Baselines beside MoME: the same frozen parts, data, steps and loss, with another adapter in the LLM.

    --method projectors     nothing is trained in the LLM: only projectors and markers are
    --method lora           one LoRA on q, k, v, o of every layer for all rates: Llama-MTSK SS. Trained at one pair of rates
                            (--rates 4:2) it is Llama-AVSR
    --method lora-ms        a LoRA for each set of rates: Llama-MTSK MS
    --method lora-mss       both, summed: Llama-MTSK MSS
    --method mome-routers   MoME with a router for each set of rates (the paper's ablation)
    --method mome-teacher, mome-bias, mome-places    ideas beyond the paper, see extras/ideas.py
    --method mome           at one pair of rates it is MoME-I

Llama-AVSR is arXiv 2409.12319, Llama-MTSK is arXiv 2503.06362. --rank 0 gives each LoRA as many parameters as MoME has
active for one token. --projector-per-rate gives each stream a projector for each of its rates.
"""
import copy
from collections import Counter
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import nn

from data import ClipError, task_rates
from extras.ideas import IDEAS
from mome import MoME

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
METHODS = {"mome": 3e-3, "mome-routers": 3e-3, "lora": 4.5e-3, "lora-ms": 4.5e-3, "lora-mss": 4.5e-3,
           "projectors": 2e-3, **dict.fromkeys(IDEAS, 3e-3)}    # peak learning rates; three are tuned, docs/results.md


# --- one copy of a module for each set of rates ----------------------------------------------------------------------

RATES = ContextVar("rates")     # {stream: rate} at which this thread reads clips: the test decodes in two threads


class PerRate(nn.Module):
    """A copy of a module for each set of rates. The copy for the current RATES computes. MoME needs no copies.

    rate_sets: those that are trained. streams: those whose rates tell the copies apart."""

    def __init__(self, module, rate_sets, streams=("audio", "video")):
        super().__init__()
        self.streams = streams
        names = dict.fromkeys(self.name_of(rates) for rates in rate_sets)
        self.copies = nn.ModuleDict({name: copy.deepcopy(module) for name in names if name})

    def name_of(self, rates):
        """{"audio": 4, "video": 2} -> "audio4_video2"."""
        return "_".join(f"{stream}{rate}" for stream, rate in rates.items() if stream in self.streams)

    @property
    def current(self):
        """The copy for the current rates. ClipError if they were not trained."""
        name = self.name_of(RATES.get())
        if name not in self.copies:
            raise ClipError(f"rates {name}: this model has weights of its own for each set of rates, and was trained at "
                            f"{', '.join(self.copies)}")
        return self.copies[name]

    @property
    def weight(self):
        return self.current.weight

    def forward(self, x):
        return self.current(x)


def follow_rates(model):
    """From now on RATES are those at which an AVSR reads its clips."""
    prefix = model.prefix

    def prefix_at(encoded, rates):
        RATES.set(rates)
        return prefix(encoded, rates)

    model.prefix = prefix_at


# --- LoRA ------------------------------------------------------------------------------------------------------------

class LoRA(nn.Module):
    """x (..., d_in) -> x @ A.T @ B.T (..., d_out), A (rank, d_in), B (d_out, rank) (Hu et al. 2021, arXiv 2106.09685).

    B starts at zero, so a new LoRA changes nothing. The scale alpha / rank is 1. Parameters are fp32."""

    def __init__(self, rank, d_in, d_out):
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, d_in).uniform_(-1, 1) / d_in ** 0.5)
        self.b = nn.Parameter(torch.zeros(d_out, rank))

    def forward(self, x):
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


class Adapted:
    """A linear layer that adds the outputs of its LoRAs."""

    def forward(self, x):
        return sum((lora(x) for lora in self.lora), super().forward(x))


def add_lora(llm, rank, rate_sets=(), shared=True):
    """Put trainable LoRAs on the attention's four projections in every layer of a Llama.

    shared: one LoRA for all rates. rate_sets: those that get a LoRA of their own."""
    for layer in llm.layers:
        for name in TARGETS:
            linear = getattr(layer.self_attn, name)
            sizes = rank, linear.in_features, linear.out_features
            loras = [LoRA(*sizes)] if shared else []
            loras += [PerRate(LoRA(*sizes), rate_sets)] if rate_sets else []
            linear.lora = nn.ModuleList(loras).to(linear.weight.device)
            kind = type(linear)
            linear.__class__ = type(f"Adapted{kind.__name__}", (Adapted, kind), {})


def lora_rank(llm, experts):
    """The rank at which LoRA has as many parameters as MoME has active ones, or as near as it gets.

    llm: LlamaConfig; experts: anything with n_routed, top_k, n_shared, bottleneck, the MoME to compare with."""
    width, kv_width, n_active = llm.n_heads * llm.head_dim, llm.n_kv_heads * llm.head_dim, experts.n_shared
    n_active += experts.top_k if experts.n_routed else 0
    one_expert = (2 * llm.dim + 1) * experts.bottleneck + llm.dim
    mome = n_active * one_expert + llm.dim * experts.n_routed
    lora_of_rank_1 = 2 * (llm.dim + width) + 2 * (llm.dim + kv_width)
    return max(1, round(mome / lora_of_rank_1))


# --- what --method asks for ------------------------------------------------------------------------------------------

def add_adapter(model, config, tasks, pairs):
    """Put into an AVSR what the method of a TrainConfig asks for -> what config.json must know of it."""
    facts = {"method": config.method, "rank": config.rank or lora_rank(model.llm.config, config), "tasks": tasks,
             "rates": pairs, "projector_per_rate": config.projector_per_rate}
    build_adapter(model, facts)
    return facts | {"parameters": count_parameters(model)}


def build_adapter(model, facts):
    """Put into an AVSR the adapter that config.json describes. MoME itself is part of the Llama."""
    method, rate_sets = facts["method"], [rates for task in facts["tasks"] for rates in task_rates(task, facts["rates"])]
    if method.startswith("lora"):
        of_rates = rate_sets if method in ("lora-ms", "lora-mss") else ()
        add_lora(model.llm, facts["rank"], of_rates, shared=method != "lora-ms")
    if method == "mome-routers":
        for mome in (layer.mome for layer in model.llm.layers):
            mome.router = PerRate(mome.router, rate_sets)
    if method in IDEAS:
        IDEAS[method](model, rate_sets)
    if facts["projector_per_rate"]:
        for stream, projector in model.projectors.items():
            model.projectors[stream] = PerRate(projector, rate_sets, (stream,))
    follow_rates(model)


def count_parameters(model):
    """{owner: number of parameters} of an AVSR. "adapter" is MoME or LoRA, "active" what one token meets of it."""
    owners = {"encoders": "encoders", "llm": "LLM"}
    counts = Counter({"encoders": 0, "LLM": 0, "adapter": 0, "projectors and markers": 0})
    for name, parameter in model.named_parameters():
        owner = owners.get(name.split(".")[0], "projectors and markers")
        counts["adapter" if owner == "LLM" and parameter.requires_grad else owner] += parameter.numel()
    counts["active"] = counts["adapter"]
    for module in model.llm.modules():
        if isinstance(module, MoME):
            one_expert = sum(weight[0].numel() for weight in (module.down, module.down_bias, module.up, module.up_bias))
            counts["active"] -= (len(module.down) - module.n_active) * one_expert
        if isinstance(module, PerRate):
            sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in module.copies.values()]
            counts["active"] -= sum(sizes[1:])
    return counts
