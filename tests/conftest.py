import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from encoders import AudioConfig, VideoConfig  # noqa: E402
from mome import AVSR, AVSRConfig, LlamaConfig  # noqa: E402
from real import media  # noqa: E402
from toy import pretrain  # noqa: E402
from toy.talker import talker_clip  # noqa: E402

SHARED = ROOT.parent / "shared"  # real clips that some tests use where they are at hand


TRAINED = "--rates 2:2,4:8 --clips 12 --valid-clips 6 --test-clips 5 --audio-steps 1 --video-steps 1 --llm-steps 1 --steps 2 --snr clean,-5".split()


def ffmpeg(*options):
    """Run the same ffmpeg as the project, to make files for it to read."""
    subprocess.run([media.ffmpeg(), "-v", "error", "-y", *map(str, options)], check=True)


@pytest.fixture(scope="session", autouse=True)
def stage_2_in_a_thread():
    """A process for the tiny Llama would import torch anew in each training. Tests that start train.py have that process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "ProcessPoolExecutor", lambda n_workers, *_: ThreadPoolExecutor(n_workers))
        yield


@pytest.fixture
def tiny():
    """A small AVSR model whose MoME and projectors are random (a trained one's stand-in), in eval mode."""
    return tiny_avsr()


def tiny_avsr(seed=0, vocab=40, **experts):
    torch.manual_seed(seed)
    experts = {"n_routed": 4, "top_k": 2, "n_shared": 1, "bottleneck": 3, **experts}
    model = AVSR(AVSRConfig(LlamaConfig(vocab, 32, 2, 4, 2, 48, **experts), AudioConfig(dim=16, n_layers=1, n_heads=2, pos_groups=16),
                            VideoConfig(dim=16, n_layers=1, n_heads=2, stem_channels=4, channels=(4, 8), pos_kernel=4)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("llm.") and parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval()


@pytest.fixture(scope="session")
def talker_clips():
    """Five clips of the synthetic talker, of unequal length."""
    return [talker_clip(("train", i, 0, 32, True)) for i in range(5)]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A checkpoint made by the whole of train.py in a few steps, for what needs one to exist rather than to be good."""
    out = tmp_path_factory.mktemp("trained") / "out"
    assert train.main([*TRAINED, "--out", str(out)]) == 0
    return out
