"""python -m pytest tests/test_weights.py: other people's weights, against transformers as the reference."""
import base64
import copy
import json
import os
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

import data
import sample
from encoders import AudioEncoder, VideoConfig, VideoEncoder, log_mel
from mome import Llama
from real import setup, tokenizer, weights
from real.files import WeightsError


# --- Llama ---

SIZES = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512)
VARIANTS = {
    "plain": {}, "tied": dict(tie_word_embeddings=True), "all heads have keys": dict(num_key_value_heads=4),
    "one key head": dict(num_key_value_heads=1), "wide heads": dict(head_dim=24),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "theta and eps": dict(rope_theta=500_000.0, rms_norm_eps=1e-3),
    "linear rope": dict(rope_scaling=dict(rope_type="linear", factor=4.0)),
    "llama3 rope": dict(rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                          original_max_position_embeddings=64)),
    "two contexts": dict(original_max_position_embeddings=128, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)),
    "the context at the top": dict(original_max_position_embeddings=64, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0))}


def random_llama(folder, shard="1GB", **more):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | more)).eval()
    for name, parameter in model.named_parameters():  # also norms and biases, which begin as ones and zeros
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_llama_gives_transformers_logits(tmp_path, variant):
    theirs, tokens = random_llama(tmp_path, **VARIANTS[variant]), torch.randint(0, 99, (2, 200))
    ours = Llama.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_shards_dtypes_and_new_experts(tmp_path):
    theirs, tokens = random_llama(tmp_path, shard="20KB"), torch.randint(0, 99, (2, 9))
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    expected = theirs(tokens).logits
    torch.testing.assert_close(Llama.from_pretrained(tmp_path)(tokens), expected, atol=1e-4, rtol=1e-4)
    half = Llama.from_pretrained(tmp_path, torch.bfloat16, n_routed=4, n_shared=1)
    assert {p.dtype for name, p in half.named_parameters() if ".mome." not in name} == {torch.bfloat16}
    assert {p.dtype for p in half.layers[1].mome.parameters()} == {torch.float32}  # what is trained
    assert (half(tokens).float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_ids_and_dtypes_that_cannot_be(tmp_path):
    random_llama(tmp_path, bos_token_id=1, eos_token_id=[2, 3])
    assert weights.llama_ids(tmp_path) == (1, 2)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong in ([], 999, -1, None, "2"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": wrong}))
        with pytest.raises(WeightsError, match="expected two ids below vocab_size 99"):
            weights.llama_ids(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: x.to(torch.int8) if "q_proj" in name else x for name, x in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="q_proj.weight' holds torch.int8: quantised weights are not supported"):
        Llama.from_pretrained(tmp_path)


def test_generate_gives_the_tokens_of_transformers(tmp_path):
    theirs, prompt = random_llama(tmp_path, eos_token_id=None, bos_token_id=None), torch.randint(0, 99, (1, 12))
    expected = theirs.generate(prompt, max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(prompt))
    llm = Llama.from_pretrained(tmp_path)
    (ids, _), = sample.generate(llm, [llm.embed_tokens(prompt[0])], eos=-1, beam=1, max_tokens=20)
    assert ids == expected[0, 12:].tolist()


def change(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def change_config(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


WRONG_LLAMAS = {
    "no tensor 'model.layers.1.mlp.up_proj.weight'": lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
    "no place for: model.extra": lambda t: t.update({"model.extra": torch.zeros(1)}),
    r"'model.norm.weight' has shape \(31,\), expected \(32,\)":
        lambda t: t.update({"model.norm.weight": torch.zeros(31)})}


@pytest.mark.parametrize("message", WRONG_LLAMAS)
def test_wrong_tensors_are_named(tmp_path, message):
    random_llama(tmp_path)
    change(tmp_path / "model.safetensors", WRONG_LLAMAS[message])
    with pytest.raises(WeightsError, match=message):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize("entry, message", [
    ({"model_type": "qwen2"}, "model_type 'qwen2'"), ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_parameters": None}, "rope type 'yarn'")])
def test_models_that_are_not_supported_are_named(tmp_path, entry, message):
    random_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | entry))
    with pytest.raises(WeightsError, match=message):
        Llama.from_pretrained(tmp_path)


def test_folders_without_weights_are_named(tmp_path):
    with pytest.raises(WeightsError, match="config.json: not readable"):
        Llama.from_pretrained(tmp_path)
    random_llama(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(WeightsError, match="not readable as safetensors"):
        Llama.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no model.safetensors"):
        Llama.from_pretrained(tmp_path)


# --- products with few rows ---

@pytest.mark.parametrize("shape", [(256,), (1, 1, 256), (3, 256), (2, 2, 256), (5, 256), (0, 256)])
@pytest.mark.parametrize("d_out, biased", [(264, False), (264, True), (265, True)])
def test_linear_of_few_rows_is_that_of_many(shape, d_out, biased):
    torch.manual_seed(0)
    inputs = [(torch.randn(size) / 16).requires_grad_() for size in (shape, (d_out, 256), d_out)][:3 if biased else 2]
    ours, theirs = weights.few_rows_linear(*inputs), F.linear(*inputs)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (ours, theirs))):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):  # its dtype too
        torch.testing.assert_close(weights.few_rows_linear(*inputs), F.linear(*inputs), atol=0.01, rtol=0.02)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_llama_uses_products_with_few_rows(tmp_path, tied, monkeypatch):
    random_llama(tmp_path, vocab_size=96, tie_word_embeddings=tied)
    llm = Llama.from_pretrained(tmp_path, n_routed=4, n_shared=1)
    fast = [name for name, module in llm.named_modules() if isinstance(module, weights.FewRowsLinear)]
    assert len(fast) == 2 * 7 + (not tied) and not any(".mome." in name for name in fast)
    shapes = []

    def few_rows_linear(x, weight, bias=None):
        shapes.append(tuple(weight.shape))
        return F.linear(x, weight, bias)

    monkeypatch.setattr(weights, "few_rows_linear", few_rows_linear)
    monkeypatch.setattr(weights, "MIN_WEIGHTS", 1)
    tokens = torch.randint(96, (1, 3))
    expected = llm(tokens)
    assert len(shapes) == 2 * 4 + 1 and shapes[-1] == (96, 32)  # q, k, v together, gate and up too; and the logits
    monkeypatch.undo()
    monkeypatch.setattr(weights, "MIN_WEIGHTS", 1)
    torch.testing.assert_close(llm(tokens), expected)
    copied = copy.deepcopy(llm)
    copied.embed_tokens.weight.zero_()
    assert copied.logits.__self__ is copied


@torch.no_grad()
@pytest.mark.parametrize("biased", [False, True])
def test_layers_that_read_the_same_x_share_one_product(tmp_path, biased, monkeypatch):
    random_llama(tmp_path, attention_bias=biased, mlp_bias=biased)
    monkeypatch.setattr(weights, "MIN_WEIGHTS", 1)
    llm = Llama.from_pretrained(tmp_path)
    attention, mlp = llm.layers[0].self_attn, llm.layers[0].mlp
    joined = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert len({layer.weight.untyped_storage().data_ptr() for layer in joined}) == 1    # no number is kept twice
    products, shapes = weights.few_rows_linear, []

    def few_rows_linear(x, weight, bias=None):
        shapes.append(weight.shape[0])
        return products(x, weight, bias)

    monkeypatch.setattr(weights, "few_rows_linear", few_rows_linear)
    for x in (torch.randn(1, 1, 32), torch.randn(3, 1, 32), torch.randn(1, 1, 32)):
        shapes.clear()
        for layer in (*joined, mlp.up_proj, mlp.gate_proj):     # in any order
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        assert shapes == [sum(layer.out_features for layer in joined), 2 * mlp.up_proj.out_features]
    x = torch.randn(1, 5, 32)                                   # of many tokens each layer computes its own
    shapes.clear()
    torch.testing.assert_close(attention.q_proj(x), F.linear(x, attention.q_proj.weight, attention.q_proj.bias))
    assert shapes == [attention.q_proj.out_features]


def test_joined_weights_follow_every_change(tmp_path, monkeypatch):
    """A new weight, one that is written into, a copy of the model, a gradient: each layer computes with its own weight."""
    random_llama(tmp_path)
    monkeypatch.setattr(weights, "MIN_WEIGHTS", 1)
    llm = Llama.from_pretrained(tmp_path)
    attention, x = llm.layers[0].self_attn, torch.randn(1, 1, 32)

    def check(layers):
        with torch.no_grad():
            for layer in layers:
                torch.testing.assert_close(layer(x.clone()), F.linear(x, layer.weight))

    q, k, v = layers = attention.q_proj, attention.k_proj, attention.v_proj
    k.weight = torch.nn.Parameter(torch.randn_like(k.weight))
    check(layers)
    q.weight.data.mul_(2)
    check(layers)
    llm.load_state_dict({name: torch.randn_like(tensor) for name, tensor in llm.state_dict().items()})
    check(layers)
    copied = copy.deepcopy(llm)
    copied.layers[0].self_attn.v_proj.weight.data.zero_()
    check([copied.layers[0].self_attn.v_proj, v])
    v.weight.requires_grad_()
    v(x).sum().backward()
    torch.testing.assert_close(v.weight.grad, x[0].expand_as(v.weight))


# --- fingerprints ---

@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_fingerprints_tell_weights_apart(tmp_path, suffix):
    """A fine-tuned copy has the same size, names and shapes. It differs in nearly every weight."""
    def write(folder, tensors):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / f"model{suffix}"
        (save_file if suffix == ".safetensors" else torch.save)(tensors, path)
        return path

    torch.manual_seed(0)
    tensors = {"a": torch.randn(3000, 1000), "b": torch.randn(2000)}
    first, same = write("first", tensors), write("same", tensors)
    tuned = write("tuned", {name: t + 1e-3 * torch.randn(t.shape) for name, t in tensors.items()})
    other = write("other", {name: t.half() for name, t in tensors.items()})
    one = write("one", tensors | {"a": tensors["a"].index_fill(0, torch.tensor([1234]), 0.)})
    for whole in (False, True):
        marks = [weights.fingerprint(path, whole) for path in (first, same, tuned, other, one)]
        assert marks[0] == marks[1] and marks[0] != marks[2] != marks[3] != marks[0]
        assert marks[0]["bytes"] == first.stat().st_size == marks[2]["bytes"]
    assert marks[0] != marks[4]  # every byte is compared
    if suffix == ".safetensors":
        assert weights.fingerprint(first.parent) == weights.fingerprint(first)
    with pytest.raises(WeightsError, match="no such file"):
        weights.fingerprint(tmp_path / "none")


# --- Whisper ---

@torch.no_grad()
@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("part", ["whole", "encoder", "bare"])
def test_whisper_encoder_equals_transformers(tmp_path, n_mels, part):
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=256, decoder_layers=1,
        decoder_attention_heads=4, decoder_ffn_dim=64, num_mel_bins=n_mels, max_source_positions=1500, vocab_size=99,
        pad_token_id=0, bos_token_id=1, eos_token_id=2)
    theirs = transformers.WhisperForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    if part != "whole":
        def cut(tensors):
            start = "model.encoder." if part == "bare" else "model."
            for name in list(tensors):
                tensor = tensors.pop(name)
                if name.startswith("model.encoder."):
                    tensors[name.removeprefix(start)] = tensor
        change(tmp_path / "model.safetensors", cut)
    mel = torch.randn(2, n_mels, 3000)
    ours = AudioEncoder.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(mel), theirs.model.encoder(mel).last_hidden_state, atol=1e-3, rtol=1e-3)
    assert ours(mel[:, :, :301]).shape == (2, 151, 64)  # short input: the first positions


def test_folders_that_no_one_can_read_are_one_line(tmp_path):
    """Whatever is missing or of another kind in config.json is a WeightsError, not a traceback."""
    config = transformers.WhisperConfig(d_model=64, encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=256,
                                        decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=64, vocab_size=99,
                                        pad_token_id=0, bos_token_id=1, eos_token_id=2)
    transformers.WhisperForConditionalGeneration(config).save_pretrained(tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    for wrong, reason in (({"activation_function": "relu"}, "activation_function 'relu'"), ({"d_model": "x"}, "damaged"),
                          ({"encoder_layers": None}, "damaged"), ({"quantization_config": "int8"}, "damaged")):
        (tmp_path / "config.json").write_text(json.dumps(good | wrong))
        with pytest.raises(WeightsError, match=reason):
            AudioEncoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(WeightsError):
        AudioEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("n_mels", [80, 128])
def test_log_mel_equals_transformers(n_mels):
    wave = torch.randn(16000 * 3).cumsum(0)
    wave = 0.5 * wave / wave.abs().max()
    theirs = transformers.WhisperFeatureExtractor(feature_size=n_mels)(wave.numpy(), sampling_rate=16000, padding=False)
    torch.testing.assert_close(log_mel(wave, n_mels), torch.tensor(theirs["input_features"][0]), atol=1e-4, rtol=0)


# --- AV-HuBERT ---

def avhubert_state(dim=64, n_layers=2):
    """A state dict with AV-HuBERT's names and, but for the transformer's sizes, its shapes."""
    torch.manual_seed(0)
    state, net = {}, "feature_extractor_video.resnet."

    def norm(name, n):
        state.update({f"{name}.weight": torch.rand(n) + .5, f"{name}.bias": torch.randn(n),
                      f"{name}.running_mean": torch.randn(n), f"{name}.running_var": torch.rand(n) + .5,
                      f"{name}.num_batches_tracked": torch.tensor(7)})

    def linear(name, *shape):
        state.update({f"{name}.weight": 0.1 * torch.randn(shape), f"{name}.bias": 0.1 * torch.randn(shape[0])})

    state[f"{net}frontend3D.0.weight"] = 0.1 * torch.randn(64, 1, 5, 7, 7)
    norm(f"{net}frontend3D.1", 64)
    state[f"{net}frontend3D.2.weight"] = torch.rand(64)
    c_in = 64
    for stage, c in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            at = f"{net}trunk.layer{stage}.{block}"
            state[f"{at}.conv1.weight"] = 0.03 * torch.randn(c, c_in, 3, 3)
            state[f"{at}.conv2.weight"] = 0.03 * torch.randn(c, c, 3, 3)
            norm(f"{at}.bn1", c), norm(f"{at}.bn2", c)
            state[f"{at}.relu1.weight"], state[f"{at}.relu2.weight"] = torch.rand(c), torch.rand(c)
            if stage > 1 and block == 0:
                state[f"{at}.downsample.0.weight"] = 0.03 * torch.randn(c, c_in, 1, 1)
                norm(f"{at}.downsample.1", c)
            c_in = c
    linear("feature_extractor_video.proj", dim, 512)
    linear("feature_extractor_audio.proj", dim, 104)
    linear("post_extract_proj", dim, 2 * dim)
    linear("layer_norm", 2 * dim)
    state["layer_norm.weight"] = torch.rand(2 * dim)
    state |= {"encoder.pos_conv.0.bias": torch.randn(dim), "encoder.pos_conv.0.weight_g": torch.rand(1, 1, 128),
              "encoder.pos_conv.0.weight_v": torch.randn(dim, dim // 16, 128)}
    for n in range(n_layers):
        at = f"encoder.layers.{n}"
        for proj in ("k_proj", "v_proj", "q_proj", "out_proj"):
            linear(f"{at}.self_attn.{proj}", dim, dim)
        linear(f"{at}.fc1", 4 * dim, dim)
        linear(f"{at}.fc2", dim, 4 * dim)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            state |= {f"{at}.{name}.weight": torch.rand(dim), f"{at}.{name}.bias": torch.randn(dim)}
    state |= {"encoder.layer_norm.weight": torch.rand(dim), "encoder.layer_norm.bias": torch.randn(dim),
              "mask_emb": torch.randn(dim), "final_proj.weight": torch.randn(8, dim), "final_proj.bias": torch.randn(8),
              "label_embs_concat": torch.randn(20, 8)}
    return state


class Alien:
    """Something of another library that a checkpoint drags along."""

    def __init__(self, *args):
        self.args = args


class Command:
    """An object whose unpickling runs a shell command."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@torch.no_grad()
def test_avhubert_reads_lips_in_its_second_half_and_its_encoder_is_huberts(tmp_path):
    from transformers.models.hubert.modeling_hubert import HubertEncoderStableLayerNorm
    torch.save({"model": avhubert_state()}, tmp_path / "av.pt")
    ours, seen = VideoEncoder.from_pretrained(tmp_path / "av.pt"), {}
    for name in ("fuse_norm", "pos_conv"):
        getattr(ours, name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].clone()}))
    out = ours(torch.rand(2, 1, 9, 96, 96))
    assert not seen["fuse_norm"][..., :64].any() and seen["fuse_norm"][..., 64:].any()
    theirs = HubertEncoderStableLayerNorm(transformers.HubertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=256)).eval()
    conv, state = "pos_conv_embed.conv.", {}
    names = {"self_attn.": "attention.", "self_attn_layer_norm": "layer_norm", "fc1": "feed_forward.intermediate_dense",
             "fc2": "feed_forward.output_dense", "pos_conv.0.weight_g": conv + "parametrizations.weight.original0",
             "pos_conv.0.weight_v": conv + "parametrizations.weight.original1", "pos_conv.0.bias": conv + "bias"}
    for name, tensor in avhubert_state().items():
        if name.startswith("encoder."):
            for a, b in names.items():
                name = name.replace(a, b)
            state[name.removeprefix("encoder.")] = tensor
    theirs.load_state_dict(state)
    torch.testing.assert_close(out, theirs(seen["pos_conv"]).last_hidden_state, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("finetuned", [False, True])
def test_avhubert_file_loads_without_its_classes(tmp_path, finetuned):
    state = avhubert_state()
    named = state
    if finetuned:
        named = {f"encoder.w2v_model.{name}": t for name, t in state.items()} | {"decoder.out": torch.zeros(3)}
    file = {"cfg": Alien({"a": [1]}), "args": None, "model": named, "task_state": [Alien(), {"x": Alien()}]}
    torch.save(file, tmp_path / "av.pt")
    encoder = VideoEncoder.from_pretrained(tmp_path / "av.pt")
    video = torch.rand(2, 1, 9, 96, 96)
    out = encoder(video)
    assert out.shape == (2, 9, 64) and out.isfinite().all()
    padded = torch.cat([video[1:], torch.rand(1, 1, 4, 96, 96)], 2)
    torch.testing.assert_close(encoder(padded, torch.tensor([9]))[:, :9], out[1:], atol=1e-4, rtol=1e-4)
    assert torch.equal(encoder(video[..., 4:92, 4:92]), out)  # the middle 88 x 88 is what it looks at
    v, g = state["encoder.pos_conv.0.weight_v"], state["encoder.pos_conv.0.weight_g"]
    expected = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(64, 64, 128, groups=16), dim=2)
    expected.parametrizations.weight.original0.copy_(g), expected.parametrizations.weight.original1.copy_(v)
    torch.testing.assert_close(encoder.pos_conv.weight, expected.weight)


def test_avhubert_large_has_a_place_for_every_tensor():
    """The real sizes, on the meta device: every name and shape of the Large model is asked for, none is left."""
    with torch.device("meta"):
        ours = VideoEncoder(VideoConfig(**weights.avhubert_config({
            "post_extract_proj.weight": torch.empty(1024, 2048),
            "encoder.pos_conv.0.weight": torch.empty(1024, 64, 128),
            **{f"encoder.layers.{n}.fc2.bias": torch.empty(1024) for n in range(24)}})))
    small = avhubert_state(n_layers=1)
    asked = {weights.avhubert_name(name) for name in ours.state_dict()}
    for name in small:
        unused = name.startswith(("mask_emb", "final_proj", "label_embs", "feature_extractor_audio"))
        assert name in asked or "pos_conv" in name or unused
    assert 320e6 < sum(p.numel() for p in ours.parameters()) < 326e6


def test_a_pickle_that_would_run_a_command_runs_nothing(tmp_path):
    torch.save({"cfg": Command(tmp_path / "ran"), "model": avhubert_state()}, tmp_path / "av.pt")
    with open(tmp_path / "plain.pt", "wb") as file:
        pickle.dump({"model": Command(tmp_path / "ran")}, file)
    VideoEncoder.from_pretrained(tmp_path / "av.pt")
    with pytest.raises(WeightsError):
        VideoEncoder.from_pretrained(tmp_path / "plain.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "av.pt", weights_only=False)  # the ordinary way does run it, so that this test can fail
    assert (tmp_path / "ran").exists()


def test_wrong_avhubert_files_are_named(tmp_path):
    (tmp_path / "no.pt").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="no.pt: not readable"):
        VideoEncoder.from_pretrained(tmp_path / "no.pt")
    state = avhubert_state()
    del state["encoder.layers.1.fc1.bias"]
    torch.save({"model": state}, tmp_path / "less.pt")
    with pytest.raises(WeightsError, match="encoder.layers.1.fc1.bias"):
        VideoEncoder.from_pretrained(tmp_path / "less.pt")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="not an AV-HuBERT"):
        VideoEncoder.from_pretrained(tmp_path / "other.pt")


# --- tokenizers ---

LINES = ["the capital of France is Paris", "don't we'll I'm he'd  they've", "1234 567  89 0.5 ¼ ², Ⅷ ٣٤",
         "x = f(a[i], b) ** 2;\treturn\r\n", "   four   spaces    ", "naïve café über Straße", "Привет, мир",
         "こんにちは世界", "東京都 1区", "안녕하세요", "שלום עולם", "مرحبا", "नमस्ते",
         "👩‍🚀 🇫🇷 ❤️ 🫠", "a\n\n\n b\n  c", "<|bos|> <|eos|>", "", " ", "\u00ad\u200b\u3000\U0010fffd"]


def train_bpe(folder, pre_tokenizer, alphabet=True):
    """A byte-level BPE made by HF's tokenizers library in `folder` -> its tokenizer."""
    import tokenizers
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = pre_tokenizer(tokenizers)
    bpe.train_from_iterator(LINES * 3, tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<|bos|>", "<|eos|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet() if alphabet else []))
    bpe.save(str(folder / "tokenizer.json"))
    return bpe


PRE_TOKENIZERS = {
    "GPT-2": lambda t: t.pre_tokenizers.ByteLevel(add_prefix_space=False),
    "a sequence in a sequence": lambda t: t.pre_tokenizers.Sequence([t.pre_tokenizers.Sequence([
        t.pre_tokenizers.Digits(individual_digits=True)]), t.pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "SmolLM2": lambda t: t.pre_tokenizers.Sequence([
        t.pre_tokenizers.Digits(True), t.pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "Llama 3": lambda t: t.pre_tokenizers.Sequence([
        t.pre_tokenizers.Split(t.Regex(tokenizer.LLAMA3_WORDS), "isolated"),
        t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
    "DeepSeek-Coder": lambda t: t.pre_tokenizers.Sequence([
        t.pre_tokenizers.Split(t.Regex("[\r\n]"), "isolated"), t.pre_tokenizers.Split(t.Regex(r"\s?\p{L}+"), "isolated"),
        t.pre_tokenizers.Split(t.Regex(r"\s?\p{P}+"), "isolated"), t.pre_tokenizers.Split("=", "isolated"),
        t.pre_tokenizers.Digits(individual_digits=True), t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
    "a group in a pattern": lambda t: t.pre_tokenizers.Sequence([
        t.pre_tokenizers.Split(t.Regex(r"(\s?)(\p{L}+)|(\p{N})"), "isolated"),
        t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
    "runs of digits": lambda t: t.pre_tokenizers.Sequence([
        t.pre_tokenizers.Digits(individual_digits=False), t.pre_tokenizers.ByteLevel(add_prefix_space=False)])}


@pytest.mark.parametrize("alphabet", [True, False], ids=["all bytes", "some bytes"])
@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
def test_tokenizers_give_the_ids_of_hf(tmp_path, kind, alphabet):
    theirs = train_bpe(tmp_path, PRE_TOKENIZERS[kind], alphabet)
    ours, dropped = data.load_tokenizer(tmp_path), 0
    rng = random.Random(0)
    lines = LINES + ["".join(rng.choices("".join(LINES) + "ÿþ܀", k=rng.randint(1, 40))) for _ in range(1000)]
    for line in lines:
        ids = theirs.encode(line.replace("<|", "<"), add_special_tokens=False).ids
        assert ours.encode(line.replace("<|", "<")) == ids
        dropped += ours.decode(ids) != line.replace("<|", "<")
    assert (dropped > 0) == (not alphabet)  # only bytes that the vocabulary lacks are lost, as HF loses them
    assert ours.encode_single_token("<|eos|>") == 1 and 1 not in ours.encode("<|eos|>")  # text is text


def test_added_tokens_that_are_words_or_letters(tmp_path):
    """DeepSeek-Coder's tokenizer has letters like ü among its added tokens."""
    from tokenizers.normalizers import NFC
    theirs = train_bpe(tmp_path, PRE_TOKENIZERS["GPT-2"])
    theirs.add_tokens(["ß", "st", "straße", "don't", "हिन्दी", "7", "<|eot|>"])
    theirs.normalizer = NFC()
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = data.load_tokenizer(tmp_path)
    for text in (" die straße", " weißt du", "i don't", " हिन्दी भाषा", " 17", *map(data.normalize, LINES)):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ours.encode(text)) == text


def test_rank_file_of_llama_3(tmp_path):
    ranks = [bytes([b]) for b in range(256)] + [b"th", b"the", b" the"]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    bpe = data.load_tokenizer(tmp_path)
    assert bpe.encode("the the") == [257, 258] and bpe.decode([257, 258]) == "the the"
    assert bpe.encode_single_token("<|begin_of_text|>") == 259


def test_tokenizers_that_are_not_supported_are_named(tmp_path):
    with pytest.raises(WeightsError, match="no tokenizer.json and no tokenizer.model"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(WeightsError, match="SentencePiece"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "byte_fallback": True, "vocab": {}}}))
    with pytest.raises(WeightsError, match="SentencePiece"):
        data.load_tokenizer(tmp_path)
    for step in ({"type": "Split", "pattern": {"Regex": " "}, "behavior": "MergedWithNext", "invert": False},
                 {"type": "Split", "pattern": {"Regex": " "}, "behavior": "Isolated", "invert": True},
                 {"type": "Split", "pattern": {"Regex": r"[a-z&&[^b]]"}, "behavior": "Isolated", "invert": False},
                 {"type": "Metaspace"}):
        steps = {"type": "Sequence", "pretokenizers": [step, {"type": "ByteLevel", "add_prefix_space": False}]}
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}}, "pre_tokenizer": steps}))
        with pytest.raises(WeightsError, match=f"not supported: .*{step.get('behavior', 'Metaspace')}"):
            data.load_tokenizer(tmp_path)


@torch.no_grad()
def test_a_head_of_its_own_counts_although_the_config_says_tied(tmp_path):
    random_llama(tmp_path)
    change_config(tmp_path, lambda config: config.update(tie_word_embeddings=True))
    theirs, tokens = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval(), torch.randint(0, 99, (2, 9))
    torch.testing.assert_close(Llama.from_pretrained(tmp_path)(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_quantised_weights_and_pointers_are_named(tmp_path):
    random_llama(tmp_path)
    change_config(tmp_path, lambda config: config.update(quantization_config={"quant_method": "bitsandbytes"}))
    with pytest.raises(WeightsError, match="quantised by bitsandbytes"):
        Llama.from_pretrained(tmp_path)
    change_config(tmp_path, lambda config: config.pop("quantization_config"))
    for name in ("model.safetensors", "tokenizer.model", "tokenizer.json", "config.json", "large.pt"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        load = {"large.pt": lambda: VideoEncoder.from_pretrained(tmp_path / name)}.get(name, lambda: (
            data.load_tokenizer(tmp_path) if "tokenizer" in name else Llama.from_pretrained(tmp_path)))
        with pytest.raises(WeightsError, match="git lfs pull"):
            load()


def test_more_layers_than_tensors(tmp_path):
    random_llama(tmp_path)
    change_config(tmp_path, lambda config: config.update(num_hidden_layers=10**6))
    with pytest.raises(WeightsError, match="1,000,000 layers by its config.json"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, reason", [
    (lambda file: file["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    (lambda file: file["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix"),
    (lambda file: file["model"]["merges"].pop(5), "made by no merge"),
    (lambda file: file["added_tokens"].append({"content": "hello", "id": 9999, "single_word": True}), "'hello' takes"),
    (lambda file: file.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        file["pre_tokenizer"], {"type": "Digits", "individual_digits": True}]}), "after ByteLevel"),
    (lambda file: file.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [file["pre_tokenizer"]] * 2}), "after ByteLevel"),
    (lambda file: file.update(normalizer={"type": "Lowercase"}), "its normalizer Lowercase"),
    (lambda file: file["model"]["vocab"].update({"a": file["model"]["vocab"]["b"]}), "one id"),
    (lambda file: file["model"].pop("merges"), "KeyError"),
    (lambda file: file["model"].update(vocab=[1]), "damaged, or of a kind"),
    (lambda file: file["pre_tokenizer"].pop("type"), "KeyError")])
def test_tokenizers_that_would_give_other_ids_are_refused(tmp_path, change, reason):
    train_bpe(tmp_path, PRE_TOKENIZERS["GPT-2"])
    data.load_tokenizer(tmp_path)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    change(file)
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(WeightsError, match=reason):
        data.load_tokenizer(tmp_path)


@pytest.mark.parametrize("word", ["'", ".", "می\u200c", "col·legi", "ארה״ב", "\u094d"])
def test_added_tokens_of_letters_that_join_words(tmp_path, word):
    theirs = train_bpe(tmp_path, PRE_TOKENIZERS["GPT-2"])
    theirs.add_tokens([word])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = data.load_tokenizer(tmp_path)
    for text in (" don't o'clock", " می\u200cخواهم", " col·legi", " ארה״ב", " हिन्दी", setup.PROMPT):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("pattern", [
    r"\p{N}{1,3}+", r"(?i)\p{Lu}+", "[[:digit:]]", r"[\p{L}[0-9]]", r"\w+", r"\bx", r"x{2}?", r" ?[^(\s|[.,!?…])]+", "(x"])
def test_expressions_that_mean_something_else_in_hf_are_refused(tmp_path, pattern):
    train_bpe(tmp_path, lambda t: t.pre_tokenizers.Sequence([
        t.pre_tokenizers.Split(t.Regex("x"), "isolated"), t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(WeightsError, match="tokenizer.json: a step of its pre_tokenizer is not supported: .*Split"):
        data.load_tokenizer(tmp_path)


def test_tokenizers_without_a_type_and_special_tokens_that_are_not_written(tmp_path):
    theirs = train_bpe(tmp_path, PRE_TOKENIZERS["GPT-2"])
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    del file["model"]["type"]
    file["model"]["byte_fallback"] = True           # without effect: the vocabulary has all bytes
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    ours, ids = data.load_tokenizer(tmp_path), theirs.encode(" мир", add_special_tokens=False).ids
    assert ours.encode(" мир") == ids and ours.decode([0, *ids, 1]) == " мир"


@pytest.mark.parametrize("damage", [
    lambda lines: [], lambda lines: lines[:-1], lambda lines: [*lines[:-1], lines[-1][:-2]], lambda lines: lines[1:],
    lambda lines: [*lines, b"<html>"], lambda lines: lines[:-1] + [lines[-1].replace(b"258", b"257")]])
def test_a_damaged_rank_file_is_refused(tmp_path, damage):
    tokens = [bytes([b]) for b in range(256)] + [b"th", b"the", b" the"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (tmp_path / "config.json").write_text('{"bos_token_id": 259}')
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines))
    assert data.load_tokenizer(tmp_path).encode(" the") == [258]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(damage(lines)))
    with pytest.raises(WeightsError, match="tokenizer.model: .*damaged"):
        data.load_tokenizer(tmp_path)


@pytest.mark.parametrize("edit", [
    lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.zeros(512, 1, dtype=torch.uint8)}),
    lambda t: t.update({"model.layers.0.self_attn.q_proj.qweight": t.pop("model.layers.0.self_attn.q_proj.weight")}),
    lambda t: t.update({"model.layers.0.self_attn.q_proj.weight_scale": torch.ones(1)})])
def test_quantised_weights_without_a_word_in_the_config_are_named(tmp_path, edit):
    random_llama(tmp_path)
    change(tmp_path / "model.safetensors", edit)
    with pytest.raises(WeightsError, match="quantised weights"):
        Llama.from_pretrained(tmp_path)


def test_a_name_of_a_hub_is_no_folder():
    with pytest.raises(WeightsError, match="meta-llama/Llama-3.2-1B: not a folder. Nothing is downloaded"):
        Llama.from_pretrained("meta-llama/Llama-3.2-1B")


def test_an_index_without_its_map_is_named_by_its_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(WeightsError, match="weight_map"):
        weights.fingerprint(tmp_path)
