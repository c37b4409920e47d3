"""From a face to the picture of its mouth that lip readers are trained on.

    landmarks (mediapipe's FaceMesh) -> the largest face -> smoothed over time -> turned, scaled and moved onto the field's mean
    face, eyes level, 256 pixels -> the 96 x 96 pixels about its mouth

which is the alignment of AV-HuBERT's and most others' data; the choice of a face and the gaps are not in the paper. Landmarks
are complex numbers x + iy here: a similarity transform is then a * z + b. mediapipe is an extra: requirements-face.txt.

Axes: T frames, P landmarks.
"""
import contextlib
import hashlib
import json
import os
import threading
from itertools import groupby
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from encoders import FPS
from media import MIN_SIZE, MOUTH_SIZE, ClipError, note, pictures, shown
from weights import write_whole

VIEW = 768                                             # pixels: the larger side of what the detector sees
MEAN_FACE = np.array([102.07 + 94.27j, 156.36 + 93.58j, 129.0 + 135.9j, 129.31 + 157.82j])  # the first P of POINTS
CROP = 96                                              # of the mean face's 256 pixels
POINTS = {                                             # FaceMesh's vertices, of which the mean is taken; the last four to be seen
    "right eye": (33, 160, 158, 133, 153, 144), "left eye": (362, 385, 387, 263, 373, 380), "nose base": (2, 97, 98, 326, 327),
    "mouth": (61, 291, 0, 17, 13, 14), "right corner": (61,), "left corner": (291,), "upper lip": (0,), "lower lip": (17,)}
SMOOTHING = 12                                         # frames
GAP = 12                                               # frames without a face that are filled from their neighbours
MAX_FACES = 4
SHEET = 75                                             # pictures on a contact sheet
QUIET = threading.Lock()


def parse_box(text):
    """'x,y,w,h' -> four whole numbers; ValueError says what is wrong."""
    try:
        x, y, w, h = map(int, text.split(","))
    except ValueError:
        raise ValueError(f"--box {text!r}: expected x,y,w,h in pixels, like 120,180,96,96") from None
    if min(x, y) < 0 or min(w, h) < MIN_SIZE:
        raise ValueError(f"--box {text!r}: x and y are 0 or more, w and h at least {MIN_SIZE}")
    return x, y, w, h


def mouths(source, size, box=None, cache=None):
    """The mouth in each frame of a media.Source, as (size, size) uint8: cut out by `box` (x, y, w, h; "all" is the whole picture), or
    the picture as it is where it is small and square, or found in the face; the last is done once and kept in the folder
    `cache`, if there is one. Raises ClipError."""
    width, height = source.picture
    if min(width, height) < MIN_SIZE:
        raise ClipError(f"{shown(source.path)}: pictures of {width}x{height} pixels; a mouth needs {MIN_SIZE}x{MIN_SIZE} or more")
    if box not in (None, "all") and (box[0] + box[2] > width or box[1] + box[3] > height):
        raise ClipError(f"{shown(source.path)}: --box {','.join(map(str, box))} reaches beyond its pictures of {width}x{height}")
    if not box and not is_mouth(source):
        yield from kept(source, size, cache) if cache else crops(source, size, find(source))
        return
    cut = f"crop={box[2]}:{box[3]}:{box[0]}:{box[1]}," if box not in (None, "all") else ""
    with pictures(source, f"{cut}scale={size}:{size}:flags=area") as decoder:
        for part in decoder.frames(size * size):
            if len(part) == size * size:
                yield np.frombuffer(part, np.uint8).reshape(size, size)


def is_mouth(source):
    """Whether its pictures are mouths as they are: small and square."""
    return source.picture[0] == source.picture[1] <= MOUTH_SIZE


# --- landmarks -------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def face_mesh(source):
    """mediapipe's detector; its libraries' talk is kept from stderr."""
    try:
        with quiet():
            from mediapipe.python.solutions.face_mesh import FaceMesh
    except ImportError:
        width, height = source.picture
        raise ClipError(f"{shown(source.path)}: finding the mouth in a picture of {width}x{height} needs mediapipe: pip install -r "
                        "requirements-face.txt; or say where it is, --box x,y,w,h; or use the sound alone, --task asr") from None
    with quiet():
        mesh = FaceMesh(max_num_faces=MAX_FACES, min_detection_confidence=0.5, min_tracking_confidence=0.5)
        mesh.process(np.zeros((64, 64, 3), np.uint8))  # so that all is loaded, and said
    with mesh:
        yield mesh


@contextlib.contextmanager
def quiet():
    """Nothing written to file descriptor 2 in this block is seen."""
    with QUIET, open(os.devnull, "w") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def view(source, pixels):
    """A Decoder of square pictures of VIEW, the source's own in their middle, and how many bytes one has."""
    fit = f"scale={VIEW}:{VIEW}:force_original_aspect_ratio=decrease,pad={VIEW}:{VIEW}:-1:-1"
    return pictures(source, fit, pixels), VIEW * VIEW * (3 if pixels == "rgb24" else 1)


def find(source):
    """Landmarks of the largest face -> (T, P) complex, in the pixels of `view`. Raises ClipError naming the frames without."""
    faces = []                                         # for each frame: (faces, P)
    decoder, n_bytes = view(source, "rgb24")
    with decoder, face_mesh(source) as mesh, tqdm(desc="finding the face", unit=" frames", leave=False, delay=2) as progress:
        for part in decoder.frames(n_bytes):
            if len(part) < n_bytes:
                break
            with contextlib.nullcontext() if any(faces) else quiet():  # it has something to say of the first face
                seen = mesh.process(np.frombuffer(part, np.uint8).reshape(VIEW, VIEW, 3)).multi_face_landmarks or []
            faces.append([[VIEW * np.mean([complex(face.landmark[i].x, face.landmark[i].y) for i in vertices])
                           for vertices in POINTS.values()] for face in seen])
            progress.update()
    if not faces:
        raise ClipError(f"{shown(source.path)}: no picture in it can be read")
    return smoothed(filled(largest(faces, source), len(faces), source))


def largest(faces, source):
    """Faces of each frame -> {frame: landmarks (P,)} of the one that is largest on average over all frames."""
    tracks = []
    for t, found in enumerate(faces):
        for face in map(np.array, found):
            near = [track for track in tracks if t not in track
                    and abs(track[max(track)][3] - face[3]) < abs(face[1] - face[0]) * 1.5]
            track = min(near, key=lambda track: abs(track[max(track)][3] - face[3])) if near else {}
            if not near:
                tracks.append(track)
            track[t] = face
    if not tracks:
        raise ClipError(f"{shown(source.path)}: no face in any of its frames, 0-{len(faces) - 1}; say where the mouth is, --box x,y,w,h, "
                        "or use the sound alone, --task asr")
    tracks.sort(key=lambda track: -sum(abs(face[1] - face[0]) for face in track.values()))
    others = [track for track in tracks[1:] if len(track) > len(faces) / 4]
    if others:
        x, y = (round(100 * part(np.mean([face[3] for face in tracks[0].values()])) / VIEW) for part in (np.real, np.imag))
        note(f"{shown(source.path)}: {1 + len(others)} faces; read is the one largest on average, its mouth {x} % from the left and {y} % from the top")
    return tracks[0]


def filled(track, n_frames, source):
    """{frame: landmarks} -> (T, P), short gaps filled from their neighbours."""
    times = np.array(sorted(track))
    gaps = [list(run) for there, run in groupby(range(n_frames), lambda t: t in track) if not there]
    named = ", ".join(f"{gap[0]}-{gap[-1]}" if len(gap) > 1 else f"{gap[0]}" for gap in gaps)
    if max(map(len, gaps), default=0) > GAP:
        raise ClipError(f"{shown(source.path)}: no face in frames {named} of {n_frames} ({FPS} a second); cut the clip, say where the mouth "
                        "is, --box x,y,w,h, or use the sound alone, --task asr")
    if gaps:
        note(f"{shown(source.path)}: no face in frames {named} of {n_frames}; they are filled from their neighbours")
    known = np.stack([track[t] for t in times])
    return np.stack([np.interp(range(n_frames), times, p.real) + 1j * np.interp(range(n_frames), times, p.imag) for p in known.T], 1)


def smoothed(points):
    """(T, P) -> (T, P), each the mean of the SMOOTHING frames about it."""
    before = SMOOTHING // 2
    padded = np.pad(points, ((before, SMOOTHING - 1 - before), (0, 0)), "edge")
    return np.lib.stride_tricks.sliding_window_view(padded, SMOOTHING, 0).mean(-1)


# --- crops -----------------------------------------------------------------------------------------------------------

def alignment(points):
    """Landmarks (P,) -> a, b of the similarity a * z + b that brings the first four closest to the mean face."""
    z, goal = points[:4], MEAN_FACE
    a = np.vdot(z - z.mean(), goal - goal.mean()) / np.vdot(z - z.mean(), z - z.mean())
    return a, goal.mean() - a * z.mean()


def crop(picture, points, size):
    """The mouth in a picture (H, W) uint8, by its landmarks (P,) -> (size, size) uint8, each pixel the mean of all that it covers."""
    a, b = alignment(points)
    step = CROP / size
    fine = min(16, int(np.ceil(step / abs(a))))        # source pixels in one of ours: so many samples
    offsets = (np.arange(size * fine) + .5) * step / fine - CROP / 2
    goal = a * points[3] + b + offsets[None] + 1j * offsets[:, None]
    at = (goal - b) / a
    scale = np.array(picture.shape[::-1])              # grid_sample's -1 and 1 are the outer edges of the picture
    grid = torch.from_numpy(np.stack([at.real, at.imag], -1) * 2 / scale - 1).float()[None]
    sampled = F.grid_sample(torch.from_numpy(picture.astype(np.float32))[None, None], grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(sampled, fine)[0, 0].round().to(torch.uint8).numpy()


def crops(source, size, points):
    """The mouths of a source by landmarks (T, P) of its frames, as (size, size) uint8."""
    decoder, n_bytes = view(source, "gray")
    with decoder:
        for part, where in zip(decoder.frames(n_bytes), points):
            if len(part) == n_bytes:
                yield crop(np.frombuffer(part, np.uint8).reshape(VIEW, VIEW), where, size)


def kept(source, size, folder):
    """The mouths (T, size, size) of a source as `folder` has them from earlier, or else puts them there."""
    stat, code = os.stat(source.path), Path(__file__).read_text("utf-8")
    key = [os.path.abspath(source.path), stat.st_size, stat.st_mtime_ns, size, code]
    path = Path(folder) / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:40]}.safetensors"
    if not path.is_file():
        frames = np.stack(list(crops(source, size, find(source))))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda temporary: save_file({"frames": frames}, temporary))
    return load_file(path)["frames"]


def write_sheet(source, path, box=None):
    """A contact sheet of up to 75 of the source's mouths, evenly in time, with their landmarks in colour, as an image at `path`."""
    points = None if box or is_mouth(source) else find(source)
    cells = []
    for t, picture in enumerate(mouths(source, CROP, box) if points is None else crops(source, CROP, points)):
        cell = np.repeat(picture[..., None], 3, -1)
        if points is not None:
            a, b = alignment(points[t])
            for z in a * (points[t] - points[t][3]) + (CROP - 1) / 2 * (1 + 1j):
                x, y = round(z.real), round(z.imag)
                if 1 <= min(x, y) and max(x, y) < CROP - 1:
                    cell[y - 1:y + 2, x - 1:x + 2] = 60, 255, 60
        cells.append(cell)
    if not cells:
        raise ClipError(f"{shown(source.path)}: no picture in it can be read")
    cells = [cells[t] for t in np.linspace(0, len(cells) - 1, min(SHEET, len(cells))).round().astype(int)]
    columns = min(15, len(cells))
    cells += [np.zeros_like(cells[0])] * (-len(cells) % columns)
    sheet = np.concatenate([np.concatenate(cells[i:i + columns], 1) for i in range(0, len(cells), columns)])
    write_whole(path, lambda temporary: imageio.imwrite(temporary, sheet, extension=".png"))
