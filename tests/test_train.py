"""python -m pytest tests/test_train.py: the two commands, their flags, their files, wrong use."""
import ast
import itertools
import json
import math
import random
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, TRAINED, ffmpeg
from safetensors.torch import load_file

import data
import sample
import train
from data import ClipError, parse_rates
from encoders import AudioEncoder
from extras import auto, baselines, cost
from mome import AVSR, AVSRConfig, Llama, LlamaConfig
from real import clips as data_command
from real import checkpoint, media
from real.clips import read_clip
from real.options import parse_options, parse_sample_options
from real.report import wrap, write_srt
from toy import pretrain
from toy.talker import talker_clip, write_talker_clips
from toy.tokenizer import make_tokenizer

TINY = "--clips 12 --valid-clips 6 --test-clips 4 --audio-steps 1 --video-steps 1 --ctc-steps 2 --llm-steps 1 --steps 2 --snr clean,-5".split()


# --- flags ---

def parse_args(argv):
    return parse_options(train.TrainConfig, argv, train.__doc__, "", train.PRESETS, train.check_config)


@pytest.mark.parametrize("text, pairs", [("2,4,8", [(2, 2), (4, 4), (8, 8)]), ("4:2,16:5", [(4, 2), (16, 5)]), ("3", [(3, 3)]),
                                         ("4,16x2,5", [(4, 2), (4, 5), (16, 2), (16, 5)]), ("4,4:4,8:2", [(4, 4), (8, 2)])])
def test_rates(text, pairs):
    assert data.parse_rates(text) == pairs


@pytest.mark.parametrize("text", ["", "2,,4", "a", "4:", ":4", "0", "-2", "2.5", "4x", "4x2x1", "4:2:1", "2;4"])
def test_bad_rates(text, capsys):
    with pytest.raises(ValueError, match="rate"):
        data.parse_rates(text)
    with pytest.raises(SystemExit) as end:
        train.main(["--rates", text])
    assert end.value.code == 2 and "rate" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("argv", [["--count", "0"], ["--seed", "-1"], ["check"]])
def test_bad_data_flags(argv):
    with pytest.raises(SystemExit) as end:
        data_command.main(argv)
    assert end.value.code == 2


def test_rates_of_a_task():
    pairs = [(4, 2), (4, 5), (16, 2)]
    assert data.task_rates("avsr", pairs) == [{"audio": 4, "video": 2}, {"audio": 4, "video": 5}, {"audio": 16, "video": 2}]
    assert data.task_rates("asr", pairs) == [{"audio": 4}, {"audio": 16}]
    assert data.task_rates("vsr", pairs) == [{"video": 2}, {"video": 5}]


@pytest.mark.parametrize("flags, said", [("--tasks asr,lips", "--tasks: 'lips'"), ("--snr clean,loud", "--snr 'clean,loud'"),
                                         ("--snr nan", "--snr 'nan'"), ("--steps -1", "--steps"), ("--steps x", "--steps"),
                                         ("--top-k 9", "top_k 9"), ("--place mlp", "--place"), ("--seed -1", "--seed"),
                                         ("--lr nan", "--lr"), ("--weight-decay -1", "--weight-decay")])
def test_bad_flags(flags, said, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(flags.split())
    assert end.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_every_flag_has_one_default_and_a_help_line(capsys):
    assert parse_args([]) == train.TrainConfig()
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    told = capsys.readouterr().out
    for f in fields(train.TrainConfig):
        assert "--" + f.name.replace("_", "-") in told
    assert told.index("--rates") < told.index("--n-routed") < told.index("--lr")


def test_readme_commands_parse():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    commands = re.findall(r"^ {4}(?:.*&& )?python (train|sample|data)\.py ?(.*)$", text, re.M)
    assert {name for name, _ in commands} == {"train", "sample", "data"}
    for name, arguments in commands:
        argv = shlex.split(arguments, comments=True)
        if name == "train":
            parse_args(argv)
        elif name == "sample":
            parse_sample_options(argv, "")
        else:
            data_command.parse_args(argv)


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 180 and max(map(len, lines)) <= 120 and len(" ".join(lines).split()) <= 1900


# --- training ---

def test_frame_units():
    aligned = ("rest", 0.09), ("B", 0.19), ("IY", 0.4)
    assert pretrain.frame_units(aligned, 10, 25, {"B": 1, "IY": 2}).tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]


def test_ctc_path_is_the_likeliest_of_all():
    def said(path):
        return [unit for t, unit in enumerate(path) if unit and (t == 0 or path[t - 1] != unit)]

    log_probs = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    for target in ([4], [1, 2], [3, 3], [1, 2, 1], [1, 1, 1]):
        paths = [path for path in itertools.product(range(5), repeat=6) if said(path) == target]
        best = max(paths, key=lambda path: sum(log_probs[t, unit] for t, unit in enumerate(path)))
        found = pretrain.ctc_path(log_probs, torch.tensor(target))
        assert [[0, *target][k] for k in found] == list(best)
    assert pretrain.ctc_path(log_probs, torch.tensor([1, 1, 1, 1])) is None      # with blanks between, 7 tokens


def test_units_that_are_heard_for_a_moment_are_filled_out():
    path = pretrain.fill_out(torch.tensor([0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0]), 2)
    assert path.tolist() == [0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0]
    aligned = pretrain.alignment(path.tolist(), ["rest", "B", "IY"], 0.24)
    assert [unit for unit, _ in aligned] == ["rest", "B", "IY", "rest"]
    assert [end for _, end in aligned] == pytest.approx([0.02, 0.12, 0.2, 0.24])
    assert pretrain.frame_units(aligned, 12, 50, {"B": 1, "IY": 2}).tolist() == path.tolist()
    assert pretrain.frame_units(aligned, 6, 50 / 2.1, {"B": 1, "IY": 2}).tolist() == [1, 1, 1, 2, 2, 0]     # slower


def test_sound_says_when_units_are_said():
    """An encoder of one-hot frames, whose tokens are therefore known."""
    class Encoder(torch.nn.Module):
        config = SimpleNamespace(dim=4)

        def forward(self, x, lengths):
            return torch.eye(4)[[0, 1, 1, 0, 2, 0, 3, 0]][None] * 9

    clip = data.Clip("a", "bin", log_power=np.zeros((80, 16), np.float16))
    unit_ids = {"rest": 0, "B": 1, "IH": 2, "N": 3}
    heard = pretrain.heard_units(Encoder(), torch.nn.Identity(), [clip, replace(clip, text="x")], unit_ids, "cpu")
    assert list(heard) == ["0"] and set(heard["0"].tolist()) == {1, 2, 3}


def test_fit_lowers_the_loss_and_passes_over_parameters_without_gradient():
    weight, unused = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(1))
    losses = []

    def loss_at(step):
        losses.append((weight - torch.arange(4.)).square().sum())
        return losses[-1]
    pretrain.fit("test", iter([weight, unused]), loss_at, 40, 0.1)
    assert losses[-1] < losses[0] / 4 and unused.item() == 1 and len(losses) == 40


def test_what_fails_in_a_step_ends_training():
    def loss_at(step):
        raise ValueError(f"step {step}")
    with pytest.raises(ValueError, match="step 0"):
        pretrain.fit("test", [torch.nn.Parameter(torch.zeros(1))], loss_at, 9, 0.1)


def test_stage_2_reads_letters_and_writes_words():
    """Text alone goes in: the bytes of a sentence; its words are the labels. No sentence of the test split is among them."""
    tokenizer, rows = make_tokenizer(["bin", "blue", "now"]), []
    config = AVSRConfig(LlamaConfig(tokenizer.n_vocab, 16, 1, 2, 2, 16), bos=259, eos=260, prompt=(261,))
    llm = Llama(config.llm)
    table = llm.embed_tokens.weight.detach().clone()
    original = llm.transcript_loss

    def transcript_loss(prefixes, labels):
        if not rows:
            for prefix, y in zip(prefixes, labels):
                ids = [(table - vector).abs().sum(1).argmin().item() for vector in prefix.detach()]
                rows.append((ids, y.tolist()))
        return original(prefixes, labels)
    llm.transcript_loss = transcript_loss
    pretrain.train_llm(llm, ["bin blue", "blue now"], {"now bin"}, tokenizer, config, 1, 0, "cpu")
    assert len(rows) == pretrain.LLM_BATCH
    for ids, labels in rows:
        text = bytes(ids[1:-1]).decode()
        assert ids[0] == 259 and ids[-1] == 261 and labels == [*tokenizer.encode(f" {text}"), 260] and text != "now bin"
    assert len({tuple(ids) for ids, _ in rows}) > 3  # sentences and random words


def test_a_made_up_sentence_is_never_a_tested_one():
    words, tested = ["a", "b"], {f"{x} {y}" for x in "ab" for y in "ab"}
    drawn = {pretrain.random_sentence(["a b c"], tested, words, random.Random(seed)) for seed in range(300)}
    assert not drawn & tested and len(drawn) > 10


def test_frozen_parts_are_found_after_a_comment_in_mome_changes(trained, tmp_path):
    """The cache's keys are what goes in, not the source text."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("real/*.py"), *ROOT.glob("toy/*.py"), *ROOT.glob("extras/*.py")]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text() + ("\n# one more comment\n" if path.name == "mome.py" else ""))
    argv = [*TRAINED, *"--snr clean --test-clips 3 --steps 1 --out out --cache".split(), str(trained / "cache")]
    done = subprocess.run([sys.executable, "train.py", *argv], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("found in") == 3, done.stderr


ADAPTERS = {"projectors": ("MoME 0 (0 active", 0), "lora-mss": ("LoRA 200,704 (57,344 active", 7 * 4 * 4 * 2),
            "mome-routers": ("MoME 103,200 (30,304 active", 4 * (4 + 6))}     # 2 sets of rates for each of 3 tasks


@pytest.mark.parametrize("method", ADAPTERS)
def test_other_methods_train_test_and_are_read_again(method, trained, tmp_path, capsys):
    argv = [*TRAINED, "--snr", "clean", "--out", str(tmp_path / "out"), "--cache", str(trained / "cache"), "--method", method]
    assert train.main(argv) == 0
    printed = capsys.readouterr().out
    names = [name for name in load_file(tmp_path / "out/model.safetensors") if ".mome." in name or ".lora." in name]
    said, n_tensors = ADAPTERS[method]
    assert f"trained: {said} for one token)" in printed and len(names) == n_tensors
    rows = json.loads((tmp_path / "out/metrics.json").read_text())["rows"]
    assert train.main([*argv[:-2], "--eval-only"]) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["rows"] == rows and metrics["config"]["method"] == method


def test_lora_changes_nothing_at_first_and_is_all_that_trains_in_the_llm(tiny):
    tokens = torch.randint(0, 40, (2, 6))
    before = tiny.llm(tokens)
    baselines.add_lora(tiny.llm, 3)
    torch.testing.assert_close(tiny.llm(tokens), before)
    q = tiny.llm.layers[0].self_attn.q_proj
    lora, = q.lora
    torch.nn.init.normal_(lora.b)
    x = torch.randn(5, 32)
    torch.testing.assert_close(q(x), x @ (q.weight + lora.b @ lora.a).T)
    tiny.llm(tokens).sum().backward()
    assert lora.a.grad is not None and q.weight.grad is None
    class Paper:
        n_routed, top_k, n_shared, bottleneck = 23, 4, 1, 12
    llama_3b = LlamaConfig(128_256, dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, ffn_dim=8192, head_dim=128)
    assert baselines.lora_rank(llama_3b, Paper) == 22  # the paper's LoRA of rank 48 has 27.5M, its MoME 12.7M active
    alone = [SimpleNamespace(n_routed=0, top_k=top_k, n_shared=1, bottleneck=48) for top_k in (1, 4)]
    assert len({baselines.lora_rank(LlamaConfig(99), experts) for experts in alone}) == 1      # experts that are not there


@pytest.mark.parametrize("method", ["mome", "lora"])
def test_any_module_may_ask_for_the_rates(method, tiny):
    """docs/fork.md and an exercise of the README use this."""
    facts = {"method": method, "rank": 3, "tasks": ["asr"], "rates": [(2, 4), (4, 2)], "projector_per_rate": False}
    baselines.build_adapter(tiny, facts)
    seen = []
    tiny.llm.layers[0].mlp.register_forward_hook(lambda *_: seen.append(baselines.RATES.get()))
    for rates in ({"audio": 2}, {"audio": 4}):
        tiny.loss({"audio": (torch.randn(1, 12, 16), torch.tensor([12]))}, [[3]], rates)
    assert seen == [{"audio": 2}, {"audio": 4}]


def test_mss_begins_with_loras_of_their_own(tiny):
    """Two equal ones would together have the rank of one."""
    baselines.add_lora(tiny.llm, 3, [{"audio": 2}, {"audio": 4}])
    shared, of_rates = tiny.llm.layers[0].self_attn.q_proj.lora
    assert not any(torch.equal(shared.a, lora.a) for lora in of_rates.copies.values())


@torch.no_grad()
@pytest.mark.parametrize("method", ["lora-ms", "lora-mss", "mome-routers"])
def test_each_set_of_rates_has_its_own_weights(method, tiny):
    """A copy serves one set of rates, in each thread its own; rates that were not trained are refused."""
    facts = {"method": method, "rank": 3, "tasks": ["avsr", "asr"], "rates": [(2, 4), (4, 2)], "projector_per_rate": True}
    baselines.build_adapter(tiny, facts)
    copies = [module for module in tiny.modules() if isinstance(module, baselines.PerRate)]
    in_llm = [copy.copies for copy in copies if len(copy.copies) == 4]
    assert {tuple(copy) for copy in in_llm} == {("audio2_video4", "audio4_video2", "audio2", "audio4")}
    assert [list(copy.copies) for copy in copies if len(copy.copies) == 2] == [["audio2", "audio4"], ["video4", "video2"]]
    encoded = {stream: (torch.randn(1, 12, 16), torch.tensor([12])) for stream in ("audio", "video")}

    def states(rates):
        prefix, = tiny.prefix({stream: encoded[stream] for stream in rates}, rates)
        return tiny.llm.hidden_states(prefix[None])

    rate_sets = [{"audio": 2, "video": 4}, {"audio": 4, "video": 2}, {"audio": 4}]
    before = [states(rates) for rates in rate_sets]
    for copy in in_llm:
        for parameter in copy["audio4_video2"].parameters():
            parameter.normal_()
    with ThreadPoolExecutor(2) as workers:
        after = list(workers.map(states, 10 * rate_sets))
    for i, x in enumerate(after):
        assert torch.equal(x, before[i % 3]) == (i % 3 != 1)
    with pytest.raises(ClipError, match="rates audio3: this model has weights of its own for each set of rates, and was trained at"):
        states({"audio": 3})


def test_the_papers_counts_of_its_baselines():
    """Active parameters with Llama 3.2 3B: 12.7M of MoME, 27.5M of Llama-AVSR and of MTSK's MS and SS, 55.0M of its MSS."""
    for method, active, total in (("mome", 12.7, 53.6), ("mome-routers", 12.7, 59.5), ("lora", 27.5, 27.5), ("lora-ms", 27.5, 110.1),
                                  ("lora-mss", 55.1, 137.6)):
        config = parse_options(train.TrainConfig, ["--preset", "paper", "--dry-run", "--method", method], "", "", train.PRESETS,
                               train.check_config)
        with torch.device("meta"):
            model = AVSR(cost.sizes(config))
            counts = baselines.add_adapter(model, config, ["avsr"], parse_rates(config.rates))["parameters"]
        assert (round(counts["active"] / 1e6, 1), round(counts["adapter"] / 1e6, 1)) == (active, total), method


def test_imports_go_one_way():
    """No circle among the files at the top, in real/ and toy/, also counting imports inside functions.

    Not counted: the command line under data.py's __main__, and extras/, which sample.py imports for two of its --rate."""
    files = {str(path.relative_to(ROOT)).removesuffix(".py").replace("/", "."): path
             for folder in (".", "real", "toy") for path in (ROOT / folder).glob("*.py")}
    imports = {}
    for name, path in files.items():
        tree = ast.parse(path.read_text())
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))]
        found = set()
        for node in tree.body if name in ("toy.talker", "real.clips") else ast.walk(tree):  # these two import lazily for data.py
            if isinstance(node, ast.ImportFrom):
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        imports[name] = found & set(files)

    def reaches(start, goal, visited):
        return any(name == goal or name not in visited and not visited.add(name) and reaches(name, goal, visited)
                   for name in imports[start])
    assert not [name for name in files if reaches(name, name, set())]
    assert imports["mome"] == {"encoders", "real.weights"} and imports["encoders"] == {"real.weights"}  # weights: in from_pretrained
    assert sorted(name for name in files if "." not in name) == ["data", "encoders", "mome", "sample", "train"]  # five files at the top


def test_what_training_writes(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert {(r["task"], r["audio_rate"], r["video_rate"], r["snr_db"]) for r in metrics["rows"]} == (
        {("avsr", a, v, snr) for a, v in ((2, 2), (4, 8)) for snr in (None, -5.0)}
        | {("asr", a, None, snr) for a in (2, 4) for snr in (None, -5.0)} | {("vsr", None, v, None) for v in (2, 8)})
    assert {(r["task"], r["audio_rate"], r["video_rate"], r["snr_db"]) for r in metrics["auto"]} == (
        {(task, "auto", None, snr) for task, snr in (("avsr", None), ("avsr", -5.0), ("asr", None), ("asr", -5.0), ("vsr", None))})
    for row in metrics["rows"]:
        assert row["clips"] == 5 and row["words"] == 30 and row["split"] == "test" and row["wer"] >= 0
    assert set(metrics["seconds"]) == {"clips", "stage 1, audio", "stage 1, video", "stage 2, rest", "stage 3", "calibration", "test"}
    assert metrics["config"]["rates"] == "2:2,4:8"
    assert len(list((trained / "samples").glob("*.mp4"))) == len(list((trained / "samples").glob("*.txt"))) == 3
    assert sorted(p.name for p in trained.iterdir()) == [
        "cache", "config.json", "log.csv", "metrics.json", "model.safetensors", "run.json", "samples",
        "state.safetensors", "tokenizer.json"]
    assert str(trained) not in (trained / "config.json").read_text()


def test_frozen_parts_are_bit_identical_to_stages_1_and_2(trained):
    model = load_file(trained / "model.safetensors")
    for name, prefix in (("audio-encoder", "encoders.audio."), ("video-encoder", "encoders.video."), ("llama", "llm.")):
        path, = (trained / "cache").glob(f"{name}-*.safetensors")
        for key, tensor in load_file(path).items():
            assert torch.equal(model[prefix + key], tensor), key
    assert any(model[k].abs().sum() > 0 for k in model if k.endswith("mome.up"))  # and stage 3 did train


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does not add up in a fixed order")
def test_same_seed_same_bytes_cached_or_not_and_eval_only(trained, tmp_path, capfd):
    assert train.main([*TRAINED, "--out", str(tmp_path / "cached"), "--cache", str(trained / "cache")]) == 0
    assert capfd.readouterr().out.count("found in") == 3
    tmp_path = tmp_path / "fresh"
    tmp_path.mkdir()
    (tmp_path / "curve.json").write_text("[]")
    assert train.main([*TRAINED, "--out", str(tmp_path)]) == 0
    assert "found in" not in capfd.readouterr().out
    assert (trained / "model.safetensors").read_bytes() == (tmp_path.parent / "cached/model.safetensors").read_bytes()
    rows = [json.loads((folder / "metrics.json").read_text())["rows"] for folder in (trained, tmp_path)]
    assert rows[0] == rows[1] and (trained / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert not (tmp_path / "curve.json").exists()  # an earlier model's
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert train.main([*TRAINED, "--out", str(tmp_path), "--eval-only"]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["rows"] == rows[0]
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before
    flags = "--eval-only --rates 3 --tasks asr --test-clips 3 --n-routed 2 --rank 99 --method lora"
    assert train.main([*flags.split(), "--out", str(tmp_path)]) == 0
    metrics, saved = (json.loads((tmp_path / name).read_text()) for name in ("metrics.json", "config.json"))
    tested = metrics["config"]                                      # of the model, whatever the flags say
    assert {r["audio_rate"] for r in metrics["rows"]} == {3} and tested["n_routed"] == 8
    assert tested["method"] == "mome" and tested["rank"] == saved["rank"] != 99
    assert "auto is tested only beside all trained rates: 2:2,4:8" in capfd.readouterr().err
    assert train.main(["--out", str(tmp_path / "none"), "--eval-only"]) == 2
    assert "no config.json" in capfd.readouterr().err


@pytest.mark.skipif(not (SHARED / "digits").is_dir(), reason="needs the real digit strings beside the project")
def test_real_voices(tmp_path, capsys):
    for part in ("train", "test"):
        (tmp_path / "digits" / part).mkdir(parents=True)
        for path in sorted((SHARED / "digits" / part).glob("*_000?.*")):
            (tmp_path / "digits" / part / path.name).symlink_to(path)
    argv = ["--data", str(tmp_path / "digits"), "--out", str(tmp_path / "out"), "--rates", "4,8", *TINY]
    assert train.main(argv) == 2
    assert "no train clip has audio and video, which avsr needs" in capsys.readouterr().err
    assert train.main([*argv, "--tasks", "asr"]) == 0
    rows = json.loads((tmp_path / "out/metrics.json").read_text())["rows"]
    assert [(r["task"], r["audio_rate"], r["video_rate"], r["snr_db"]) for r in rows] == [
        ("asr", 4, None, None), ("asr", 8, None, None), ("asr", 4, None, -5), ("asr", 8, None, -5)]
    capsys.readouterr()
    assert sample.main(["--ckpt", str(tmp_path / "out")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert sample.main(["--ckpt", str(tmp_path / "out"), "--task", "vsr"]) == 2
    assert "reads audio only" in capsys.readouterr().err


def test_a_folder_with_clips_that_lack_a_stream(tmp_path, capsys):
    write_talker_clips(tmp_path / "clips", 8, "train", 0, size=32)
    paths = sorted((tmp_path / "clips").glob("*.mp4"))
    for path, options in ((paths[0], "-an -c:v copy"), (paths[1], "-vn -c:a copy")):
        ffmpeg("-i", path, *options.split(), tmp_path / "cut.mp4")
        (tmp_path / "cut.mp4").replace(path)
    argv = ["--data", str(tmp_path / "clips"), "--out", str(tmp_path / "out"), "--rates", "4", *TINY, "--steps", "8",
            "--n-routed", "0", "--n-shared", "0", "--snr", "clean"]
    assert train.main(argv) == 0  # projectors only
    assert "MoME 0 (0 active for one token)," in capsys.readouterr().out
    assert not [name for name in load_file(tmp_path / "out/model.safetensors") if "mome" in name]
    assert sample.main([str(paths[0]), str(paths[1]), str(paths[2]), "--ckpt", str(tmp_path / "out"), "--json"]) == 0
    told = capsys.readouterr()
    assert [json.loads(line)["task"] for line in told.out.splitlines()] == ["vsr", "asr", "avsr"]
    again = ["--eval-only", "--data", str(tmp_path / "clips"), "--out", str(tmp_path / "out"), "--rates", "4", "--snr", "clean",
             "--tasks", "asr", "--max-bad", "50%"]
    for n_more in (0, 8):                     # a folder that has grown is split anew
        n_more and write_talker_clips(tmp_path / "clips/more", n_more, "train", 1, size=32)
        assert train.main(again) == 0
        assert ("not that of the training any more" in capsys.readouterr().err) == bool(n_more)


def test_missing_data(tmp_path, capsys):
    assert train.main(["--data", str(tmp_path / "nowhere")]) == 2
    assert train.main(["--data", str(tmp_path)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "nowhere: no such folder" in told[0] and "no clips here" in told[1]


# --- sample.py ---

def run(capsys, *argv):
    code = sample.main([str(a) for a in argv])
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    return code, told.out.splitlines(), told.err.splitlines()


def test_sample_default_clips_and_json(trained, capsys):
    code, out, err = run(capsys, "--ckpt", trained)
    assert code == 0 and len(out) == 3 and not err
    code, lines, _ = run(capsys, "--ckpt", trained, "--json")
    answers = [json.loads(line) for line in lines]
    assert code == 0 and [a["text"] for a in answers] == out
    for answer in answers:
        assert set(answer) == {"clip", "text", "task", "audio_rate", "video_rate", "tokens", "duration", "seconds", "logprob", "segments"}
        assert [segment["text"] for segment in answer["segments"]] == [answer["text"]] and answer["segments"][0]["end"] == answer["duration"]
        assert (answer["task"], answer["audio_rate"], answer["video_rate"]) == ("avsr", 2, 2) and answer["logprob"] <= 0


def test_sample_rates_tasks_and_beam(trained, capsys):
    clip = next((trained / "samples").glob("*.mp4"))
    frames = len(read_clip(clip).frames)
    for flags, task, rates, tokens in (
            ("--rate 4", "avsr", (4, 4), 6 + -(-2 * frames // 4) + -(-frames // 4)), ("--rate 8:3 --beam 3", "avsr", (8, 3), 6 + -(-2 * frames // 8) + -(-frames // 3)),
            ("--task asr --rate 5", "asr", (5, None), 4 + -(-2 * frames // 5)), ("--task vsr --rate 4:1", "vsr", (None, 1), 4 + frames)):
        code, out, _ = run(capsys, "--ckpt", trained, clip, "--json", *flags.split())
        answer = json.loads(out[0])
        assert code == 0 and answer["task"] == task and (answer["audio_rate"], answer["video_rate"]) == rates
        assert answer["tokens"] == tokens


def test_sample_rate_auto_and_all(trained, capsys):
    clip = next((trained / "samples").glob("*.mp4"))
    code, lines, _ = run(capsys, "--ckpt", trained, clip, "--rate", "all")
    assert code == 0 and [line.split()[:2] for line in lines] == [["rate", "4:8"], ["rate", "2:2"]]
    flops = [float(re.search(r"([\d.]+) GFLOPs", line)[1]) for line in lines]
    assert 0 < flops[0] < flops[1] and "x real time" in lines[0]
    code, lines, _ = run(capsys, "--ckpt", trained, clip, "--rate", "all", "--task", "vsr", "--json")
    assert code == 0 and [json.loads(line)["video_rate"] for line in lines] == [8, 2] and json.loads(lines[0])["flops"] > 1e6
    model, config, _ = checkpoint.load_for_use(str(trained))
    assert set(config["auto"]) == set(sample.TASKS) and config["longest"] > 1
    for threshold, rates, passes in ((-1e9, (4, 8), [(4, 8)]), (1e9, (3, 3), [(4, 8), (3, 3)])):  # never and always in doubt
        config["auto"]["avsr"] = threshold
        answer = sample.transcribe(clip, str(trained), rate="auto")
        assert (answer["audio_rate"], answer["video_rate"]) == rates
        assert answer["tokens"] == sum(sample.transcribe(clip, str(trained), rate=f"{a}:{v}")["tokens"] for a, v in passes)
    del config["auto"]
    with pytest.raises(ValueError, match="no threshold for avsr; train it with --valid-every"):
        sample.transcribe(clip, str(trained), rate="auto")
    checkpoint.load_once.cache_clear()


def test_a_clip_whose_task_has_no_threshold_does_not_end_the_others(trained, tmp_path, capsys):
    out = shutil.copytree(trained, tmp_path / "out", ignore=shutil.ignore_patterns("cache"))
    config = json.loads((out / "config.json").read_text())
    config["auto"] = {"avsr": -1e9}
    (out / "config.json").write_text(json.dumps(config))
    clip = next((out / "samples").glob("*.mp4"))
    ffmpeg("-i", clip, "-vn", tmp_path / "sound.wav")
    code, lines, err = run(capsys, "--ckpt", out, tmp_path / "sound.wav", clip, "--rate", "auto")
    assert code == 1 and len(lines) == 1 and err == [
        "sample.py: --rate auto: this checkpoint has no threshold for asr; train it with --valid-every"]


def test_decode_goes_on_only_with_the_clips_in_doubt(tiny, talker_clips):
    encoded = tiny.encode(data.batch(talker_clips, ["audio", "video"]))
    coarse, fine = {"audio": 8, "video": 4}, {"audio": 2, "video": 1}
    first, second = (sample.decode(tiny, encoded, rates) for rates in (coarse, fine))
    threshold = sorted(logprob for _, logprob, *_ in first)[2]
    both = auto.decode_ladder(tiny, encoded, [(coarse, threshold), (fine, -math.inf)])
    for a, b, c in zip(first, second, both):
        ids, logprob, rates, _ = a if a[1] >= threshold else b
        assert (c[0], c[2]) == (ids, rates) and c[1] == pytest.approx(logprob) and c[3] == a[3] + (b[3] if a[1] < threshold else 0)
    assert [c[2] for c in both].count(fine) == 2


def test_calibration(tiny, talker_clips, monkeypatch):
    """With a decoder whose doubt is right: the clips it gets wrong at the coarse rate are decoded again, no others."""
    def fake(model, clips, plan, snrs, *_):
        wrong = {clip.name: i % 4 == 0 for i, clip in enumerate(clips)}
        return {(key, snr): [("a b", "a c" if wrong[clip.name] and decoder.keywords["rates"] == {"audio": 8} else "a b",
                              -1. if wrong[clip.name] else -.1 - .001 * n - .2 * (snr is not None), 100 // decoder.keywords["rates"]["audio"])
                             for n, clip in enumerate(clips)] for key, (task, decoder) in plan.items() for snr in snrs}
    monkeypatch.setattr(auto, "decode_all", fake)
    clips = [replace(talker_clips[0], name=str(i)) for i in range(40)]
    threshold = auto.calibrate(tiny, clips, ["asr"], [(2, 2), (4, 4), (8, 8)], None)["asr"]
    assert threshold == pytest.approx(-.139)      # of the clean clips; the noisy ones alone would allow -.339


def test_every_cell_of_the_table_is_decoded_at_its_noise_and_rates(tiny, talker_clips, monkeypatch):
    pairs, tokenizer = [(4, 2), (8, 8)], SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    found = sample.decode_all(tiny, talker_clips, sample.fixed_plan(["avsr", "vsr"], pairs), [None, 0., -5.], tokenizer)
    logprobs = {key: [logprob for _, _, logprob, _ in rows] for key, rows in found.items()}
    ordered = sorted(talker_clips, key=lambda clip: clip.duration)
    for snr in (None, 0., -5.):
        noisy = [data.in_babble(clip, snr, talker_clips) for clip in ordered]
        encoded = tiny.encode(data.batch(noisy, ["audio", "video"]))
        for a, v in pairs:
            expected = [answer[1] for answer in sample.decode(tiny, encoded, {"audio": a, "video": v})]
            assert logprobs[("avsr", a, v), snr] == pytest.approx(expected, abs=1e-5)
    assert len({tuple(x) for x in logprobs.values()}) == len(logprobs) == 6 + 2          # lips are read clean alone
    encode, sizes = tiny.encode, []
    monkeypatch.setattr(tiny, "encode", lambda features: (sizes.append(len(features["audio"][0])), encode(features))[1])
    monkeypatch.setattr(sample, "TEST_SECONDS", 2 * ordered[-1].duration + 1)            # long clips go in smaller groups
    again = sample.decode_all(tiny, talker_clips, sample.fixed_plan(["avsr"], pairs), [None], tokenizer)
    assert sorted(sizes) == [1, 2, 2] and all([y for _, y, *_ in again[key]] == [y for _, y, *_ in found[key]] for key in again)


def test_stage_1_meets_no_tested_sentence(tmp_path, monkeypatch):
    met, text = [], talker_clip(("train", 0, 0, 32, False)).text
    monkeypatch.setattr(pretrain, "train_encoder", lambda stream, encoder, clips, *_: met.extend(clips) or encoder.state_dict())
    pretrain.begin_on_talker("audio", AudioEncoder(), {text}, train.TrainConfig(clips=4), tmp_path, torch.device("cpu"))
    assert met and text not in {clip.text for clip in met}


def test_sample_long_clip_and_subtitles(trained, tmp_path, capsys):
    model, config, _ = checkpoint.load_for_use(str(trained))
    clips = [talker_clip(("test", i, 0, 64, True)) for i in range(10)]
    media.write_mp4(tmp_path / "long.mp4", np.concatenate([clip.frames for clip in clips]), np.concatenate([clip.wave for clip in clips]))
    heard = []
    answer = sample.transcribe(tmp_path / "long.mp4", str(trained), on_segment=heard.append)
    assert heard == answer["segments"] and len(heard) >= 8 and answer["text"] == " ".join(s["text"] for s in heard if s["text"])
    assert all(a["start"] < a["end"] <= b["start"] for a, b in zip(heard, heard[1:])) and heard[-1]["end"] <= sum(clip.duration for clip in clips)
    assert answer["tokens"] == sum(segment["tokens"] for segment in heard)
    code, out, err = run(capsys, "--ckpt", trained, tmp_path / "long.mp4", "--srt", tmp_path / "long.srt")
    assert code == 0 and out == [answer["text"]]
    assert (tmp_path / "long.srt").is_file()
    with pytest.raises(SystemExit):
        sample.main(["--srt", "x.srt", "a.mp4", "b.mp4"])
    write_srt(tmp_path / "b.srt", [{"start": 3661.5, "end": 3662.25, "text": "a"}, {"start": 3663, "end": 3664, "text": ""},
                                            {"start": 3664, "end": 3665, "text": ("b " * 30).strip()}])
    thai = "แล้วก็ไปกินข้าวด้วยกันที่นั่นนะ" * 5
    assert wrap(thai).replace("\n", "") == thai and not any(unicodedata.combining(line[0]) or line[0] == "ิ" for line in wrap(thai).split("\n"))
    assert wrap("short " + 42 * "x") == "short\n" + 42 * "x" and wrap("a" + 99 * " " + "b") == "a\nb" and wrap("") == ""
    assert (tmp_path / "b.srt").read_text().splitlines() == [
        "1", "01:01:01,500 --> 01:01:02,250", "a", "", "2", "01:01:04,000 --> 01:01:05,000", ("b " * 21).strip(), ("b " * 9).strip()]


def test_sample_agrees_with_training(trained):
    model, config, tokenizer = checkpoint.load_for_use(str(trained))
    clip = sorted((trained / "samples").glob("*.mp4"))[0]
    answer = sample.transcribe(clip, trained, rate="4:8")
    decoded = sample.decode_all(model, [read_clip(clip, text="a")], sample.fixed_plan(["avsr"], [(4, 8)]), [None], tokenizer)
    (_, text, logprob, tokens), = decoded[("avsr", 4, 8), None]
    assert text == answer["text"] and tokens == answer["tokens"] and logprob == pytest.approx(answer["logprob"], abs=1e-3)


def test_sample_wrong_use(trained, tmp_path, capsys):
    good = sorted((trained / "samples").glob("*.mp4"))[0]
    silent, text, empty = tmp_path / "silent.mp4", tmp_path / "text.mp4", tmp_path / "folder"
    ffmpeg("-i", good, "-an", "-c:v", "copy", silent)
    text.write_text("not media")
    empty.mkdir()
    for argv, code, said in (
            (["--ckpt", tmp_path / "none"], 2, "no config.json"), (["--ckpt", trained, "--rate", "fast", good], 2, "rates 'fast'"),
            (["--ckpt", trained, "--rate", "2,4", good], 2, "read at one"), (["--ckpt", trained, "--rate", "", good], 2, "rates"), (["--ckpt", trained, "--beam", 0, good], 2, "--beam"),
            (["--ckpt", trained, text], 2, "text.mp4: not readable"), (["--ckpt", trained, text, good], 1, "text.mp4"),
            (["--ckpt", trained, good, tmp_path / "missing.mp4", good], 1, "no such file"), (["--ckpt", trained, good, "w" * 300], 1, "www"), (["--ckpt", trained, empty], 2, "folder: not a file"),
            (["--ckpt", trained, silent, "--task", "asr"], 2, "silent.mp4: the clip has video only, and task asr needs audio"), (["--ckpt", trained, silent], 0, None)):
        got, out, err = run(capsys, *argv)
        assert got == code, (argv, err)
        assert err == [] if said is None else (len(err) == 1 and said in err[0]), (argv, err)
        assert len(out) == sum(a in (good, silent) for a in argv) * (code < 2), argv


@pytest.mark.skipif(not (SHARED / "grid").is_dir(), reason="needs the real GRID clips beside the project")
def test_real_faces_are_read_where_a_box_says(trained, capsys):
    code, out, err = run(capsys, *sorted((SHARED / "grid").glob("*.mpg")), "--ckpt", trained, "--json", "--box", "132,170,96,96")
    assert code == 0 and len(out) == 8 and not err
    assert all(json.loads(line)["tokens"] == 6 + 75 + 38 for line in out)
