"""python -m pytest tests/test_mome.py: the MoME layer, the decoder, pooling, the audio-visual model."""
import subprocess
import sys

import jiwer
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, tiny_avsr

import data
from mome import AVSR, Llama, LlamaConfig, MoME, pool, rope_tables
from real.checkpoint import load_model, save_model
from real.files import CheckpointError
from sample import KVCache, generate
from toy.tokenizer import make_tokenizer


def random_mome(n_routed=6, top_k=2, n_shared=1, bottleneck=4, dim=16, seed=0):
    torch.manual_seed(seed)
    mome = MoME(dim, n_routed, top_k, n_shared, bottleneck)
    for parameter in (mome.down_bias, mome.up, mome.up_bias):
        torch.nn.init.normal_(parameter)
    return mome


def run_path(mome, path, x):
    """-> the output, and the gradients of the input and of all parameters, in fp32."""
    mome.path = path
    x = x.clone().requires_grad_()
    mome.zero_grad()
    y = mome(x)
    (y * torch.linspace(.1, 1, y.numel()).view_as(y)).sum().backward()  # one sign: no sum cancels, which bf16 could not follow
    return [t.float().clone() for t in (y.detach(), x.grad, *(torch.zeros_like(p) if p.grad is None else p.grad for p in mome.parameters()))]


def assert_near(found, expected, tolerance):
    """Every tensor within `tolerance` of its greatest value."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        if b.numel():
            assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


ROUTINGS = {"random": None, "collapsed": [0, 1], "some experts empty": [2, 3, 4]}


@pytest.fixture(params=ROUTINGS)
def routed(request):
    """A function of a shape -> (mome, x) of that routing: only these experts can win, since all inputs share a direction
    that they alone like."""
    def make(shape, **sizes):
        mome, x, winners = random_mome(**sizes), torch.randn(*shape), ROUTINGS[request.param]
        if winners:
            with torch.no_grad():
                x[..., 0] = 10
                mome.router.weight[:, 0] = torch.tensor([5.0 if e in winners else -5.0 for e in range(mome.n_routed)])
        return mome, x
    return make


PATHS = ("wide", "grouped", "auto")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(1, 16), (3, 7, 16), (0, 16)])
@pytest.mark.parametrize("bottleneck", [4, 3])  # rows of 16 bytes, and rows that are padded to it
def test_all_paths_equal_the_loop_in_value_and_gradient(routed, path, shape, bottleneck):
    mome, x = routed(shape, bottleneck=bottleneck)
    loop, other = run_path(mome, "loop", x), run_path(mome, path, x)
    assert loop[0].shape == x.shape
    assert_near(other, loop, 1e-5)


@pytest.mark.parametrize("path", ("loop", *PATHS))
def test_all_paths_in_bf16_are_near_the_loop_in_fp32(routed, path):
    """12 is the paper's bottleneck: 24 bytes in bf16, so the grouped product pads it. Both sides hold the same numbers, and
    the router decides in fp32, so that both choose the same experts."""
    mome, x = routed((40, 64), dim=64, bottleneck=12)
    with torch.no_grad():
        for p in mome.parameters():
            p.copy_(p.bfloat16())
    x = x.bfloat16().float()
    expected = run_path(mome, "loop", x)
    assert_near(run_path(mome.bfloat16(), path, x.bfloat16()), expected, 2e-2)


def test_grouped_refuses_widths_that_are_not_whole_16_bytes():
    mome = random_mome(dim=10)
    mome.path = "grouped"
    with pytest.raises(ValueError, match="16 bytes"):
        mome(torch.randn(3, 10))
    mome.path = "auto"
    assert mome(torch.randn(3, 10)).shape == (3, 10)


def test_auto_moves_tokens_only_where_that_saves_work():
    def choice(n_tokens, bottleneck, dtype=torch.float32, dim=16):
        mome, h = random_mome(23, 4, 1, bottleneck, dim), torch.zeros(n_tokens, dim, dtype=dtype)
        return mome.best_path(h)
    assert choice(2048, 12) == choice(16, 384) == choice(2048, 384, torch.float64) == choice(2048, 384, dim=10) == "wide"
    assert choice(2048, 384) == choice(2048, 384, torch.bfloat16) == "grouped"


def test_router_decides_in_fp32_in_a_bf16_model_and_under_autocast():
    """Two experts whose logits bf16 cannot tell apart: the better one is chosen all the same."""
    mome = random_mome(n_routed=2, top_k=1, n_shared=0, dim=64).bfloat16()
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        mome.router.weight.fill_(1)
        mome.router.weight[1, 0] = 1.0078125  # bf16's next number after 1: logits 64 and 64.0078
    assert mome.route(x)[1].item() == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert mome.float().route(x.float())[1].item() == 1


@pytest.mark.parametrize("path", ("loop", *PATHS))
def test_all_paths_run_under_autocast(path):
    mome, x = random_mome(), torch.randn(40, 16)
    expected = mome(x)
    mome.path = path
    with torch.autocast("cpu", torch.bfloat16):
        assert_near([mome(x).float()], [expected], 2e-2)


def test_the_only_chosen_expert_keeps_its_probability():
    mome, x = random_mome(top_k=1), torch.randn(9, 16)
    torch.testing.assert_close(mome.route(x)[0][:, 1], mome.router(x).softmax(-1).amax(-1))


def test_balance_loss_trains_the_router():
    mome, x = random_mome(), torch.randn(9, 16, requires_grad=True)
    mome(x)
    mome.balance_loss.backward()
    assert mome.router.weight.grad.abs().sum() > 0 and x.grad.abs().sum(1).min() > 0


@pytest.mark.parametrize("place", ["attn", "ffn", "layer"])
def test_rows_of_unequal_length_are_computed_without_padding(place):
    """(1, N, D) with lengths gives each row what it gives alone, and no expert meets padding."""
    torch.manual_seed(0)
    llm = Llama(LlamaConfig(40, 32, 2, 4, 2, 48, n_routed=4, n_shared=1, place=place))
    for layer in llm.layers:
        torch.nn.init.normal_(layer.mome.up)
    rows = [torch.randn(n, 32, requires_grad=True) for n in (3, 8, 1, 5)]
    hidden = llm.hidden_states(torch.cat(rows)[None], [3, 8, 1, 5])[0]
    assert [len(x) for x in llm.layers[1].mome.routed] == [17, 17]
    alone = [llm.hidden_states(row[None])[0] for row in rows]
    torch.testing.assert_close(hidden, torch.cat(alone), atol=1e-5, rtol=1e-5)
    packed = torch.autograd.grad(hidden.square().sum(), rows)
    each = torch.autograd.grad(sum(h.square().sum() for h in alone), rows)
    assert_near(packed, each, 1e-4)


def test_only_shared_experts_and_no_experts():
    x = torch.randn(5, 16)
    mome = random_mome(n_routed=0, n_shared=2)
    assert mome.n_active == 2
    expected = sum(F.gelu(x @ mome.down[n].T + mome.down_bias[n]) @ mome.up[n] + mome.up_bias[n] for n in range(2))
    for path in ("loop", *PATHS):
        mome.path = path
        torch.testing.assert_close(mome(x), expected)
    assert all(layer.mome is None for layer in Llama(LlamaConfig(10, 16, 1, 2, 2, 16)).layers)


def test_all_experts_chosen_is_the_dense_mixture():
    mome, x = random_mome(n_routed=5, top_k=5, n_shared=1), torch.randn(9, 16)
    gates = torch.cat([torch.ones(9, 1), mome.router(x).softmax(-1)], 1)
    dense = sum(gates[:, n, None] * (F.gelu(x @ mome.down[n].T + mome.down_bias[n]) @ mome.up[n] + mome.up_bias[n])
                for n in range(6))
    torch.testing.assert_close(mome(x), dense)


def test_gates_sum_to_one_and_are_top_k():
    mome, x = random_mome(n_routed=6, top_k=3, n_shared=2), torch.randn(50, 16)
    gates, experts = mome.route(x)
    assert (gates[:, :2] == 1).all() and (experts[:, :2] == torch.tensor([0, 1])).all()
    torch.testing.assert_close(gates[:, 2:].sum(1), torch.ones(50))
    top, chosen = mome.router(x).topk(3)
    assert torch.equal(experts[:, 2:], chosen + 2)
    torch.testing.assert_close(gates[:, 2:], top.softmax(1))


def test_the_example_in_the_docstring_of_route():
    mome = MoME(4, n_routed=4, top_k=2, n_shared=0, bottleneck=1)
    with torch.no_grad():
        mome.router.weight.copy_(torch.eye(4))
    gates, experts = mome.route(torch.tensor([[2., 0, 1, -1], [0, 0, 3, 3]]))
    assert experts[0].tolist() == [0, 2] and sorted(experts[1].tolist()) == [2, 3]
    torch.testing.assert_close(gates, torch.tensor([[.73, .27], [.5, .5]]), atol=.005, rtol=0)


def test_mome_needs_torch_alone():
    """mome.py and encoders.py are all that a fork must take along."""
    blocked = """
import sys
import torch
allowed = {*sys.stdlib_module_names, *(name.split(".")[0] for name in sys.modules), "mome", "encoders"} - {"numpy"}
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in allowed:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import mome
print(sorted(name for name in sys.modules if name in ("mome", "encoders", "data", "real", "safetensors", "tiktoken")))
"""
    done = subprocess.run([sys.executable, "-c", blocked], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "['encoders', 'mome']", done.stderr


def test_balance_loss_is_one_when_even_and_more_in_collapse():
    mome = random_mome(n_routed=4, top_k=1, dim=4)
    with torch.no_grad():
        mome.router.weight.copy_(torch.eye(4) * 9)
    mome(torch.eye(4))
    assert mome.balance_loss.item() == pytest.approx(1, abs=1e-5)
    mome(torch.eye(4)[[0, 0, 0, 0]])
    assert mome.balance_loss.item() == pytest.approx(4, abs=0.01)


def test_balance_loss_is_that_of_the_switch_transformer():
    mome, x = random_mome(n_routed=6, top_k=2), torch.randn(50, 16)
    mome(x)
    probs = mome.router(x).softmax(-1)
    f = torch.bincount(probs.topk(2).indices.flatten(), minlength=6) / 100        # of 50 tokens, 2 choices each
    torch.testing.assert_close(mome.balance_loss, 6 * (f * probs.mean(0)).sum())


@pytest.mark.parametrize("place", ["attn", "ffn", "layer"])
def test_what_mome_reads_and_where_its_output_is_added(place):
    torch.manual_seed(0)
    layer = Llama(LlamaConfig(9, 32, 1, 4, 2, 48, n_routed=4, n_shared=1, place=place)).layers[0]
    for parameter in layer.parameters():                    # norms too, so that what they read and give differ
        torch.nn.init.normal_(parameter, std=0.3)
    x, rope = torch.randn(1, 6, 32), rope_tables(torch.arange(6), torch.ones(4))
    h = layer.input_layernorm(x)
    y = x + layer.self_attn(h, rope=rope) + (layer.mome(h) if place == "attn" else 0)
    g = layer.post_attention_layernorm(y)
    expected = y + layer.mlp(g) + {"attn": 0, "ffn": layer.mome(g), "layer": layer.mome(h)}[place]
    torch.testing.assert_close(layer(x, rope=rope), expected)


@pytest.mark.parametrize("place", ["attn", "ffn", "layer"])
def test_new_mome_changes_nothing_and_then_something(place):
    sizes = (40, 32, 2, 4, 2, 48)
    plain, tokens = Llama(LlamaConfig(*sizes)), torch.randint(0, 40, (2, 6))
    llama = Llama(LlamaConfig(*sizes, n_routed=4, n_shared=1, place=place))
    missing, unexpected = llama.load_state_dict(plain.state_dict(), strict=False)
    assert missing and all(".mome." in name for name in missing) and not unexpected
    assert torch.equal(plain(tokens), llama(tokens))
    torch.nn.init.normal_(llama.layers[0].mome.up)
    assert not torch.allclose(plain(tokens), llama(tokens), atol=1e-3)


@pytest.mark.parametrize("wrong", [{"place": "mlp"}, {"n_routed": 4, "top_k": 5}, {"n_routed": -1}, {"bottleneck": 0}])
def test_wrong_sizes_are_refused(wrong):
    with pytest.raises(ValueError):
        LlamaConfig(10, **wrong)


def test_tokens_of_a_bf16_encoder_are_averaged_in_fp32(tiny):
    x, lengths = torch.randn(1, 64, 16).bfloat16(), torch.tensor([64])
    (half,), (whole,) = (tiny.prefix({"audio": (tokens, lengths)}, {"audio": 8}) for tokens in (x, x.float()))
    assert torch.equal(half, whole)


def test_what_is_trained_begins_small(tiny):
    """Of the markers <audio>, </audio>, <video>, </video> no two are equal. Down-projections begin as linear layers do."""
    markers = torch.cat(list(tiny.markers.values()))
    assert 0.015 < markers.std() < 0.025 and len(markers.unique(dim=0)) == 4
    assert 0.8 < MoME(64, 4, 2, 1, 8).down.abs().max() * 64 ** 0.5 <= 1


@pytest.mark.parametrize("part", ["norm", "layers.0.input_layernorm", "layers.1.post_attention_layernorm"])
def test_the_eps_of_every_norm_is_the_configs(part):
    assert Llama(LlamaConfig(9, 32, 2, 4, 2, 48, norm_eps=.25)).get_submodule(part).eps == .25


def test_llama_is_causal():
    torch.manual_seed(0)
    llama, tokens = Llama(LlamaConfig(40, 32, 2, 4, 2, 48, n_routed=4)), torch.randint(0, 40, (2, 9))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 40
    before, after = llama(tokens), llama(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_cache_agrees_with_no_cache_for_unequal_prefixes():
    model = tiny_avsr()
    llm, lengths, steps = model.llm, [3, 8, 5], 4
    tokens = [torch.randint(0, 40, (n + steps,)) for n in lengths]
    x = torch.nn.utils.rnn.pad_sequence([llm.embed_tokens(t[:n]) for t, n in zip(tokens, lengths)], True)
    cache = KVCache(llm.config, torch.tensor(lengths), 8 + steps, x)
    llm.hidden_states(x, cache=cache)
    for step in range(steps):
        new = torch.stack([t[n + step] for t, n in zip(tokens, lengths)])[:, None]
        hidden = llm.hidden_states(llm.embed_tokens(new), positions=(torch.tensor(lengths) + step)[:, None, None], cache=cache)
        for b, n in enumerate(lengths):
            torch.testing.assert_close(llm.logits(hidden)[b, 0], llm(tokens[b][None, :n + step + 1])[0, -1], atol=1e-4, rtol=1e-4)


# --- pooling ---

def test_pool_is_the_mean_also_of_ragged_tails_and_never_of_padding():
    x = torch.randn(2, 7, 3)
    pooled, lengths = pool(x, torch.tensor([7, 4]), 3)
    assert pooled.shape == (2, 3, 3) and lengths.tolist() == [3, 2]
    torch.testing.assert_close(pooled[0], torch.stack([x[0, :3].mean(0), x[0, 3:6].mean(0), x[0, 6]]))
    torch.testing.assert_close(pooled[1, :2], torch.stack([x[1, :3].mean(0), x[1, 3]]))
    leak = x.clone()
    leak[1, 4:] = 1e6
    assert torch.equal(pool(leak, torch.tensor([7, 4]), 3)[0], pooled)


def test_pool_by_8_is_pool_by_2_of_pool_by_4():
    x, lengths = torch.randn(3, 32, 5), torch.tensor([32, 16, 8])
    once, twice = pool(x, lengths, 8), pool(*pool(x, lengths, 4), 2)
    assert once[1].tolist() == twice[1].tolist()
    torch.testing.assert_close(once[0], twice[0])
    assert torch.equal(pool(x, lengths, 1)[0][0], x[0])


# --- the whole model ---

BOTH = {"audio": 4, "video": 2}


def answers_of(model, encoded, rates, beam=1, max_tokens=32):
    """Decode encoded clips -> [(token ids, mean log-probability)]."""
    return generate(model.llm, model.prefix(encoded, rates), model.config.eos, beam, max_tokens)


def features(clips, streams=("audio", "video")):
    return data.batch(clips, streams)


def test_padded_batch_equals_one_by_one(tiny, talker_clips):
    for rates in (BOTH, {"audio": 3}, {"video": 5}):
        together = tiny.prefix(tiny.encode(features(talker_clips)), rates)
        for clip, prefix in zip(talker_clips, together):
            torch.testing.assert_close(prefix, tiny.prefix(tiny.encode(features([clip])), rates)[0], atol=1e-4, rtol=1e-4)
        answers = answers_of(tiny, tiny.encode(features(talker_clips)), rates, max_tokens=6)
        for clip, (ids, logprob) in zip(talker_clips, answers):
            (alone, alone_logprob), = answers_of(tiny, tiny.encode(features([clip])), rates, max_tokens=6)
            assert ids == alone and logprob == pytest.approx(alone_logprob, abs=1e-3)


def test_input_layout(tiny, talker_clips):
    encoded = tiny.encode(features(talker_clips[:1]))
    (row,), (sound,) = tiny.prefix(encoded, BOTH), tiny.prefix(encoded, {"audio": 4})
    n_audio, n_video = -(-encoded["audio"][1].item() // 4), -(-encoded["video"][1].item() // 2)
    assert len(row) == 1 + 1 + n_audio + 1 + 1 + n_video + 1 + 1
    table, (a, v) = tiny.llm.embed_tokens.weight, (tiny.markers["audio"], tiny.markers["video"])
    for position, expected in ((0, table[0]), (1, a[0]), (2 + n_audio, a[1]), (3 + n_audio, v[0]), (-2, v[1]), (-1, table[2])):
        assert torch.equal(row[position], expected)
    assert len(sound) == n_audio + 4 and torch.equal(sound[-2], a[1]) and torch.equal(row[:3 + n_audio], sound[:-1])
    first, _, second, _ = tiny.projectors["video"]
    pooled, _ = pool(*encoded["video"], 2)
    torch.testing.assert_close(row[4 + n_audio:-2], F.layer_norm(second(first(pooled[0]).relu()), (32,)))


def test_loss_is_the_mean_over_all_tokens_of_the_transcripts_and_over_the_layers(tiny, talker_clips):
    encoded, labels, logits = tiny.encode(features(talker_clips[:2])), [[7, 9, 4], [5]], []
    for prefix, ids in zip(tiny.prefix(encoded, BOTH), labels):
        x = torch.cat([prefix, tiny.llm.embed_tokens(torch.tensor(ids))])
        logits.append(tiny.llm.logits(tiny.llm.hidden_states(x[None]))[0, len(prefix) - 1:])
    cross_entropy, balance = tiny.loss(encoded, labels, BOTH)
    torch.testing.assert_close(cross_entropy, F.cross_entropy(torch.cat(logits), torch.tensor([7, 9, 4, 1, 5, 1])))
    balances = [layer.mome.balance_loss for layer in tiny.llm.layers]
    torch.testing.assert_close(balance, torch.stack(balances).mean())
    assert len(balances) == 2 and balances[0] != balances[1]


def test_frozen_parts_get_no_gradient_and_router_and_experts_do(talker_clips):
    model = tiny_avsr()
    for layer in model.llm.layers:
        torch.nn.init.normal_(layer.mome.up)
    model.train()
    assert not any(module.training for module in model.encoders.modules())
    sum(model.loss(model.encode(features(talker_clips)), [[5, 6]] * 5, BOTH)).backward()
    for name, parameter in model.named_parameters():
        if ".mome." in name or name.startswith(("projectors.", "markers.")):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None and not parameter.requires_grad, name


def greedy(model, encoded, rates, steps):
    """Greedy decoding without cache, batch or beam."""
    x, ids, scores = model.prefix(encoded, rates)[0], [], []
    for _ in range(steps):
        logp = model.llm.logits(model.llm.hidden_states(x[None])[0, -1]).log_softmax(-1)
        scores.append(logp.max().item())
        best = logp.argmax().item()
        if best == model.config.eos:
            break
        ids.append(best)
        x = torch.cat([x, model.llm.embed_tokens.weight[None, best]])
    return ids, sum(scores) / len(scores)


@torch.no_grad()
def test_beam_1_is_greedy_and_a_wider_beam_scores_no_worse(talker_clips):
    ended = 0
    for seed in range(30):
        model = tiny_avsr(seed, vocab=4)
        encoded = model.encode(features(talker_clips[:1]))
        expected, logprob = greedy(model, encoded, BOTH, 6)
        (ids, mean), = answers_of(model, encoded, BOTH, max_tokens=6)
        assert ids == expected and mean == pytest.approx(logprob, abs=1e-4)
        ended += len(ids) < 6
        (_, wide), = answers_of(model, encoded, BOTH, beam=4, max_tokens=2)
        (_, narrow), = answers_of(model, encoded, BOTH, beam=1, max_tokens=2)
        assert wide >= narrow - 1e-5
    assert 0 < ended < 30, "these seeds no longer cover both ways of stopping"


@torch.no_grad()
def test_a_beam_as_wide_as_the_vocabulary_finds_the_best_two_tokens(talker_clips):
    missed = 0
    for seed in range(4):
        model = tiny_avsr(seed, vocab=6, tied=False)        # with a tied head the likeliest token repeats itself
        encoded = model.encode(features(talker_clips[:1]))
        prefix = model.prefix(encoded, BOTH)[0]

        def logp(ids):
            x = torch.cat([prefix, model.llm.embed_tokens(torch.tensor(ids, dtype=torch.long))])
            return model.llm.logits(model.llm.hidden_states(x[None])[0, -1]).log_softmax(-1).tolist()

        eos, first = model.config.eos, logp([])
        means = {(): first[eos]} | {(a,) if b == eos else (a, b): (first[a] + second) / 2
                                    for a in range(6) if a != eos for b, second in enumerate(logp([a]))}
        (ids, mean), = answers_of(model, encoded, BOTH, beam=6, max_tokens=2)
        assert tuple(ids) == max(means, key=means.get) and mean == pytest.approx(max(means.values()), abs=1e-4)
        missed += greedy(model, encoded, BOTH, 2)[0] != ids
    assert missed, "in none of these seeds does greedy decoding miss the best two tokens"


@torch.no_grad()
def test_a_beam_reports_the_probability_of_its_words(talker_clips):
    """What a hypothesis scored, with survivors moving between beams at every step, is what one pass over its words scores."""
    for seed in range(6):
        model = tiny_avsr(seed, vocab=8)
        encoded = model.encode(features(talker_clips))
        for prefix, (ids, mean) in zip(model.prefix(encoded, BOTH), answers_of(model, encoded, BOTH, beam=3, max_tokens=6)):
            said = torch.tensor(ids + [model.config.eos] * (len(ids) < 6))
            x = torch.cat([prefix, model.llm.embed_tokens(said[:-1])])
            logp = model.llm.logits(model.llm.hidden_states(x[None])[0, len(prefix) - 1:]).log_softmax(-1)
            assert mean == pytest.approx(logp[torch.arange(len(said)), said].mean().item(), abs=1e-4)


@torch.no_grad()
def test_a_padded_batch_of_beams_equals_one_by_one(tiny, talker_clips):
    together = answers_of(tiny, tiny.encode(features(talker_clips)), BOTH, beam=3, max_tokens=5)
    for clip, (ids, mean) in zip(talker_clips, together):
        (alone, alone_mean), = answers_of(tiny, tiny.encode(features([clip])), BOTH, beam=3, max_tokens=5)
        assert ids == alone and mean == pytest.approx(alone_mean, abs=1e-3)


def test_one_batch_overfits_to_wer_0(talker_clips):
    tokenizer = make_tokenizer(sorted({w for clip in talker_clips for w in clip.text.split()}))
    model = tiny_avsr(vocab=tokenizer.n_vocab).train()
    x, labels = model.encode(features(talker_clips)), [tokenizer.encode(f" {clip.text}") for clip in talker_clips]
    pairs = [BOTH, {"audio": 8}]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 5e-3)
    for _ in range(300):
        optimizer.zero_grad()
        for rates in pairs:
            cross_entropy, balance = model.loss(x, labels, rates)
            ((cross_entropy + 0.01 * balance) / len(pairs)).backward()
        optimizer.step()
    model.eval()
    for rates in pairs:
        told = [tokenizer.decode(ids).strip() for ids, _ in answers_of(model, x, rates)]
        assert jiwer.wer([clip.text for clip in talker_clips], told) == 0, told


def test_checkpoint_round_trip_and_same_bytes(tiny, tmp_path, talker_clips):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_model(tiny, tmp_path / name, {}, words=[], rates=[[4, 2]])
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    loaded, config = load_model(tmp_path / "a")
    assert config["rates"] == [[4, 2]] and loaded.config == tiny.config and isinstance(loaded, AVSR)
    for a, b in zip(tiny.prefix(tiny.encode(features(talker_clips)), BOTH), loaded.prefix(loaded.encode(features(talker_clips)), BOTH)):
        assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match="no config.json"):
        load_model(tmp_path)
    for name, content in (("config.json", "{"), ("config.json", "{}"), ("model.safetensors", "short")):
        good = (tmp_path / "b" / name).read_bytes()
        (tmp_path / "b" / name).write_text(content)
        with pytest.raises(CheckpointError, match="damaged"):
            load_model(tmp_path / "b")
        (tmp_path / "b" / name).write_bytes(good)
