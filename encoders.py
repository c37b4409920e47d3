"""The two encoders of MoME (paper section 3): sound -> 50 tokens a second, lips -> 25 tokens a second.

Each is a convolutional front end followed by the same pre-norm transformer. The default sizes are tiny
stand-ins that toy/pretrain.py trains. Other sizes give the layouts of the paper's encoders:

    AudioEncoder  Whisper (openai/whisper): log-mel -> Conv1d -> Conv1d of stride 2 -> blocks
    VideoEncoder  AV-HuBERT (facebookresearch/av_hubert), lips only: Conv3d stem -> ResNet -> blocks

Axes: B batch, T time (tokens or frames), D width, M mel bands, H W rows and columns of a picture, C channels.
"""
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

SAMPLE_RATE = 16_000                          # Hz
HOP_LENGTH = 160                              # samples between two log-mel frames: 100 frames a second
N_FFT = 400                                   # samples in one STFT window: 25 ms
FPS = 25                                      # video frames a second
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS        # 640: one video frame lasts 4 log-mel frames or 2 audio tokens
MELS_PER_AUDIO_TOKEN = 2                      # the stride of the audio encoder's second convolution


@dataclass(frozen=True)
class AudioConfig:
    """Sizes of the audio encoder. The defaults are the tiny stand-in."""
    n_mels: int = 80
    dim: int = 128
    n_layers: int = 2
    n_heads: int = 4
    pos_kernel: int = 31    # tokens; width of PositionConv (not in the paper); 0: none, as in Whisper
    pos_groups: int = 0     # groups of that convolution, 0 for one group per channel
    max_tokens: int = 1500  # 30 s
    padded: bool = False    # a Whisper that pads every clip to 30 s, see real/weights.py


@dataclass(frozen=True)
class VideoConfig:
    """Sizes of the video encoder. The defaults are the tiny stand-in."""
    size: int = 32                            # pixels: height and width of the centre crop that is encoded
    picture: int = 32                         # pixels: height and width of the mouth picture before the crop
    stem_channels: int = 8
    stem_kernel: int = 5                      # pixels; the kernel is always 5 frames deep
    channels: tuple[int, ...] = (16, 32, 64)  # of the ResNet's stages; all but the first halve the picture
    blocks_per_stage: int = 1
    dim: int = 128
    n_layers: int = 2
    n_heads: int = 4
    pos_kernel: int = 16                      # tokens
    pos_groups: int = 4


# --- sound to log-mel -------------------------------------------------------------------------------------
@lru_cache
def mel_filters(n_mels):
    """Slaney's mel filter bank -> (n_mels, N_FFT // 2 + 1).

    Bands are linear below 1 kHz and logarithmic above. Each triangle has unit area."""
    knee = 1000.0                                         # Hz
    step, log_step = 200 / 3, math.log(6.4) / 27  # Hz per mel below the knee, log Hz per mel above it

    def to_hz(mel):
        above = knee * torch.exp(log_step * (mel - knee / step))
        return torch.where(mel < knee / step, mel * step, above)

    top = knee / step + math.log(SAMPLE_RATE / 2 / knee) / log_step
    edges = to_hz(torch.linspace(0, top, n_mels + 2, dtype=torch.float64))[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    freqs = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)
    rising = (freqs - low) / (centre - low)
    falling = (high - freqs) / (high - centre)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    area = (high - low) / 2
    return (triangles / area).float()


def mel_power(wave, n_mels=80):
    """wave (..., samples) at 16 kHz -> power in mel bands (..., n_mels, samples // 160), 100 frames a second.

    The STFT is centred and reflect-padded, and its last frame is dropped, as in Whisper. Powers of unrelated
    sounds add up. data.noisy_power uses that to mix noise in."""
    assert wave.shape[-1] > N_FFT // 2, f"{wave.shape[-1]} samples are too few for a window of {N_FFT}"
    flat = wave.float().reshape(-1, wave.shape[-1])
    window = torch.hann_window(N_FFT, device=wave.device)
    stft = torch.stft(flat, N_FFT, HOP_LENGTH, window=window, return_complex=True)
    stft_power = stft[..., :-1].abs().square()
    power = mel_filters(n_mels).to(wave.device) @ stft_power
    return power.view(*wave.shape[:-1], *power.shape[-2:])


def compress(power):
    """Mel powers (..., n_mels, frames) -> Whisper's log-mel of the same shape, values about -1 to 1.

    Values more than 8 (80 dB) below the clip's maximum are raised to that floor."""
    log = power.clamp(min=1e-10).log10()
    floor = log.amax(dim=(-2, -1), keepdim=True) - 8
    log = torch.maximum(log, floor)
    return (log + 4) / 4


def log_mel(wave, n_mels=80):
    """wave (..., samples) at 16 kHz, -1 to 1 -> log-mel (..., n_mels, frames), as in openai/whisper."""
    return compress(mel_power(wave, n_mels))


# --- the transformer that both encoders share -------------------------------------------------------------
def valid_mask(lengths, total):
    """lengths (B,) -> (B, total) bool: true at tokens, false at padding. Padding stands on the right."""
    return torch.arange(total, device=lengths.device) < lengths[:, None]


class Block(nn.Module):
    """Pre-norm attention and a GELU feed-forward. Whisper's keys have no bias: it cancels in the softmax."""
    def __init__(self, dim, n_heads, key_bias):
        super().__init__()
        self.n_heads = n_heads
        self.attn_norm = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=key_bias)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x, valid):
        """x (B, T, D), valid (B, T) -> (B, T, D). Every token attends to all valid tokens."""
        def heads(y):
            return y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)        # (B, heads, T, D / heads)

        h = self.attn_norm(x)
        q, k, v = heads(self.q(h)), heads(self.k(h)), heads(self.v(h))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.ffn_norm(x))))


class PositionConv(nn.Conv1d):
    """A convolution over time that tells tokens their order, as in AV-HuBERT: x (B, T, D) -> (B, T, D)."""
    def __init__(self, dim, kernel, groups):
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=groups or dim)

    def forward(self, x):
        """x must be zero at padding."""
        context = super().forward(x.transpose(1, 2))
        context = context[..., :x.shape[1]]                                          # (B, D, T)
        return x + F.gelu(context).transpose(1, 2)


class AudioEncoder(nn.Module):
    """Log-mel (B, M, frames) -> (B, T, D) at 50 tokens a second, in Whisper's layout (openai/whisper)."""
    Config = AudioConfig

    def __init__(self, config: AudioConfig = AudioConfig()):
        super().__init__()
        self.config, dim = config, config.dim
        stride = MELS_PER_AUDIO_TOKEN
        self.conv1 = nn.Conv1d(config.n_mels, dim, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, kernel_size=3, padding=1, stride=stride)
        exponents = torch.arange(dim // 2) / (dim // 2 - 1)
        angles = torch.arange(config.max_tokens)[:, None] * torch.exp(-math.log(1e4) * exponents)
        positions = torch.cat([angles.sin(), angles.cos()], dim=1)
        self.register_buffer("positions", positions)
        self.pos_conv = None
        if config.pos_kernel:
            self.pos_conv = PositionConv(dim, config.pos_kernel, config.pos_groups)
        blocks = [Block(dim, config.n_heads, key_bias=False) for _ in range(config.n_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)

    def forward(self, mel, lengths=None):
        """mel (B, M, frames), lengths (B,) in frames -> (B, T, D) with T = ceil(frames / 2).

        Padding is zeroed before each convolution, so a padded clip gives the same tokens as the clip alone.
        AssertionError for more than `max_tokens` tokens: cut the clip."""
        if lengths is None:
            lengths = torch.full((len(mel),), mel.shape[-1], device=mel.device)
        valid = valid_mask(lengths, mel.shape[-1])[:, None]                   # (B, 1, frames)
        x = F.gelu(self.conv1(mel * valid)) * valid                           # (B, D, frames)
        x = F.gelu(self.conv2(x)).transpose(1, 2)                                    # (B, T, D)
        assert x.shape[1] <= len(self.positions), f"{x.shape[1]} audio tokens, at most {len(self.positions)}"
        x = x + self.positions[:x.shape[1]]
        valid = valid_mask(self.n_tokens(lengths), x.shape[1])                       # (B, T)
        if self.pos_conv is not None:
            x = self.pos_conv(x * valid[..., None])
        for block in self.blocks:
            x = block(x, valid)
        return self.norm(x)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, padded=False):
        """The encoder of an HF Whisper in `folder`. Raises real.files.WeightsError."""
        from real.weights import load_whisper
        return load_whisper(cls, folder, dtype, padded)

    @staticmethod
    def n_tokens(frames):
        """Number of tokens for a number of log-mel frames."""
        return (frames + MELS_PER_AUDIO_TOKEN - 1) // MELS_PER_AUDIO_TOKEN


# --- lips -------------------------------------------------------------------------------------------------
class ResidualBlock(nn.Module):
    """ResNet's basic block with PReLUs: (B * T, C_in, H, W) -> (B * T, C_out, H / stride, W / stride)."""
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu1 = nn.PReLU(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu2 = nn.PReLU(c_out)
        self.downsample = None
        if stride > 1 or c_in != c_out:
            conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(c_out))

    def forward(self, x):
        h = self.relu1(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu2(h + shortcut)


class VideoEncoder(nn.Module):
    """Grey mouths (B, 1, T, H, W) in 0 to 1 -> (B, T, D) at 25 tokens a second, in AV-HuBERT's layout."""
    Config = VideoConfig

    def __init__(self, config: VideoConfig = VideoConfig()):
        super().__init__()
        self.config, dim = config, config.dim
        c_in, k = config.stem_channels, config.stem_kernel
        padding = 2, k // 2, k // 2
        self.stem = nn.Conv3d(1, c_in, (5, k, k), (1, 2, 2), padding, bias=False)
        self.stem_norm = nn.BatchNorm2d(c_in)
        self.stem_relu = nn.PReLU(c_in)
        resnet = []
        for stage, c_out in enumerate(config.channels):
            for block in range(config.blocks_per_stage):
                stride = 2 if stage > 0 and block == 0 else 1
                resnet.append(ResidualBlock(c_in, c_out, stride))
                c_in = c_out
        self.resnet = nn.Sequential(*resnet)
        self.proj = nn.Linear(c_in, dim)
        self.fuse_norm = nn.LayerNorm(2 * dim)
        self.fuse = nn.Linear(2 * dim, dim)
        self.pos_conv = PositionConv(dim, config.pos_kernel, config.pos_groups)
        blocks = [Block(dim, config.n_heads, key_bias=True) for _ in range(config.n_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)

    def forward(self, video, lengths=None):
        """video (B, 1, T, H, W) in 0 to 1, lengths (B,) in frames -> (B, T, D)."""
        B, _, T, height, width = video.shape
        if lengths is None:
            lengths = torch.full((B,), T, device=video.device)
        valid = valid_mask(lengths, T)                                               # (B, T)
        size = self.config.size
        assert height == width >= size, f"pictures of {width}x{height}, expected squares from {size}"
        edge = (width - size) // 2
        video = video[..., edge:edge + size, edge:edge + size]
        x = (video - 0.421) / 0.165 * valid[:, None, :, None, None]           # AV-HuBERT's pixel mean and std
        # A Conv3d over one channel equals a Conv2d over 5 frames as channels, which is much faster on a CPU.
        x = F.pad(x[:, 0], (0, 0, 0, 0, 2, 2))                                # (B, T + 4, H, W)
        x = x.unfold(1, 5, 1).permute(0, 1, 4, 2, 3)                          # (B, T, 5, H, W)
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)     # faster on a CPU, same values
        x = F.conv2d(x, self.stem.weight[:, 0], stride=2, padding=self.stem.padding[1])
        x = self.stem_relu(self.stem_norm(x))
        x = F.max_pool2d(x, 3, 2, 1)                                          # (B * T, C, H / 4, W / 4)
        x = self.resnet(x).mean(dim=(-2, -1))                                        # (B * T, C)
        x = self.proj(x).view(B, T, -1)                                              # (B, T, D)
        x = torch.cat([torch.zeros_like(x), x], dim=-1)                       # AV-HuBERT's audio half is zero
        x = self.fuse(self.fuse_norm(x))
        x = self.pos_conv(x * valid[..., None])
        for block in self.blocks:
            x = block(x, valid)
        return self.norm(x)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32):
        """The encoder of an AV-HuBERT file (Base or Large, or fine-tuned). Raises WeightsError."""
        from real.weights import load_avhubert
        return load_avhubert(cls, path, dtype)

    @staticmethod
    def n_tokens(frames):
        """Number of tokens for a number of frames: one token each."""
        return frames
