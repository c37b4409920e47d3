"""MoME: Mixture of Matryoshka Experts for audio-visual speech recognition (arXiv 2510.04136), the model.

Read downward: configs -> MoME, the idea -> a Llama with MoME beside its layers -> Matryoshka pooling and
projectors -> AVSR, the whole model with its loss. train.py trains it and sample.py decodes with it.
What differs from the paper or adds to it is marked `not in the paper`. Axes, in names and shape comments:

    B batch    N tokens of all clips, flattened        E experts: N_s shared ones first, then N_r routed ones
    T time     H attention heads                       K routed experts that one token is sent to (top_k)
    D width    V vocabulary  S stored tokens           A = N_s + K experts that one token passes through
                                                       R bottleneck width of an expert
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from encoders import AudioConfig, AudioEncoder, VideoConfig, VideoEncoder, valid_mask

PLACES = ("attn", "ffn", "layer")


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the Llama and of the MoME beside each of its layers. Without experts it is a plain Llama."""
    vocab_size: int
    dim: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2
    ffn_dim: int = 352
    head_dim: int = 0                     # 0: dim / n_heads
    rope_theta: float = 10_000.0
    rope_scaling: tuple[float, ...] = ()  # see real/weights.py, which scales Llama.inv_freq
    norm_eps: float = 1e-5
    attention_bias: bool = False
    mlp_bias: bool = False
    tied: bool = True                     # the output head shares the embedding's weight
    n_routed: int = 0                     # routed experts; each token is sent to top_k of them
    top_k: int = 2
    n_shared: int = 0                     # experts that every token passes through
    bottleneck: int = 8                   # hidden width of an expert
    place: str = "attn"                   # MoME stands beside: attn, ffn, or the whole layer

    def __post_init__(self):
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.place not in PLACES:
            raise ValueError(f"place {self.place!r}: expected one of {', '.join(PLACES)}")
        if min(self.n_routed, self.n_shared) < 0 or self.bottleneck < 1:
            raise ValueError("n_routed and n_shared must be 0 or more, bottleneck 1 or more")
        if self.n_routed and not 1 <= self.top_k <= self.n_routed:
            raise ValueError(f"top_k {self.top_k}: expected 1 to n_routed, {self.n_routed}")


@dataclass(frozen=True)
class AVSRConfig:
    """The whole model. A stream whose encoder config is None does not exist in the model."""
    llm: LlamaConfig
    audio: AudioConfig | None = AudioConfig()
    video: VideoConfig | None = VideoConfig()
    projector_dim: int = 256              # hidden width of the projectors; not in the paper
    bos: int = 0                          # ids of the LLM's tokenizer; real/setup.py sets them
    eos: int = 1
    prompt: tuple[int, ...] = (2,)        # fixed text between the streams and the transcript
    max_tokens: int = 32                  # most tokens that are generated for a clip, <eos> included


# --- the idea: a mixture of Matryoshka experts ------------------------------------------------------------
class MoME(nn.Module):
    """MoME(h) = sum_{n <= N_s} E_n(h) + sum_{n > N_s} g_n E_n(h)                         (paper, section 3)

    An expert is a bottleneck: E(h) = gelu(h @ down + b) @ up + c. Every token passes the N_s shared experts.
    A linear router sends it to K of the N_r routed experts, with gates g.
    Nothing here knows a rate or a stream. A sound token pooled by 16, a lip token pooled by 2 and a word meet
    the same router and experts. The paper's aim: what experts learn at fine rates serves coarse rates.
    Up-projections start at zero, so a new MoME adds nothing to its layer (not in the paper). Parameters stay
    fp32 beside a bf16 Llama: AdamW's steps are too small for bf16."""
    sum_counts = staticmethod(lambda counts: counts)    # real/run.py sums over torchrun's processes here
    def __init__(self, dim, n_routed, top_k, n_shared, bottleneck):
        super().__init__()
        self.n_routed, self.top_k, self.n_shared = n_routed, top_k, n_shared
        self.n_active = n_shared + (top_k if n_routed else 0)             # A
        self.router = nn.Linear(dim, n_routed, bias=False) if n_routed else None
        E, R, D = n_shared + n_routed, bottleneck, dim
        bound = D ** -0.5
        self.down = nn.Parameter(torch.empty(E, R, D).uniform_(-bound, bound))
        self.down_bias = nn.Parameter(torch.zeros(E, R))
        self.up = nn.Parameter(torch.zeros(E, R, D))
        self.up_bias = nn.Parameter(torch.zeros(E, D))
        self.path = "auto"                  # how to compute: loop, grouped, wide, or auto to choose
        self.routed = None                  # the last call's routing, for balance_loss

    def forward(self, h):
        """h (..., D) -> (..., D). In training h has no padding (Llama.hidden_states)."""
        x = h.reshape(-1, h.shape[-1])                                    # (N, D)
        gates, experts = self.route(x)                                    # (N, A), (N, A)
        path = self.best_path(x) if self.path == "auto" else self.path
        compute = getattr(self, path)                                     # loop, grouped or wide
        weights = self.down, self.down_bias, self.up, self.up_bias
        weights = [weight.to(h.dtype) for weight in weights]
        return compute(x, gates, experts, *weights).view_as(h)

    def route(self, x):
        """x (N, D) -> gates (N, A) and expert numbers (N, A). Shared experts come first, with gates of 1.
        Routed gates: a softmax over all N_r logits, its K largest values divided by their sum. That equals
        a softmax over the K largest logits. Two tokens, N_s = 0, N_r = 4, K = 2:

            logits [2, 0, 1, -1]  softmax [.64, .09, .24, .03]  experts 0, 2  gates .73, .27
            logits [0, 0, 3,  3]  softmax [.02, .02, .48, .48]  experts 2, 3  gates .50, .50
        With K = 1 the softmax value stays: a gate of 1 would give the router no gradient (not in the paper).
        The router computes in fp32: a rounded logit could choose the wrong expert."""
        gates = x.new_ones(len(x), self.n_shared)
        experts = torch.arange(self.n_shared, device=x.device)
        experts = experts.expand(len(x), -1)
        if self.router is None:
            return gates, experts
        with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
            logits = F.linear(x.float(), self.router.weight.float())      # (N, N_r)
        probs = logits.softmax(dim=-1)
        top, chosen = probs.topk(self.top_k, dim=-1)                      # (N, K)
        self.routed = probs, chosen
        if self.top_k > 1:
            top = top / top.sum(dim=-1, keepdim=True)
        gates = torch.cat([gates, top.to(x.dtype)], dim=1)
        experts = torch.cat([experts, chosen + self.n_shared], dim=1)
        return gates, experts

    @property
    def balance_loss(self):
        """N_r * sum_e f_e P_e of the last call (Switch Transformer); 1 for an even load. f_e: e's share of
        the N K choices, not of the N tokens (not in the paper). P_e: e's mean probability."""
        if self.routed is None:
            return self.down.new_zeros(())
        probs, chosen = self.routed
        choices = torch.zeros_like(probs).scatter(1, chosen, 1.0)         # (N, N_r) of 0 and 1
        counts = self.sum_counts(choices.sum(0))                          # (N_r,)
        f = counts / counts.sum()                                         # (N_r,) counts.sum() is K N
        P = probs.sum(0) * self.top_k / counts.sum()                      # (N_r,) a mean over N tokens
        return self.n_routed * (f * P).sum()

    @staticmethod
    def loop(x, gates, experts, down, down_bias, up, up_bias):
        """The equation word for word: each expert computes the tokens that were sent to it."""
        out = torch.zeros_like(x)
        for n in range(len(down)):
            token, slot = (experts == n).nonzero(as_tuple=True)
            hidden = F.gelu(x[token] @ down[n].T + down_bias[n])
            y = hidden @ up[n] + up_bias[n]
            out = out.index_add(0, token, gates[token, slot, None] * y)
        return out

    @staticmethod
    def wide(x, gates, experts, down, down_bias, up, up_bias):
        """All experts as one bottleneck of width E * R. Gates of 0 remove the experts that were not chosen.
        This is E / A times the arithmetic, but no token moves. For narrow experts moving costs more."""
        gate = gates.new_zeros(len(x), len(down)).scatter(1, experts, gates)             # (N, E)
        hidden = F.linear(x, down.flatten(0, 1), down_bias.flatten())                    # (N, E * R)
        hidden = F.gelu(hidden).unflatten(1, down_bias.shape)
        hidden = (hidden * gate[..., None]).flatten(1)
        return torch.addmm(gate @ up_bias, hidden, up.flatten(0, 1))                     # (N, D)

    @staticmethod
    def grouped(x, gates, experts, down, down_bias, up, up_bias):
        """Tokens sorted by expert, so that one grouped product serves all experts: the least arithmetic.
        But every token is copied A times. F.grouped_mm needs rows of n * 16 bytes: zeros are added to R."""
        (E, R, D), A = down.shape, experts.shape[1]
        if D * x.element_size() % 16:
            raise ValueError(f"path 'grouped': a row of {D} numbers is not n * 16 bytes; use 'wide'")
        expert, order = experts.flatten().sort()                          # (N * A,)
        token = order // A
        ends = torch.searchsorted(expert, torch.arange(E, device=x.device), right=True).int()
        spare = -R % (16 // x.element_size())
        down = F.pad(down, (0, 0, 0, spare))
        down_bias = F.pad(down_bias, (0, spare))
        up = F.pad(up, (0, 0, 0, spare))
        x_of_expert = x.index_select(0, token)                            # (N * A, D)
        hidden = F.grouped_mm(x_of_expert, down.mT, offs=ends)
        hidden = F.gelu(hidden + down_bias[expert])                       # (N * A, R + spare)
        y = F.grouped_mm(hidden, up, offs=ends) + up_bias[expert]         # (N * A, D)
        gate = gates.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, token, gate * y)

    def best_path(self, x):
        """The path for x (N, D). `grouped` skips E - A experts but copies a token A times. Else `wide`."""
        (E, R, D), A = self.down.shape, self.n_active
        supported = x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and not x.is_cuda)
        supported = supported and D * x.element_size() % 16 == 0
        faster = (E - A) * R > 64 * A and len(x) > 16
        return "grouped" if faster and supported else "wide"


# --- a Llama ----------------------------------------------------------------------------------------------
def rope_tables(positions, inv_freq):
    """positions (..., T), inv_freq (D/H/2,) -> cos, and sin with its first half negated, (..., T, D/H)."""
    angles = positions[..., None].float() * inv_freq
    cos, sin = angles.cos(), angles.sin()
    sin = torch.cat([-sin, sin], -1)
    return torch.cat([cos, cos], -1), sin


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + half]) of x (B, H, T, D/H) by the angle of its position."""
    half = x.shape[-1] // 2
    partners = x.roll(half, -1)
    return x * cos + partners * sin


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: n_kv_heads keys and values serve n_heads queries."""
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        bias = config.attention_bias
        width = config.n_heads * config.head_dim
        kv_width = config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, width, bias=bias)
        self.k_proj = nn.Linear(config.dim, kv_width, bias=bias)
        self.v_proj = nn.Linear(config.dim, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, config.dim, bias=bias)

    def forward(self, x, rope, lengths=None, write=None, mask=None):
        """x (B, T, D) -> (B, T, D), causal. rope: see rope_tables. With a list of lengths x is (1, N, D):
        clips one after another. Each attends to itself alone. In decoding `write(k, v)` stores new keys and
        values and returns all S stored ones. mask (B, 1, 1, S) is true where a new token may look."""
        def heads(y):
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)   # (B, H, T, D/H)
        causal = write is None or x.shape[1] > 1    # one new token may look at all that is stored
        def attend(q, k, v):
            return F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=causal, enable_gqa=True)
        q = rotate(heads(self.q_proj(x)), *rope)
        k = rotate(heads(self.k_proj(x)), *rope)
        v = heads(self.v_proj(x))
        if write is not None:
            k, v = write(k, v)
        if lengths is None:
            h = attend(q, k, v)
        else:
            clips = zip(*[y.split(lengths, 2) for y in (q, k, v)])
            attended = [attend(*clip) for clip in clips]
            h = torch.cat(attended, 2)                                    # (1, H, N, D/H)
        return self.o_proj(h.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """The feed-forward block: down(silu(gate(x)) * up(x))."""
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One Llama layer with MoME in parallel. MoME reads the normalised input of the block it stands beside.
    Beside the whole layer MoME reads the input of attention (not in the paper). The outputs are added."""
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.place, self.mome = None, None      # Llama.add_mome sets them

    def forward(self, x, **attention):
        """x (B, T, D) -> (B, T, D), see Attention."""
        h = self.input_layernorm(x)
        y = x + self.self_attn(h, **attention)
        if self.place == "attn":
            y = y + self.mome(h)                # beside the attention
        h_mlp = self.post_attention_layernorm(y)
        z = y + self.mlp(h_mlp)
        if self.place == "ffn":
            z = z + self.mome(h_mlp)            # beside the feed-forward
        if self.place == "layer":
            z = z + self.mome(h)                # beside the whole layer
        return z


class Llama(nn.Module):
    """A Llama decoder. Its modules have the names of HF's LlamaModel."""
    Config = LlamaConfig
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.lm_head = None
        if not config.tied:
            self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
        self.register_buffer("inv_freq", config.rope_theta ** -exponents, persistent=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        self.add_mome()

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, **changes):
        """The Llama of an HF folder. changes: see add_mome. Raises real.files.WeightsError."""
        from real.weights import load_llama
        return load_llama(cls, folder, dtype, **changes)

    def add_mome(self, **changes):
        """Put a new MoME beside each layer. `changes` replace fields of the config, like n_routed=8."""
        self.config = config = replace(self.config, **changes)
        if config.n_routed + config.n_shared:
            sizes = config.dim, config.n_routed, config.top_k, config.n_shared, config.bottleneck
            for layer in self.layers:
                layer.place, layer.mome = config.place, MoME(*sizes)

    def forward(self, tokens):
        """Token ids (B, T) -> logits (B, T, V)."""
        return self.logits(self.hidden_states(self.embed_tokens(tokens)))

    def logits(self, hidden):
        """hidden (..., D) -> (..., V)."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden, head.weight)

    def hidden_states(self, x, lengths=None, positions=None, cache=None):
        """Embeddings x (B, T, D) -> normalised hidden states (B, T, D), ready for `logits`. With a list of
        lengths x is (1, N, D): clips one after another, without padding. positions: (T,) or (B, 1, T), by
        default from 0 on in each clip. cache: a sample.KVCache, in decoding."""
        if positions is None:
            rows = [torch.arange(n) for n in lengths or [x.shape[1]]]
            positions = torch.cat(rows).to(x.device)
        cos, sin = rope_tables(positions, self.inv_freq)
        rope = cos.to(x.dtype), sin.to(x.dtype)
        mask = None if cache is None else cache.mask()
        for i, layer in enumerate(self.layers):
            write = None if cache is None else cache.writer(i)
            x = layer(x, rope=rope, lengths=lengths, write=write, mask=mask)
        return self.norm(x)

    def transcript_loss(self, prefixes, labels):
        """Mean next-token cross-entropy of `labels` (B tensors of ids) after `prefixes` (B tensors (T_b, D)).
            input    <bos> ... prompt  y0  y1  y2       Logits are computed only at tokens with a label.
            label              y0      y1  y2  <eos>    Logits at all tokens would fill the memory."""
        inputs = [self.embed_tokens(y[:-1]) for y in labels]
        rows = [torch.cat(row) for row in zip(prefixes, inputs)]
        lengths = [len(row) for row in rows]
        hidden = self.hidden_states(torch.cat(rows)[None], lengths)       # (1, N, D)
        at_labels = []
        for h, y in zip(hidden[0].split(lengths), labels):
            at_labels.append(h[-len(y):])
        logits = self.logits(torch.cat(at_labels)).float()                # (all labels, V)
        return F.cross_entropy(logits, torch.cat(labels))


# --- Matryoshka pooling and the projectors ----------------------------------------------------------------
def pool(x, lengths, rate):
    """Average every `rate` tokens: x (B, T, D), lengths (B,) -> (B, ceil(T / rate), D), new lengths (B,).
    A token at rate 8 is the mean of two tokens at rate 4, like a doll in a doll. Padding never enters a mean.
    Only the last window may be shorter. It is the mean of its tokens (not in the paper)."""
    B, T, D = x.shape
    valid = valid_mask(lengths.to(x.device), T)
    valid = valid[..., None].to(x)                                        # (B, T, 1) of 0 and 1
    rest = (0, 0, 0, -T % rate)                                           # fills up the last window
    windows = F.pad(x * valid, rest).view(B, -1, rate, D)
    counts = F.pad(valid, rest).view(B, -1, rate, 1)
    lengths = (lengths + rate - 1) // rate
    return windows.sum(2) / counts.sum(2).clamp(min=1), lengths


class Projector(nn.Sequential):
    """(..., D_encoder) -> (..., D). One per stream for all rates, also untrained ones (not in the paper)."""
    def __init__(self, d_in, d_hidden, d_out):
        super().__init__(
            nn.Linear(d_in, d_hidden), nn.ReLU(),
            nn.Linear(d_hidden, d_out), nn.LayerNorm(d_out))


# --- the whole model --------------------------------------------------------------------------------------
class AVSR(nn.Module):
    """Frozen encoders -> pooling -> projectors -> frozen Llama with MoME. Projectors, MoME and
    each stream's two markers are trained (trained markers: not in the paper). The Llama reads:

        <bos> <audio> sound </audio> <video> lips </video> prompt transcript <eos>

    inputs: {stream: (x, lengths in frames)}, "audio" (B, mels, frames), "video" (B, 1, T, rows, cols).
    rates: {stream: rate} of the streams that are used, sound before lips."""
    def __init__(self, config: AVSRConfig, llm=None, audio=None, video=None):
        """Pretrained modules may be passed in (llm, audio, video). The others are built from `config`."""
        super().__init__()
        self.config = config
        width = config.llm.dim
        self.llm = llm or Llama(config.llm)
        self.encoders = nn.ModuleDict()
        if config.audio is not None:
            self.encoders["audio"] = audio or AudioEncoder(config.audio)
        if config.video is not None:
            self.encoders["video"] = video or VideoEncoder(config.video)
        self.projectors = nn.ModuleDict()
        self.markers = nn.ParameterDict()
        for stream, encoder in self.encoders.items():
            self.projectors[stream] = Projector(encoder.config.dim, config.projector_dim, width)
            self.markers[stream] = nn.Parameter(0.02 * torch.randn(2, width))
        for name, parameter in self.named_parameters():
            pretrained = name.startswith(("llm.", "encoders."))
            parameter.requires_grad_(not pretrained or ".mome." in name)

    @property
    def device(self):
        return self.llm.norm.weight.device

    def train(self, mode=True):
        """Frozen encoders stay in eval mode: a BatchNorm in training mode would move its statistics."""
        super().train(mode)
        self.encoders.eval()
        return self

    @torch.no_grad()
    def encode(self, inputs):
        """Each stream once, for all rates -> {stream: (tokens (B, T, D_encoder), lengths (B,))}."""
        encoded = {}
        for stream, (x, lengths) in inputs.items():
            encoder = self.encoders[stream]
            tokens = encoder(x.to(encoder.norm.weight.dtype), lengths)
            encoded[stream] = tokens, encoder.n_tokens(lengths)
        return encoded

    def prefix(self, encoded, rates):
        """What the Llama reads before the transcript -> B embedding sequences (T_b, D)."""
        table = self.llm.embed_tokens.weight
        bos, prompt = table[[self.config.bos]], table[list(self.config.prompt)]
        sequences = []                                                    # for each stream B tensors (T, D)
        for stream, rate in rates.items():
            tokens, lengths = encoded[stream]
            tokens, lengths = pool(tokens.float(), lengths, rate)
            tokens = self.projectors[stream](tokens).to(table)            # (B, T, D)
            start, end = self.markers[stream].to(table)[:, None]
            rows = zip(tokens, lengths.tolist())
            sequences.append([torch.cat([start, x[:length], end]) for x, length in rows])
        return [torch.cat([bos, *row, prompt]) for row in zip(*sequences)]

    def loss(self, encoded, transcripts, rates):
        """At one set of rates: the cross-entropy of the transcripts (B lists of ids), and the layers' mean
        balancing loss. train.train_mome adds both. Gradients reach the experts through frozen layers."""
        labels = [torch.tensor([*ids, self.config.eos], device=self.device)
                  for ids in transcripts]
        cross_entropy = self.llm.transcript_loss(self.prefix(encoded, rates), labels)
        momes = [layer.mome for layer in self.llm.layers if layer.mome is not None]
        balance = sum(mome.balance_loss for mome in momes)
        return cross_entropy, balance / max(1, len(momes))
