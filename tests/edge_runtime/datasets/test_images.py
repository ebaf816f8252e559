"""Images of every kind of pixel: converted by their real range, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedzo.edge_runtime.datasets.data import load_dataset
from fedzo.protocol.errors import DataError

image_module = pytest.importorskip("PIL.Image", reason="fedzo[images] is not installed")

RAMP = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)


def _saved(folder: Path, name: str, image: Any) -> Path:
    (folder / "0").mkdir(exist_ok=True)
    image.save(folder / "0" / name)
    return folder


def _loaded(folder: Path, channels: int = 1) -> Any:
    return load_dataset(folder, (channels, 256, 256), 2).train.batch(np.array([0])).x[0]


@pytest.mark.parametrize("name", ["ramp.png", "ramp.tif", "ramp.pgm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_values_of_16_bits_are_rounded_to_8(tmp_path: Path, name: str, channels: int) -> None:
    got = _loaded(_saved(tmp_path, name, image_module.fromarray(RAMP)), channels)
    expected = np.rint(RAMP / 257.0) / 255.0
    for plane in got:
        np.testing.assert_allclose(plane, expected, atol=1e-7)


def test_big_endian_values_of_16_bits(tmp_path: Path) -> None:
    image = image_module.frombytes("I;16B", (256, 256), RAMP.astype(">u2").tobytes())
    np.testing.assert_allclose(
        _loaded(_saved(tmp_path, "ramp.tif", image))[0], np.rint(RAMP / 257.0) / 255.0, atol=1e-7
    )


@pytest.mark.parametrize(("dtype", "mode"), [(np.float32, "F"), (np.int32, "I")])
def test_images_whose_range_nobody_knows_are_refused(tmp_path: Path, dtype: Any, mode: str) -> None:
    folder = _saved(tmp_path, "values.tif", image_module.fromarray((RAMP / 65535.0).astype(dtype)))
    with pytest.raises(DataError, match=rf"values\.tif holds values of the kind {mode}, whose range") as caught:
        _loaded(folder)
    assert ".npy" in caught.value.hint


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("1", "a.png"),
        ("L", "a.png"),
        ("LA", "a.png"),
        ("P", "a.gif"),
        ("RGB", "a.png"),
        ("RGBA", "a.png"),
        ("RGBX", "a.tif"),
        ("CMYK", "a.jpg"),
        ("YCbCr", "a.tif"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_values_of_8_bits_stay(tmp_path: Path, mode: str, name: str, channels: int) -> None:
    image = image_module.fromarray((RAMP >> 8).astype(np.uint8)).convert("RGB").convert(mode)
    got = _loaded(_saved(tmp_path, name, image), channels)
    with image_module.open(tmp_path / "0" / name) as read:
        expected = np.asarray(read.convert("L" if channels == 1 else "RGB")) / 255.0
    np.testing.assert_allclose(got, expected[np.newaxis] if channels == 1 else np.moveaxis(expected, -1, 0), atol=1e-6)
    assert got.max() > 0.9
