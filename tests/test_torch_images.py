"""Image data sets: halves, IDX files whole and broken, folders of every kind of image, and what is refused."""

from __future__ import annotations

import gzip
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from ctrl.torch.images import Images, digits, from_bytes, image_folder, mnist, read_idx, to_bytes


def labelled(counts, seed=0):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))]
    pixels = torch.linspace(-1, 1, len(labels))[:, None, None, None].expand(-1, 1, 2, 3)
    return Images(pixels, labels, "numbers")


def halves_are_fair(data, first, second):
    """Disjoint and complete, sizes within one also by class, and each image still beside its label."""
    seen = [half.pixels[:, 0, 0, 0] for half in (first, second)]
    together = torch.cat(seen)
    label_of = dict(zip(data.pixels[:, 0, 0, 0].tolist(), data.labels.tolist(), strict=True))
    return (sorted(together.tolist()) == sorted(data.pixels[:, 0, 0, 0].tolist())
            and abs(len(first) - len(second)) <= 1
            and bool(((torch.bincount(first.labels, minlength=data.classes)
                       - torch.bincount(second.labels, minlength=data.classes)).abs() <= 1).all())
            and all([label_of[x] for x in values.tolist()] == half.labels.tolist() for half, values in zip((first, second), seen, strict=True)))


def test_split():
    data = labelled([7, 1, 10, 3])
    first, second = data.split(0)
    assert halves_are_fair(data, first, second)
    assert first.classes == second.classes == 4 and first.name == "numbers"
    same, other = data.split(0)[0], data.split(1)[0]
    assert torch.equal(same.pixels, first.pixels) and not torch.equal(other.pixels, first.pixels)
    unlabelled = Images(data.pixels)
    a, b = unlabelled.split(3)
    assert a.labels is None and sorted(torch.cat([a.pixels, b.pixels])[:, 0, 0, 0].tolist()) == data.pixels[:, 0, 0, 0].tolist()

    # Planted: halves that overlap, unstratified halves, labels out of step with their pixels.
    order = data.labels.argsort(stable=True)
    assert not halves_are_fair(data, first, first)
    assert not halves_are_fair(data, data.subset(order[:11]), data.subset(order[11:]))
    assert not halves_are_fair(data, Images(first.pixels, first.labels.roll(1), "", data.class_names), second)


def test_digits():
    data = digits()
    assert len(data) == 1797 and data.shape == (1, 8, 8) and data.classes == 10 and data.name == "digits"
    assert data.pixels.dtype == torch.float32 and data.pixels.min() == -1 and data.pixels.max() == 1
    assert torch.equal((data.pixels + 1) * 8, ((data.pixels + 1) * 8).round())     # sixteen greys, exactly
    assert data.labels[:10].tolist() == list(range(10)) and not torch.equal(data.pixels[0], data.pixels[0].mT)
    first, second = data.split(0)
    assert (len(first), len(second)) == (899, 898)


def test_bytes_there_and_back():
    values = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    pixels = from_bytes(values)
    assert pixels.dtype == torch.float32 and pixels.min() == -1 and pixels.max() == 1
    for x in (pixels, pixels.double(), pixels.half(), pixels + 3e-3, pixels - 3e-3):
        assert np.array_equal(to_bytes(x), values)
    assert to_bytes(torch.tensor([[[[-7.0, 7.0, 0.0]]]])).ravel().tolist() == [0, 255, 128]
    truncated = ((pixels + 1) * 127.5).to(torch.uint8).numpy()      # planted: truncation in the place of rounding
    assert not np.array_equal(truncated, values)


def idx(array):
    array = np.asarray(array, dtype=np.uint8)
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def written(folder, part, pixels, labels, mark="-", zipped=False):
    for stem, array in (("images", pixels), ("labels", labels)):
        content = idx(array)
        path = folder / f"{part}-{stem}{mark}idx{np.ndim(array)}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(content) if zipped else content)


PIXELS = np.arange(5 * 3 * 4).reshape(5, 3, 4) * 4
LABELS = [0, 2, 1, 1, 3]


@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("part", ["train", "t10k"])
def test_mnist_files(tmp_path, part, mark, zipped):
    written(tmp_path, part, PIXELS, LABELS, mark, zipped)
    data = mnist(tmp_path)
    assert data.shape == (1, 3, 4) and data.classes == 4 and data.labels.tolist() == LABELS and data.name.endswith(part)
    assert np.array_equal(to_bytes(data.pixels)[:, 0], PIXELS)


def test_mnist_prefers_the_training_images(tmp_path):
    written(tmp_path, "t10k", PIXELS[:2], LABELS[:2])
    assert len(mnist(str(tmp_path))) == 2
    written(tmp_path, "train", PIXELS, LABELS, ".", True)
    assert len(mnist(tmp_path)) == 5


def test_broken_idx_files(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    whole = idx(PIXELS)
    for content, message in [
            (b"", "expected an IDX file"), (whole[:3], "expected an IDX file"), (b"\x89PNG" + whole[4:], "got 89 50 4e 47"),
            (idx(LABELS), r"in 3 dimensions \(it begins 00 00 08 03\), got 00 00 08 01"), (b"\0\0\x0d\x03" + whole[4:], "got 00 00 0d 03"),
            (whole[:9], "bytes, got 9"), (whole[:-1], "16 \\+ 5 x 3 x 4 bytes, got 75"), (whole + b"\0", "got 77"),
            (gzip.compress(whole)[:-12], "expected a whole gzip file"), (gzip.compress(whole)[:20] + b"garbage", "expected a whole gzip file")]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            read_idx(path, 3)
        assert str(path) in str(error.value)
    path.write_bytes(whole)
    assert np.array_equal(read_idx(path, 3), PIXELS)


def test_incomplete_mnist_folders(tmp_path):
    with pytest.raises(ValueError, match="folder: expected train-images-idx3-ubyte or"):
        mnist(tmp_path)
    written(tmp_path, "train", PIXELS, LABELS[:4])
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte: expected 5 labels, as many as images in train-images-idx3-ubyte, got 4"):
        mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="expected train-labels-idx1-ubyte beside"):
        mnist(tmp_path)


@pytest.mark.skipif("CTRL_MNIST_DIR" not in os.environ, reason="CTRL_MNIST_DIR names no folder with MNIST's files")
def test_real_mnist():
    data = mnist(os.environ["CTRL_MNIST_DIR"])
    assert data.shape == (1, 28, 28) and data.classes == 10 and len(data) in (10_000, 60_000)
    assert abs(float((data.pixels.mean() + 1) / 2) - 0.131) < 0.003      # published mean intensity: .1307 of the training images


def saved(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path, **options)


def grey(level, size=(6, 6)):
    return np.full(size, level, np.uint8)


def test_image_folder(tmp_path):
    rng = np.random.default_rng(0)
    exact = rng.integers(0, 256, (6, 6), dtype=np.uint8)
    saved(tmp_path / "b" / "1.png", exact)
    saved(tmp_path / "b" / "deep" / "2.BMP", grey(255))
    saved(tmp_path / "a" / "3.png", np.stack([grey(51)] * 3, axis=-1))       # grey saved as colour stays grey
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    saved(tmp_path / ".cache" / "4.png", grey(9))
    data = image_folder(tmp_path, 6)
    assert data.shape == (1, 6, 6) and data.class_names == ("a", "b") and data.labels.tolist() == [0, 1, 1] and data.name == tmp_path.name
    bytes_ = to_bytes(data.pixels)[:, 0]
    assert np.array_equal(bytes_[1], exact) and np.all(bytes_[0] == 51) and np.all(bytes_[2] == 255)

    saved(tmp_path / "a" / "0.webp", np.stack([grey(200), grey(10), grey(10)], axis=-1), lossless=True)
    colour = image_folder(tmp_path, 6)
    assert colour.shape == (3, 6, 6) and colour.labels.tolist() == [0, 0, 1, 1]
    assert to_bytes(colour.pixels)[0, :, 0, 0].tolist() == [200, 10, 10] and np.array_equal(to_bytes(colour.pixels)[2, 1], exact)
    assert image_folder(tmp_path / "b", 6).labels is None      # one sub-folder, `deep`, and an image beside it: no classes


def test_image_folder_crops_and_resizes(tmp_path):
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:12], wide[:, 12:16] = 100, 200       # the central square is half 100, half 200
    saved(tmp_path / "wide.png", wide)
    saved(tmp_path / "tall.png", wide.T)
    tall, short = to_bytes(image_folder(tmp_path, 8).pixels)[:, 0]
    assert np.array_equal(short, wide[:, 8:16]) and np.array_equal(tall, wide.T[8:16])
    small = to_bytes(image_folder(tmp_path, 2).pixels)[1, 0]
    assert np.all(np.abs(small.astype(int) - [[100, 200]]) < 20)     # a squeezed image would be about 33 and 67
    photo = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    saved(tmp_path / "photo" / "0.jpg", photo, quality=100)
    reduced = to_bytes(image_folder(tmp_path / "photo", 8).pixels)[0, 0]
    assert np.abs(reduced.astype(int) - photo.reshape(8, 8, 8, 8).mean((1, 3))).max() < 6


def test_image_folder_modes(tmp_path):
    """16-bit grey, palettes, transparency and cameras' rotations."""
    saved(tmp_path / "a16.png", np.full((4, 4), 0xAB12, np.uint16))
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[:2, :, 3] = 255       # black above, transparent below
    saved(tmp_path / "b_clear.png", clear)
    Image.fromarray(grey(77, (4, 4))).convert("P").save(tmp_path / "c_palette.png")
    turned = Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 2, axis=0).repeat(4, axis=1))
    exif = turned.getexif()
    exif[0x0112] = 3        # upside down
    turned.save(tmp_path / "d_turned.png", exif=exif)
    out = to_bytes(image_folder(tmp_path, 4).pixels)
    assert out.shape == (4, 1, 4, 4)
    assert np.all(out[0] == 0xAB) and np.all(out[1, 0, :2] == 0) and np.all(out[1, 0, 2:] == 255) and np.all(out[2] == 77)
    assert np.all(out[3, 0, :2] == 255) and np.all(out[3, 0, 2:] == 0)


def test_image_folder_refusals(tmp_path):
    with pytest.raises(ValueError, match="folder: expected an existing folder"):
        image_folder(tmp_path / "nowhere", 8)
    with pytest.raises(ValueError, match="folder: expected images .*, got none in"):
        image_folder(tmp_path, 8)
    saved(tmp_path / "a" / "good.png", grey(0))
    with pytest.raises(ValueError, match="size: expected an integer >= 1, got 0"):
        image_folder(tmp_path, 0)
    (tmp_path / "a" / "broken.png").write_bytes((tmp_path / "a" / "good.png").read_bytes()[:40])
    (tmp_path / "a" / "text.jpg").write_text("hello")
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "a" / "float.tiff")
    with pytest.raises(ValueError, match=r"3 of 4 that are not: .*broken\.png \(.*float\.tiff \(.*8- or 16-bit.*text\.jpg \(Unidentified"):
        image_folder(tmp_path, 8)
    for name in ("broken.png", "text.jpg", "float.tiff"):
        (tmp_path / "a" / name).unlink()
    saved(tmp_path / "b" / "good.png", grey(0))
    saved(tmp_path / "loose.png", grey(0))
    with pytest.raises(ValueError, match=r"class folder \(a, b, ...\) or none, got .*loose\.png outside"):
        image_folder(tmp_path, 8)


def test_refusals():
    good = torch.zeros(4, 1, 2, 2)
    assert Images(good.double()).pixels.dtype == torch.float32 and Images(good).classes == 0
    assert Images(good, torch.tensor([0, 1, 5, 1], dtype=torch.uint8)).labels.dtype == torch.int64
    for pixels in (np.zeros((4, 1, 2, 2)), good.int(), good[0], good[:0], good + 1.01, good * torch.nan):
        with pytest.raises(ValueError, match="pixels: expected"):
            Images(pixels)
    for labels in (torch.zeros(3, dtype=torch.long), torch.zeros(4), torch.tensor([0, -1, 0, 0]), [0, 1, 2, 3]):
        with pytest.raises(ValueError, match="labels: expected"):
            Images(good, labels)
    with pytest.raises(ValueError, match=r"labels: expected 0 ... 1, got 0 ... 2"):
        Images(good, torch.tensor([0, 1, 2, 0]), class_names=("a", "b"))
    with pytest.raises(ValueError, match="class_names: expected none without labels"):
        Images(good, class_names=("a", "b"))
    with pytest.raises(ValueError, match="split: expected at least two"):
        Images(good[:1]).split(0)
    with pytest.raises(ValueError, match="seed: expected"):
        Images(good).split(-1)
