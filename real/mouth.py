"""From pictures of a face to pictures of its mouth, cropped as lip readers are trained on them.

    landmarks (mediapipe's FaceMesh) -> the largest face -> smoothed over time -> turned, scaled and moved onto a mean
    face of 256 pixels, with its eyes level -> the 96 x 96 pixels around its mouth

AV-HuBERT's data and most others' are aligned like this. Choosing a face and filling gaps are not in the paper.
Landmarks are complex numbers x + iy, so that a similarity transform is a * z + b. mediapipe is optional: see
requirements-face.txt.

Axes: T frames, P landmarks.
"""
import math
import os
import sys
import threading
from collections import defaultdict
from contextlib import closing, contextmanager, nullcontext, redirect_stderr
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save
from tqdm import tqdm

from encoders import FPS
from real.files import CheckpointError, digest, note, read_stored, shown, write_whole
from real.media import clip_error, picture_frames
from real.weights import fingerprint

VERSION = 4       # raise it when the same file gives other crops than before: stored crops are then not used
MOUTH_SIZE = 112  # pixels: a square picture of at most this size shows nothing but a mouth
MIN_SIZE = 16     # pixels: a smaller picture cannot show a mouth
VIEW = 768        # pixels: faces are looked for in squares of this size, with the source's picture in the middle
FIT = f"scale={VIEW}:{VIEW}:force_original_aspect_ratio=decrease,pad={VIEW}:{VIEW}:-1:-1"
CROP = 96         # pixels of the mean face's 256
SMOOTHING = 12    # frames
MAX_GAP = FPS     # frames: a gap without a face that is longer is not filled
MAX_FACES = 4
MEAN_FACE = np.array([102.07 + 94.27j, 156.36 + 93.58j, 129.0 + 135.9j, 129.31 + 157.82j])  # the first four of POINTS
POINTS = {        # a landmark is the mean of these vertices of FaceMesh; the last four are for pictures and tests
    "right eye": (33, 160, 158, 133, 153, 144), "left eye": (362, 385, 387, 263, 373, 380),
    "nose base": (2, 97, 98, 326, 327), "mouth": (61, 291, 0, 17, 13, 14),
    "right corner": (61,), "left corner": (291,), "upper lip": (0,), "lower lip": (17,)}
HINT = "say where the mouth is, --box x,y,w,h; or use the sound alone, train.py: --tasks asr, sample.py: --task asr"
STDERR = threading.Lock()
FILLING = defaultdict(threading.Lock)   # one for each file of the cache


def parse_box(text):
    """'x,y,w,h' -> four whole numbers. Raises ValueError."""
    try:
        x, y, w, h = map(int, text.split(","))
    except ValueError:
        raise ValueError(f"--box {text!r}: expected x,y,w,h in pixels, like 120,180,96,96") from None
    if min(x, y) < 0 or min(w, h) < MIN_SIZE:
        raise ValueError(f"--box {text!r}: x and y are 0 or more, w and h at least {MIN_SIZE}")
    return x, y, w, h


def mouths(source, size, box=None, cache=None):
    """Yield the mouth in each frame of a media.Source, as (size, size) uint8, None where no face is. Raises ClipError.

    The mouth is what `box` (x, y, w, h) cuts out, or with "all" the whole picture. Without a box it is the whole
    picture if that is a small square, otherwise it is found in the largest face. Crops of faces are stored in the
    folder `cache` (None: nowhere)."""
    width, height = source.picture_size
    if min(width, height) < MIN_SIZE:
        raise clip_error(source.path, f"pictures of {width}x{height} pixels; "
                                      f"a mouth needs {MIN_SIZE}x{MIN_SIZE} or more")
    if not box and not is_mouth(source):
        yield from cached_crops(source, size, cache) if cache else crop_mouths(source, size, find_landmarks(source))
        return
    scale = f"scale={size}:{size}:flags=area"
    if box and box != "all":
        x, y, w, h = box
        if x + w > width or y + h > height:
            raise clip_error(source.path, f"--box {x},{y},{w},{h} reaches beyond its pictures of {width}x{height}")
        scale = f"crop={w}:{h}:{x}:{y}:exact=1,{scale}"
    yield from picture_frames(source, scale, (size, size))


def is_mouth(source):
    """Whether the source's pictures are small squares, which show nothing but a mouth."""
    return source.picture_size[0] == source.picture_size[1] <= MOUTH_SIZE


# --- landmarks -------------------------------------------------------------------------------------------------------

@contextmanager
def quiet():
    """Discard what is written to file descriptor 2 in this block: mediapipe's C++ code writes messages there.

    Other threads write to sys.stderr meanwhile, and that still goes to the terminal."""
    with (STDERR, open(os.devnull, "w") as devnull, os.fdopen(os.dup(2), "w", buffering=1) as terminal,
          redirect_stderr(terminal) if sys.stderr is sys.__stderr__ else nullcontext()):
        os.dup2(devnull.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal.fileno(), 2)


@contextmanager
def face_mesh(source):
    """mediapipe's detector, in a with-block. Raises ClipError if mediapipe is not installed."""
    with quiet():
        try:
            from mediapipe.python.solutions.face_mesh import FaceMesh
        except ImportError:
            size = "{}x{}".format(*source.picture_size)
            raise clip_error(source.path, f"finding the mouth in a picture of {size} needs mediapipe: "
                                          f"pip install -r requirements-face.txt; or {HINT}") from None
        mesh = FaceMesh(max_num_faces=MAX_FACES, min_detection_confidence=0.5, min_tracking_confidence=0.5)
        mesh.process(np.zeros((64, 64, 3), np.uint8))  # the first picture makes it load its models and print messages
    with mesh:
        yield mesh


def find_landmarks(source):
    """Landmarks of a source's largest face -> (T, P) complex, in pixels of VIEW, NaN in long gaps. Raises ClipError."""
    faces = []  # for each frame the faces in it, each a list of P landmarks
    with closing(picture_frames(source, FIT, (VIEW, VIEW, 3))) as pictures, face_mesh(source) as mesh, \
            tqdm(desc="finding the face", unit=" frames", leave=False, delay=2) as progress:
        for picture in pictures:
            with nullcontext() if any(faces) else quiet():  # mediapipe prints a message at the first face
                meshes = mesh.process(picture).multi_face_landmarks or []
            faces.append([[VIEW * np.mean([complex(face.landmark[i].x, face.landmark[i].y) for i in vertices])
                           for vertices in POINTS.values()] for face in meshes])
            progress.update()
    if not faces:
        raise clip_error(source.path, "no picture in it can be read")
    return smooth(fill_gaps(largest_face(faces, source), len(faces), source))


def largest_face(faces, source):
    """The faces (P,) of each frame -> {frame: landmarks} of the face that is largest on average over all frames.

    A face continues the nearest track if its mouth has moved by less than 1.5 eye distances. Another track
    continues it too if the two are never seen together, and if it lasts a second and is over half as large.
    Raises ClipError."""
    tracks = []
    for t, detected in enumerate(faces):
        for face in map(np.array, detected):
            moves = [(abs(track[next(reversed(track))][3] - face[3]), i) for i, track in enumerate(tracks) if t not in track]
            move, nearest = min(moves, default=(math.inf, None))
            if move < 1.5 * abs(face[1] - face[0]):  # the distance of the eyes
                tracks[nearest][t] = face
            else:
                tracks.append({t: face})
    if not tracks:
        raise clip_error(source.path, f"no face in any of its frames, 0-{len(faces) - 1}; {HINT}")
    sizes = [np.array([abs(face[1] - face[0]) for face in track.values()]) for track in tracks]
    order = sorted(range(len(tracks)), key=lambda i: -sizes[i].sum())
    chosen, n_others = dict(tracks[order[0]]), 0
    for i in order[1:]:
        together = chosen.keys() & tracks[i].keys()
        n_others += bool(together) and len(tracks[i]) > len(faces) / 4
        if not together and len(tracks[i]) >= FPS and sizes[i].mean() > sizes[order[0]].mean() / 2:
            chosen |= tracks[i]    # the face has moved unseen, or the film is cut
    if n_others:
        place = 100 / VIEW * np.mean([face[3] for face in chosen.values()])
        note(f"{shown(source.path)}: {1 + n_others} faces; read is the one largest on average, its mouth "
             f"{place.real:.0f} % from the left and {place.imag:.0f} % from the top")
    return chosen


def fill_gaps(track, n_frames, source):
    """{frame: landmarks (P,)} -> (T, P). Gaps of up to MAX_GAP frames are interpolated, and ends filled with what is
    nearest, with a note. Longer gaps are NaN."""
    times = sorted(track)
    points = np.stack([np.interp(range(n_frames), times, point) for point in np.stack([track[t] for t in times]).T], 1)
    for present, run in groupby(range(n_frames), track.__contains__):
        if not present:
            gap, fate = list(run), "filled from their neighbours"
            if len(gap) > MAX_GAP:
                points[gap], fate = np.nan, "the pictures there are not used"
            note(f"{shown(source.path)}: no face in frames {gap[0]}-{gap[-1]} of {n_frames} ({FPS} a second); {fate}")
    return points


def smooth(points):
    """(T, P) -> (T, P): each frame becomes the mean of the SMOOTHING frames around it, but not over a cut.

    At a cut the mouth jumps by more than half an eye distance, and by less for SMOOTHING frames before and after."""
    before, parts = SMOOTHING // 2, []
    jumps = np.flatnonzero(np.abs(np.diff(points[:, 3])) > 0.5 * np.abs(points[1:, 1] - points[1:, 0])) + 1
    cuts = [at for at in jumps if not any(0 < abs(at - other) <= SMOOTHING for other in jumps)]
    for part in np.split(points, cuts):
        padded = np.pad(part, ((before, SMOOTHING - 1 - before), (0, 0)), "edge")
        parts.append(np.lib.stride_tricks.sliding_window_view(padded, SMOOTHING, 0).mean(-1))
    return np.concatenate(parts)


# --- crops -----------------------------------------------------------------------------------------------------------

def alignment(points):
    """Landmarks (P,) -> a, b, so that a * z + b brings the first four closest to the mean face (least squares)."""
    z, goal = points[:4], MEAN_FACE
    a = np.vdot(z - z.mean(), goal - goal.mean()) / np.vdot(z - z.mean(), z - z.mean())
    return a, goal.mean() - a * z.mean()


def crop_mouth(picture, points, size):
    """A picture (H, W) uint8 and its landmarks (P,) -> the mouth (size, size) uint8.

    A pixel of the crop is the mean of samples that are at most one pixel of the picture apart."""
    a, _ = alignment(points)
    step = CROP / size                           # pixels of the mean face in one pixel of the crop
    n = min(16, int(np.ceil(step / abs(a))))     # n x n samples for one pixel of the crop
    offsets = (np.arange(size * n) + .5) * step / n - CROP / 2
    z = points[3] + (offsets[None] + 1j * offsets[:, None]) / a  # (n size, n size): where the samples are
    scale = np.array(picture.shape[::-1])        # for grid_sample the outer edges of the picture are at -1 and 1
    grid = torch.from_numpy(np.stack([z.real, z.imag], -1) * 2 / scale - 1).float()[None]
    pixels = torch.from_numpy(picture.astype(np.float32))[None, None]
    samples = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(samples, n)[0, 0].round().to(torch.uint8).numpy()


def crop_mouths(source, size, points):
    """Yield a source's mouths (size, size) uint8, by the landmarks (T, P) of its frames; None where these are NaN."""
    with closing(picture_frames(source, FIT, (VIEW, VIEW))) as pictures:
        for picture, landmarks in zip(pictures, points):
            yield None if np.isnan(landmarks).any() else crop_mouth(picture, landmarks, size)


def cached_crops(source, size, folder):
    """The mouths of a source's largest face, T times (size, size) or None. They are kept in `folder`."""
    key = [VERSION, fingerprint(source.path, whole=True), size, source.picture_track]
    path = Path(folder) / f"{digest(key)}.safetensors"
    with FILLING[path]:                         # pieces of one file are read side by side; one thread finds the face
        if not path.is_file():
            crops = list(crop_mouths(source, size, find_landmarks(source)))
            found = np.array([crop is not None for crop in crops])
            frames = np.stack([crop if crop is not None else np.zeros((size, size), np.uint8) for crop in crops])
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, lambda temporary: temporary.write_bytes(save({"frames": frames, "found": found})))
            except OSError as error:            # of the cache, not of the clip
                raise CheckpointError(f"{path}: not written: {error.strerror}") from None
    stored = read_stored(path, load_file)
    return [frame if found else None for frame, found in zip(stored["frames"], stored["found"])]
