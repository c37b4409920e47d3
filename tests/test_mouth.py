"""python -m pytest tests/test_mouth.py: from a face to its mouth; real faces where mediapipe is installed."""
import contextlib
import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor

import imageio.v3 as imageio
import numpy as np
import pytest
from conftest import SHARED, ffmpeg

from data import ClipError
from extras.sheet import write_sheet
from real import media, mouth
from real.clips import read_clip
from real.files import CheckpointError


def source(tmp_path, size="320x240", seconds=1):
    """A clip of a test picture, without a face."""
    path = tmp_path / f"{size}.mp4"
    ffmpeg("-f", "lavfi", "-i", f"testsrc=size={size}:rate=25:duration={seconds},noise=alls=20:allf=t", path)
    return media.probe(path)


def face(x=0., y=0., scale=1., turn=0.):
    """Landmarks (P,) of the mean face, scaled, turned and moved. The lips are 8 to 20 pixels from the mouth."""
    points = np.append(mouth.MEAN_FACE, mouth.MEAN_FACE[3] + np.array([-20, 20, -8j, 8j]))
    return points * scale * np.exp(1j * turn) + complex(x, y)


# --- the geometry ---

@pytest.mark.parametrize("scale, turn", ((1, 0), (.5, .3), (3, -.5)))
def test_alignment_undoes_a_similarity(scale, turn):
    a, b = mouth.alignment(face(30, -20, scale, turn))
    assert np.allclose(a * face(30, -20, scale, turn) + b, face())


def test_crop_does_not_depend_on_the_pose():
    def picture(points):
        """A dark disc around the mouth, a third of the crop wide, on a plane that is brighter to the right."""
        a, b = mouth.alignment(points)
        y, x = np.mgrid[:768, :768] + .5
        z = a * (x + 1j * y) + b - mouth.MEAN_FACE[3]
        return np.where(abs(z) < 16, 20, 120 + np.clip(z.real, -100, 100)).astype(np.uint8)

    poses = face(200, 200), face(150, 100, 2, .2), face(300, 250, .6, -.3)
    crops = [mouth.crop_mouth(picture(points), points, 96).astype(int) for points in poses]
    assert crops[0].shape == (96, 96) and (crops[0][46:50, 46:50] == 20).all()
    assert crops[0][48, 90] > crops[0][48, 5] + 60
    assert all(np.abs(crop - crops[0]).mean() < 3 for crop in crops)
    assert mouth.crop_mouth(picture(face(200, 200)), face(200, 200), 32).shape == (32, 32)


def test_threads_that_read_one_file_find_its_face_once(tmp_path, monkeypatch):
    clip, calls = source(tmp_path), []

    def find(_):
        calls.append(1)
        time.sleep(0.1)
        return np.stack([face()] * 25)
    monkeypatch.setattr(mouth, "find_landmarks", find)
    with ThreadPoolExecutor(4) as readers:
        crops = list(readers.map(lambda _: list(mouth.mouths(clip, 32, None, tmp_path / "crops")), range(4)))
    assert len(calls) == 1 and all(np.array_equal(crops[0], other) for other in crops) and len(crops[0]) == 25


def test_a_full_disk_is_no_fault_of_the_clip(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(mouth, "find_landmarks", lambda _: np.stack([face()] * 25))
    monkeypatch.setattr(mouth, "write_whole", full)
    with pytest.raises(CheckpointError, match="crops/.*: not written: No space left on device"):
        list(mouth.mouths(source(tmp_path), 32, None, tmp_path / "crops"))


def test_smoothing_and_gaps(tmp_path, capsys):
    clip = source(tmp_path)
    assert np.allclose(mouth.smooth(np.stack([face(x) for x in range(40)]))[20], face(20.5 - 1), atol=1.1)
    assert np.allclose(mouth.smooth(np.stack([face(5)] * 3)), face(5))
    track = {t: face(t) for t in range(40) if not 10 <= t < 20}
    assert np.allclose(mouth.fill_gaps(track, 40, clip), np.stack([face(t) for t in range(40)]))
    assert "no face in frames 10-19 of 40" in capsys.readouterr().err
    points = mouth.fill_gaps({t: face(t) for t in range(60) if not 10 <= t < 40 and t != 3}, 60, clip)
    notes = capsys.readouterr().err
    assert "frames 3-3 of 60 (25 a second); filled" in notes and "frames 10-39 of 60 (25 a second); the pictures there are not used" in notes
    assert np.isnan(points[10:40]).all() and not np.isnan(points[:10]).any() and not np.isnan(points[40:]).any()
    assert np.allclose(mouth.fill_gaps({t: face(t) for t in range(20, 40)}, 40, clip)[0], face(20))      # the nearest


def test_the_largest_face_on_average(tmp_path, capsys):
    clip = source(tmp_path)
    faces = [[face(0, 0, .5), face(300, 0, 1)] if t % 2 else [face(300 + t, 0, 1), face(0, 0, .5)] for t in range(20)]
    faces[7] = [face(0, 0, .5)]
    track = mouth.largest_face(faces, clip)
    assert sorted(track) == [t for t in range(20) if t != 7] and all(points[0].real > 350 for points in track.values())
    assert "2 faces; read is the one largest on average" in capsys.readouterr().err
    with pytest.raises(ClipError, match="no face in any of its frames, 0-2"):
        mouth.largest_face([[], [], []], clip)


def test_a_face_is_followed_over_a_cut(tmp_path, capsys):
    """Both shots are read, also where they are of another size; nothing is smoothed from one into the other."""
    shots = [[face(0, 0, 1.5)]] * 40 + [[face(300, 100)]] * 30
    points = mouth.fill_gaps(mouth.largest_face(shots, source(tmp_path)), 70, None)
    assert np.allclose(mouth.smooth(points), np.stack([shot[0] for shot in shots])) and not capsys.readouterr().err


@pytest.mark.parametrize("other, n", [(face(300, 100), 5), (face(300, 100, .4), 30)])
def test_another_face_in_a_gap_is_not_followed(tmp_path, other, n):
    """A detector takes something else for a face just when it has lost the real one; a small one is a poster."""
    shots = [[face()]] * 40 + [[other]] * n + [[face()]] * 40
    track = mouth.largest_face(shots, source(tmp_path))
    assert sorted(track) == [*range(40), *range(40 + n, 80 + n)]


def test_a_single_wrong_frame_is_smoothed():
    moved = np.stack([face(40 * (t == 15)) for t in range(30)])
    assert np.abs(mouth.smooth(moved)[:, 3] - face()[3]).max() < 5


# --- files ---

@contextlib.contextmanager
def detector(source):
    """It replaces mediapipe and finds a face in the middle of every picture."""
    class Face:
        def __init__(self):
            landmark = [type("Landmark", (), {"x": 0, "y": 0}) for _ in range(400)]
            for vertices, z in zip(mouth.POINTS.values(), face(256, 256)):
                for i in vertices:
                    landmark[i] = type("Landmark", (), {"x": z.real / mouth.VIEW, "y": z.imag / mouth.VIEW})
            self.landmark = landmark

    class Mesh:
        def process(self, picture):
            assert picture.shape == (mouth.VIEW, mouth.VIEW, 3)
            return type("Result", (), {"multi_face_landmarks": [Face()]})
    yield Mesh()


def test_a_face_is_found_once_and_its_crops_are_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(mouth, "face_mesh", detector)
    clip = source(tmp_path)
    first = read_clip(clip.path, size=48, cache=tmp_path / "crops").frames
    assert first.shape == (25, 48, 48) and first.std() > 5 and len(list((tmp_path / "crops").iterdir())) == 1
    monkeypatch.setattr(mouth, "face_mesh", None)
    elsewhere = clip.path.rename(tmp_path / "elsewhere.mp4")
    assert np.array_equal(read_clip(elsewhere, size=48, cache=tmp_path / "crops").frames, first)
    replaced, old = bytearray(elsewhere.read_bytes()), os.stat(elsewhere)
    replaced[-1] ^= 1
    elsewhere.write_bytes(replaced)
    os.utime(elsewhere, ns=(old.st_atime_ns, old.st_mtime_ns))
    with pytest.raises(TypeError):          # the face is looked for again
        read_clip(elsewhere, size=48, cache=tmp_path / "crops")


def test_contact_sheet(tmp_path, monkeypatch):
    monkeypatch.setattr(mouth, "face_mesh", detector)
    clip = source(tmp_path, seconds=2)
    write_sheet(clip, tmp_path / "sheet.png")
    sheet = imageio.imread(tmp_path / "sheet.png")
    assert sheet.shape == (4 * 96, 15 * 96, 3)
    assert (sheet[48, 48] == (60, 255, 60)).all()  # a landmark
    assert not sheet[3 * 96:, 6 * 96:].any()       # 50 cells of 60
    away = np.stack([face(160, 120)] * 50)
    away[10:40] = np.nan                           # for over a second
    monkeypatch.setattr("extras.sheet.find_landmarks", lambda source: away)
    write_sheet(clip, tmp_path / "away.png")
    assert imageio.imread(tmp_path / "away.png").shape == (2 * 96, 15 * 96, 3)     # 20 cells of 30
    write_sheet(clip, tmp_path / "box.png", (0, 0, 100, 100))
    assert not (imageio.imread(tmp_path / "box.png")[48, 48] == (60, 255, 60)).all()


def test_boxes(tmp_path):
    clip = source(tmp_path)
    whole = np.stack(list(mouth.mouths(clip, 240, "all")))
    assert whole.shape == (25, 240, 240)
    cut, = {picture.shape for picture in mouth.mouths(clip, 64, (10, 20, 64, 64))}
    assert cut == (64, 64)
    with pytest.raises(ClipError, match="--box 300,0,64,64 reaches beyond its pictures of 320x240"):
        list(mouth.mouths(clip, 64, (300, 0, 64, 64)))
    assert mouth.parse_box("1,2,30,40") == (1, 2, 30, 40)


def test_small_squares_are_mouths_and_others_need_the_extra(tmp_path, monkeypatch):
    assert mouth.is_mouth(source(tmp_path, "112x112"))
    assert not mouth.is_mouth(source(tmp_path, "112x96")) and not mouth.is_mouth(source(tmp_path, "128x128"))
    monkeypatch.setitem(__import__("sys").modules, "mediapipe", None)
    advice = "pip install -r requirements-face.txt; or .* --box x,y,w,h; or .* --task asr"
    with pytest.raises(ClipError, match=advice) as error:
        read_clip(source(tmp_path).path)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not (SHARED / "grid").is_dir(), reason="needs the real GRID clips beside the project")
def test_real_faces(tmp_path, capfd):
    pytest.importorskip("mediapipe")
    for path in sorted((SHARED / "grid").glob("*.mpg")):
        clip = media.probe(path)
        points = mouth.find_landmarks(clip)
        frames = np.stack(list(mouth.crop_mouths(clip, 96, points)))
        assert frames.shape == (75, 96, 96)
        for t in range(75):
            a, _ = mouth.alignment(points[t])
            right, left, upper, lower = a * (points[t][4:] - points[t][3])
            assert 24 < left.real - right.real < 58, (path.name, t)  # in the middle half of the crop's width
            assert abs(right.real + left.real) < 12 and -20 < upper.imag < 0 < lower.imag < 24, (path.name, t)
    assert capfd.readouterr().err.strip() == ""
