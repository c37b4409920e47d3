"""python -m pytest tests/test_pictures.py: the pictures of a run are drawn, and wrong use is refused in one line."""
import json
import sys

import numpy as np
import pytest

from extras import pictures


def test_the_three_pictures(trained, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for picture in ("clip", "tokens", "routing"):
        assert pictures.main([picture, str(trained), "--save", str(tmp_path / "docs" / "new.png")]) == 0
        path = tmp_path / "docs" / "new.png"
        assert path.read_bytes().startswith(b"\x89PNG")
        path.unlink()
    assert capsys.readouterr().out.count("mean correlation") == 2


def test_the_shares_of_each_layer_sum_to_1(trained):
    found = pictures.routing(str(trained))
    assert list(found) == ["2:2", "4:8"]
    for shares in found.values():
        assert shares.shape == (4, 8) and np.allclose(shares.sum(1), 1)


def test_seeds_of_one_method_are_one_line(tmp_path):
    for seed, wer in enumerate((0.1, 0.3)):
        (tmp_path / str(seed)).mkdir()
        rows = [{"task": "avsr", "audio_rate": 4, "video_rate": 2, "snr_db": snr, "wer": wer, "tokens": 50.0}
                for snr in (None, 0.0, -5.0)]
        document = {"config": {"method": "mome", "seed": seed}, "rows": rows}
        (tmp_path / str(seed) / "metrics.json").write_text(json.dumps(document))
    found = pictures.curves([tmp_path / "0", tmp_path / "1"])
    assert list(found) == [None, -5.0]
    (tokens, *wers, rates), = found[None]["mome"]
    assert tokens == 50 and rates == "4:2" and wers == pytest.approx([20, 10, 30])


def test_wrong_use_is_one_line(trained, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    save = ["--save", str(tmp_path / "new.png")]
    no_clip = ["clip", str(trained), "--clip", str(tmp_path / "none.mp4")]
    (tmp_path / "metrics.json").write_text('{"config": {"method": "mome"}, "rows": []}')
    for argv in (["clip", str(tmp_path)], ["routing", str(tmp_path)], ["tokens", str(tmp_path)], no_clip):
        assert pictures.main(argv + save) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert pictures.main(["clip", str(trained), *save]) == 2
    assert "pip install -r extras/requirements.txt" in capsys.readouterr().err
    assert not (tmp_path / "new.png").exists()
