"""The pictures of the README, from what train.py wrote. They need matplotlib (extras/requirements.txt).

    python -m extras.pictures clip out --save docs/clip.png                            a clip as the model sees it
    python -m extras.pictures tokens out out-lora out-projectors --save docs/tokens.png    WER over the tokens read
    python -m extras.pictures routing out --save docs/routing.png                      experts by layer and rate
"""
import argparse
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from data import TASKS, TOKENS_PER_SECOND, batch, task_rates, to_device
from encoders import valid_mask
from real import media
from real.checkpoint import reading
from real.clips import read_clip
from real.files import read_json, run_script, write_whole
from sample import choose_task, load

NAMES = {"mome": "MoME", "lora": "LoRA", "projectors": "projectors only", "audio": "sound", "video": "lips"}
COLOURS = {"mome": "tab:blue", "lora": "tab:orange", "projectors": "tab:green", "audio": "#4878a8", "video": "#c8745a"}
FLOOR = 0.1     # % WER: a logarithmic axis has no 0


def sample_paths(folder):
    """The media files of a checkpoint's samples, sorted. Raises FileNotFoundError."""
    paths = [path for path in sorted(Path(folder, "samples").glob("*")) if path.suffix.lower() in media.SUFFIXES]
    if not paths:
        raise FileNotFoundError(f"{folder}/samples: no clips there")
    return paths


def rate_name(rates):
    """{"audio": 4, "video": 2} -> '4:2'. Equal rates give one number."""
    return ":".join(str(rate) for rate in dict.fromkeys(rates.values()))


# --- clip -------------------------------------------------------------------------------------------------

def clip_picture(args):
    """Eight mouths evenly in time, the log-mel, and the windows that become one token at each trained rate."""
    from matplotlib.figure import Figure
    model, config, _ = load(str(args.folders[0]))
    path = args.clip or sample_paths(args.folders[0])[0]
    options = reading(model.config.audio, model.config.video)
    clip = read_clip(path, streams=tuple(model.encoders), **options)
    task = choose_task(clip, model)
    features, rate_sets = batch([clip], TASKS[task]), task_rates(task, config["rates"])
    panels = {"tokens": 0.2 * sum(len(rates) + 0.6 for rates in rate_sets)}             # heights in inches
    panels = {"video": 1.0, "audio": 1.5} | panels
    panels = {name: height for name, height in panels.items() if name in (*features, "tokens")}
    height, top = sum(panels.values()) + 0.12 * len(panels) + 0.85, 0.4
    figure = Figure((10.4, height))
    for name, size in panels.items():
        panel = figure.add_axes((0.9 / 10.4, 1 - (top + size) / height, 8 / 10.4, size / height))
        panel.set(xlim=(0, clip.duration), yticks=[])
        panel.tick_params(labelbottom=name == "tokens", bottom=name == "tokens")
        panel.spines[:].set_visible(False)
        panels[name], top = panel, top + size + 0.12
    if "video" in features:
        frames, n = features["video"][0][0, 0], model.config.video.size
        edge, slot = (frames.shape[-1] - n) // 2, clip.duration / 8
        frames = frames[:, edge:edge + n, edge:edge + n]
        for i in range(8):
            extent = (i + 0.03) * slot, (i + 0.97) * slot, 0, 1
            picture = frames[int((i + 0.5) / 8 * len(frames))]
            panels["video"].imshow(picture, "gray", vmin=0, vmax=1, extent=extent, aspect="auto")
        panels["video"].set(xlim=(0, clip.duration), ylabel="mouths")
    if "audio" in features:
        mel, extent = features["audio"][0][0], (0, clip.duration, 0, 1)
        panels["audio"].imshow(mel, "magma", origin="lower", extent=extent, aspect="auto")
        panels["audio"].set_ylabel("log-mel")
    y, right = 0, 1.01 * clip.duration
    for rates in rate_sets:
        first, total = y, 1 + len(model.config.prompt)
        for stream, rate in rates.items():
            seconds = rate / TOKENS_PER_SECOND[stream]
            n = int(-(-model.encoders[stream].n_tokens(features[stream][1])[0] // rate))
            starts = np.arange(n) * seconds
            widths = np.minimum(seconds, clip.duration - starts)
            panels["tokens"].barh(y, widths, 0.85, starts, color=COLOURS[stream], edgecolor="white", linewidth=0.8)
            panels["tokens"].text(-0.01 * clip.duration, y, f"{NAMES[stream]} : {rate}", ha="right", va="center", size=9)
            panels["tokens"].text(right, y, f"{n}", va="center", size=9)
            y, total = y + 1, total + n + 2
        panels["tokens"].text(1.05 * clip.duration, (first + y - 1) / 2, f"the LLM reads {total}", va="center", size=9)
        y += 0.6
    panels["tokens"].text(right, -1.1, "tokens", va="center", size=9)
    panels["tokens"].set(ylim=(y - 1, -0.6), xlabel="seconds")
    text = Path(path).with_suffix(".txt")
    title = f"“{text.read_text('utf-8').strip()}”" if text.is_file() else Path(path).name
    figure.text(4.9 / 10.4, 1 - 0.2 / height, title, ha="center", va="center", size=12)
    return figure


# --- tokens -----------------------------------------------------------------------------------------------

def curves(folders):
    """metrics.json of each folder -> {snr: {method: [(tokens, mean WER %, least, most, rates)]}} of avsr, in order.

    Folders of one method are seeds. The noises are clean and the lowest SNR that all folders have."""
    runs = []
    for folder in folders:
        metrics = read_json(Path(folder, "metrics.json"))
        runs.append((metrics["config"]["method"], [row for row in metrics["rows"] if row["task"] == "avsr"]))
    common = set.intersection(*({row["snr_db"] for row in rows} for _, rows in runs))
    if not common:
        raise ValueError("metrics.json: no noise at which all these folders have rows of avsr")
    found = {}
    for snr in sorted(common, key=lambda snr: (snr is not None, snr))[:2]:
        for method in dict.fromkeys(method for method, _ in runs):
            points = {}
            for row in (row for name, rows in runs if name == method for row in rows if row["snr_db"] == snr):
                rates = rate_name({"audio": row["audio_rate"], "video": row["video_rate"]})
                points.setdefault(rates, []).append((row["tokens"], 100 * row["wer"]))
            lines = ((*np.mean(p, 0), *np.min(p, 0)[1:], *np.max(p, 0)[1:], rates) for rates, p in points.items())
            found.setdefault(snr, {})[method] = sorted(lines)
    return found


def tokens_picture(args):
    """WER over the tokens that the LLM reads before the first word: a panel per noise, a line per method."""
    from matplotlib.figure import Figure
    found = curves(args.folders)
    figure = Figure((4.4 * len(found), 3.6), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for panel, (snr, lines) in zip(panels, found.items()):
        ticks = {}
        for method, points in lines.items():
            tokens, *wers, rates = zip(*points)
            mean, least, most = np.maximum(wers, FLOOR)
            ticks = dict(zip(rates, tokens)) | ticks
            panel.errorbar(tokens, mean, (mean - least, most - mean), fmt="o-", capsize=3, color=COLOURS[method],
                           label=NAMES[method])
        panel.set(xscale="log", yscale="log", xlabel="tokens read by the LLM (rate)",
                  title="clean" if snr is None else f"babble at {snr:g} dB")
        panel.set_xticks(list(ticks.values()), [f"{n:.0f}\n({rates})" for rates, n in ticks.items()])
        panel.set_xticks([], minor=True)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel(f"WER, %  (less than {FLOOR:g} is drawn at {FLOOR:g})")
    panels[0].legend()
    return figure


# --- routing ----------------------------------------------------------------------------------------------

@torch.no_grad()
def activation(model, encoded, rates):
    """Share of the prefix tokens' choices that went to each routed expert -> (layers, N_r). Each row sums to 1."""
    prefixes = model.prefix(encoded, rates)
    lengths = torch.tensor([len(prefix) for prefix in prefixes], device=model.device)
    x = pad_sequence(prefixes, batch_first=True)
    model.llm.hidden_states(x, valid_mask(lengths, x.shape[1]))
    shares = []
    for mome in (layer.mome for layer in model.llm.layers):
        _, chosen, valid = mome.routed                                      # (N, K), (B, T)
        counts = chosen[valid.flatten()].flatten().bincount(minlength=mome.n_routed)
        shares.append((counts / counts.sum()).cpu())
    return torch.stack(shares).numpy()


def routing(folder):
    """The activation of a checkpoint's experts on its samples -> [(rates, shares (layers, N_r))].

    A model of the synthetic talker also reads 32 of its validation clips."""
    model, config, _ = load(str(folder))
    if not model.config.llm.n_routed:
        raise ValueError(f"{folder}: this model has no routed experts")
    task = "avsr" if "avsr" in config["tasks"] else config["tasks"][0]
    options, paths = reading(model.config.audio, model.config.video), sample_paths(folder)
    clips = [read_clip(path, streams=TASKS[task], **options) for path in paths]
    if not config["parts"] and all("_talker" in path.name for path in paths):
        from toy.talker import talker_clip
        clips += [talker_clip(("valid", i, 0, options["size"], True)) for i in range(32)]
    clips = [clip for clip in clips if set(TASKS[task]) <= set(clip.streams)]
    encoded = model.encode(to_device(batch(clips, TASKS[task]), model.device))
    return [(rates, activation(model, encoded, rates)) for rates in task_rates(task, config["rates"])]


def correlation(pairs):
    """Mean Pearson correlation of pairs of rows, or nan where no pair varies."""
    values = [np.corrcoef(a, b)[0, 1] for a, b in pairs if np.std(a) > 0 and np.std(b) > 0]
    return np.mean(values) if values else float("nan")


def routing_picture(args):
    """A heat map of layers and experts for each rate. Prints how much the activation of rates and layers agrees."""
    from matplotlib.figure import Figure
    found = routing(args.folders[0])
    shares = np.stack([share for _, share in found])                        # (rates, layers, N_r)
    n_rates, n_layers, n_routed = shares.shape
    figure = Figure((0.7 + n_rates * max(2.4, 0.4 * n_routed), 1.2 + 0.36 * n_layers), layout="constrained")
    panels = figure.subplots(1, n_rates, sharey=True, squeeze=False)[0]
    for panel, (rates, share) in zip(panels, found):
        picture = panel.imshow(100 * share, "Blues", vmin=0, vmax=100 * shares.max(), aspect="auto")
        for (layer, expert), value in np.ndenumerate(100 * share if n_routed <= 16 else share[:0]):
            colour = "white" if value > 60 * shares.max() else "black"
            panel.text(expert, layer, f"{value:.0f}", ha="center", va="center", size=8, color=colour)
        panel.set(title=f"rate {rate_name(rates)}", xlabel="routed expert")
        panel.set_xticks(range(n_routed), range(1, n_routed + 1))
        panel.set_yticks(range(n_layers), range(1, n_layers + 1))
    panels[0].set_ylabel("layer")
    figure.colorbar(picture, ax=list(panels), label="% of choices", pad=0.01)
    rates = correlation(pair for layer in shares.swapaxes(0, 1) for pair in combinations(layer, 2))
    layers = correlation(pair for rate in shares for pair in combinations(rate, 2))
    print(f"mean correlation of the activation: {rates:.2f} between rates at the same layer, "
          f"{layers:.2f} between layers at the same rate")
    return figure


# --- python -m extras.pictures ----------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=PICTURES)
    parser.add_argument("folders", nargs="+", metavar="OUT", help="of train.py; several only for tokens")
    parser.add_argument("--save", required=True, metavar="PNG", help="the picture to write")
    parser.add_argument("--clip", help="for clip: a media file (default: the first of OUT/samples)")
    args = parser.parse_args(argv)
    if args.picture != "tokens" and len(args.folders) > 1:
        parser.error(f"{args.picture} shows one folder")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("pictures.py: matplotlib is not installed: pip install -r extras/requirements.txt", file=sys.stderr)
        return 2
    try:
        figure = PICTURES[args.picture](args)
        Path(args.save).parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.save, lambda path: figure.savefig(path, dpi=130, format="png"))
    except (ValueError, OSError, KeyError, TypeError) as error:
        print(f"pictures.py: {error}", file=sys.stderr)
        return 2
    return 0


PICTURES = {"clip": clip_picture, "tokens": tokens_picture, "routing": routing_picture}

if __name__ == "__main__":
    run_script(main)
