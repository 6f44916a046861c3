"""A small stand-in for MNIST, for places where the real one is absent: continuous integration, notebooks.

These are NOT MNIST images, nor made from any: ten kinds of pen strokes, defined below, are bent, slanted, moved and
drawn with pens of several widths. They look alike, have the same format and are about as hard to tell apart for a
small network; figures obtained with them are not figures about MNIST.

The images are the same on every machine: of the random generator only uniform numbers are used, and of
floating-point arithmetic only operations that IEEE 754 rounds in one way, one element at a time.
"""

import os
import shutil
from functools import cache
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lightning_l2l.arguments import check_at_least
from lightning_l2l.data import idx

Floats = npt.NDArray[np.float32]

# Ways to write each digit. Strokes are separated by commas; a point is two digits, x and y from 0 (left, top) to 9,
# on a square as high as the digit. Corners within a stroke are rounded off.
_GLYPHS = (
    ("50 30 13 16 39 59 69 86 83 70 50", "60 40 23 16 18 39 49 69 83 81 60"),
    ("50 59", "33 50, 50 49", "60 39"),
    ("12 20 60 82 84 56 19, 19 89", "12 20 70 83 65 28 07 27 58 89"),
    ("11 30 70 82 74 44, 44 74 86 88 69 29 18", "10 80, 80 44, 44 74 86 88 69 29 18"),
    ("40 06, 06 86, 63 69", "10 14 25 84, 80 84 79"),
    ("80 20, 20 14, 14 33 73 86 88 69 29 18", "80 31 14, 14 44 75 78 59 19"),
    ("70 41 14 17 29 69 87 86 74 34 16", "50 23 17 29 59 77 65 35 17"),
    ("10 80, 80 49", "11 30 80, 80 55 49", "10 80, 80 39, 35 75"),
    ("70 30 11 13 34 64 86 88 69 29 18 16 34 64 83 81 70", "80 50 21 33 65 78 59 39 27 36 73 80"),
    ("81 60 30 12 14 35 65 83 81, 81 79", "81 50 22 24 45 73 81, 81 84 77 49 29"),
)
_FIELD = 120  # cells along each side of a distance field
_SPAN = 1.5  # a field reaches from -_SPAN to _SPAN, the digit's square from -1 to 1
_CHUNK = 500  # images drawn at a time: what they need fits a processor's cache


def write_digits(root: str | Path, num_train: int = 7200, num_test: int = 2000, seed: int = 0) -> None:
    """Writes a data set of drawn digits, in the files and the format of MNIST, that `MNISTDataModule` reads.

    All four files appear at once, complete. The ten classes are equally frequent, in random order.

    Args:
        root: Folder of the data sets; the files go to `<root>/MNIST/raw`, unpacked.
        num_train: Number of images in the training files, of which `MNISTDataModule` takes a sixth for validation.
        num_test: Number of images in the test files.
        seed: Seed of all images, 0 or more.

    Raises:
        FileExistsError: If `<root>/MNIST/raw` is not empty: real data are never overwritten.
        ValueError: If a size is not a positive integer, or `seed` is negative.
    """
    check_at_least(1, num_train=num_train, num_test=num_test)
    check_at_least(0, seed=seed)
    folder = idx.raw_folder(root)
    found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if found:
        raise FileExistsError(
            f"{folder.resolve()} has {found[0]} already, and write_digits overwrites nothing; give another root, or "
            "delete the folder if its content is not needed"
        )
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")  # same disk: the move is atomic
    part.mkdir(parents=True, exist_ok=True)
    try:
        rng = np.random.default_rng(seed)
        for prefix, num in (("train", num_train), ("t10k", num_test)):
            labels = (np.argsort(rng.random(num), kind="stable") % len(_GLYPHS)).astype(np.uint8)
            images = [_draw(labels[first : first + _CHUNK], rng) for first in range(0, num, _CHUNK)]
            idx.write_idx(part / f"{prefix}-images-idx3-ubyte", np.concatenate(images))
            idx.write_idx(part / f"{prefix}-labels-idx1-ubyte", labels)
        os.rename(part, folder)  # takes the place of an empty folder, fails at any other
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _draw(labels: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Draws one image for each label, `[n, 28, 28]`."""
    n = len(labels)

    def spread(scale: float, mean: float = 0.0) -> Floats:
        """One number an image, `[n, 1, 1]`, with a bell-shaped distribution within +-3 `scale` of its mean."""
        bell = (rng.random(n) + rng.random(n) + rng.random(n) - 1.5) * 2
        return (bell * scale + mean).astype(np.float32)[:, None, None]

    # Where the pixels lie on the square of the digit, which has [-1, 1] for both of its coordinates.
    axis = np.arange(-13.5, 14, dtype=np.float32) / 10  # a digit is at most 20 pixels high, before it is changed
    x, y = (axis + spread(0.1)) * spread(0.14, 1.25), (axis[:, None] + spread(0.08)) * spread(0.1, 1.1)
    x, y = x + spread(0.3, 0.15) * y, y + spread(0.2) * x  # slanted and turned
    x = x + spread(0.15) * x * y + spread(0.15) * y * y + spread(0.25) * (y * y * y - y)  # bent
    y = y + spread(0.15) * x * y + spread(0.15) * x * x + spread(0.25) * (x * x * x - x)

    ways = np.array([len(glyphs) for glyphs in _GLYPHS])
    glyph = (np.cumsum(ways) - ways)[labels] + (rng.random(n) * ways[labels]).astype(np.int64)
    column, row = (np.clip((z / _SPAN + 1) * (_FIELD / 2), 0, _FIELD - 1).astype(np.int64) for z in (x, y))
    distance = _fields()[glyph[:, None, None], row, column]

    ink = (spread(0.03, 0.13) - distance) / spread(0.03, 0.16) + 0.5
    ink = ink + (rng.random(ink.shape) - 0.5).astype(np.float32) * 0.3  # seen at the edges of strokes only
    images: npt.NDArray[np.uint8] = (np.clip(ink, 0, 1) * 255).astype(np.uint8)
    return images


@cache
def _fields() -> Floats:
    """Distance of each cell to the nearest stroke of each glyph, `[glyphs, _FIELD, _FIELD]`; a square's side is 2."""
    fields = []
    axis = ((np.arange(_FIELD) + 0.5) / (_FIELD / 2) - 1) * _SPAN
    for glyph in chain.from_iterable(_GLYPHS):
        nearest = np.full((_FIELD, _FIELD), np.inf)
        for stroke in glyph.split(","):
            points = _rounded([(int(p[0]) / 4.5 - 1, int(p[1]) / 4.5 - 1) for p in stroke.split()])
            for (x0, y0), (x1, y1) in pairwise(points):
                x, y, u, v = axis - x0, axis[:, None] - y0, x1 - x0, y1 - y0
                along = np.clip((x * u + y * v) / (u * u + v * v), 0, 1)  # share of the segment passed
                across = x - along * u, y - along * v
                nearest = np.minimum(nearest, across[0] * across[0] + across[1] * across[1])
        fields.append(np.sqrt(nearest).astype(np.float32))
    return np.stack(fields)


def _rounded(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Rounds the corners off a stroke (Chaikin's algorithm); its ends stay where they are."""
    for _ in range(2):
        inner = []
        for (x0, y0), (x1, y1) in pairwise(points):
            inner += [(0.75 * x0 + 0.25 * x1, 0.75 * y0 + 0.25 * y1), (0.25 * x0 + 0.75 * x1, 0.25 * y0 + 0.75 * y1)]
        points = [points[0], *inner[1:-1], points[-1]] if len(points) > 2 else points
    return points
