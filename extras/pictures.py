"""Pictures of what train.py wrote, some of them in README.md and docs/results.md (matplotlib: extras/requirements.txt).

    python -m extras.pictures clip out --save docs/clip.png                                a clip as the model sees it
    python -m extras.pictures tokens out out-lora out-projectors --save tokens.png         WER over the tokens read
    python -m extras.pictures routing out --save docs/routing.png                          experts by layer, rate, stream
    python -m extras.pictures agreement out --save docs/agreement.png                      see extras/routing.py
    python -m extras.pictures similarity out --save docs/similarity.png                    see extras/routing.py
"""
import argparse
from itertools import combinations
from pathlib import Path

import numpy as np

from data import TASKS, TOKENS_PER_SECOND, batch, task_rates, to_device
from extras.routing import agreement_picture, agreements, prefix_choices, similarity_picture
from real.checkpoint import load_for_use, reading
from real.clips import choose_task, read_clip
from real.files import read_json, write_whole
from real.options import sample_clips
from real.script import in_one_line, run_script
from toy.talker import talker_clip

STYLES = {"mome": ("MoME", "tab:blue"), "lora": ("LoRA", "tab:orange"), "projectors": ("projectors only", "tab:green"),
          "audio": ("sound", "#4878a8"), "video": ("lips", "#c8745a")}
NAMES = {stream: STYLES[stream][0] for stream in TOKENS_PER_SECOND}
N_VALID = 32    # validation clips whose routing is looked at
FLOOR = 0.1     # % WER: a logarithmic axis has no 0


def read(folder, paths=None):
    """A checkpoint and clips, by default its samples -> model, config, clips, task."""
    model, config, _ = load_for_use(folder)
    options = reading(model.config.audio, model.config.video)
    clips = [read_clip(path, streams=tuple(model.encoders), **options) for path in paths or sample_clips(folder)]
    return model, config, clips, choose_task(clips[0].name, clips[0].streams, model, None, config["tasks"])


def clip_picture(figure, folder, path=None):
    """Draw eight mouths, the log-mel, and the windows that become one token at each trained rate."""
    model, config, (clip, *_), task = read(folder, path and [path])
    inputs, rate_sets, end = batch([clip], TASKS[task]), task_rates(task, config["rates"]), clip.duration
    heights = {"video": 0.85, "audio": 1.5, "tokens": 0.25 * len(rate_sets) * (len(TASKS[task]) + 0.6)}      # inches
    heights = {name: height for name, height in heights.items() if name in (*inputs, "tokens")}
    figure.set_size_inches(10.4, sum(heights.values()) + 1.1)
    panels = dict(zip(heights, figure.subplots(len(heights), sharex=True, height_ratios=list(heights.values()))))
    if "video" in inputs:
        frames, size = inputs["video"][0][0, 0].numpy(), model.config.video.size
        edge = (frames.shape[-1] - size) // 2
        for i in range(8):
            picture = frames[int((i + 0.5) / 8 * len(frames)), edge:edge + size, edge:edge + size]
            extent = (i + 0.03) * end / 8, (i + 0.97) * end / 8, 0, 1
            panels["video"].imshow(picture, "gray", vmin=0, vmax=1, extent=extent, aspect="auto")
    if "audio" in inputs:
        panels["audio"].imshow(inputs["audio"][0][0].numpy(), "magma", origin="lower", extent=(0, end, 0, 1),
                               aspect="auto")
    y, labels, tokens = 0, {}, panels["tokens"]
    for rates in rate_sets:
        counts = []
        for stream, rate in rates.items():
            seconds, n = rate / TOKENS_PER_SECOND[stream], int(model.encoders[stream].n_tokens(inputs[stream][1])[0])
            starts, (name, colour) = np.arange(-(-n // rate)) * seconds, STYLES[stream]
            tokens.barh(y, np.minimum(seconds, end - starts), 0.85, starts, color=colour, edgecolor="white")
            counts, labels[y], y = [*counts, len(starts)], f"{name}, rate {rate}", y + 1
        counts.append(1 + 2 * len(rates) + len(model.config.prompt))
        text = f"{' + '.join(map(str, counts))} = {sum(counts)}"
        tokens.text(1.01 * end, y - len(rates) / 2 - 0.5, text, va="center")
        y += 0.6
    for name, panel in panels.items():
        panel.set(xlim=(0, end), yticks=[], ylabel={"video": "mouths", "audio": "log-mel"}.get(name, ""))
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
    tokens.set_yticks(list(labels), list(labels.values()))
    names = " + ".join(STYLES[stream][0] for stream in inputs)
    tokens.set(ylim=(y - 1, -0.6), xlabel=f"seconds          right: tokens of {names} + markers and prompt")
    text = Path(clip.name).with_suffix(".txt")
    figure.suptitle(f"“{text.read_text('utf-8').strip()}”" if text.is_file() else Path(clip.name).name)


def curves(folders):
    """metrics.json of each folder -> {snr: {method: [(tokens, mean WER %, least, most, rates)]}} for avsr.

    Folders of one method are its seeds. The noises are None (clean) and the lowest SNR of all."""
    found = {}
    for metrics in (read_json(Path(folder, "metrics.json")) for folder in folders):
        for row in (row for row in metrics.get("rows", []) if row["task"] == "avsr"):
            points = found.setdefault(row["snr_db"], {}).setdefault(metrics["config"]["method"], {})
            rates = f"{row['audio_rate']}:{row['video_rate']}"
            points.setdefault(rates, []).append((row["tokens"], 100 * row["wer"]))
    if not found:
        raise ValueError(f"{folders[0]}/metrics.json: no rows of avsr")
    snrs = [snr for snr in (None, min(found.keys() - {None}, default=None)) if snr in found]
    return {snr: {method: sorted((*np.mean(p, 0), np.min(p, 0)[1], np.max(p, 0)[1], r) for r, p in points.items())
                  for method, points in found[snr].items()} for snr in snrs}


def tokens_picture(figure, *folders):
    """Draw WER over the tokens that the LLM reads before the first word: a panel per noise, a line per method."""
    found = curves(folders)
    figure.set_size_inches(4.4 * len(found), 3.6)
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for panel, (snr, lines) in zip(panels, found.items()):
        for method, points in lines.items():
            tokens, *wers, rates = zip(*points)
            (mean, least, most), (name, colour) = np.maximum(wers, FLOOR), STYLES.get(method, (method, None))
            panel.errorbar(tokens, mean, (mean - least, most - mean), fmt="o-", capsize=3, color=colour, label=name)
        panel.set(xscale="log", yscale="log", title="clean" if snr is None else f"babble at {snr:g} dB")
        panel.set(xlabel="tokens read by the LLM, at rates of sound:lips")
        panel.set_xticks([], minor=True)
        panel.set_xticks(tokens, [f"{n:.0f}\n{rate}" for n, rate in zip(tokens, rates)])
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel(f"WER, %  (less than {FLOOR:g} is drawn at {FLOOR:g})")
    panels[0].legend()


def encode_clips(folder):
    """A checkpoint and its samples -> model, encoded clips, sets of rates. Of a model of the synthetic talker also N_VALID
    of its validation clips."""
    model, config, clips, task = read(folder)
    if not config["parts"] and all("_talker" in clip.name for clip in clips):
        size = reading(model.config.audio, model.config.video)["size"]
        clips += [talker_clip(("valid", i, 0, size, False)) for i in range(N_VALID)]
    return model, model.encode(to_device(batch(clips, TASKS[task]), model.device)), task_rates(task, config["rates"])


def routing(folder):
    """Share of the pooled tokens' choices that went to each routed expert -> {(stream, rate): (layers, N_r)}."""
    model, encoded, rate_sets = encode_clips(folder)
    n_routed, chosen = model.config.llm.n_routed, {}
    for rates in rate_sets:
        for stream, clips in prefix_choices(model, encoded, rates).items():
            chosen.setdefault((stream, rates[stream]), []).extend(clips)
    found = {}
    for key, clips in sorted(chosen.items()):
        counts = np.array([np.bincount(layer.flatten(), minlength=n_routed) for layer in np.concatenate(clips, axis=1)])
        found[key] = counts / counts.sum(1, keepdims=True)
    return found


def draw_agreement(figure, folder):
    model, encoded, rate_sets = encode_clips(folder)
    agreement_picture(figure, agreements(model, encoded, rate_sets), NAMES)


def draw_similarity(figure, folder):
    similarity_picture(figure, *encode_clips(folder), NAMES)


def routing_picture(figure, folder):
    """Draw a heat map of layers and experts for each stream and rate. Print how the shares correlate."""
    found = routing(folder)
    n_layers, n_routed = next(iter(found.values())).shape
    highest = max(shares.max() for shares in found.values())
    of_streams = {}
    for (stream, rate), shares in found.items():
        of_streams.setdefault(stream, {})[rate] = shares
    n_columns = max(map(len, of_streams.values()))
    figure.set_size_inches(0.9 + n_columns * max(2.4, 0.4 * n_routed), (0.8 + 0.36 * n_layers) * len(of_streams) + 0.4)
    panels = figure.subplots(len(of_streams), n_columns, sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat:
        panel.set_visible(False)
    for row, (stream, of_rates) in zip(panels, of_streams.items()):
        for panel, (rate, shares) in zip(row, of_rates.items()):
            panel.set_visible(True)
            image = panel.imshow(100 * shares, "Blues", vmin=0, vmax=100 * highest, aspect="auto")
            for (i, j), value in np.ndenumerate(shares):
                panel.text(j, i, f"{100 * value:.0f}", ha="center", va="center", size=8,
                           color="white" if value > 0.6 * highest else "black")
            panel.set(title=f"{NAMES[stream]}, rate {rate}", ylabel="layer" if panel is row[0] else "")
            panel.set_xlabel("routed expert" if row[0] is panels[-1, 0] else "")
            panel.set_xticks(range(n_routed), range(1, n_routed + 1))
            panel.set_yticks(range(n_layers), range(1, n_layers + 1))
    figure.colorbar(image, ax=panels, label="% of choices", pad=0.01)
    pairs = [(one, other, layer) for one, other in combinations(found, 2) for layer in range(n_layers)]
    kinds = {
        "rates of one stream, at the same layer": [
            (found[one][i], found[other][i]) for one, other, i in pairs if one[0] == other[0]],
        "sound and lips at one rate, at the same layer": [
            (found[one][i], found[other][i]) for one, other, i in pairs if one[0] != other[0] and one[1] == other[1]],
        "layers, at the same stream and rate": [pair for shares in found.values() for pair in combinations(shares, 2)]}
    for kind, of_kind in kinds.items():
        if of_kind:
            values = [np.corrcoef(*pair)[0, 1] for pair in of_kind]
            print(f"mean correlation of the shares between {kind}: {np.mean(values):.2f}")


@in_one_line("pictures.py", ImportError, ValueError, OSError)
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    draw = {"clip": clip_picture, "tokens": tokens_picture, "routing": routing_picture, "agreement": draw_agreement,
            "similarity": draw_similarity}
    parser.add_argument("picture", choices=draw)
    parser.add_argument("folders", nargs="+", metavar="OUT", help="folder of train.py; several for tokens")
    parser.add_argument("--save", required=True, type=Path, metavar="PNG", help="the picture to write")
    parser.add_argument("--clip", help="for clip: a media file (default: the first of OUT/samples)")
    args = parser.parse_args(argv)
    if args.picture != "tokens" and len(args.folders) > 1:
        parser.error(f"{args.picture} is of one folder")
    if args.clip and args.picture != "clip":
        parser.error(f"--clip is for the picture clip, not for {args.picture}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("matplotlib is not installed: pip install -r extras/requirements.txt") from None
    figure = Figure(layout="constrained")
    draw[args.picture](figure, *args.folders, **{"path": args.clip} if args.picture == "clip" else {})
    args.save.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.save, lambda path: figure.savefig(path, dpi=130, format="png"))


if __name__ == "__main__":
    run_script(main)
