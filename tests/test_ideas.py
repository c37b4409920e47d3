"""python -m pytest tests/test_ideas.py: the ideas beyond the paper compute what they say."""
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import train
from data import ClipError
from extras import baselines, ideas

RATES = [{"audio": 2, "video": 2}, {"audio": 4, "video": 4}, {"audio": 2}, {"audio": 4}]


def test_places_tell_the_two_halves_of_a_window_apart(tiny):
    """With places a window and its mirror image give two tokens; their plain averages are the same."""
    x = torch.randn(1, 4, 16)
    mirrored = x.flip(1)
    plain = [tiny.prefix({"audio": (tokens, torch.tensor([4]))}, {"audio": 4})[0] for tokens in (x, mirrored)]
    torch.testing.assert_close(*plain)
    ideas.add_places(tiny, RATES)
    placed = [tiny.prefix({"audio": (tokens, torch.tensor([4]))}, {"audio": 4})[0] for tokens in (x, mirrored)]
    assert not torch.allclose(*placed, atol=1e-2)


def test_the_teacher_is_the_finest_rate(tiny):
    """The loss at a coarse rate is a mean of that of the transcript and that of the finest rate's distribution."""
    encoded = {"audio": (torch.randn(2, 9, 16), torch.tensor([9, 7]))}
    transcripts = [[5, 6], [7]]
    fine, coarse = (tiny.loss(encoded, transcripts, rates)[0].item() for rates in RATES[2:])
    logits = []
    original = tiny.llm.logits
    tiny.llm.logits = lambda hidden: logits.append(original(hidden)) or logits[-1]
    for rates in RATES[2:]:
        tiny.loss(encoded, transcripts, rates)
    taught = torch.nn.functional.cross_entropy(logits[1], logits[0].softmax(-1)).item()
    ideas.add_teacher(tiny, RATES)
    assert tiny.loss(encoded, transcripts, RATES[2])[0].item() == pytest.approx(fine)
    assert tiny.loss(encoded, transcripts, RATES[3])[0].item() == pytest.approx(coarse / 2 + taught / 2, rel=1e-5)


def test_threads_that_decode_at_once_keep_their_logits_apart(tiny):
    ideas.add_teacher(tiny, RATES)
    before, sizes = sys.getswitchinterval(), [1 + i % 5 for i in range(3000)]
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as workers:
            found = list(workers.map(lambda n: len(tiny.llm.logits(torch.zeros(n, 32))), sizes))
    finally:
        sys.setswitchinterval(before)
    assert found == sizes


def test_the_finest_rate_must_come_first(tiny):
    with pytest.raises(ClipError, match="name the finest rates first"):
        ideas.add_teacher(tiny, RATES[::-1])


def test_a_bias_moves_choices_and_not_gates(tiny):
    mome = tiny.llm.layers[0].mome
    x = torch.randn(50, 32)
    gates, experts = mome.route(x)
    ideas.add_bias(tiny)
    same_gates, same_experts = mome.route(x)
    assert torch.equal(gates, same_gates) and torch.equal(experts, same_experts)
    mome.bias.data[3] = 2
    gates, experts = mome.route(x)
    assert (experts[:, 1] == 3 + mome.n_shared).all() and torch.allclose(gates[:, 1:].sum(1), torch.ones(50))
    mome.balance_loss.backward()
    assert mome.router.weight.grad is None and mome.bias.grad.argmax() == 3 and mome.bias.grad[3] == pytest.approx(1.0)


def test_threads_may_route_at_once(tiny):
    ideas.add_bias(tiny)
    mome = tiny.llm.layers[0].mome
    batches = [torch.randn(n, 32) for n in (50, 5000)] * 50
    with torch.no_grad(), ThreadPoolExecutor(2) as pool:
        for x, (gates, _) in zip(batches, pool.map(mome.route, batches)):
            assert len(gates) == len(x)
    assert mome.to("meta").route(torch.empty(7, 32, device="meta"))[1].shape == (7, 3)      # as extras/cost.py does


def test_rates_that_the_teacher_does_not_take_are_refused_at_once(capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(["--method", "mome-teacher", "--rates", "8,4,2"])
    assert "name the finest rates first" in capsys.readouterr().err


def test_an_idea_is_a_method(tiny):
    facts = {"method": "mome-bias", "rank": 1, "tasks": ["asr"], "rates": [(2, 2), (4, 4)], "projector_per_rate": False}
    baselines.build_adapter(tiny, facts)
    assert isinstance(tiny.llm.layers[1].mome, ideas.BiasedMoME)
