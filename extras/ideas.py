"""Three ideas to lose less at coarse rates, beyond the paper, each at MoME's number of active parameters in the LLM:

    --method mome-teacher   the finest rate teaches the coarser ones: cross-entropy with its distribution over words
    --method mome-bias      balance without a loss on the router: a bias on the choice alone, as in DeepSeek-V3 (2412.19437)
    --method mome-places    order inside a window: tokens carry their place in it through the average

docs/results.md says what came of each.
"""
import torch
import torch.nn.functional as F
from torch import nn

from data import ClipError
from mome import MoME, Projector

TEACHER = 0.5       # weight of the teacher's distribution, against the transcript


def add_teacher(model, rate_sets):
    """--method mome-teacher. The finest set of rates of each task comes first in a step. Its distribution is kept, without
    gradient. The loss at the others is (1 - TEACHER) * cross-entropy + TEACHER * cross-entropy with that distribution.

    Raises ClipError if the finest set does not come first."""
    loss, logits, kept, finest = model.loss, model.llm.logits, {}, finest_rates(rate_sets)

    def keep_logits(hidden):
        kept["logits"] = found = logits(hidden)     # in the test, two threads decode at once
        return found

    def loss_with_teacher(encoded, transcripts, rates):
        cross_entropy, balance = loss(encoded, transcripts, rates)
        if rates == finest[tuple(rates)]:
            kept["teacher"] = kept["logits"].detach().float().softmax(-1)
            return cross_entropy, balance
        taught = F.cross_entropy(kept["logits"].float(), kept["teacher"])
        return (1 - TEACHER) * cross_entropy + TEACHER * taught, balance

    model.llm.logits, model.loss = keep_logits, loss_with_teacher


def finest_rates(rate_sets):
    """{streams: their finest rates}. Raises ClipError if these do not come first."""
    finest = {tuple(rates): min((other for other in rate_sets if set(other) == set(rates)), key=lambda r: sum(r.values()))
              for rates in rate_sets}
    first = {tuple(rates): rates for rates in reversed(rate_sets)}
    if first != finest:
        raise ClipError("--method mome-teacher: name the finest rates first, like --rates 2,4,8")
    return finest


class BiasedMoME(MoME):
    """A MoME that chooses experts by probability + bias and gates them by the probability alone.

    `balance_loss` moves the bias of an expert against its load and leaves the router alone."""

    def route(self, x):
        with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
            probs = F.linear(x.float(), self.router.weight.float()).softmax(-1)
        chosen = (probs + self.bias).topk(self.top_k, dim=-1).indices     # (N, K)
        self.routed = probs, chosen         # in the test, two threads decode at once: it is not read here
        top = probs.gather(1, chosen)
        if self.top_k > 1:
            top = top / top.sum(dim=-1, keepdim=True)
        shared = torch.arange(self.n_shared, device=x.device).expand(len(x), -1)
        gates = torch.cat([x.new_ones(shared.shape), top.to(x.dtype)], dim=1)
        return gates, torch.cat([shared, chosen + self.n_shared], dim=1)

    @property
    def balance_loss(self):
        probs, chosen = self.routed
        load = torch.zeros_like(probs).scatter(1, chosen, 1.0).sum(0)
        total = self.sum_counts(load).sum()                               # of all processes, whose gradients add up
        excess = (self.n_routed * load - load.sum()) / total
        return (self.bias * excess).sum()                                 # its gradient is the excess load


def add_bias(model):
    """--method mome-bias."""
    for layer in model.llm.layers:
        layer.mome.__class__ = BiasedMoME
        layer.mome.bias = nn.Parameter(torch.zeros(layer.mome.n_routed, device=model.device))


def add_places(model, rate_sets):
    """--method mome-places. Encoder tokens x_t become (x_t, p_t x_t): p_t runs from -1 to 1 over the coarsest window. The
    average of p_t x_t over a window tells its beginning from its end. Only the projectors are wider."""
    coarsest = {stream: max(rates[stream] for rates in rate_sets if stream in rates) for stream in model.encoders}
    prefix = model.prefix
    for stream, projector in model.projectors.items():
        wide = Projector(2 * projector[0].in_features, projector[0].out_features, projector[2].out_features)
        model.projectors[stream] = wide.to(model.device)

    def prefix_with_places(encoded, rates):
        placed = {}
        for stream in rates:
            x, lengths = encoded[stream]                                       # (B, T, D)
            place = torch.arange(x.shape[1], device=x.device) % coarsest[stream]
            place = 2 * place / max(1, coarsest[stream] - 1) - 1               # (T,)
            placed[stream] = torch.cat([x, x * place[:, None].to(x)], dim=-1), lengths
        return prefix(placed, rates)

    model.prefix = prefix_with_places


IDEAS = {"mome-teacher": add_teacher, "mome-places": add_places, "mome-bias": lambda model, rate_sets: add_bias(model)}
