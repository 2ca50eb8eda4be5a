"""Image data sets: pixels in [-1, 1] with labels, from scikit-learn's digits, MNIST's files or any folder of images."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ctrl import check
from ctrl.check import Array

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
UNSIGNED_BYTE = 8  # IDX's code for its data type
NAMED = 5  # unreadable files that an error names


@dataclass(frozen=True, eq=False)
class Images:
    """A data set of images of one size.

        pixels      : (n, c, h, w)   float32, -1 black, 1 white
        labels      : (n,)           int64 in 0 ... classes - 1, or None
        class_names : (classes,)     by default the numbers 0 ... max(labels)

    Source: design.md, torch.   Checked: tests/test_torch_images.py::test_refusals
    """

    pixels: Tensor
    labels: Tensor | None = None
    name: str = "images"
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check.instance("pixels", self.pixels, Tensor, "a tensor (n, c, h, w)")
        if self.pixels.ndim != 4 or self.pixels.numel() == 0 or not self.pixels.is_floating_point():
            raise ValueError(f"pixels: expected a non-empty float tensor (n, c, h, w), got {self.pixels.dtype} {tuple(self.pixels.shape)}")
        low, high = (float(x) for x in self.pixels.aminmax())
        if not (low >= -1 and high <= 1):
            raise ValueError(f"pixels: expected values in [-1, 1], got [{low:g}, {high:g}]")
        object.__setattr__(self, "pixels", self.pixels.float())
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.labels is None:
            if self.class_names:
                raise ValueError(f"class_names: expected none without labels, got {len(self.class_names)}")
            return
        check.instance("labels", self.labels, Tensor, "a tensor (n,) of integers, or None")
        if self.labels.shape != (len(self),) or self.labels.is_floating_point() or self.labels.is_complex():
            raise ValueError(f"labels: expected integers of shape ({len(self)},), got {self.labels.dtype} {tuple(self.labels.shape)}")
        object.__setattr__(self, "labels", self.labels.long())
        first, last = (int(x) for x in self.labels.aminmax())
        if not self.class_names:
            object.__setattr__(self, "class_names", tuple(str(k) for k in range(last + 1)))
        if first < 0 or last >= self.classes:
            raise ValueError(f"labels: expected 0 ... {self.classes - 1}, got {first} ... {last}")

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w)."""
        _, c, h, w = self.pixels.shape
        return c, h, w

    @property
    def classes(self) -> int:
        """How many classes the labels are of; 0 without labels."""
        return len(self.class_names)

    def subset(self, index: Tensor) -> Images:
        """The images at `index`, (m,) integers or (n,) booleans; classes keep their numbers."""
        return Images(self.pixels[index], None if self.labels is None else self.labels[index], self.name, self.class_names)

    def split(self, seed: int) -> tuple[Images, Images]:
        """Two disjoint random halves: sizes, also within each class, differ by at most one.

        All images in random order, stably sorted by label; even places are the first half, odd places the second.
        Source: theory.md, section 1 (a reward and its judge must not share data).   Checked: tests/test_torch_images.py::test_split
        """
        if len(self) < 2:
            raise ValueError(f"split: expected at least two images, got {len(self)}")
        order = torch.from_numpy(np.random.default_rng(check.integer("seed", seed, at_least=0)).permutation(len(self)))
        if self.labels is not None:
            order = order[self.labels.cpu()[order].argsort(stable=True)]
        return self.subset(order[::2].sort().values), self.subset(order[1::2].sort().values)


def digits() -> Images:
    """The 1,797 real 8x8 digits that come with scikit-learn; x = grey / 8 - 1, grey in 0 ... 16.

    Source: scikit-learn, load_digits (UCI, optical recognition of handwritten digits).   Checked: tests/test_torch_images.py::test_digits
    """
    from sklearn.datasets import load_digits

    grey, labels = load_digits(return_X_y=True)
    return Images(torch.from_numpy(grey / 8 - 1).reshape(-1, 1, 8, 8), torch.from_numpy(labels), "digits")


def mnist(folder: str | Path) -> Images:
    """MNIST, or any set in its format: the training images when the folder has them, else the test images, with their labels.

    Files train-images-idx3-ubyte and train-labels-idx1-ubyte (or t10k-...), with '.' or '-' before idx, gzipped or not.
    Source: yann.lecun.com/exdb/mnist (format).   Checked: tests/test_torch_images.py::test_mnist_files
    """
    folder = Path(folder)
    for part in ("train", "t10k"):
        if (file := _idx_file(folder, f"{part}-images", 3)) is not None:
            if (beside := _idx_file(folder, f"{part}-labels", 1)) is None:
                raise ValueError(f"folder: expected {part}-labels-idx1-ubyte beside {file}, got no such file")
            pixels, labels = read_idx(file, 3), read_idx(beside, 1)
            if len(pixels) != len(labels):
                raise ValueError(f"{beside}: expected {len(pixels)} labels, as many as images in {file.name}, got {len(labels)}")
            return Images(from_bytes(pixels[:, None]), torch.from_numpy(labels), f"{folder.resolve().name}-{part}")
    raise ValueError(f"folder: expected train-images-idx3-ubyte or t10k-images-idx3-ubyte (gzipped or not), got none of them in {folder}")


def _idx_file(folder: Path, stem: str, dimensions: int) -> Path | None:
    names = (f"{stem}{mark}idx{dimensions}-ubyte{end}" for mark in "-." for end in ("", ".gz"))
    return next((path for name in names if (path := folder / name).is_file()), None)


def read_idx(path: str | Path, dimensions: int) -> Array:
    """The unsigned bytes of an IDX file, gzipped or not.

        0, 0, 8 (unsigned byte), dimensions;  each length, 4 bytes, big-endian;  the bytes, last index fastest

    Source: yann.lecun.com/exdb/mnist (format).   Checked: tests/test_torch_images.py::test_broken_idx_files
    """
    raw = Path(path).read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: expected a whole gzip file, got {error}") from None
    magic = bytes((0, 0, UNSIGNED_BYTE, dimensions))
    if raw[:4] != magic:
        raise ValueError(f"{path}: expected an IDX file of bytes in {dimensions} dimensions (it begins {magic.hex(' ')}), got {raw[:4].hex(' ')}")
    start = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(raw[at:at + 4], "big") for at in range(4, start, 4))
    if len(raw) != start + math.prod(shape):
        raise ValueError(f"{path}: expected {start} + {' x '.join(map(str, shape))} bytes, got {len(raw)}")
    return np.frombuffer(bytearray(raw), np.uint8, offset=start).reshape(shape)


def image_folder(folder: str | Path, size: int) -> Images:
    """Every image under a folder, cropped to its central square and resized to (size, size).

    Two or more sub-folders are classes, in the order of their names; otherwise there are no labels. One channel when every
    image is grey (equal red, green and blue), else three. Transparent pixels become white; 16-bit grey keeps its upper 8 bits.
    Source: design.md, torch.   Checked: tests/test_torch_images.py::test_image_folder
    """
    check.integer("size", size, at_least=1)
    files, labels, class_names = _listed(Path(folder))
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:  # Pillow decodes without the interpreter's lock
        read = pool.map(lambda path: _thumbnail(path, size), files)
        thumbnails = list(tqdm(read, total=len(files), desc="reading images", unit="image", disable=None, leave=False, delay=1))
    unreadable = [f"{path} ({out})" for path, out in zip(files, thumbnails, strict=True) if isinstance(out, str)]
    if unreadable:
        more = ", ..." if len(unreadable) > NAMED else ""
        raise ValueError(f"folder: expected readable images, got {len(unreadable)} of {len(files)} that are not: "
                         + ", ".join(unreadable[:NAMED]) + more)
    rgb = np.stack([out for out in thumbnails if not isinstance(out, str)])
    if np.all(rgb == rgb[..., :1]):
        rgb = rgb[..., :1]
    name = Path(folder).resolve().name
    return Images(from_bytes(rgb.transpose(0, 3, 1, 2)), None if labels is None else torch.tensor(labels), name, class_names)


def _listed(folder: Path) -> tuple[list[Path], Sequence[int] | None, tuple[str, ...]]:
    """Image files in order, with labels and class names when two or more sub-folders hold images."""
    if not folder.is_dir():
        raise ValueError(f"folder: expected an existing folder, got {folder}")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
                   and not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if not files:
        raise ValueError(f"folder: expected images ({', '.join(SUFFIXES)}), got none in {folder}")
    parents = [path.relative_to(folder).parts[:-1] for path in files]
    names = sorted({parts[0] for parts in parents if parts})
    if len(names) < 2:
        return files, None, ()
    if loose := [path for path, parts in zip(files, parents, strict=True) if not parts]:
        raise ValueError(f"folder: expected every image in a class folder ({', '.join(names[:NAMED])}, ...) or none, got {loose[0]} outside")
    return files, [names.index(parts[0]) for parts in parents], tuple(names)


def _thumbnail(path: Path, size: int) -> Array | str:
    """(size, size, 3) bytes, or what is wrong with the file."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            file.draft(None, (2 * size, 2 * size))  # a large JPEG decodes at a half, a quarter or an eighth
            image: Image.Image = ImageOps.exif_transpose(file)
        if image.mode.startswith(("I", "F")):
            image = Image.fromarray(_upper_byte(np.asarray(image)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS))
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        return f"{type(error).__name__}: {error}"


def _upper_byte(grey: Array) -> Array:
    if grey.dtype.kind == "f" or grey.min() < 0 or grey.max() >= 2**16:
        raise ValueError(f"expected 8- or 16-bit values, got {grey.dtype} in [{grey.min():g}, {grey.max():g}]")
    return (grey >> 8).astype(np.uint8)


def from_bytes(values: Array) -> Tensor:
    """x = value / 127.5 - 1: bytes (n, c, h, w) to pixels in [-1, 1], float32.

    Source: design.md, torch.   Checked: tests/test_torch_images.py::test_bytes_there_and_back
    """
    return torch.from_numpy(np.ascontiguousarray(values)).float() / 127.5 - 1


def to_bytes(pixels: Tensor) -> Array:
    """round(127.5 (clamp(x, -1, 1) + 1)): pixels (n, c, h, w) to bytes in 0 ... 255, on the CPU; the inverse of `from_bytes`.

    Source: design.md, torch.   Checked: tests/test_torch_images.py::test_bytes_there_and_back
    """
    return ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
