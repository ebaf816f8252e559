"""Image folders: one folder a class, decoded once into ``uint8``.

Labels must mean the same on every device, also on one that has images of three classes only. So folders named by
numbers give the label themselves, and folders with other names must all be there (some may be empty); then their
sorted order counts.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...protocol.errors import ConfigError, DataError

__all__ = ["count_images", "read_image_folder"]

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_TEST_NAMES = ("test", "val", "validation")
_MAX_PIXELS = 50_000_000
_EIGHT_BIT = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}


def read_image_folder(
    path: Path, input_shape: tuple[int, ...], n_classes: int, limit_mib: int
) -> list[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Decode ``path/CLASS/*.png`` or ``path/train/CLASS/*.png`` with ``path/test/CLASS/*.png``.

    Images are converted to the model's number of channels (1 or 3) and scaled to its size with a bilinear filter. Grey
    values of 16 bits are rounded to 8; images of other numbers, whose range nobody knows, are refused.

    Args:
        path: The folder.
        input_shape: ``(channels, height, width)``.
        n_classes: Number of classes of the model.
        limit_mib: Largest size of the decoded images.

    Returns:
        One or two pairs ``(uint8[n, channels, height, width], int64[n])``: training and, if there is one, test part.

    Raises:
        DataError: A folder or an image cannot be used.
        ConfigError: Pillow is not installed.
    """
    if len(input_shape) != 3 or input_shape[0] not in (1, 3):
        raise DataError(
            f"{path} is a folder of images, the model takes samples of shape {input_shape}",
            hint="images need a model with input (1, height, width) or (3, height, width)",
        )
    listings = [_listing(folder, n_classes) for folder in _parts(path)]
    size = sum(map(len, listings)) * math.prod(input_shape)
    if size > limit_mib << 20:
        raise DataError(
            f"the images of {path} take {size / 2**20:.0f} MiB decoded, the limit is {limit_mib} MiB",
            hint="use fewer images on this device, or a .npy pair, which is mapped and takes no memory",
        )
    return [_decoded(listing, input_shape) for listing in listings]


def count_images(path: Path) -> list[int]:
    """Images of the training part and, if there is one, of the test part; decodes nothing."""
    return [sum(len(_images(entry)) for entry in folder.iterdir() if entry.is_dir()) for folder in _parts(path)]


def _parts(path: Path) -> list[Path]:
    if not (path / "train").is_dir():
        return [path]
    test = next((path / name for name in _TEST_NAMES if (path / name).is_dir()), None)
    return [path / "train"] if test is None else [path / "train", test]


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES and not p.name.startswith("."))


def _listing(folder: Path, n_classes: int) -> list[tuple[Path, int]]:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    numbered = bool(classes) and all(entry.name.isdecimal() for entry in classes)
    if not numbered and len(classes) != n_classes:
        raise DataError(
            f"{folder} has {len(classes)} class folders, the model has {n_classes} classes",
            hint="make a folder for each class, empty ones too, or name the folders by class number",
        )
    files = []
    for position, entry in enumerate(classes):
        label = int(entry.name) if numbered else position
        files += [(image, label) for image in _images(entry)]
    return files


def _decoded(
    files: list[tuple[Path, int]], input_shape: tuple[int, ...]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    image_module = _pillow()
    channels, height, width = input_shape
    out = np.empty((len(files), *input_shape), dtype=np.uint8)
    for position, (path, _) in enumerate(files):
        try:
            with warnings.catch_warnings():
                # Pillow only warns of a decompression bomb up to twice its limit.
                warnings.simplefilter("error")
                with image_module.open(path) as image:
                    if image.width * image.height > _MAX_PIXELS:
                        raise DataError(f"{path} has {image.width} x {image.height} pixels, the limit is {_MAX_PIXELS}")
                    pixels = _eight_bit(image, path).convert("L" if channels == 1 else "RGB")
                    if pixels.size != (width, height):
                        pixels = pixels.resize((width, height), image_module.Resampling.BILINEAR)
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{path} cannot be decoded: {error}", hint="remove the file or convert it to PNG"
            ) from error
        values = np.asarray(pixels, dtype=np.uint8)
        out[position] = values[np.newaxis] if channels == 1 else np.moveaxis(values, -1, 0)
    return out, np.array([label for _, label in files], dtype=np.int64)


def _eight_bit(image: Any, path: Path) -> Any:
    """The image with values of 8 bits; Pillow's own conversion of others cuts off at 255."""
    if image.mode in _EIGHT_BIT:
        return image
    # Older releases of Pillow read 16 bits as 32.
    if not image.mode.startswith("I;16") and (image.mode != "I" or image.format not in ("PNG", "PPM")):
        raise DataError(
            f"{path} holds values of the kind {image.mode}, whose range is not known",
            hint="convert it to PNG with 8 or 16 bits, or give the values as .npy files",
        )
    values = np.asarray(image).astype(np.uint16)
    whole, rest = np.divmod(values, np.uint16(257))
    return _pillow().fromarray((whole + (rest > 128)).astype(np.uint8))  # 65535 / 257 = 255


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("reading image folders needs Pillow", hint='pip install "fedzo[images]"') from error
    return Image
