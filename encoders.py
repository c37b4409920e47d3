"""The two encoders of MoME (paper section 3): sound -> 50 tokens a second, lips -> 25 tokens a second.

Both are a small convolutional stem followed by the same pre-norm transformer. With their default configs they are tiny and
are pretrained here as stand-ins; with other configs they have the layouts of the paper's encoders:

    AudioEncoder  Whisper (openai/whisper): log-mel -> Conv1d -> Conv1d of stride 2 -> blocks
    VideoEncoder  AV-HuBERT (facebookresearch/av_hubert), lips only: Conv3d stem -> ResNet -> blocks

Axes: B batch, T time in tokens or frames, D width, M mel bins, H W picture rows and columns, C channels.
"""
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

import weights

SAMPLE_RATE = 16_000                          # Hz
HOP_LENGTH = 160                              # samples between log-mel frames
N_FFT = 400                                   # samples in a window: 25 ms
FPS = 25                                      # video frames a second
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS        # 640: one video frame = 4 log-mel frames = 2 audio tokens
MELS_PER_AUDIO_TOKEN = 2                      # the stride of the audio encoder's second convolution


@dataclass(frozen=True)
class AudioConfig:
    """Sizes of the audio encoder; the defaults are the tiny stand-in, Whisper-medium is (80, 1024, 24, 16, pos_kernel=0)."""
    n_mels: int = 80
    dim: int = 128
    n_layers: int = 2
    n_heads: int = 4
    pos_kernel: int = 31    # as in VideoConfig; Whisper has no such convolution (0), but a tiny encoder with little data
    pos_groups: int = 0     # learns several times faster with it (not in the paper); 0: each channel on its own
    max_tokens: int = 1500  # 30 s
    padded: bool = False    # read every clip with silence up to 30 s after it, as Whisper was trained: 13 times the work at 3 s


@dataclass(frozen=True)
class VideoConfig:
    """Sizes of the video encoder; the defaults are the tiny stand-in, AV-HuBERT Large is
    (88, 64, 7, (64, 128, 256, 512), 2, 1024, 24, 16, 128, 16)."""
    size: int = 32                         # height and width of the mouth picture that is looked at,
    picture: int = 32                      # in the middle of one this large that is read
    stem_channels: int = 8
    stem_kernel: int = 5                   # pixels; always 5 frames deep
    channels: tuple[int, ...] = (16, 32, 64)  # of the ResNet's stages; each but the first halves the picture
    blocks_per_stage: int = 1
    dim: int = 128
    n_layers: int = 2
    n_heads: int = 4
    pos_kernel: int = 16                   # tokens that the convolution which tells order reaches over
    pos_groups: int = 4


# --- sound to log-mel ------------------------------------------------------------------------------------------------

@lru_cache
def mel_filters(n_mels):
    """Slaney's mel filter bank (linear below 1 kHz, logarithmic above, unit area) -> (n_mels, N_FFT // 2 + 1)."""
    step, knee, log_step = 200 / 3, 1000.0, math.log(6.4) / 27  # Hz per mel below the knee, log Hz per mel above

    def to_hz(mel):
        return torch.where(mel < knee / step, mel * step, knee * torch.exp(log_step * (mel - knee / step)))

    top = knee / step + math.log(SAMPLE_RATE / 2 / knee) / log_step
    edges = to_hz(torch.linspace(0, top, n_mels + 2, dtype=torch.float64))[:, None]
    freqs = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)
    rising = (freqs - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - freqs) / (edges[2:] - edges[1:-1])
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (edges[2:] - edges[:-2])).float()


def mel_power(wave, n_mels=80):
    """Power in each mel band, 100 frames a second: wave (..., samples) at 16 kHz -> (..., n_mels, samples // 160).

    A reflect-padded, centred STFT without its last frame, as Whisper has it. Powers of sounds that are unrelated add up,
    which is how training mixes noise in (data.noisy_power)."""
    assert wave.shape[-1] > N_FFT // 2, f"a wave of {wave.shape[-1]} samples is too short for a {N_FFT}-sample window"
    flat = wave.float().reshape(-1, wave.shape[-1])
    window = torch.hann_window(N_FFT, device=wave.device)
    stft = torch.stft(flat, N_FFT, HOP_LENGTH, window=window, return_complex=True)[..., :-1]
    power = mel_filters(n_mels).to(wave.device) @ stft.abs().square()
    return power.view(*wave.shape[:-1], *power.shape[-2:])


def compress(power):
    """Mel powers (..., n_mels, frames) -> Whisper's log-mel: log10, at most 8 below the clip's maximum, about -1..1."""
    log = power.clamp(min=1e-10).log10()
    return (torch.maximum(log, log.amax(dim=(-2, -1), keepdim=True) - 8) + 4) / 4


def log_mel(wave, n_mels=80):
    """wave (..., samples) at 16 kHz in -1..1 -> log-mel (..., n_mels, frames), 100 frames a second (openai/whisper)."""
    return compress(mel_power(wave, n_mels))


# --- the transformer both encoders share -----------------------------------------------------------------------------

def length_mask(lengths, total):
    """lengths (B,) -> (B, total) bool, true at real positions and false at padding."""
    return torch.arange(total, device=lengths.device) < lengths[:, None]


class Block(nn.Module):
    """Pre-norm attention and GELU feed-forward. Whisper's keys have no bias (it would cancel in the softmax)."""

    def __init__(self, dim, n_heads, key_bias):
        super().__init__()
        self.n_heads = n_heads
        self.attn_norm, self.ffn_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=key_bias), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x, mask):
        """x (B, T, D), mask (B, T) true where a position may be looked at -> (B, T, D)."""
        h = self.attn_norm(x)
        q, k, v = (proj(h).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])  # (B, heads, T, D / heads)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.ffn_norm(x))))


class PositionConv(nn.Conv1d):
    """x (B, T, D), zero at padding -> (B, T, D): adds what the neighbours say, AV-HuBERT's way of telling order."""

    def __init__(self, dim, kernel, groups):
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=groups or dim)

    def forward(self, x):
        return x + F.gelu(super().forward(x.transpose(1, 2))[..., :x.shape[1]]).transpose(1, 2)


class AudioEncoder(nn.Module):
    """Log-mel (B, M, frames) -> (B, T, D) at 50 tokens a second, in Whisper's layout (openai/whisper, `AudioEncoder`)."""

    def __init__(self, config: AudioConfig = AudioConfig()):
        super().__init__()
        self.config, dim = config, config.dim
        self.conv1 = nn.Conv1d(config.n_mels, dim, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, kernel_size=3, stride=2, padding=1)
        rates = torch.exp(-math.log(1e4) / (dim // 2 - 1) * torch.arange(dim // 2))
        angles = torch.arange(config.max_tokens)[:, None] * rates
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], dim=1))
        self.pos_conv = PositionConv(dim, config.pos_kernel, config.pos_groups) if config.pos_kernel else None
        self.blocks = nn.ModuleList(Block(dim, config.n_heads, key_bias=False) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, mel, lengths=None):
        """mel (B, M, frames), lengths (B,) frames before padding -> (B, T, D), with T = ceil(frames / 2).

        Padding is zeroed before each convolution, so that a padded clip equals the clip alone. Sounds of more than
        `max_tokens` tokens are an error: cut them first."""
        n_tokens = self.n_tokens(mel.shape[-1])
        lengths = torch.full((len(mel),), mel.shape[-1], device=mel.device) if lengths is None else lengths
        if self.config.padded:
            mel, lengths = self.with_silence(mel, lengths)
        real = length_mask(lengths, mel.shape[-1])[:, None]                  # (B, 1, frames)
        x = F.gelu(self.conv1(mel * real)) * real                            # (B, D, frames)
        x = F.gelu(self.conv2(x)).transpose(1, 2)                            # (B, T, D)
        assert x.shape[1] <= len(self.positions), f"{x.shape[1]} audio tokens, at most {len(self.positions)}"
        x = x + self.positions[:x.shape[1]]
        mask = length_mask(self.n_tokens(lengths), x.shape[1])
        x = x if self.pos_conv is None else self.pos_conv(x * mask[..., None])
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)[:, :n_tokens]

    def with_silence(self, mel, lengths):
        """mel (B, M, frames), lengths (B,) -> mel (B, M, 2 * max_tokens), lengths, with the log-mel of silence after each clip:
        what `compress` makes of no power, 2 below the clip's largest value."""
        room = MELS_PER_AUDIO_TOKEN * self.config.max_tokens - mel.shape[-1]
        assert room >= 0, f"{mel.shape[-1]} log-mel frames, at most {MELS_PER_AUDIO_TOKEN * self.config.max_tokens}"
        real = length_mask(lengths, mel.shape[-1])[:, None]
        silence = mel.masked_fill(~real, -torch.inf).amax((1, 2), keepdim=True) - 2
        mel = torch.where(F.pad(real, (0, room)), F.pad(mel, (0, room)), silence)
        return mel, torch.full_like(lengths, mel.shape[-1])

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, padded=False):
        """The encoder of an HF Whisper in `folder` (a whole model or its encoder alone). Raises weights.WeightsError."""
        tensors = weights.Shards(folder)
        prefix = next((p for p in ("model.encoder.", "encoder.") if f"{p}conv1.weight" in tensors), "")
        with torch.device("meta"):
            encoder = cls(AudioConfig(**weights.whisper_config(folder), padded=padded))
        weights.fill(encoder, tensors, lambda name: prefix + weights.whisper_name(name), folder, dtype,
                     r"(model\.)?decoder\.|proj_out\.")
        return encoder.eval()

    @staticmethod
    def n_tokens(frames):
        """Tokens that come of `frames` log-mel frames."""
        return (frames + MELS_PER_AUDIO_TOKEN - 1) // MELS_PER_AUDIO_TOKEN


# --- lips ------------------------------------------------------------------------------------------------------------

class ResidualBlock(nn.Module):
    """ResNet's basic block with PReLUs: (N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.relu1, self.relu2 = nn.PReLU(c_out), nn.PReLU(c_out)
        self.downsample = None if (stride, c_in) == (1, c_out) else nn.Sequential(
            nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        h = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(h + (x if self.downsample is None else self.downsample(x)))


class VideoEncoder(nn.Module):
    """Grey mouths (B, 1, T, H, W), pixels 0..1 -> (B, T, D) at 25 tokens a second, in AV-HuBERT's layout."""

    def __init__(self, config: VideoConfig = VideoConfig()):
        super().__init__()
        self.config, dim, stem, k = config, config.dim, config.stem_channels, config.stem_kernel
        self.stem = nn.Conv3d(1, stem, (5, k, k), stride=(1, 2, 2), padding=(2, k // 2, k // 2), bias=False)
        self.stem_norm, self.stem_relu = nn.BatchNorm2d(stem), nn.PReLU(stem)
        stages = zip((stem, *config.channels), config.channels)
        self.trunk = nn.Sequential(*[
            ResidualBlock(c_in if block == 0 else c_out, c_out, stride=2 if stage and block == 0 else 1)
            for stage, (c_in, c_out) in enumerate(stages) for block in range(config.blocks_per_stage)])
        self.proj = nn.Linear(config.channels[-1], dim)
        self.fuse_norm, self.fuse = nn.LayerNorm(2 * dim), nn.Linear(2 * dim, dim)
        self.pos_conv = PositionConv(dim, config.pos_kernel, config.pos_groups)
        self.blocks = nn.ModuleList(Block(dim, config.n_heads, key_bias=True) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, video, lengths=None):
        """video (B, 1, T, H, W) in 0..1, lengths (B,) frames before padding -> (B, T, D)."""
        B, _, T, _, _ = video.shape
        lengths = torch.full((B,), T, device=video.device) if lengths is None else lengths
        mask = length_mask(lengths, T)
        edge = (video.shape[-1] - self.config.size) // 2
        assert edge >= 0, f"pictures of {video.shape[-1]} pixels, at least {self.config.size}"
        video = video[..., edge:edge + self.config.size, edge:edge + self.config.size]
        x = (video - 0.421) / 0.165 * mask[:, None, :, None, None]           # AV-HuBERT's mean and deviation of pixels
        # The 3-d convolution of one channel, said as a 2-d one of five: each picture with its two neighbours on each side.
        x = F.pad(x[:, 0], (0, 0, 0, 0, 2, 2)).unfold(1, 5, 1).permute(0, 1, 4, 2, 3).flatten(0, 1)      # (B * T, 5, H, W)
        x = x.contiguous(memory_format=torch.channels_last)                  # several times faster on CPUs
        x = F.conv2d(x, self.stem.weight[:, 0], stride=2, padding=self.stem.padding[1])                  # (B * T, C, H / 2, W / 2)
        x = F.max_pool2d(self.stem_relu(self.stem_norm(x)), 3, 2, 1)         # (B * T, C, H / 4, W / 4)
        x = self.trunk(x).mean(dim=(-2, -1))                                 # (B * T, C)
        x = self.proj(x).view(B, T, -1)                                      # (B, T, D)
        x = torch.cat([torch.zeros_like(x), x], dim=-1)                      # AV-HuBERT's audio half: absent, so zeros
        x = self.pos_conv(self.fuse(self.fuse_norm(x)) * mask[..., None])
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32):
        """The video encoder in an AV-HuBERT file (Base or Large, pretrained or fine-tuned). Raises weights.WeightsError."""
        tensors = weights.avhubert_tensors(path)
        with torch.device("meta"):
            encoder = cls(VideoConfig(**weights.avhubert_config(path, tensors)))
        weights.fill(encoder, tensors, weights.avhubert_name, path, dtype, weights.AVHUBERT_DROPPED)
        return encoder.eval()

    @staticmethod
    def n_tokens(frames):
        """Tokens that come of `frames` pictures: one each."""
        return frames
