"""MoME: Mixture of Matryoshka Experts for audio-visual speech recognition (arXiv 2510.04136), the model in one file.

Read it downward: configs -> a Llama's leaf modules -> the MoME layer (the idea) -> the decoder -> Matryoshka pooling and
projectors -> the audio-visual model: its loss over all rates, its decoding.

Axes, in names, shape comments and einsums:

    B batch        N tokens of all clips, flattened     E experts, shared ones first     H attention heads
    T time         V vocabulary                         K experts that a token passes    R bottleneck width
    D width        S slots of the KV cache              W beam width

Choices that the paper does not settle are marked `not in the paper`.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import weights
from encoders import AudioConfig, AudioEncoder, VideoConfig, VideoEncoder

PLACES = ("attn", "ffn", "layer")
PARTS = 8                                                 # into which `linear` cuts large weights
FEW_ROWS = 4 if torch.backends.mkl.is_available() else 0  # for at most so many rows, where MKL computes


# --- configs ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the decoder and of the MoME modules beside its layers; no experts at all make it a plain Llama."""
    vocab_size: int
    dim: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2
    ffn_dim: int = 352
    head_dim: int = 0       # width of a head; 0: dim / n_heads
    rope_theta: float = 10_000.0
    rope_scaling: tuple[float, ...] = ()  # see `rope_tables`: none, linear's factor, or llama3's four numbers
    norm_eps: float = 1e-5
    attention_bias: bool = False
    mlp_bias: bool = False
    tied: bool = True       # the output head is the embedding
    n_routed: int = 0       # routed experts, of which each token is sent to top_k
    top_k: int = 2
    n_shared: int = 0       # experts that every token passes
    bottleneck: int = 8     # hidden width of an expert
    place: str = "attn"     # what MoME stands beside: attn, ffn, or the whole layer

    def __post_init__(self):
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.place not in PLACES:
            raise ValueError(f"place {self.place!r}: one of {', '.join(PLACES)}")
        if min(self.n_routed, self.n_shared) < 0 or self.bottleneck < 1:
            raise ValueError(f"n_routed {self.n_routed}, n_shared {self.n_shared}, bottleneck {self.bottleneck}: "
                             "counts of experts are 0 or more, a bottleneck is at least 1 wide")
        if self.n_routed and not 1 <= self.top_k <= self.n_routed:
            raise ValueError(f"top_k {self.top_k}: a token goes to 1 or more and at most all {self.n_routed} routed experts")


@dataclass(frozen=True)
class AVSRConfig:
    """The whole model. A stream whose encoder is None is one that the model does not have."""
    llm: LlamaConfig
    audio: AudioConfig | None = AudioConfig()
    video: VideoConfig | None = VideoConfig()
    projector_dim: int = 256             # hidden width of the projectors; not in the paper
    bos: int = 0                         # token ids of the LLM's tokenizer
    eos: int = 1
    prompt: tuple[int, ...] = (2,)       # the fixed text between the streams and the transcript
    balance_weight: float = 0.01         # of the load-balancing loss
    max_tokens: int = 32                 # at most so many are decoded


# --- a Llama's leaf modules ------------------------------------------------------------------------------------------

def linear(x, weight, bias=None):
    """x (..., d_in) @ weight (d_out, d_in).T + bias -> (..., d_out).

    A few rows, as in a step of decoding, are bound by reading the weights, and MKL reads them on one core at a third of the
    memory's speed. As a batch of PARTS products, each with some rows of the weights, all cores read as fast as they can;
    that pays from about 2 ** 16 weights on."""
    few = 0 < x.numel() <= FEW_ROWS * x.shape[-1] and weight.numel() >= 2 ** 16 and len(weight) % PARTS == 0
    if not few or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    columns = x.reshape(1, -1, x.shape[-1]).mT.expand(PARTS, -1, -1)         # (PARTS, d_in, N)
    y = torch.bmm(weight.unflatten(0, (PARTS, -1)), columns).flatten(0, 1)   # (d_out, N)
    y = y.mT.reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias.to(y.dtype)


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; the mean of squares is taken in fp32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_tables(positions, head_dim, theta, scaling=()):
    """cos and sin of the rotary angles at positions (..., T) -> two (..., T, D/H), in the half-split order of HF's Llamas;
    sin bears the sign that `rotate` needs.

    `scaling` stretches positions for contexts longer than those of pretraining: by (factor,) all of them alike; by Llama 3's
    (factor, low, high, context) only the slow rotations, of fewer than `low` turns in the old context; those of more than
    `high` turns stay, and between the two it changes smoothly."""
    rates = theta ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    if len(scaling) == 1:
        rates = rates / scaling[0]
    elif scaling:
        factor, low, high, context = scaling
        kept = ((context * rates / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        rates = rates * kept + rates / factor * (1 - kept)
    angles = positions[..., None].float() * rates
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + half]) of x (B, H, T, D/H) by its position's angle."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class KVCache:
    """Keys and values of all layers, allocated once: (layers, B * W, kv heads, S, D/H).

    First comes a prefix of B rows, stored for each of its W beams, then a token at a time of B * W rows. `real`
    (B * W, S), where there is one, tells which slots may be looked at: prefixes of unequal length leave padding between
    them and the words that follow."""

    def __init__(self, config, batch, slots, like, beam=1):
        shape = (config.n_layers, batch * beam, config.n_kv_heads, slots, config.head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)
        self.real, self.prefix, self.filled = None, 0, 0

    def write(self, layer, k, v):
        """Store k and v (B or B * W, kv heads, T, D/H) in the next slots; returns what these T tokens may look at."""
        start, end = self.filled, self.filled + k.shape[2]
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            store.unflatten(0, (len(new), -1))[:, :, :, start:end] = new[:, None]
        return (self.k[layer, :, :, :end], self.v[layer, :, :, :end]) if start else (k, v)

    def advance(self, n_tokens, real=None):
        """After all layers have written: move on. `real` (B, T) comes with a padded prefix."""
        if real is not None:
            self.real = torch.ones(self.k.shape[1], self.k.shape[3], dtype=torch.bool, device=real.device)
            self.real.unflatten(0, (len(real), -1))[:, :, :n_tokens] = real[:, None]
        self.prefix = self.prefix or n_tokens
        self.filled += n_tokens

    def pick(self, rows):
        """Of each beam keep what follows the prefix of these rows (a search's survivors); the beams of one clip share
        their prefix, so that it need not move."""
        for store in (self.k, self.v):
            store[:, :, :, self.prefix:self.filled] = store[:, rows, :, self.prefix:self.filled]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: n_kv_heads keys and values serve n_heads queries."""

    def __init__(self, config):
        super().__init__()
        self.head_dim, bias = config.head_dim, config.attention_bias
        self.q_proj = Linear(config.dim, config.n_heads * config.head_dim, bias=bias)
        self.k_proj = Linear(config.dim, config.n_kv_heads * config.head_dim, bias=bias)
        self.v_proj = Linear(config.dim, config.n_kv_heads * config.head_dim, bias=bias)
        self.o_proj = Linear(config.n_heads * config.head_dim, config.dim, bias=bias)

    def forward(self, x, rope, cache=None, layer=0, mask=None):
        """x (B, T, D) -> (B, T, D), causal; with a filled cache, x is what follows and `mask` (B, 1, T, S) what it sees."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)   # (B, H, T, D/H)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.write(layer, k, v)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=x.shape[1] > 1, enable_gqa=True)
        return self.o_proj(h.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """The feed-forward block: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.up_proj = Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.down_proj = Linear(config.ffn_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# --- the idea: a mixture of Matryoshka experts -----------------------------------------------------------------------

class MoME(nn.Module):
    """MoME(h) = sum_{n <= N_s} E_n(h) + sum_{n > N_s} g_n E_n(h)                                       (paper, section 3)

    An expert is a bottleneck, E(h) = up(gelu(down(h))); the first N_s are shared, the others are routed: g is the top-K
    sparse output of one linear router. Nothing here knows a rate or a modality: a token of sound pooled by 16, a token
    of lips pooled by 2 and a word meet the same router and the same experts, and that is what lets what is learned at
    fine rates serve the coarse ones.

    Called on (..., dim), it returns the same shape; `balance_loss` then belongs to that call. Up-projections start at
    zero, so that a new MoME changes nothing. Beside a bf16 Llama the parameters stay fp32, for the optimizer's small
    steps, and are rounded when used."""

    def __init__(self, dim, n_routed, top_k, n_shared, bottleneck):
        super().__init__()
        self.n_routed, self.n_shared, self.top_k = n_routed, n_shared, top_k
        n_experts = n_shared + n_routed
        self.router = nn.Linear(dim, n_routed, bias=False) if n_routed else None
        self.down = nn.Parameter(torch.empty(n_experts, bottleneck, dim).uniform_(-1, 1) / dim ** 0.5)  # (E, R, D)
        self.down_bias = nn.Parameter(torch.zeros(n_experts, bottleneck))                               # (E, R)
        self.up = nn.Parameter(torch.zeros(n_experts, bottleneck + 1, dim))      # (E, R + 1, D), the last row is the bias
        self.path, self.routed = "auto", None

    def forward(self, h, mask=None):
        """h (..., D), mask (...) true at real tokens (padding must not count in the balance) -> (..., D)."""
        flat = h.reshape(-1, h.shape[-1])                                    # (N, D)
        gates, experts = self.route(flat, None if mask is None else mask.reshape(-1))
        paths = {"loop": self.loop, "grouped": self.grouped, "wide": self.wide}
        path = self.best_path(flat) if self.path == "auto" else self.path
        down, bias, up = (p.to(h.dtype) for p in (self.down, self.down_bias, self.up))
        return paths[path](flat, gates, experts, down, bias, up).view_as(h)

    def best_path(self, h):
        """`wide` computes (E - K) * R products that `grouped` saves by moving K copies of a token; that pays from about 64
        for each copy on, unless the tokens are few (extras/bench.py --plot, CPU; the paper's 23 experts of 12, top 4, are
        at 45). `grouped` also wants bf16, or fp32 on a CPU, and whole rows of 16 bytes."""
        (E, R, D), K = self.down.shape, self.n_shared + (self.top_k if self.n_routed else 0)
        able = h.dtype == torch.bfloat16 or (h.dtype == torch.float32 and h.device.type == "cpu")
        pays = (E - K) * R > 64 * K and len(h) > 16
        return "grouped" if able and pays and D * h.element_size() % 16 == 0 else "wide"

    def route(self, h, mask=None):
        """h (N, D) -> gates and experts, both (N, K): whom each token is sent to and how much each counts. The shared
        experts come first, with gates of 1 (so K counts them too), then the top_k routed ones, whose gates sum to 1.

        Softmax over all routed experts, the largest, renormalised (but a single one keeps its probability, or the router
        would learn nothing from it; not in the paper), in fp32 whatever the model computes in: an ill-rounded choice is a
        wrong expert."""
        gates = h.new_ones(len(h), self.n_shared)
        experts = torch.arange(self.n_shared, device=h.device).expand(len(h), -1)
        if self.router is None:
            return gates, experts
        with torch.autocast("cuda" if h.is_cuda else "cpu", enabled=False):
            probs = F.linear(h.float(), self.router.weight.float()).softmax(dim=-1)              # (N, N_r)
        top, chosen = probs.topk(self.top_k, dim=-1)
        self.routed = probs, chosen, mask
        top = top / top.sum(dim=-1, keepdim=True) if self.top_k > 1 else top
        return torch.cat([gates, top.to(h.dtype)], dim=1), torch.cat([experts, chosen + self.n_shared], dim=1)

    @property
    def balance_loss(self):
        """Of the last call, Switch Transformer's N_r sum_e f_e P_e: f_e the share of choices that fell on e, P_e its mean
        probability, over real tokens; 1 when the load is even."""
        if self.routed is None:
            return self.down.new_zeros(())
        probs, chosen, mask = self.routed
        counted = torch.ones_like(probs[:, :1]) if mask is None else mask[:, None].to(probs)
        total = counted.sum().clamp(min=1)
        share = torch.zeros_like(probs).scatter(1, chosen, counted.expand(chosen.shape)).sum(0) / (total * self.top_k)
        return self.n_routed * (share * (probs * counted).sum(0) / total).sum()

    @staticmethod
    def loop(h, gates, experts, down, bias, up):
        """The equation, expert by expert, each on the tokens that were sent to it."""
        out = torch.zeros_like(h)
        for n in range(len(down)):
            tokens, k = (experts == n).nonzero(as_tuple=True)
            hidden = F.gelu(h[tokens] @ down[n].T + bias[n])
            expert = F.pad(hidden, (0, 1), value=1) @ up[n]
            out = out.index_add(0, tokens, gates[tokens, k, None] * expert)
        return out

    @staticmethod
    def grouped(h, gates, experts, down, bias, up):
        """Tokens sorted by expert, so that each expert's are a block of one grouped product: the least arithmetic, K of E
        experts, but every token is copied K times, moved there and back. Rows are padded to the 16 bytes it wants."""
        if h.shape[1] * h.element_size() % 16:
            raise ValueError(f"path 'grouped': rows of {h.shape[1]} numbers are not whole 16 bytes; use 'wide' or 'loop'")
        (E, R, _), K = down.shape, experts.shape[1]
        expert, order = experts.flatten().sort()                             # (N * K,)
        tokens = order // K
        ends = torch.searchsorted(expert, torch.arange(E, device=h.device), right=True).int()                    # (E,)
        spare = -(R + 1) % (16 // h.element_size())                          # rows of zeros
        down, bias, up = F.pad(down, (0, 0, 0, 1 + spare)), F.pad(bias, (0, 1 + spare)), F.pad(up, (0, 0, 0, spare))
        hidden = F.grouped_mm(h.index_select(0, tokens), down.mT, offs=ends)                     # (N * K, R + 1 + spare)
        hidden = F.gelu(hidden + bias[expert]).index_fill(1, torch.tensor([R], device=h.device), 1)
        moved = F.grouped_mm(hidden * gates.flatten()[order, None], up, offs=ends)               # (N * K, D)
        return torch.zeros_like(h).index_add(0, tokens, moved)

    @staticmethod
    def wide(h, gates, experts, down, bias, up):
        """All experts as one bottleneck of width E * R; the gates zero what was not chosen: E / K times the arithmetic, but
        no token moves, and experts this narrow cost less to compute than their tokens cost to sort."""
        hidden = F.gelu(linear(h, down.flatten(0, 1), bias.flatten()))       # (N, E * R)
        hidden = F.pad(hidden.unflatten(-1, bias.shape), (0, 1), value=1)    # (N, E, R + 1)
        dense = gates.new_zeros(len(h), len(down)).scatter(1, experts, gates)                    # (N, E)
        return (hidden * dense[..., None]).flatten(1) @ up.flatten(0, 1)


# --- the decoder -----------------------------------------------------------------------------------------------------

class Layer(nn.Module):
    """One Llama layer with MoME in parallel: its output is added to that of the attention, the feed-forward or the layer.

    What the experts read is the block's own normalised input; beside the whole layer, the attention's (not in the paper)."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.add_mome(config)

    def add_mome(self, config):
        """A new MoME as `config` says, or none; also for a layer that came from a file."""
        experts = config.n_routed + config.n_shared
        self.place = config.place if experts else None
        self.mome = MoME(config.dim, config.n_routed, config.top_k, config.n_shared, config.bottleneck) if experts else None

    def forward(self, x, real=None, **attention):
        """x (B, T, D), real (B, T) true at tokens that are not padding -> (B, T, D)."""
        h = self.input_layernorm(x)
        mixed = self.mome(h, real) if self.place in ("attn", "layer") else 0
        x = x + self.self_attn(h, **attention)
        if self.place == "attn":
            x = x + mixed
        h = self.post_attention_layernorm(x)
        x = x + self.mlp(h)
        if self.place == "ffn":
            mixed = self.mome(h, real)
        return x + mixed if self.place in ("ffn", "layer") else x


class Llama(nn.Module):
    """A Llama decoder; its modules bear the names of HF's LlamaForCausalLM."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, **experts):
        """The Llama in an HF folder (config.json, safetensors, one or sharded) in `dtype`, with new MoME modules in fp32 if
        `experts` (n_routed and so on) asks for them. Raises weights.WeightsError where something does not fit."""
        config = LlamaConfig(**weights.llama_config(folder))
        with torch.device("meta"):  # no memory yet: each tensor comes from the file, so that one copy is all there ever is
            llm = cls(config)
        weights.fill(llm, weights.Shards(folder), weights.llama_name, folder, dtype, weights.LLAMA_DROPPED)
        llm.config = replace(config, **experts)
        for layer in llm.layers:
            layer.add_mome(llm.config)
        return llm

    def forward(self, tokens):
        """tokens (B, T) -> logits (B, T, V)."""
        return self.logits(self.trunk(self.embed_tokens(tokens)))

    def logits(self, hidden):
        """hidden (..., D) -> (..., V)."""
        return linear(hidden, self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight)

    def trunk(self, x, real=None, positions=None, cache=None):
        """Embeddings x (B, T, D) -> hidden states (B, T, D), normalised for `logits`.

        real (B, T): true at tokens; padding stands on the right. With a cache that holds a prefix, x is the one token
        that follows in each row, at `positions` (B,)."""
        B, T, _ = x.shape
        positions = torch.arange(T, device=x.device) if positions is None else positions[:, None, None]  # (T,) or (B, 1, 1)
        rope = [table.to(x.dtype) for table in rope_tables(positions, self.config.head_dim, self.config.rope_theta,
                                                           self.config.rope_scaling)]
        mask = None                                        # of a prefix: causal, so padding on the right is never seen
        if cache is not None and cache.filled:
            assert T == 1, f"after its prefix a cache takes one token at a time, not {T}"
            mask = None if cache.real is None else cache.real[:, None, None, :cache.filled + 1]    # (B, 1, 1, S)
        for i, layer in enumerate(self.layers):
            x = layer(x, real=real, rope=rope, cache=cache, layer=i, mask=mask)
        if cache is not None:
            cache.advance(T, real)
        return self.norm(x)

    def transcript_loss(self, prefixes, labels):
        """Mean next-token cross-entropy of `labels` (B lists of ids, as tensors) after `prefixes` (B tensors (T_b, D)).

        Logits are computed only where a label stands: with a real vocabulary they would be most of the memory."""
        rows = [torch.cat([p, self.embed_tokens(y[:-1])]) for p, y in zip(prefixes, labels)]
        real = pad_sequence([torch.ones(len(row), dtype=torch.bool, device=row.device) for row in rows], True)
        hidden = self.trunk(pad_sequence(rows, True), real)                               # (B, T, D)
        hidden = torch.cat([h[len(p) - 1:len(p) - 1 + len(y)] for h, p, y in zip(hidden, prefixes, labels)])
        return F.cross_entropy(self.logits(hidden).float(), torch.cat(labels))

    @torch.no_grad()
    def generate(self, prefixes, eos, beam=1, max_tokens=32):
        """Continue `prefixes` (B tensors (T_b, D)) -> B pairs (token ids, mean log-probability per token), <eos> scored
        but not returned.

        A beam search whose width of 1 is greedy decoding. A hypothesis that has ended waits, adding nothing; the best
        is the one of the highest mean log-probability (not in the paper)."""
        B, V, device, sizes = len(prefixes), self.config.vocab_size, prefixes[0].device, [len(p) for p in prefixes]
        lengths, x = torch.tensor(sizes, device=device), pad_sequence(prefixes, True)
        real = torch.arange(x.shape[1], device=device) < lengths[:, None] if len(set(sizes)) > 1 else None
        cache = KVCache(self.config, B, x.shape[1] + max_tokens, x, beam)
        last = self.trunk(x, real, cache=cache)[torch.arange(B, device=device), lengths - 1]          # (B, D)
        last, lengths = last.repeat_interleave(beam, 0), lengths.repeat_interleave(beam)              # (B * W, ...)
        scores = torch.full((B, beam), float("-inf"), device=device)
        scores[:, 0] = 0                                                     # the beams of a clip begin as one
        done = torch.zeros(B * beam, dtype=torch.bool, device=device)
        tokens = torch.zeros(B * beam, 0, dtype=torch.long, device=device)
        waiting = torch.full((V,), float("-inf"), device=device)
        waiting[eos] = 0
        for step in range(max_tokens):
            logp = self.logits(last).float().log_softmax(-1)
            logp = torch.where(done[:, None], waiting, logp).view(B, beam, V)
            scores, best = (scores[..., None] + logp).flatten(1).topk(beam)  # (B, W) of W * V continuations
            parents = (best // V + beam * torch.arange(B, device=device)[:, None]).flatten()
            chosen = (best % V).flatten()
            if beam > 1:
                cache.pick(parents)
            tokens, done = torch.cat([tokens[parents], chosen[:, None]], 1), done[parents] | (chosen == eos)
            if step == max_tokens - 1 or done.all():                         # the one place that waits for the device
                break
            last = self.trunk(self.embed_tokens(chosen[:, None]), positions=lengths + step, cache=cache)[:, 0]
        n_words = (tokens != eos).sum(-1).view(B, beam)
        means = scores / (n_words + done.view(B, beam)).clamp(min=1)
        winners = means.argmax(-1)
        tokens, n_words = tokens.view(B, beam, -1), n_words.tolist()
        return [(tokens[b, w, :n_words[b][w]].tolist(), means[b, w].item()) for b, w in enumerate(winners.tolist())]

    def balance_loss(self):
        """Mean of the layers' balancing losses of their last call."""
        losses = [layer.mome.balance_loss for layer in self.layers if layer.mome is not None and self.config.n_routed]
        return torch.stack(losses).mean() if losses else self.norm.weight.new_zeros(())


# --- Matryoshka pooling and the projectors ---------------------------------------------------------------------------

def pool(x, lengths, rate):
    """Average each `rate` successive tokens: x (B, T, D), lengths (B,) -> (B, ceil(T / rate), D), (B,) new lengths.

    Padding never enters a mean; a last window that is not full is the mean of what it has (not in the paper)."""
    B, T, D = x.shape
    real = (torch.arange(T, device=x.device) < lengths.to(x.device)[:, None]).to(x)[..., None]
    x, real = (F.pad(t, (0, 0, 0, -T % rate)).view(B, -1, rate, t.shape[-1]) for t in (x * real, real))
    return x.sum(2) / real.sum(2).clamp(min=1), (lengths + rate - 1) // rate


class Projector(nn.Sequential):
    """Encoder width -> LLM width. One for each stream serves all rates, also rates it was never trained at."""

    def __init__(self, d_in, d_hidden, d_out):
        super().__init__(nn.Linear(d_in, d_hidden), nn.ReLU(), nn.Linear(d_hidden, d_out), nn.LayerNorm(d_out))


# --- the audio-visual model ------------------------------------------------------------------------------------------

class AVSR(nn.Module):
    """Frozen encoders -> pooling -> projectors -> frozen Llama with trained MoME modules.

    `features` below is {stream: (x, lengths)}: log-mels (B, M, frames) for "audio", mouths (B, 1, T, H, W) for "video".
    `rates` is {stream: rate}; streams that it does not name stay out of the input, which is always

        <bos> <audio> A </audio> <video> V </video> prompt transcript <eos>
    """

    def __init__(self, config: AVSRConfig, llm=None, **encoders):
        """`llm` and encoders (audio=, video=) that are given, as `from_pretrained` makes them, are used; `config` describes
        them, and all others are built from it."""
        super().__init__()
        self.config, width = config, config.llm.dim
        self.llm = llm or Llama(config.llm)
        self.encoders = nn.ModuleDict({stream: encoders.get(stream) or build(sizes) for stream, build, sizes in (
            ("audio", AudioEncoder, config.audio), ("video", VideoEncoder, config.video)) if sizes is not None})
        self.projectors = nn.ModuleDict({stream: Projector(encoder.config.dim, config.projector_dim, width)
                                         for stream, encoder in self.encoders.items()})
        self.markers = nn.ParameterDict({stream: nn.Parameter(0.02 * torch.randn(2, width)) for stream in self.encoders})
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.startswith(("llm.", "encoders.")) or ".mome." in name)

    @property
    def streams(self):
        """The streams that this model reads, in the order of its input."""
        return tuple(self.encoders)

    @property
    def device(self):
        return self.llm.norm.weight.device

    def train(self, mode=True):
        """The frozen encoders stay in eval mode: a BatchNorm would move its statistics even without gradients."""
        super().train(mode)
        self.encoders.eval()
        return self

    @torch.no_grad()
    def encode(self, features):
        """Each stream once, for all rates: -> {stream: (tokens (B, T, D_encoder), lengths (B,))}."""
        encoded = {}
        for stream, (x, lengths) in features.items():
            encoder = self.encoders[stream]
            encoded[stream] = encoder(x.to(encoder.norm.weight.dtype), lengths), encoder.n_tokens(lengths)
        return encoded

    def prefix(self, encoded, rates):
        """What the LLM reads before the transcript, a list of B embedding sequences (T_b, D)."""
        table = self.llm.embed_tokens.weight
        streams = []
        for stream in self.streams:
            if stream in rates:
                tokens, lengths = encoded[stream]
                tokens, lengths = pool(tokens.float(), lengths, rates[stream])
                streams.append((self.markers[stream].to(table), self.projectors[stream](tokens).to(table), lengths.tolist()))
        rows = []
        for b in range(len(streams[0][1])):
            rows.append([table[self.config.bos, None]])
            for (opening, closing), tokens, lengths in streams:
                rows[b] += [opening[None], tokens[b, :lengths[b]], closing[None]]
            rows[b].append(table[list(self.config.prompt)])
        return [torch.cat(parts) for parts in rows]

    def loss(self, encoded, transcripts, pairs):
        """Mean over the rate pairs of the next-token cross-entropy + the weighted balancing loss (paper, section 3), for
        clips that `encode` has read once for all of them.

        transcripts: B lists of token ids; pairs: a list of `rates`."""
        labels = [torch.tensor([*ids, self.config.eos], device=self.device) for ids in transcripts]
        losses = [self.llm.transcript_loss(self.prefix(encoded, rates), labels)
                  + self.config.balance_weight * self.llm.balance_loss() for rates in pairs]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def generate(self, encoded, rates, beam=1, max_tokens=None):
        """Decode a batch of encoded clips -> [(token ids, mean log-probability per token)]; see `Llama.generate`."""
        return self.llm.generate(self.prefix(encoded, rates), self.config.eos, beam, max_tokens or self.config.max_tokens)
