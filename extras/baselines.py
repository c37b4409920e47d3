"""Baselines beside MoME: the same frozen parts, data, steps and loss, with another adapter in the LLM.

    python train.py --method lora          LoRA on q, k, v, o of every layer, as many parameters as MoME has active
    python train.py --method projectors    no adapter at all: only projectors and markers are trained
"""
import torch
import torch.nn.functional as F
from torch import nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class LoRA:
    """Adds x @ A.T @ B.T to a linear layer, A (rank, d_in), B (d_out, rank) (Hu et al. 2021, arXiv 2106.09685).

    B starts at zero, so a new LoRA changes nothing. The scale alpha / rank is 1."""

    def forward(self, x):
        a, b = self.lora_a.to(x.dtype), self.lora_b.to(x.dtype)
        return super().forward(x) + F.linear(F.linear(x, a), b)


def add_adapter(llm, config):
    """What --method asks for beside MoME, put into a Llama -> what the checkpoint must know of it."""
    if config.method != "lora":
        return {}
    rank = lora_rank(llm.config, config)
    add_lora(llm, rank)
    return {"lora_rank": rank}


def add_lora(llm, rank):
    """Put trainable LoRAs of this rank on the attention's four projections in every layer of a Llama."""
    for layer in llm.layers:
        for name in TARGETS:
            linear = getattr(layer.self_attn, name)
            kind = type(linear)
            linear.__class__ = type(f"LoRA{kind.__name__}", (LoRA, kind), {})
            d_out, d_in = linear.weight.shape
            device = linear.weight.device
            linear.lora_a = nn.Parameter(torch.empty(rank, d_in, device=device).uniform_(-1, 1) / d_in ** 0.5)
            linear.lora_b = nn.Parameter(torch.zeros(d_out, rank, device=device))


def lora_rank(llm, experts):
    """The rank at which LoRA has as many parameters as MoME has active ones, or as near as it gets.

    llm: LlamaConfig; experts: anything with n_routed, top_k, n_shared, bottleneck, the MoME to compare with."""
    width, kv_width, n_active = llm.n_heads * llm.head_dim, llm.n_kv_heads * llm.head_dim, experts.n_shared
    n_active += experts.top_k if experts.n_routed else 0
    one_expert = (2 * llm.dim + 1) * experts.bottleneck + llm.dim
    mome = n_active * one_expert + llm.dim * experts.n_routed
    lora_of_rank_1 = 2 * (llm.dim + width) + 2 * (llm.dim + kv_width)
    return max(1, round(mome / lora_of_rank_1))
