"""python -m pytest tests/test_experiments.py: the lists of runs, results.csv, and the tables that are made from it."""
import json
import re
import signal
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from matplotlib.figure import Figure

import train
from extras import experiments, own_decoder, plot
from extras.experiments import LISTS, ROOT, Trial
from real.options import parse_options

PLACES = {"runs": "runs", "shared": "shared", "llm": "llm", "whisper": "whisper"}


def metrics_of(trial, seed, wer=0.1):
    """What train.py would write for a trial, with one WER everywhere."""
    argv = experiments.command(trial, seed, PLACES)[2:]
    config = parse_options(train.TrainConfig, argv, "", "", train.PRESETS, lambda config: None)
    rows = [{"task": "avsr", "audio_rate": 2, "video_rate": 2, "snr_db": snr, "wer": wer, "words": 30, "tokens": 50.} for snr in (None, -5.)]
    auto = [{"task": "avsr", "audio_rate": "auto", "video_rate": None, "snr_db": None, "wer": wer, "words": 30, "tokens": 40.}]
    return {"rows": rows, "auto": auto, "seconds": {"clips": 1., "stage 3": 61.}, "config": vars(config)}


def test_every_listed_run_is_a_command_that_train_takes():
    """All flags parse. No two runs have one folder, but for a model that is tested again, and none have one key."""
    names, keys, n_again = set(), set(), 0
    for trial in (trial for trials in LISTS.values() for trial in trials):
        n_again += bool(trial.again)
        argv = experiments.command(trial, 0, PLACES)
        config = parse_options(train.TrainConfig, argv[2:], "", "", train.PRESETS, train.check_config)
        assert argv[:2] == ["python", "train.py"] and config.rates == trial.rates and config.method == trial.method
        names.add(config.out)
        keys.add(experiments.key_of(trial, 0))
    assert len(names) + n_again == len(keys) == sum(map(len, LISTS.values()))


def test_runs_are_done_once_and_go_on_where_they_stopped(tmp_path, monkeypatch, capsys):
    """A run whose rows are in results.csv is not done again; one that fails leaves no row."""
    argv, commands = ["two", "--results", str(tmp_path / "results.csv")], []
    trials = [Trial("mome", "2", seeds=(0, 1)), Trial("lora", "2", "rank 3", "--rank 3", seeds=(0,))]
    monkeypatch.setattr(experiments, "LISTS", {"two": trials})

    def results():
        return experiments.read_results(tmp_path / "results.csv")

    def run(command, **_):
        commands.append(command)
        method, seed = command[command.index("--method") + 1], int(command[command.index("--seed") + 1])
        if len(commands) == 2:
            return SimpleNamespace(returncode=2)
        out = tmp_path / command[-1]
        out.mkdir(parents=True)
        (out / "metrics.json").write_text(json.dumps(metrics_of(Trial(method, "2"), seed)))
        (out / "config.json").write_text(json.dumps({"parameters": {"adapter": 9, "active": 5}}))
        (out / "log.csv").write_text("step,seconds\n0,1.5\n10,91.0\n")         # 30 s of an earlier process
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    assert experiments.main(argv) == 2 and len(results()) == 3
    assert experiments.main(argv) == 0 and len(commands) == 4 and len(results()) == 9
    assert experiments.main(argv) == 0 and len(commands) == 4
    row = results()[1]
    assert row["wer"] == "0.10000" and row["snr_db"] == "-5" and row["rates"] == "2:2" and row["seconds"] == "92"
    assert row["trained_params"] == "9" and row["active_params"] == "5" and float(row["flops"]) > 1e8
    assert experiments.main(["--list", *argv[1:]]) == 0
    assert "2 of 2 seeds    2 min  python train.py --rates 2 --method mome --seed 0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        experiments.main(["three"])


def test_ctrl_c_leaves_train_py_the_time_to_write_its_state(tmp_path, monkeypatch, capsys):
    def run(command, **_):
        signal.raise_signal(signal.SIGINT)
        return SimpleNamespace(returncode=130)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(experiments, "LISTS", {"one": [Trial("mome", "2", seeds=(0,))]})
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    assert experiments.main(["one", "--results", "results.csv"]) == 130
    assert "ended with 130; the same call goes on from here" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(SystemExit, match="2"):
        experiments.main(["one", "--results", "results.csv", "--seeds", "5"])


@pytest.mark.parametrize("method", ["mome-places", "lora-mss", "mome-routers"])
def test_the_flops_of_every_kind_of_model_are_counted(method):
    config = parse_options(train.TrainConfig, ["--rates", "2,4", "--method", method], "", "", train.PRESETS, train.check_config)
    fine, coarse = (experiments.flops_at(config, (("audio", rate), ("video", rate))) for rate in (2, 4))
    assert fine > coarse > 1e8


def test_the_flops_of_adapters_are_counted():
    counted = {}
    for method in ("projectors", "lora", "lora-mss"):
        config = parse_options(train.TrainConfig, ["--rates", "2,4", "--method", method], "", "", train.PRESETS, train.check_config)
        counted[method] = experiments.flops_at(config, (("audio", 2), ("video", 2)))
    assert counted["projectors"] < counted["lora"] < counted["lora-mss"]


def test_names_that_no_run_has_are_refused(tmp_path, capsys):
    for flags in (["--seeds", "0,7"], ["--methods", "mome,lroa"]):
        with pytest.raises(SystemExit, match="2"):
            experiments.main(["main", "--results", str(tmp_path / "results.csv"), *flags])
        assert f"no run of main has {flags[1].split(',')[1]}" in capsys.readouterr().err


def test_only_the_seeds_and_methods_that_are_named_are_run(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(experiments, "LISTS", {"two": [Trial("mome", "2"), Trial("lora", "2")]})
    monkeypatch.setattr(subprocess, "run", lambda command: commands.append(command) or SimpleNamespace(returncode=0))
    monkeypatch.setattr(experiments, "rows_of_run", lambda *_: [])
    assert experiments.main(["two", "--seeds", "1,2", "--methods", "lora", "--results", str(tmp_path / "results.csv")]) == 0
    assert [[command[command.index(flag) + 1] for flag in ("--method", "--seed")] for command in commands] == [["lora", "1"], ["lora", "2"]]


def test_rows_of_what_is_still_being_chosen_are_of_the_last_point_of_the_curve(tmp_path):
    trial = Trial("mome", "2", flags="--valid-every 1", split="valid")
    points = [{"step": step, "rows": metrics_of(trial, 0, wer)["rows"]} for step, wer in ((1, .3), (2, .2))]
    files = {"metrics": metrics_of(trial, 0), "config": {"parameters": {"adapter": 9, "active": 5}}, "curve": points}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "log.csv").write_text("step,seconds\n0,1.5\n")
    assert [(row["wer"], row["split"]) for row in experiments.rows_of_run(trial, 0, tmp_path)] == [("0.20000", "valid")] * 2


def test_links_of_the_open_list_follow_shared(tmp_path, capsys):
    for shared in ("a", "b"):
        for folder in ("librispeech/train", "librispeech/test", "speechocean/train"):
            (tmp_path / shared / folder).mkdir(parents=True)
        experiments.link_open(tmp_path / shared, tmp_path / "open")
        for link, folder in (("train/speechocean", "speechocean/train"), ("test/librispeech", "librispeech/test")):
            assert (tmp_path / "open" / link).resolve() == tmp_path / shared / folder
    assert experiments.main(["open", "--shared", str(tmp_path / "none"), "--runs", str(tmp_path), "--results", str(tmp_path / "r")]) == 2
    assert "name the folder of the corpora by --shared" in capsys.readouterr().err


def test_tables_are_means_over_seeds():
    rows = [dict.fromkeys(experiments.COLUMNS, "") | {
        "method": "mome", "data": "synthetic", "train_rates": "2,4", "rates": rates, "task": "asr", "snr_db": "clean", "seed": seed, "wer": wer}
        for rates, wers in (("2", ("0.01", "0.02", "0.03")), ("4", ("0.5",))) for seed, wer in enumerate(wers)]
    assert plot.cell(rows, "asr", "2,4,8") == "2.0 ± 0.6 / 50.0 / –"
    assert plot.cell(rows, "asr", "2,4", errors=False) == "2.0 / 50.0"
    text = plot.by_condition(rows, "2,4", {"MoME": ("mome", ""), "LoRA": ("lora", "")}, {"sound": ("asr", "clean")})
    assert text.splitlines()[2] == "| sound | 2.0 ± 0.6 / 50.0 |"
    page = "before\n<!-- results: main -->\nold\n<!-- end -->\nafter\n"
    assert plot.updated(page, {"main": "new\n"}) == page.replace("old", "new")


def test_tables_keep_the_seeds_that_all_columns_have():
    def row(method, seed, train_rates="2,4"):
        return {"method": method, "seed": seed, "train_rates": train_rates}
    found = plot.of_common_seeds({"a": [row("a", "0"), row("a", "1")], "b": [row("b", "1"), row("b", "2")], "none": []})
    assert found == {"a": [row("a", "1")], "b": [row("b", "1")]}


def test_differences_are_taken_seed_by_seed():
    def row(method, train_rates, seed, wer, rates="2"):
        return {"method": method, "variant": "", "train_rates": train_rates, "seed": seed, "task": "vsr", "snr_db": "clean",
                "rates": rates, "wer": str(wer)}
    rows = [row("mome", "2", "0", .2), row("mome", "2", "1", .9), row("mome", "2", "2", .5), row("lora", "2", "0", .1), row("lora", "2", "1", .6)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "CONDITIONS", {"lips": ("vsr", "clean")})
        assert plot.paired(rows, "2").splitlines()[-1] == "| lips | +20.0 ± 10.0 |"


def test_models_for_one_pair_of_rates_are_compared_over_the_seeds_that_all_have():
    def rows_of(train_rates, seed, *wers):
        rates = train_rates.split(":")[0] if ":" in train_rates else "4"
        return [{"method": "lora", "variant": "", "train_rates": train_rates, "seed": seed, "task": task, "snr_db": snr,
                 "rates": rates, "wer": str(wer)} for wer, (task, snr) in zip(wers, (("vsr", "clean"), ("asr", "clean"), ("asr", "0")))]
    rows = [*rows_of("2,4,8", "0", .1, .2, .3), *rows_of("2,4,8", "1", .2, .2, .3), *rows_of("2,4,8", "2", .9, .9, .9)]
    rows += [row | {"rates": rates} for row in list(rows) for rates in ("2", "8")]
    for pair in ("2:2", "4:4", "8:8"):
        rows += rows_of(pair, "0", .3, .2, .4) + rows_of(pair, "1", .4, .4, .4)
    rows += rows_of("2:2", "2", .1, .1, .1)                                    # seed 2 lacks 4:4 and 8:8
    assert [line.split(" | ")[1] for line in plot.one_or_each(rows).splitlines()[2:]] == [
        "20.0 (20.0 to 20.0) |", "10.0 (10.0 to 10.0) |", "10.0 (10.0 to 10.0) |"]


def test_the_pages_have_the_numbers_of_results_csv(capsys):
    """A number in a table of README or docs/ that is not in results.csv fails here."""
    assert plot.main(["--check"]) == 0, capsys.readouterr().out
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert {str(page.relative_to(ROOT)) for page in pages if "<!-- results: " in page.read_text("utf-8")} == set(plot.PAGES)


def test_every_percentage_of_the_readme_has_a_source():
    """Outside of the marked tables it is the paper's, or it stands in docs/results.md. A new one must be named here."""
    readme, results = (ROOT.joinpath(page).read_text("utf-8") for page in ("README.md", "docs/results.md"))
    prose = "\n".join(line for line in plot.MARKED.sub("", readme).splitlines() if not line.startswith("    "))
    sound = results.split("sound: % of a coarse token's experts")[1]
    same, layer = re.search(r"rates 2 and 8: same moment ([\d.]+) .*; another layer ([\d.]+) ", sound).groups()
    other_cpu = re.search(r"MoME and LoRA differ by up to ([\d.]+) points", results)[1]
    of_paper = "2.9"
    sources = {other_cpu, of_paper, f"{float(same):.0f}", f"{float(layer):.0f}"}
    assert set(re.findall(r"(\d+(?:\.\d+)?) (?:%|points)", prose)) == sources
    assert f"shares {float(same):.0f} %" in prose and f"Chance is {float(layer):.0f} %" in prose
    assert f"CPUs differ by up to {other_cpu} points" in prose and "1.8, 1.7, 2.9, 2.9 % WER" in prose
    correlations = re.findall(r"mean correlation .* between (?:rates|sound and lips) .*: (0\.\d\d)", results)
    assert len(correlations) == 2 and all(f" {value}" in prose for value in correlations)


def test_a_page_that_is_not_current_is_named_and_written_anew(tmp_path, monkeypatch, capsys):
    page, text = tmp_path / "page.md", "a\n<!-- results: main -->\n{}\n<!-- end -->\nb\n"
    page.write_text(text.format("old"))
    (tmp_path / "docs").mkdir()
    for name, value in (("ROOT", tmp_path), ("PAGES", ("page.md",)), ("tables", lambda rows: {"main": "new\n"}),
                        ("tokens_picture", lambda *_: None)):
        monkeypatch.setattr(plot, name, value)
    assert plot.main(["--check"]) == 1 and "page.md: not current" in capsys.readouterr().out and page.read_text() == text.format("old")
    assert plot.main([]) == 0 and page.read_text() == text.format("new") and (tmp_path / "docs/tokens.png").is_file()
    assert plot.main(["--check"]) == 0


def test_the_picture_of_tokens(tmp_path):
    figure = Figure()
    rows = [dict.fromkeys(experiments.COLUMNS, "") | {
        "method": "mome", "data": "synthetic", "train_rates": "2,4,8", "rates": rates, "task": "avsr", "snr_db": snr, "seed": seed,
        "wer": wer * noise, "tokens": tokens, "split": "test"}
        for rates, tokens, wer in (("2:2", "100", .2), ("4:4", "50", .1), ("auto", "60", .3))
        for snr, noise in (("clean", 1), ("-5", 2)) for seed in "01"]
    plot.tokens_picture(figure, rows)
    for panel, noise in zip(figure.axes, (1, 2)):
        (line, *_), = panel.containers
        assert line.get_xdata().tolist() == [50, 100] and line.get_ydata().tolist() == [10 * noise, 20 * noise]


def test_whispers_own_decoder_is_measured_on_the_test_split(tmp_path, monkeypatch, capsys):
    """Its texts are normalised like all others. The decoder itself is transformers'."""
    for split, name, text in (("train", "a", "one"), ("test", "b", "seven eight"), ("test", "c", "nine")):
        folder = tmp_path / "clips" / split
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"{name}.wav", 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
        (folder / f"{name}.txt").write_text(text)
    monkeypatch.setattr(own_decoder, "RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(own_decoder, "transcribe_all", lambda folder, clips: [" Seven, eight." for _ in clips])
    assert own_decoder.main(["whisper-base", str(tmp_path / "clips"), "--results", "numbers"]) == 0
    assert "66.7 % WER of 3 words in 2 of 2 clips" in capsys.readouterr().out
    row, = experiments.read_results(tmp_path / "results.csv")
    assert (row["method"], row["data"], row["wer"], row["words"]) == ("whisper-base", "numbers", "0.66667", "3")
    for path in (tmp_path / "clips/test").glob("*.wav"):
        path.write_bytes(b"no sound")
    for folder, said in (("nowhere", "nowhere"), ("clips", "none of its")):
        assert own_decoder.main(["whisper-base", str(tmp_path / folder)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert said in error


def test_the_sentence_below_the_table_of_readme():
    """Ratios of summed errors, over the seeds that all three methods have; -5 dB of sound alone and `auto` do not count."""
    def row(method, seed, wer, **other):
        return {"method": method, "variant": "", "train_rates": "2,4,8", "seed": seed, "task": "vsr", "snr_db": "clean",
                "rates": "2", "wer": str(wer), "words": "100"} | other

    rows = [row("mome", "0", .1), row("lora", "0", .05), row("projectors", "0", .4), row("mome", "1", .9), row("lora", "1", .9)]
    rows += [row("lora", "0", .9, **other) for other in ({"task": "asr"}, {"snr_db": "0"}, {"rates": "auto"}, {"variant": "x"})]
    text = plot.summary(rows)
    assert "mean of 1 seed;" in text and "LoRA makes 0.50 times" in text and "alone 4.0 times" in text
    rows.append(row("projectors", "1", 1.6))
    assert "mean of 2 seeds;" in plot.summary(rows) and "alone 2.0 times" in plot.summary(rows)
    assert plot.summary(rows[:2]) == "*Not run yet.*\n"
