"""python -m pytest tests/test_parts.py: real parts in train.py and sample.py, the cache of features, costs."""
import json
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_weights import PRE_TOKENIZERS, avhubert_state, random_llama, train_bpe

import data
import sample
import train
from encoders import AudioConfig, AudioEncoder, VideoConfig, log_mel
from extras import cost
from extras.baselines import build_adapter, count_parameters
from mome import AVSR, AVSRConfig, Llama, LlamaConfig
from real import checkpoint, features, report, setup
from real.checkpoint import identify, load_model, save_model
from real.clips import read_clip
from real.files import CheckpointError, write_whole
from real.options import parse_options
from toy.talker import write_talker_clips


def random_whisper(folder, n_mels):
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=128, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=32, num_mel_bins=n_mels, vocab_size=99,
        pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny Llama with a tokenizer, a tiny Whisper of 128 mels, an AV-HuBERT of two layers, and a folder of clips."""
    root = tmp_path_factory.mktemp("parts")
    for name in ("llm", "whisper", "clips"):
        (root / name).mkdir()
    random_llama(root / "llm", vocab_size=700, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True)
    train_bpe(root / "llm", PRE_TOKENIZERS["SmolLM2"])
    random_whisper(root / "whisper", 128)
    torch.save({"model": avhubert_state()}, root / "avhubert.pt")
    write_talker_clips(root / "clips" / "train", 4, "train", 0, size=48)
    write_talker_clips(root / "clips" / "test", 2, "test", 0, size=48)
    return root


def flags(parts):
    return ["--llm", str(parts / "llm"), "--audio-encoder", str(parts / "whisper"),
            "--video-encoder", str(parts / "avhubert.pt"), "--data", str(parts / "clips"),
            *"--rates 2:2,4:8 --steps 2 --batch-size 2 --copies 1 --snr clean,-5".split()]


@pytest.fixture(scope="module")
def real(parts):
    """A checkpoint on these parts, made by the whole of train.py."""
    assert train.main([*flags(parts), "--out", str(parts / "out")]) == 0
    return parts / "out"


# --- checkpoints ---

def test_a_checkpoint_names_the_real_parts_and_holds_what_was_trained(parts, real):
    names = set(load_file(real / "model.safetensors"))
    assert {name.split(".")[0] for name in names if ".mome." not in name} == {"projectors", "markers"}
    assert any(name.endswith("mome.up") for name in names)
    named = json.loads((real / "config.json").read_text())["parts"]
    assert {part: entry["path"] for part, entry in named.items()} == {
        "llm": str(parts / "llm"), "audio": str(parts / "whisper"), "video": str(parts / "avhubert.pt")}
    assert named["video"]["bytes"] == (parts / "avhubert.pt").stat().st_size
    assert not (real / "tokenizer.json").exists()


def generate(model, encoded, rates, max_tokens=None):
    config = model.config
    return sample.generate(model.llm, model.prefix(encoded, rates), config.eos, 1, max_tokens or config.max_tokens)


def run(capsys, *argv):
    checkpoint.load_once.cache_clear()
    code = sample.main([str(a) for a in argv])
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    return code, told.out.splitlines(), told.err.splitlines()


def test_sample_reads_it_with_the_real_tokenizer_and_mel_bands(parts, real, capsys):
    code, lines, err = run(capsys, "--ckpt", real, "--json", "--verify")
    assert code == 0 and len(lines) == 2 and not err
    model, config, tokenizer = checkpoint.load_for_use(str(real))
    assert model.config.audio.n_mels == 128 and model.config.video.picture == 96
    clips = [read_clip(json.loads(line)["clip"], size=96, n_mels=128) for line in lines]
    encoded = [model.encode(data.to_device(data.batch([clip], ["audio", "video"]), model.device)) for clip in clips]
    ids = [generate(model, x, {"audio": 2, "video": 2})[0][0] for x in encoded]
    texts = [data.normalize(tokenizer.decode(i)) for i in ids]
    assert all(ids) and [json.loads(line)["text"] for line in lines] == texts


def test_eval_only_finds_the_parts_again(parts, real, tmp_path):
    shutil.copytree(real, tmp_path / "out", ignore=shutil.ignore_patterns("cache"))
    assert train.main(["--eval-only", "--data", str(parts / "clips"), *"--rates 2:2,4:8 --snr clean,-5".split(),
                       "--out", str(tmp_path / "out")]) == 0
    rows = [json.loads((out / "metrics.json").read_text())["rows"] for out in (real, tmp_path / "out")]
    assert rows[0] == rows[1]


def test_moved_changed_and_unknown_parts(parts, real, tmp_path, capsys):
    out, away = tmp_path / "out", tmp_path / "away"
    shutil.copytree(real, out, ignore=shutil.ignore_patterns("cache"))
    config = json.loads((out / "config.json").read_text())
    config["parts"]["llm"]["path"] = str(away)
    (out / "config.json").write_text(json.dumps(config))
    code, _, err = run(capsys, "--ckpt", out)
    assert code == 2 and len(err) == 1 and str(away) in err[0] and "--llm PATH" in err[0]
    shutil.copytree(parts / "llm", away)
    assert run(capsys, "--ckpt", out)[0] == 0
    elsewhere = tmp_path / "elsewhere"
    away.rename(elsewhere)
    assert run(capsys, "--ckpt", out, "--llm", elsewhere)[0] == 0

    tensors = load_file(elsewhere / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, elsewhere / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run(capsys, "--ckpt", out, "--llm", elsewhere, "--verify")
    assert code == 2 and len(err) == 1 and "not the llm part" in err[0] and "whole is" in err[0]
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    save_file(tensors, elsewhere / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run(capsys, "--ckpt", out, "--llm", elsewhere)
    assert code == 2 and len(err) == 1 and "not the llm part" in err[0] and "sample is" in err[0]


def test_a_fine_tuned_llm_is_refused_without_reading_every_byte(parts, real, tmp_path, capsys):
    """It has the size, names, shapes and config of the LLM of training."""
    shutil.copytree(parts / "llm", tmp_path / "llm")
    tensors = load_file(tmp_path / "llm/model.safetensors")
    tuned = {name: t + 1e-3 * torch.randn(t.shape) for name, t in tensors.items()}
    save_file(tuned, tmp_path / "llm/model.safetensors", metadata={"format": "pt"})
    code, _, err = run(capsys, "--ckpt", real, "--llm", tmp_path / "llm")
    assert code == 2 and len(err) == 1 and "not the llm part" in err[0] and "bytes" not in err[0]


def test_another_tokenizer_and_weights_that_were_not_fetched_are_said(parts, real, tmp_path, capsys):
    shutil.copytree(parts / "llm", tmp_path / "llm")
    train_bpe(tmp_path / "llm", PRE_TOKENIZERS["GPT-2"])
    code, _, (line,) = run(capsys, "--ckpt", real, "--llm", tmp_path / "llm")
    assert code == 2 and "not the llm part" in line and "its tokenizer is" in line
    (tmp_path / "llm/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    code, _, (line,) = run(capsys, "--ckpt", real, "--llm", tmp_path / "llm")
    assert code == 2 and "git lfs pull" in line


def test_another_tokenizer_is_another_training(parts, tmp_path, capsys):
    """A state that has ended must not be given to a model of other tokens."""
    shutil.copytree(parts / "llm", tmp_path / "llm")
    argv = ["--llm", str(tmp_path / "llm"), *flags(parts)[2:4], *flags(parts)[6:], "--tasks", "asr", "--snr", "clean",
            "--out", str(tmp_path / "out")]
    for tokenizer, said in (("SmolLM2", ""), ("SmolLM2", "this training has ended"), ("GPT-2", "another training has ended here")):
        train_bpe(tmp_path / "llm", PRE_TOKENIZERS[tokenizer])
        assert train.main(argv) == 0 and said in capsys.readouterr().err


def test_a_tokenizer_with_more_ids_than_the_llm_is_refused(parts, tmp_path, capsys):
    shutil.copytree(parts / "llm", tmp_path / "llm")
    random_llama(tmp_path / "llm", vocab_size=300, bos_token_id=0, eos_token_id=1)
    assert train.main([*flags(parts), "--llm", str(tmp_path / "llm"), "--out", str(tmp_path / "out")]) == 2
    assert "its tokenizer writes ids up to" in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_of_an_older_version_is_refused(tiny, tmp_path, capsys):
    """Formerly `up` had a row for the bias, config.json had no format and the ResNet was called trunk."""
    save_model(tiny, tmp_path, {}, words=["a"], rates=[[4, 2]], tasks=["avsr"])
    tensors = {name.replace(".resnet.", ".trunk."): t for name, t in load_file(tmp_path / "model.safetensors").items()}
    for name in [name for name in tensors if name.endswith(".up_bias")]:
        up = name.removesuffix("_bias")
        tensors[up] = torch.cat([tensors[up], tensors.pop(name)[:, None]], 1)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["format"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = f"{tmp_path}: made by an older version; train it again: python train.py --out {tmp_path}"
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path)
    assert str(error.value) == message
    assert run(capsys, "--ckpt", tmp_path) == (2, [], [f"sample.py: {message}"])


@torch.no_grad()
def test_lora_is_stored_beside_a_real_llm(parts, tmp_path):
    """A checkpoint of the method lora holds the adapters and projectors, and nothing of the real LLM."""
    llm = Llama.from_pretrained(parts / "llm")
    model = AVSR(AVSRConfig(llm.config, AudioConfig(dim=16, n_layers=1, n_heads=2), None), llm).eval()
    facts = {"method": "lora", "rank": 3, "tasks": ["asr"], "rates": [[2, 2]], "projector_per_rate": False}
    build_adapter(model, facts)
    adapters = {name: p for name, p in model.named_parameters() if ".lora." in name}
    for p in adapters.values():
        p.normal_(std=0.3)
    save_model(model, tmp_path, identify({"llm": parts / "llm"}), **facts)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert adapters and {name for name in names if name.startswith("llm.")} == set(adapters)
    loaded, config = load_model(tmp_path)
    assert config["method"] == "lora"
    x = model.encode({"audio": (torch.randn(2, 80, 40), torch.tensor([40, 31]))})
    tokens = model.prefix(x, {"audio": 2})[0][None]
    torch.testing.assert_close(loaded.llm.hidden_states(tokens), model.llm.hidden_states(tokens))
    plain = Llama.from_pretrained(parts / "llm")
    assert not torch.allclose(loaded.llm.hidden_states(tokens), plain.hidden_states(tokens), atol=1e-2)


def test_a_stand_in_is_not_replaced(trained, parts, capsys):
    code, _, err = run(capsys, "--ckpt", trained, "--llm", parts / "llm")
    assert code == 2 and len(err) == 1 and "holds its own stand-in" in err[0]


@pytest.mark.parametrize("argv, said", [
    (["--llm", "nowhere", "--data", "x"], "nowhere"), (["--audio-encoder", "nowhere", "--data", "x"], "nowhere"),
    (["--video-encoder", "nowhere", "--data", "x"], "nowhere")])
def test_wrong_parts_are_one_line(argv, said, tmp_path, capsys):
    assert train.main([*argv, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and said in err[0] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", ["--tasks asr --llm x --audio-encoder x --data x", "--eval-only", "--dry-run"])
def test_the_preset_needs_only_what_its_tasks_use(argv):
    assert train_config("--preset", "paper", *argv.split()).preset == "paper"


@pytest.mark.parametrize("argv, said", [
    (["--preset", "paper"], "--preset paper with --tasks avsr needs --llm, --audio-encoder, --video-encoder and --data"),
    ("--preset paper --tasks asr --llm x --data x".split(), "with --tasks asr needs --llm, --audio-encoder and --data"),
    ("--preset paper --dry-run --checkpointing".split(), "--dry-run does not count what --checkpointing saves"),
    ("--method lora-ms --compile".split(), "--compile: not with --method lora-ms"),
    ("--method lora-ms --checkpointing".split(), "--checkpointing: not with --method lora-ms"),
    ("--method mome-bias --n-routed 0".split(), "--method mome-bias is about the router"),
    ("--method mome-teacher --rates-per-step 1".split(), "so --rates-per-step is all"),
    ("--tasks asr --video-encoder x --data x".split(), "--tasks asr do not use both encoders"),
    (["--pad-audio"], "--pad-audio is for Whisper"), (["--seed", str(2 ** 63)], "--seed must be under"),
    (["--audio-encoder", "x"], "--data")])
def test_flags_that_need_others(argv, said, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(argv)
    assert end.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_clips_of_a_step_are_shared_evenly_by_the_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for more in ({"batch_size": 6}, {"eval_only": True}):
        setup.check_config(train.TrainConfig(**more))
    with pytest.raises(ValueError, match="--batch-size 4: 3 processes cannot share it evenly"):
        setup.check_config(train.TrainConfig())


def test_another_config_of_the_llm_is_refused(parts, tmp_path):
    """Its weights are the same, but they would compute other values."""
    shutil.copytree(parts / "llm", tmp_path / "llm")
    (tmp_path / "out").mkdir()
    llm = Llama.from_pretrained(tmp_path / "llm")
    model = AVSR(AVSRConfig(llm.config, AudioConfig(dim=16, n_layers=1, n_heads=2), None), llm)
    save_model(model, tmp_path / "out", identify({"llm": tmp_path / "llm"}))
    load_model(tmp_path / "out")
    config = json.loads((tmp_path / "llm/config.json").read_text())
    (tmp_path / "llm/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(CheckpointError, match="llm: its config.json is not the one that .*out was trained with"):
        load_model(tmp_path / "out")


def test_padded_outputs_are_others_and_other_sound_is_another_training(talker_clips, tmp_path, monkeypatch):
    def keys(padded=False, babble_key="x"):
        """-> (what names the outputs of the encoder, the hash of the frozen parts)"""
        seen, config = [], AudioConfig(dim=16, n_layers=1, n_heads=2, pos_groups=16, padded=padded)
        monkeypatch.setattr(setup, "read_parts", lambda *_: {"audio": AudioEncoder(config)})
        monkeypatch.setattr(setup, "Features", lambda folder, model, keys, *_: seen.append(keys) or SimpleNamespace(babble_key=babble_key))
        job = train.TrainConfig(data="x", out=str(tmp_path)), ["asr"], torch.device("cpu"), report.Stopwatch()
        return seen, setup.set_up(*job)[3]["frozen"]
    monkeypatch.setattr(setup, "identify", lambda *_: {"audio": {"whole": "w"}})
    monkeypatch.setattr(setup, "pretrain", lambda *_: None)
    monkeypatch.setattr(setup, "load_clips", lambda *_, **__: {"train": talker_clips, "test": talker_clips})
    assert keys() == keys()
    assert keys()[0] != keys(padded=True)[0]
    assert keys()[1] != keys(babble_key="y")[1]


def test_a_real_llm_reads_stand_in_encoders_and_the_curve_is_kept(parts, tmp_path, capsys):
    argv = (f"--llm {parts}/llm --tasks asr --rates 4 --clips 24 --valid-clips 4 --test-clips 3 --audio-steps 1 --steps 4 "
            f"--valid-every 2 --snr clean --out {tmp_path}")
    assert train.main(argv.split()) == 0
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert [point["step"] for point in curve] == [2, 4]
    assert all(point["rows"][0]["split"] == "valid" and point["rows"][0]["clips"] >= 2 for point in curve)
    assert any(name.startswith("encoders.audio.") for name in load_file(tmp_path / "model.safetensors"))


# --- bf16, padding ---

def test_experts_stay_fp32_beside_a_bf16_llama(parts):
    llm = Llama.from_pretrained(parts / "llm", torch.bfloat16, n_routed=4, top_k=2, n_shared=1, bottleneck=3)
    model = AVSR(AVSRConfig(llm.config, AudioConfig(dim=16, n_layers=1, n_heads=2), None), llm)
    encoded = model.encode({"audio": (torch.randn(2, 80, 40), torch.tensor([40, 31]))})
    sum(sum(model.loss(encoded, [[5, 6], [7]], rates)) for rates in ({"audio": 2}, {"audio": 4})).backward()
    for name, p in model.named_parameters():
        frozen = name.startswith(("llm.", "encoders.")) and ".mome." not in name
        dtype = torch.bfloat16 if frozen and name.startswith("llm.") else torch.float32
        assert p.dtype == dtype and (p.grad is None) == frozen, name
    assert all(len(ids) <= 5 for ids, _ in generate(model, encoded, {"audio": 4}, max_tokens=5))


@torch.no_grad()
def test_padded_clips_are_what_whisper_was_trained_on(tmp_path):
    theirs = random_whisper(tmp_path, 80)
    ours = AudioEncoder.from_pretrained(tmp_path, padded=True)
    waves = [torch.randn(16000).cumsum(0) / 400, torch.randn(24000) / 10]
    for wave in waves:
        wave[-400:] = 0  # else the last window, here a reflection of what came before, differs
    mels = [log_mel(wave) for wave in waves]
    batch = torch.nn.utils.rnn.pad_sequence([mel.T for mel in mels], True).mT
    out = ours(batch, torch.tensor([100, 150]))
    assert out.shape == (2, 75, 32)
    extractor = transformers.WhisperFeatureExtractor()
    padded = extractor([wave.numpy() for wave in waves], sampling_rate=16000, return_tensors="pt")
    expected = theirs.model.encoder(padded["input_features"]).last_hidden_state
    for row, reference, n in zip(out, expected, (50, 75)):
        torch.testing.assert_close(row[:n], reference[:n], atol=1e-3, rtol=1e-3)


# --- what is kept of the clips ---

def test_two_runs_may_share_a_cache(parts, real, tmp_path):
    """Two processes that begin at once on an empty cache: each ends well, and the files are those that one makes."""
    argv = [*flags(parts)[:4], *flags(parts)[6:], "--tasks", "asr", "--cache", str(tmp_path / "cache")]
    runs = [subprocess.Popen([sys.executable, "train.py", *argv, "--out", str(tmp_path / name)], cwd=ROOT,
                             stderr=subprocess.PIPE, text=True) for name in ("a", "b")]
    told = [run.communicate()[1] for run in runs]
    assert [(run.returncode, "Traceback" in said) for run, said in zip(runs, told)] == [(0, False)] * 2
    files = {p.name: p.read_bytes() for p in (tmp_path / "cache/features").rglob("*") if p.is_file()}
    assert len(files) == 8  # 4 clips, each as it is and augmented
    assert all(not name.startswith(".") for name in files)
    assert set(files.values()) < {p.read_bytes() for p in (real / "cache/features").rglob("*") if p.is_file()}
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")}) == 1


def test_a_stand_in_reads_the_copies_that_a_real_encoder_reads(parts, tmp_path, monkeypatch):
    """Sound and lips of a copy have one pace, so they belong together in time."""
    drawn, rows = [], features.Features.rows
    monkeypatch.setattr(features.Features, "rows", lambda *args: drawn.append(rows(*args)) or drawn[-1])
    monkeypatch.setattr("real.setup.pretrain", lambda *_: None)
    argv = flags(parts)
    del argv[4:6]                              # the video encoder: its stand-in need not have learned anything
    argv += "--tasks avsr --copies 3 --steps 8".split()
    assert train.main([*argv, "--out", str(tmp_path / "out")]) == 0
    lengths = [(len(audio), len(video)) for step in drawn for audio, video in zip(step["audio"], step["video"])]
    assert len(lengths) == 16 and len(set(lengths)) > 4 and all(abs(audio - 2 * video) <= 2 for audio, video in lengths)


@pytest.fixture
def kept(parts, tmp_path):
    """-> make(**more): a Features of two real clips and the tiny Whisper in a new folder, and the clips."""
    clips = [read_clip(path, n_mels=128) for path in sorted((parts / "clips/train").glob("*.mp4"))[:2]]
    model = AVSR(AVSRConfig(LlamaConfig(30), AudioEncoder.from_pretrained(parts / "whisper").config, None),
                 audio=AudioEncoder.from_pretrained(parts / "whisper"))

    def make(identity="x", copies=2, seed=0, clips=clips):
        return features.Features(tmp_path / "features", model, {"audio": identity}, clips, copies, seed)
    return make, clips


def test_kept_outputs_are_those_of_the_encoder(kept):
    make, clips = kept
    store = make()
    alone = store.model.encode(data.batch(clips[:1], ["audio"]))["audio"][0][0]
    x = load_file(store.path(clips[0], 0, "audio"))["x"]
    torch.testing.assert_close(x.float(), alone, atol=5e-3, rtol=5e-3)
    copies = [load_file(store.path(clips[0], n, "audio"))["x"] for n in (1, 2)]
    assert not torch.equal(copies[0][:20], copies[1][:20]) and not torch.equal(copies[0][:20], x[:20])
    tokens, lengths = data.padded(store.rows(clips, ["audio"], random.Random(1)))["audio"]
    assert tokens.shape[:2] == (2, lengths.max()) and tokens[lengths.argmin(), lengths.min():].abs().sum() == 0
    drawn = {store.rows(clips[:1], ["audio"], random.Random(seed))["audio"][0].sum().item() for seed in range(30)}
    assert len(drawn) == 3                       # the clip and its two copies


def test_what_is_there_is_not_made_again(kept, monkeypatch):
    make, clips = kept
    make()
    written = []
    monkeypatch.setattr(features, "write_whole", lambda path, write: written.append(path) or write_whole(path, write))
    store = make()
    assert not written
    store.path(clips[0], 1, "audio").unlink()  # as after a kill
    make()
    assert written == [store.path(clips[0], 1, "audio")]
    written.clear()
    make(identity="another encoder")
    assert len(written) == 6
    written.clear()
    monkeypatch.setattr(features, "VERSION", features.VERSION + 1)
    make()
    assert len(written) == 6
    written.clear()
    make(seed=1)
    assert len(written) == 4  # the augmented copies; the clips themselves are the same
    written.clear()
    os.utime(clips[0].name, (1, 1))
    make()
    assert not written        # another time, the same sound
    make(clips=[replace(clip, name=f"/elsewhere/{os.path.basename(clip.name)}") for clip in clips])
    assert not written        # another folder, the same files
    assert all(map(np.array_equal, make(clips=clips[::-1]).voices, store.voices)) and not written     # another order
    (store.folder / "plain").touch()
    assert store.path(clips[0], 1, "audio").stat().st_mode == (store.folder / "plain").stat().st_mode     # others may read it
    changed = [replace(clips[0], wave=-clips[0].wave), *clips[1:]]
    make(clips=changed)
    assert len(written) == 5  # its three versions, and what is mixed with its voice


def test_a_damaged_file_is_one_line(kept):
    make, clips = kept
    store = make(copies=0)
    path = store.path(clips[1], 0, "audio")
    for damage in (lambda: path.write_bytes(b""), lambda: save_file({"y": torch.zeros(1)}, path)):
        damage()
        with pytest.raises(CheckpointError, match=f"{path}: damaged, delete it"):
            store.rows(clips, ["audio"], random.Random(0))


def test_distortion_keeps_time_and_bounds():
    rng, t = random.Random(0), np.arange(16000) / 16000
    wave = (0.5 * np.sin(2 * np.pi * 1000 * t)).astype(np.float32)
    levels = []
    for _ in range(40):
        pace = rng.uniform(0.8, 1.25)
        out = features.distort(wave, pace, [wave[:8000][::-1].copy()], rng)
        assert len(out) == round(16000 * pace) and out.dtype == np.float32
        assert np.abs(out).max() <= 1 and np.isfinite(out).all()
        peak = np.abs(np.fft.rfft(out)).argmax() / len(out) * 16000
        assert abs(peak - 1000 / pace) < 30  # slower is deeper
        levels.append(np.sqrt(np.mean(out ** 2)))
    assert max(levels) > 4 * min(levels)


def test_copies_get_babble_and_noise(monkeypatch):
    voices, mixed, rng = [np.ones(1600, np.float32)], [], random.Random(0)
    monkeypatch.setattr(data, "add_babble", lambda wave, others, *_: mixed.append(others[0] is voices[0]) or wave)
    for _ in range(400):
        features.distort(np.ones(1600, np.float32), 1., voices, rng)
    assert mixed.count(True) / 400 == pytest.approx(.36, abs=.07) and mixed.count(False) / 400 == pytest.approx(.24, abs=.07)


def test_pictures_of_a_copy_are_shifted_and_mirrored():
    """One bright point in each frame, brighter from frame to frame, shows what moves where."""
    frames, rows, columns = np.zeros((25, 40, 40), np.uint8), set(), set()
    frames[range(25), 30, 25] = range(1, 26)
    for seed in range(60):
        moved = features.augmented(data.Clip("a", "b", frames=frames), "video", [], random.Random(seed)).frames
        assert (np.diff(moved.max((1, 2)).astype(int)) >= 0).all()
        _, y, x = moved.nonzero()
        rows, columns = rows | set(y.tolist()), columns | set(x.tolist())
    assert rows == {28, 29, 30, 31, 32} and columns == {*range(23, 28), *range(12, 17)}


def test_a_copy_is_no_longer_than_the_encoder_reads():
    clip = data.Clip("a", "b", frames=np.zeros((725, 2, 2), np.uint8))           # 29 s
    assert max(len(features.augmented(clip, "video", [], random.Random(seed)).frames) for seed in range(20)) == 750


def test_pictures_and_sound_of_a_copy_keep_pace(talker_clips):
    audio, video = (features.augmented(talker_clips[0], stream, [talker_clips[1].wave], random.Random(3))
                    for stream in ("audio", "video"))
    assert abs(len(video.frames) / 25 - len(audio.wave) / 16000) < 0.05
    assert len(video.frames) != len(talker_clips[0].frames) and video.frames.dtype == np.uint8
    assert audio.log_power.shape == (80, len(audio.wave) // 160)


# --- what a model costs ---

def train_config(*argv):
    return parse_options(train.TrainConfig, argv, "", "", train.PRESETS, train.check_config)


def test_the_papers_count_of_active_parameters():
    config = train_config("--preset", "paper", "--dry-run")
    assert (config.rates, config.n_routed, config.top_k, config.n_shared, config.bottleneck, config.lr,
            config.weight_decay, config.epochs, config.beam) == ("4,16x2,5", 23, 4, 1, 12, 1e-3, 0.1, 10, 15)
    with torch.device("meta"):
        count = count_parameters(AVSR(cost.sizes(config)))
    assert count["active"] == 28 * (5 * (2 * 12 * 3072 + 12 + 3072) + 23 * 3072)
    assert round(count["active"] / 1e6, 1) == 12.7
    assert round(count["LLM"] / 1e9, 2) == 3.21 and round(count["encoders"] / 1e6) in range(620, 640)


def test_other_flags_win_over_the_preset():
    assert train_config("--rates", "2", "--preset", "paper", "--dry-run").rates == "2"


def test_a_dry_run_counts_lora(capsys):
    assert train.main("--dry-run --method lora --tasks asr --rates 4".split()) == 0
    counts, _ = cost.report(train_config(*"--dry-run --method lora --tasks asr --rates 4".split()))
    c = cost.STAND_INS["llm"]
    per_rank = c.n_layers * (4 * c.dim + 2 * c.n_heads * c.head_dim + 2 * c.n_kv_heads * c.head_dim)
    assert counts["adapter"] == counts["active"] > 0 and counts["adapter"] % per_rank == 0
    assert "LoRA" in capsys.readouterr().out


def test_dry_run_tells_tokens_and_flops(parts, capsys):
    assert train.main(f"--dry-run --tasks asr --rates 4,16 --llm {parts}/llm --beam 3".split()) == 0
    printed = capsys.readouterr().out
    rows = [line.split()[:2] for line in printed.splitlines() if line.split()[:1] in (["1"], ["4"], ["16"])]
    assert rows == [["1", "510"], ["4", "135"], ["16", "42"], ["1", "1160"], ["16", "82"]] and "active" in printed


def test_flops_are_twice_the_products():
    with torch.device("meta"):
        model = AVSR(AVSRConfig(LlamaConfig(64, 256, 2, 4, 4, 512), AudioConfig(), None))
    llm = cost.costs(model, 10, {"audio": 4}, 1, 1)
    layers = sum(p.numel() for p in model.llm.layers.parameters() if p.dim() == 2)
    tokens = llm["tokens"] + math.ceil(10 * cost.OUTPUT_TOKENS_PER_SECOND)
    attention = 2 * 2 * 2 * 256 * tokens ** 2
    projector = 125 * sum(p.numel() for p in model.projectors.parameters() if p.dim() == 2)
    assert llm["llm_flops"] == 2 * (layers * tokens + projector + 30 * 64 * 256) + attention
    assert llm["cache_bytes"] == 2 * 2 * 4 * 64 * tokens * 4
    assert cost.costs(model, 10, {"audio": 4}, 3, 1)["cache_bytes"] == 3 * llm["cache_bytes"]      # a beam of 3


def test_what_a_dry_run_prints(capsys):
    counts = dict.fromkeys(("encoders", "LLM", "adapter", "projectors and markers"), 2 ** 29) | {"active": 10 ** 6}
    cost.print_parameters(counts, "MoME")
    printed = capsys.readouterr().out
    assert "2.0 GiB in bf16" in printed and "16.0 GiB with gradients" in printed      # fp32: weights, gradients, two moments
    row = {"seconds": 1, "rates": {"audio": 1}, "tokens": 9, "flops": 8e12, "llm_flops": 6e12, "cache_bytes": 2 ** 21,
           "step_bytes": 2 ** 30}
    cost.print_rows("asr", [row, row | {"rates": {"audio": 4}, "flops": 2e12, "llm_flops": 1e12}], 1)
    assert capsys.readouterr().out.splitlines()[-1].split() == "4 9 2 1 4.0x 6.0x 2 MiB 1 GiB".split()


def test_a_dry_run_counts_padding_and_no_attention_matrices():
    @cache
    def of(seconds, *argv):
        config = train_config(*"--preset paper --tasks asr --dry-run".split(), *argv)
        return cost.costs(cost.model_of(config), seconds, {"audio": 1}, 1, 0)
    assert of(10, "--pad-audio")["encoder_flops"] == of(30)["encoder_flops"] > 2 * of(10)["encoder_flops"]
    assert 2.8 < of(30)["step_bytes"] / of(10)["step_bytes"] < 3.2     # with a (T, T) matrix it would grow faster than the seconds


def test_any_adapter_beside_a_real_llm_is_stored(tiny):
    """What is trained tells it, not a name."""
    layer = tiny.llm.layers[0]
    layer.adapter, layer.frozen = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3).requires_grad_(False)
    names = checkpoint.stored(tiny, {"llm": None, "audio": None})
    assert {"llm.layers.0.adapter.weight", "llm.layers.0.mome.down", "projectors.audio.0.weight", "encoders.video.norm.weight"} <= names
    assert not {"llm.layers.0.frozen.weight", "llm.norm.weight", "encoders.audio.norm.weight"} & names


def test_each_stream_costs_its_own_encoder():
    with torch.device("meta"):
        model = AVSR(AVSRConfig(LlamaConfig(64, 16, 1, 2, 2, 16), AudioConfig(), VideoConfig()))
    audio, video, both = (cost.costs(model, 3, rates, 1, 1)["encoder_flops"]
                          for rates in ({"audio": 4}, {"video": 4}, {"audio": 4, "video": 4}))
    assert 0 < audio < both and audio + video == both
