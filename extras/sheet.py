"""A contact sheet of the mouths that are read from a clip, to see whether they are found and cut out well.

    python sample.py CLIP --show-crop mouths.png
"""
import imageio.v3 as imageio
import numpy as np

from real.files import write_whole
from real.media import clip_error, select_streams
from real.mouth import CROP, alignment, crop_mouths, find_landmarks, is_mouth, mouths

MAX_PICTURES = 75
COLUMNS = 15
GREEN = 60, 255, 60


def write_sheet(source, path, box=None):
    """Write up to 75 mouths of a media.Source, evenly in time, as an image. Landmarks are green dots. Raises ClipError.

    `box`: see mouth.mouths."""
    source = select_streams(source, ("video",))
    if box or is_mouth(source):
        cells = [np.repeat(picture[..., None], 3, -1) for picture in mouths(source, CROP, box)]
    else:
        points = find_landmarks(source)
        crops = zip(crop_mouths(source, CROP, points), points)
        cells = [marked(crop, face) for crop, face in crops if crop is not None]     # None: the face is away
    if not cells:
        raise clip_error(source.path, "no picture in it can be read")
    cells = [cells[t] for t in np.linspace(0, len(cells) - 1, min(MAX_PICTURES, len(cells))).round().astype(int)]
    columns = min(COLUMNS, len(cells))
    cells += [np.zeros_like(cells[0])] * (-len(cells) % columns)
    sheet = np.concatenate([np.concatenate(cells[i:i + columns], 1) for i in range(0, len(cells), columns)])
    write_whole(path, lambda temporary: imageio.imwrite(temporary, sheet, extension=".png"))


def marked(picture, points):
    """A crop (96, 96) and its landmarks (P,), in pixels of mouth.VIEW -> (96, 96, 3) with a dot at each landmark."""
    cell = np.repeat(picture[..., None], 3, -1)
    a, _ = alignment(points)
    for z in a * (points - points[3]) + (CROP - 1) / 2 * (1 + 1j):  # the mouth is in the middle of the crop
        x, y = round(z.real), round(z.imag)
        if 1 <= min(x, y) and max(x, y) < CROP - 1:
            cell[y - 1:y + 2, x - 1:x + 2] = GREEN
    return cell
