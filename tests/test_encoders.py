"""python -m pytest tests/test_encoders.py: log-mel and the two encoders."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from encoders import AudioConfig, AudioEncoder, ResidualBlock, VideoConfig, VideoEncoder, compress, log_mel, mel_filters, mel_power


@pytest.mark.parametrize("n_mels", [80, 128])
def test_log_mel_shape_and_range(n_mels):
    wave = 0.1 * torch.randn(2, 3, 16000)
    mel = log_mel(wave, n_mels)
    assert mel.shape == (2, 3, n_mels, 100)
    top = mel.amax((-2, -1))
    assert (mel.amin((-2, -1)) >= top - 2 - 1e-5).all()  # the floor is 8 in log10, a quarter of it here
    torch.testing.assert_close(log_mel(wave[1, 2], n_mels), mel[1, 2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("hz", [320, 1000, 3000])
def test_a_tone_shows_in_its_mel_band(hz):
    tone = torch.sin(2 * np.pi * hz * torch.arange(16000) / 16000)
    filters = mel_filters(80)
    assert mel_power(tone)[:, 50].argmax() == filters[:, round(hz / 40)].argmax()
    assert filters.shape == (80, 201) and (filters.sum(1) > 0).all()


def test_mel_filters_are_slaneys():
    filters = mel_filters(80).double()
    area = filters.sum(1) * 40  # each triangle has unit area, as far as 40 Hz steps can show it
    assert (area[60:] - 1).abs().max() < 0.02
    peaks = filters.argmax(1) * 40.0
    assert (peaks[1:] >= peaks[:-1]).all() and peaks[26] == pytest.approx(1000, abs=60)  # the knee: 1 kHz is mel 15 of 45.2


def test_powers_of_unrelated_sounds_add_up():
    a, b = torch.randn(2, 32000)
    mixed, summed = mel_power(a + b), mel_power(a) + mel_power(b)
    assert (mixed.sum() / summed.sum() - 1).abs() < 0.05
    torch.testing.assert_close(compress(mel_power(a)), log_mel(a))


def encoders():
    torch.manual_seed(0)
    audio, video = AudioEncoder(AudioConfig(dim=16, n_heads=2, pos_groups=16)), VideoEncoder(VideoConfig(dim=16, n_heads=2))
    return audio.eval(), video.eval()


@pytest.mark.parametrize("frames, tokens", [(1, 1), (2, 1), (99, 50), (100, 50)])
def test_audio_tokens(frames, tokens):
    audio, _ = encoders()
    assert audio(torch.randn(2, 80, frames)).shape == (2, tokens, 16) and audio.n_tokens(frames) == tokens


@pytest.mark.parametrize("size, channels", [(32, (16, 32, 64)), (88, (8, 16, 16, 32))])
def test_video_tokens(size, channels):
    video = VideoEncoder(VideoConfig(size=size, channels=channels, blocks_per_stage=2, dim=16, n_heads=2)).eval()
    assert video(torch.rand(2, 1, 7, size, size)).shape == (2, 7, 16)


@torch.no_grad()
def test_padding_never_leaks():
    for encoder, long, short in zip(encoders(), (torch.randn(1, 80, 60), torch.rand(1, 1, 20, 32, 32)), (33, 11)):
        alone = long[:, :, :short]
        padded = long.clone()
        padded[:, :, short:] = 1e3
        n = encoder.n_tokens(short)
        torch.testing.assert_close(encoder(padded, torch.tensor([short]))[:, :n], encoder(alone), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(encoder(padded)[:, :n], encoder(alone), atol=1e-2)  # without lengths it would


@torch.no_grad()
def test_the_stem_is_a_3d_convolution():
    _, video = encoders()
    x = torch.rand(2, 1, 9, 32, 32)
    normal = (x - 0.421) / 0.165
    y = F.conv3d(normal, video.stem.weight, stride=(1, 2, 2), padding=(2, 2, 2)).transpose(1, 2).flatten(0, 1)
    seen = {}
    hook = video.stem_norm.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    video(x)
    hook.remove()
    torch.testing.assert_close(seen["x"], y, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("c_in, c_out, stride", [(4, 4, 1), (4, 6, 2)])
def test_residual_blocks_are_those_of_resnets(c_in, c_out, stride):
    """prelu(bn(conv(prelu(bn(conv(x))))) + shortcut), with random numbers in place of all parameters and statistics."""
    def norm(x, bn):
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    torch.manual_seed(0)
    block = ResidualBlock(c_in, c_out, stride).eval()
    for tensor in block.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2)
    x = torch.randn(2, c_in, 8, 8)
    h = F.prelu(norm(F.conv2d(x, block.conv1.weight, stride=stride, padding=1), block.bn1), block.relu1.weight)
    h = norm(F.conv2d(h, block.conv2.weight, padding=1), block.bn2)
    shortcut = x if stride == 1 else norm(F.conv2d(x, block.downsample[0].weight, stride=stride), block.downsample[1])
    torch.testing.assert_close(block(x), F.prelu(h + shortcut, block.relu2.weight))


@torch.no_grad()
def test_the_resnet_reads_the_largest_of_3_x_3_pixels():
    video, seen = VideoEncoder(VideoConfig(dim=16, n_heads=2)).eval(), {}
    video.stem_relu.register_forward_hook(lambda module, args, y: seen.update(stem=y))
    video.resnet.register_forward_pre_hook(lambda module, args: seen.update(pooled=args[0]))
    video(torch.rand(1, 1, 3, 32, 32))
    assert torch.equal(seen["pooled"], F.max_pool2d(seen["stem"], 3, 2, 1)) and seen["pooled"].shape[-1] == 8


def test_positions_are_whispers():
    audio = AudioEncoder(AudioConfig(dim=8, n_heads=2, pos_kernel=0))
    assert audio.positions.shape == (1500, 8)
    torch.testing.assert_close(audio.positions[3, :4], torch.sin(3 / 1e4 ** (torch.arange(4) / 3)))
    torch.testing.assert_close(audio.positions[3, 4:], torch.cos(3 / 1e4 ** (torch.arange(4) / 3)))
