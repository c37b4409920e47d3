"""python -m pytest tests/test_pictures.py: the pictures of a run are drawn, and wrong use is refused in one line."""
import json
import re
import sys

import numpy as np
import pytest
import torch

from extras import pictures, routing


@pytest.fixture(autouse=True)
def few_clips(monkeypatch):
    monkeypatch.setattr(pictures, "N_VALID", 4)


def test_the_pictures(trained, tmp_path, capsys):
    for picture in ("clip", "tokens", "routing", "agreement", "similarity"):
        assert pictures.main([picture, str(trained), "--save", str(tmp_path / "docs" / "new.png")]) == 0
        path = tmp_path / "docs" / "new.png"
        assert path.read_bytes().startswith(b"\x89PNG")
        path.unlink()
    printed = capsys.readouterr().out
    assert printed.count("mean correlation") == 3
    assert re.findall(r"rates (\d) and (\d): same moment [\d.]+ \(", printed) == [("2", "4"), ("2", "8")]


def test_agreement_is_that_of_tokens_of_one_moment():
    """Where coarse tokens are sent as their fine ones are, all agree; another moment and another layer do not."""
    fine = np.array([[[0, 1]] * 2 + [[2, 3]] * 2, [[4, 5]] * 2 + [[6, 7]] * 2])          # (2 layers, 4 tokens, K = 2)
    same, moment, layer = routing.agreement(fine[:, ::2], fine, 2)
    assert same.tolist() == [1, 1] and moment.tolist() == [0, 0] and layer.tolist() == [0, 0]
    shifted = routing.agreement(fine[:, ::2] + 1, fine, 2)
    assert shifted[0].tolist() == [0.5, 0.5]
    mean, low, high = routing.interval(np.array([0.2, 0.4, 0.6, 0.8]))
    assert mean == pytest.approx(0.5) and 0.2 <= low < 0.35 and 0.65 < high <= 0.8


def test_the_hook_sees_what_a_router_chose_and_goes(tiny):
    encoded = {"audio": (torch.randn(2, 9, 16), torch.tensor([9, 6])), "video": (torch.randn(2, 5, 16), torch.tensor([5, 3]))}
    found = routing.prefix_choices(tiny, encoded, {"audio": 4, "video": 2})
    assert {stream: [x.shape for x in clips] for stream, clips in found.items()} == {
        "audio": [(2, 3, 2), (2, 2, 2)], "video": [(2, 3, 2), (2, 2, 2)]}
    alone = routing.prefix_choices(tiny, {stream: (x[1:], lengths[1:]) for stream, (x, lengths) in encoded.items()}, {"audio": 4, "video": 2})
    assert all((found[stream][1] == alone[stream][0]).all() for stream in found)
    assert not any(layer.mome._forward_hooks for layer in tiny.llm.layers)


def test_the_shares_of_each_layer_sum_to_1(trained):
    found = pictures.routing(str(trained))
    assert list(found) == [("audio", 2), ("audio", 4), ("video", 2), ("video", 8)]
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
