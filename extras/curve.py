"""The learning curve of a run that was trained with --valid-every: WER of the held-out clips over the steps of stage 3.

    python -m extras.curve curve.png out/curve.json [other/curve.json ...]      needs matplotlib (extras/requirements.txt)
"""
import json
import sys
from pathlib import Path

from real.script import run_script


def series(curve):
    """What curve.json holds -> {name of a task at a rate: ([steps], [WER in %])}."""
    found = {}
    for point in curve:
        for row in point["rows"]:
            rates = ":".join(str(r) for r in (row["audio_rate"], row["video_rate"]) if r)
            steps, wers = found.setdefault(f"{row['task']}, rate {rates}", ([], []))
            steps.append(point["step"])
            wers.append(100 * row["wer"])
    return found


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) < 2:
        print("usage: python -m extras.curve PICTURE CURVE [CURVE ...]", file=sys.stderr)
        return 2
    picture, *paths = argv
    runs = {}
    for path in paths:
        try:
            runs[path] = series(json.loads(Path(path).read_text("utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"curve.py: {path}: not the curve.json of a run with --valid-every: {error}", file=sys.stderr)
            return 2
    try:
        from matplotlib import pyplot
    except ImportError:
        print("curve.py: matplotlib is not installed: pip install -r extras/requirements.txt", file=sys.stderr)
        return 2
    figure, panel = pyplot.subplots(figsize=(7, 3.6))
    for (path, found), style in zip(runs.items(), ("o-", "s--", "^:", "v-.") * len(runs)):
        for name, (steps, wers) in found.items():
            panel.semilogy(steps, [max(wer, .1) for wer in wers], style, label=f"{Path(path).parent}: {name}")
    panel.set_xlabel("steps of stage 3")
    panel.set_ylabel("WER of held-out clips, %  (0.1 or more)")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.grid(alpha=.3, which="both")
    panel.legend(fontsize=8)
    figure.tight_layout()
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    return 0


if __name__ == "__main__":
    run_script(main)
