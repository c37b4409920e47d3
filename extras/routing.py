"""Where tokens are sent: do a router's choices agree between rates?

A token at rate 8 is the mean of four tokens at rate 2. If rates share experts, it should be sent where those four were
sent. `agreement` is the share of the coarse token's K experts that a fine token of the same moment has too. Beside it
stand two such shares: with fine tokens of another moment of that clip, and with those of another layer, which has other
experts.

    python -m extras.pictures agreement out --save docs/agreement.png     the heat map; the numbers are printed
    python -m extras.pictures similarity out --save docs/similarity.png   cosine of pooled tokens, across rates and streams
"""
from contextlib import contextmanager
from itertools import combinations

import numpy as np
import torch

from mome import MoME

DRAWS = 2000     # of the bootstrap


@contextmanager
def observed(llm):
    """In this block, yields {layer: [experts (N, K) of each call]}. Forward hooks fill it; without them nothing is kept."""
    choices, hooks = {}, []
    for number, layer in enumerate(llm.layers):
        if isinstance(layer.mome, MoME) and layer.mome.router is not None:
            def keep(mome, inputs, output, number=number):
                choices.setdefault(number, []).append(mome.routed[1])
            hooks.append(layer.mome.register_forward_hook(keep))
    try:
        yield choices
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def prefix_choices(model, encoded, rates):
    """Encoded clips at one set of rates -> {stream: for each clip the experts (layers, T, K) of its T pooled tokens}."""
    prefixes = model.prefix(encoded, rates)
    lengths = [len(prefix) for prefix in prefixes]
    with observed(model.llm) as choices:
        model.llm.hidden_states(torch.cat(prefixes)[None], lengths)
    if not choices:
        raise ValueError("this model has no routed experts")
    experts = torch.stack([calls[0] for calls in choices.values()]).cpu()      # (layers, N, K)
    found = {stream: [] for stream in rates}
    for clip, of_clip in enumerate(experts.split(lengths, 1)):
        position = 1                                                           # after <bos>
        for stream, rate in rates.items():
            n_tokens = -(-int(encoded[stream][1][clip]) // rate)
            found[stream].append(of_clip[:, position + 1:position + 1 + n_tokens].numpy())    # after its marker
            position += n_tokens + 2
    return found


def overlap(coarse, fine):
    """Experts (..., K) of two tokens -> the share of the first's that the second has too, (...)."""
    return (coarse[..., :, None] == fine[..., None, :]).any(-1).mean(-1)


def agreement(coarse, fine, ratio):
    """Experts (layers, T, K) of one stream of one clip, at a coarse rate and at one `ratio` times finer -> three (layers,).

    Each is a mean of `overlap` over tokens: of the same moment, of another moment of the clip, and of another layer."""
    moments = np.arange(fine.shape[1])
    same = coarse[:, moments // ratio]                                         # (layers, T of the fine rate, K)
    other = np.roll(same, len(moments) // 2, axis=1)
    layers = [overlap(np.roll(same, shift, axis=0), fine).mean(1) for shift in range(1, len(fine))]
    return overlap(same, fine).mean(1), overlap(other, fine).mean(1), np.mean(layers, axis=0)


def agreements(model, encoded, rate_sets):
    """-> {(stream, fine rate, coarse rate): (3, clips, layers)} for the pairs of rates of which one divides the other."""
    choices = {}
    for rates in rate_sets:
        for stream, of_clips in prefix_choices(model, encoded, rates).items():
            choices.setdefault(stream, {})[rates[stream]] = of_clips
    found = {}
    for stream, of_rates in choices.items():
        for fine, coarse in combinations(sorted(of_rates), 2):
            if coarse % fine == 0:
                of_clips = [agreement(*pair, coarse // fine) for pair in zip(of_rates[coarse], of_rates[fine])]
                found[stream, fine, coarse] = np.array(of_clips).swapaxes(0, 1)
    if not found:
        raise ValueError("no trained rate divides another one")
    return found


def interval(of_clips, seed=0):
    """The mean over clips (n,) and its 95 % confidence interval: a bootstrap over the clips."""
    drawn = np.random.default_rng(seed).choice(of_clips, (DRAWS, len(of_clips))).mean(1)
    return of_clips.mean(), *np.quantile(drawn, (0.025, 0.975))


def agreement_picture(figure, found, names):
    """Draw for each stream the agreement of layers and pairs of rates. Print the means with their intervals.

    found: see agreements. names: {stream: word}."""
    streams = list(dict.fromkeys(stream for stream, *_ in found))
    figure.set_size_inches(4.4 * len(streams), 3.4)
    panels = figure.subplots(1, len(streams), squeeze=False)[0]
    kinds = "same moment", "another moment", "another layer"
    for panel, stream in zip(panels, streams):
        pairs = [key for key in found if key[0] == stream]
        of_layers = np.array([found[key][0].mean(0) for key in pairs]).T       # (layers, pairs of rates)
        image = panel.imshow(100 * of_layers, "Blues", vmin=0, vmax=100, aspect="auto")
        for (i, j), value in np.ndenumerate(of_layers):
            panel.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color="white" if value > 0.6 else "black")
        panel.set(title=names[stream], xlabel="rates", ylabel="layer" if panel is panels[0] else "")
        panel.set_xticks(range(len(pairs)), [f"{fine} and {coarse}" for _, fine, coarse in pairs])
        panel.set_yticks(range(len(of_layers)), range(1, len(of_layers) + 1))
        print(f"{names[stream]}: % of a coarse token's experts that a fine token has too")
        for _, fine, coarse in pairs:
            means = [interval(values.mean(1)) for values in found[stream, fine, coarse]]
            print(f"  rates {fine} and {coarse}: " + "; ".join(
                f"{kind} {100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})" for kind, (mean, low, high) in zip(kinds, means)))
    figure.colorbar(image, ax=list(panels), label="% of experts that agree", pad=0.01)


@torch.no_grad()
def similarity_picture(figure, model, encoded, rate_sets, names):
    """Draw the cosine similarity of one clip's pooled and projected tokens: streams and rates against each other."""
    rows, ticks, labels, n = [], [], [], 0
    for stream in encoded:
        for rate in sorted({rates[stream] for rates in rate_sets if stream in rates}):
            one = {stream: tuple(x[:1] for x in encoded[stream])}
            rows.append(model.prefix(one, {stream: rate})[0][2:-1 - len(model.config.prompt)])    # without bos and markers
            ticks.append(n + len(rows[-1]) / 2)
            labels.append(f"{names[stream]}, {rate}")
            n += len(rows[-1])
    x = torch.nn.functional.normalize(torch.cat(rows).float().cpu(), dim=-1)
    figure.set_size_inches(7.2, 6.2)
    panel = figure.subplots()
    image = panel.imshow((x @ x.T).numpy(), "RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    for edge in np.cumsum([len(row) for row in rows])[:-1] - 0.5:
        panel.axhline(edge, color="black", lw=0.5)
        panel.axvline(edge, color="black", lw=0.5)
    panel.set_xticks(ticks, labels, rotation=40, ha="right")
    panel.set_yticks(ticks, labels)
    figure.colorbar(image, label="cosine similarity", pad=0.01)
