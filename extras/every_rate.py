"""`sample.py --rate all`: one clip at every trained rate, with what each costs."""
import json
from unittest.mock import patch

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mome import MoME
from real.checkpoint import load_for_use
from sample import trained_rates, transcribe


def every_rate(path, ckpt="out", task=None, beam=1, box=None, **parts):
    """Yield the dict of `sample.transcribe` with its `flops`, at each trained rate from the coarsest on."""
    _, config, _ = load_for_use(str(ckpt), **parts)
    options = {"ckpt": ckpt, "beam": beam, "box": box, **parts}
    task = task or transcribe(path, **options)["task"]
    for rates in trained_rates(task, config):
        rate = f"{rates.get('audio', 1)}:{rates.get('video', 1)}"
        with (FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH),
              patch.object(MoME, "best_path", lambda *_: "wide")):      # the counter knows plain products alone
            transcribe(path, rate=rate, task=task, **options)
        yield transcribe(path, rate=rate, task=task, **options) | {"flops": counter.get_total_flops()}


def print_every_rate(path, as_json, **options):
    """A line for each rate: tokens that the LLM reads, FLOPs, seconds, text; or its JSON."""
    for result in every_rate(path, **options):
        if as_json:
            print(json.dumps(result), flush=True)
            continue
        rate = ":".join(str(result[key]) for key in ("audio_rate", "video_rate") if result[key])
        print(f"rate {rate:6} {result['tokens']:5} tokens {result['flops'] / 1e9:8.2f} GFLOPs {result['seconds']:7.2f} s "
              f"({result['seconds'] / result['duration']:.2f} x real time)  {result['text']}", flush=True)
