"""python -m pytest tests/test_extras.py: the benchmark runs and reports all its sections (never how long it takes)."""
import json

import pytest

from extras import bench, curve


def test_rows_of_the_benchmark(capsys, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"seconds": {"clips": 1.5, "stage 3": 2.0}}))
    argv = ["--quick", "--pairs", "1", "--json", "--sections", "layer,memory,paper,main", "--out", str(tmp_path)]
    assert bench.main(argv) == 0
    document = json.loads(capsys.readouterr().out)
    sections = {row["section"] for row in document["rows"]}
    assert sections == {"layer", "memory", "paper", "main job"} and "torch" in document["machine"]
    for row in document["rows"]:
        if row["section"] == "layer" and "missing" not in row:
            assert row["ratio"] == pytest.approx(row["first_seconds"] / row["second_seconds"])
    seconds, = (row["seconds"] for row in document["rows"] if row["section"] == "main job")
    assert seconds == {"clips": 1.5, "stage 3": 2.0}
    memory, = (row for row in document["rows"] if row["section"] == "memory")
    steps = [row for row in document["rows"] if row["section"] == "paper"]
    assert [row["what"] for row in steps] == ["stand-ins, 1 x 2 s", "stand-ins, 1 x 2 s, recomputed"]
    assert all(row["clips_per_second"] == pytest.approx(1 / row["step_seconds"]) and row["tflops"] > 0 for row in steps)
    assert "missing" in memory or memory["first_bytes"] > 2 * memory["second_bytes"] > 0


def test_a_missing_run_is_said_and_wrong_sections_are_refused(capsys, tmp_path):
    assert bench.main(["--sections", "main", "--out", str(tmp_path)]) == 0
    assert "no " + str(tmp_path / "metrics.json") in capsys.readouterr().out
    assert bench.main(["--sections", "paper", "--device", "cpu"]) == 0
    assert "needs a GPU of 24 GiB" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--sections", "layers"])
    assert "--sections are some of layer," in capsys.readouterr().err


def test_the_picture(tmp_path):
    assert bench.main(["--quick", "--pairs", "1", "--plot", str(tmp_path / "paths.png")]) == 0
    assert (tmp_path / "paths.png").read_bytes().startswith(b"\x89PNG")


def test_the_learning_curve(tmp_path, capsys):
    rows = [{"task": "avsr", "audio_rate": 4, "video_rate": 2, "wer": 0.5},
            {"task": "asr", "audio_rate": 4, "video_rate": None, "wer": 0.0}]
    (tmp_path / "curve.json").write_text(json.dumps([{"step": step, "loss": 1.0, "rows": rows} for step in (10, 20)]))
    assert curve.series(json.loads((tmp_path / "curve.json").read_text())) == {
        "avsr, rate 4:2": ([10, 20], [50.0, 50.0]), "asr, rate 4": ([10, 20], [0.0, 0.0])}
    assert curve.main([]) == 2 and curve.main([str(tmp_path / "curve.png"), str(tmp_path / "none.json")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert curve.main([str(tmp_path / "curve.png"), str(tmp_path / "curve.json")]) == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
