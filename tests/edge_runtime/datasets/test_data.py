"""Data files of users: every accepted form, every refusal, and batches that a restart repeats."""

from __future__ import annotations

import contextlib
import gzip
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedzo.edge_runtime.datasets.arrays import read_idx, read_npy, read_npz
from fedzo.edge_runtime.datasets.data import batch_indices, count_samples, load_dataset
from fedzo.protocol.errors import ConfigError, DataError

N = 12


def _images(shape: tuple[int, ...], n: int = N) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return (np.arange(n * int(np.prod(shape))) % 251).astype(np.uint8).reshape(n, *shape)


def _labels(n: int = N) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.arange(n, dtype=np.int64) % 3


def _idx(array: np.ndarray[Any, Any]) -> bytes:
    kind = {"u1": 8, "i4": 0x0C, "f4": 0x0D}[array.dtype.str[1:]]
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def _write(folder: Path, form: str, x: Any, y: Any) -> Path:
    if form == "npz":
        np.savez(folder / "d.npz", x=x, y=y)
        return folder / "d.npz"
    if form == "npz-packed":
        np.savez_compressed(folder / "d.npz", images=x, labels=y)
        return folder / "d.npz"
    if form in ("npy", "npy-folder"):
        np.save(folder / "x.npy", x)
        np.save(folder / "y.npy", y)
        return folder if form == "npy-folder" else folder / "x.npy"
    suffix = ".gz" if form == "idx-gz" else ""
    pack = gzip.compress if suffix else bytes
    (folder / f"train-images-idx3-ubyte{suffix}").write_bytes(pack(_idx(x)))
    (folder / f"train-labels-idx1-ubyte{suffix}").write_bytes(pack(_idx(y.astype(np.uint8))))
    return folder


FORMS = ["npz", "npz-packed", "npy", "npy-folder", "idx", "idx-gz"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_batch(tmp_path: Path, form: str) -> None:
    x, y = _images((4, 5)), _labels()
    data = load_dataset(_write(tmp_path, form, x, y), (1, 4, 5), 3)
    batch = data.train.batch(np.array([7, 2]))
    assert (batch.x.dtype.name, batch.y.dtype.name) == ("float32", "int64")
    np.testing.assert_array_equal(batch.x, (x[[7, 2], None] * np.float32(1 / 255.0)).astype(np.float32))
    np.testing.assert_array_equal(batch.y, y[[7, 2]])
    assert (len(data.train), len(data.test)) == (N, 0)
    packed = form in ("npz-packed", "idx-gz")
    assert data.resident_bytes == (x.nbytes if packed else 0) + N + 20 * N  # labels, and the order of an epoch


def test_test_part_of_the_file_wins_over_holdout(tmp_path: Path) -> None:
    x, y = _images((2, 2)), _labels()
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x[:4], y_test=y[:4])
    data = load_dataset(tmp_path / "d.npz", (1, 2, 2), 3, holdout=0.5)
    assert (len(data.train), len(data.test)) == (N, 4)


def test_idx_test_files_are_found(tmp_path: Path) -> None:
    _write(tmp_path, "idx", _images((3, 3)), _labels())
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(_idx(_images((3, 3), 2)))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(_idx(_labels(2).astype(np.uint8)))
    for path in (tmp_path, tmp_path / "train-images-idx3-ubyte"):
        assert len(load_dataset(path, (1, 3, 3), 3).test) == 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("holdout", [None, 0.0, 0.25, 0.99])
def test_counts_are_those_of_the_loaded_data(tmp_path: Path, form: str, holdout: float | None) -> None:
    path = _write(tmp_path, form, _images((4, 5)), _labels())
    data = load_dataset(path, (1, 4, 5), 3, holdout=holdout)
    assert count_samples(path, holdout=holdout) == (len(data.train), len(data.test))


def test_counts_of_a_file_with_a_test_part_and_of_images(tmp_path: Path) -> None:
    x, y = _images((2, 2)), _labels()
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x[:4], y_test=y[:4])
    assert count_samples(tmp_path / "d.npz", holdout=0.5) == (N, 4)
    root = _image_folder(tmp_path / "images", {"cat": 3, "dog": 2})
    assert count_samples(root, holdout=0.4) == (3, 2)
    _image_folder(tmp_path / "split" / "train", {"0": 3, "1": 1})
    _image_folder(tmp_path / "split" / "val", {"0": 2})
    assert count_samples(tmp_path / "split", holdout=0.4) == (4, 2)


def test_data_without_samples_are_refused_before_there_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "d.npz", x=np.zeros((0, 2)), y=np.zeros(0))
    for name in ("empty", "d.npz"):
        with pytest.raises(DataError, match="no training samples"):
            count_samples(tmp_path / name)


def test_holdout_is_disjoint_complete_and_seeded(tmp_path: Path) -> None:
    x = np.arange(40, dtype=np.float32).reshape(40, 1)
    path = _write(tmp_path, "npz", x, np.zeros(40, np.int64))
    first = load_dataset(path, (1,), 2, holdout=0.25, seed=3)
    again = load_dataset(path, (1,), 2, holdout=0.25, seed=3)
    other = load_dataset(path, (1,), 2, holdout=0.25, seed=4)
    values = [np.concatenate([b.x[:, 0] for b in part.batches(7)]) for part in (first.train, first.test)]
    assert sorted(np.concatenate(values).tolist()) == x[:, 0].tolist()
    assert len(values[1]) == 10
    np.testing.assert_array_equal(values[1], again.test.batch(np.arange(10)).x[:, 0])
    assert values[1].tolist() != other.test.batch(np.arange(10)).x[:, 0].tolist()


def test_holdout_never_takes_the_last_training_sample(tmp_path: Path) -> None:
    path = _write(tmp_path, "npz", np.zeros((1, 2), np.float32), np.zeros(1, np.int64))
    data = load_dataset(path, (2,), 2, holdout=0.9)
    assert (len(data.train), len(data.test)) == (1, 0)


@pytest.mark.parametrize(
    ("stored", "wanted", "options"),
    [
        ((3, 4, 5), (3, 4, 5), {}),
        ((4, 5, 3), (3, 4, 5), {}),
        ((4, 5, 1), (1, 4, 5), {}),
        ((4, 5), (1, 4, 5), {}),
        ((20,), (1, 4, 5), {}),
        ((60,), (3, 4, 5), {"axes": "channels_first"}),
        ((3, 3, 3), (3, 3, 3), {}),
        ((3, 3, 3), (3, 3, 3), {"axes": "channels_last"}),
        ((128, 6), (6, 128), {}),
        ((6, 128), (6, 128), {}),
    ],
)
def test_axis_orders(tmp_path: Path, stored: tuple[int, ...], wanted: tuple[int, ...], options: dict[str, Any]) -> None:
    x = np.arange(2 * int(np.prod(stored)), dtype=np.float32).reshape(2, *stored)
    data = load_dataset(_write(tmp_path, "npz", x, np.array([0, 1])), wanted, 2, **options)
    moved = options.get("axes") == "channels_last" or (len(stored) == len(wanted) and stored != wanted)
    expected = (np.moveaxis(x, -1, 1) if moved else x).reshape(2, *wanted)
    np.testing.assert_array_equal(data.train.batch(np.array([0, 1])).x, expected)


def test_padding_and_normalisation(tmp_path: Path) -> None:
    x = _images((2, 4, 3))
    data = load_dataset(
        _write(tmp_path, "npz", x, _labels()), (3, 4, 6), 3, pad=True, mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0)
    )
    got = data.train.batch(np.arange(N)).x
    padded = np.zeros((N, 3, 4, 6))
    padded[:, :, 1:3, 1:5] = np.moveaxis(x, -1, 1) / 255.0
    scale = np.array([0.5, 1.0, 2.0]).reshape(3, 1, 1)
    np.testing.assert_allclose(got, (padded - np.array([0.5, 0.25, 0.0]).reshape(3, 1, 1)) / scale, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "y", "shape", "message"),
    [
        (np.zeros((4, 28, 28), np.uint8), [0] * 4, (1, 32, 32), r"\(28, 28\), the model takes \(1, 32, 32\)"),
        (np.zeros((4, 32, 32, 3), np.uint8), [0] * 4, (1, 32, 32), r"\(32, 32, 3\), the model takes"),
        (np.zeros((4, 48), np.float32), [0] * 4, (3, 4, 4), r"\(48\), the model takes \(3, 4, 4\)"),
        (np.zeros((4, 8, 8), np.float32), [0] * 4, (64,), r"the model takes \(64\)"),
        (np.zeros((4, 2), np.float32), [0, 1, 2, 3], (2,), "labels from 0 to 3, the model has classes 0 to 2"),
        (np.zeros((4, 2), np.float32), [0, 1, -1, 2], (2,), "labels from -1 to 2"),
        (np.zeros((4, 2), np.float32), [0, 1, 2], (2,), r"4 samples and labels of shape \(3,\)"),
        (np.zeros((4, 2), np.float32), np.eye(4, 3), (2,), r"shape \(4, 3\)"),
        (np.zeros((4, 2), np.float32), [0.0, 0.5, 1.0, 2.0], (2,), "no whole numbers"),
        (np.zeros((4, 2), np.float32), [0.0, np.nan, 1.0, 2.0], (2,), "no whole numbers"),
        (np.zeros((4, 2), np.float32), ["a", "b", "a", "b"], (2,), "labels of type <U1"),
        (np.zeros((4, 2), np.bool_), [0] * 4, (2,), "inputs of type bool"),
        (np.zeros((4, 2), np.complex64), [0] * 4, (2,), "inputs of type complex64"),
        (np.zeros((0, 2), np.float32), [], (2,), "no training samples"),
        (np.zeros(4, np.float32), [0] * 4, (1,), r"inputs of shape \(4,\)"),
        (np.array([[0, 1], [0, np.nan], [0, 0]], np.float32), [0] * 3, (2,), "sample 1 holds a value"),
        (np.array([[0, 1], [0, 1], [-np.inf, 0]], np.float64), [0] * 3, (2,), "sample 2 holds a value"),
        (np.array([[0, 1e300]]), [0], (2,), "no finite float32"),
    ],
)
def test_unusable_data_are_refused(tmp_path: Path, x: Any, y: Any, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(_write(tmp_path, "npz", x, np.asarray(y)), shape, 3)
    assert str(tmp_path) in caught.value.message


def test_smaller_images_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(_write(tmp_path, "npz", _images((28, 28)), _labels()), (1, 32, 32), 3)
    assert "--pad" in caught.value.hint


@pytest.mark.parametrize("form", ["npz", "npz-packed", "npy"])
def test_object_arrays_are_never_unpickled(tmp_path: Path, form: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (sys.exit, (13,))

    x = np.empty(2, dtype=object)
    x[0] = Bomb()
    with pytest.raises(DataError, match="Python objects"):
        load_dataset(_write(tmp_path, form, x, _labels(2)), (1,), 3)


def test_compressed_bombs_are_refused_before_unpacking(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=np.zeros((3 << 20, 1), np.uint8), y=np.zeros(3 << 20, np.uint8))
    with pytest.raises(DataError, match=r"unpacks to 3.0 MiB, the limit is 2 MiB") as caught:
        load_dataset(tmp_path / "d.npz", (1,), 2, limit_mib=2)
    assert "np.savez" in caught.value.hint
    (tmp_path / "b.gz").write_bytes(gzip.compress(_idx(np.zeros((3 << 20, 1), np.uint8))))
    with pytest.raises(DataError, match="limit"):
        read_idx(tmp_path / "b.gz", 2)


def test_header_that_lies_about_the_size_is_refused(tmp_path: Path) -> None:
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1073741824, 1024), }".ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "d.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", head + text + b"1234")
    with pytest.raises(DataError, match="its header says"):
        read_npz(tmp_path / "d.npz", ["x"], 1 << 20)
    (tmp_path / "x.npy").write_bytes(head + text + b"1234")
    with pytest.raises(DataError, match="its header says"):
        read_npy(tmp_path / "x.npy")
    (tmp_path / "i.gz").write_bytes(gzip.compress(struct.pack(">BBBB2I", 0, 0, 8, 2, 1 << 10, 1 << 10) + b"12"))
    with pytest.raises(DataError, match="ends after 2 bytes"):
        read_idx(tmp_path / "i.gz", 64)


def test_mapped_npz_members_equal_what_numpy_reads(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {
        "a": np.arange(60, dtype=np.float32).reshape(3, 4, 5),
        "b": np.asfortranarray(np.arange(12, dtype=np.int16).reshape(3, 4)),
        "c": np.arange(7, dtype=">f8"),
        "e": np.zeros((0, 3), np.uint8),
    }
    np.savez(tmp_path / "d.npz", **arrays)
    got = read_npz(tmp_path / "d.npz", list(arrays), 0)
    for name, array in arrays.items():
        np.testing.assert_array_equal(got[name], array)
    with pytest.raises(DataError, match="no array"):
        read_npz(tmp_path / "d.npz", ["z"], 1)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_raise_only_data_errors(tmp_path: Path, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(FORMS))
    folder = tmp_path / form
    folder.mkdir(exist_ok=True)
    path = _write(folder, form, _images((3, 3)), _labels())
    victims = sorted(p for p in folder.iterdir() if p.is_file())
    victim = data.draw(st.sampled_from(victims))
    raw = bytearray(victim.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    victim.write_bytes(raw)
    with contextlib.suppress(DataError):
        loaded = load_dataset(path, (1, 3, 3), 3, limit_mib=1)
        batch = loaded.train.batch(np.arange(len(loaded.train)))
        assert np.isfinite(batch.x).all()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", b"1,2", "no kind that can be read"),
        ("d.npz", b"PK\x03\x04junk", "no .npz file"),
        ("d.npz", b"", "no .npz file"),
        ("x.npy", b"\x93NUMPY", "arrays x"),
    ],
)
def test_unknown_and_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_dataset(tmp_path / name, (1,), 2)


def test_missing_path_and_wrong_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data"):
        load_dataset(tmp_path / "absent", (1,), 2)
    np.savez(tmp_path / "d.npz", foo=np.zeros(3), bar=np.zeros(3))
    with pytest.raises(DataError, match="bar, foo") as caught:
        load_dataset(tmp_path / "d.npz", (1,), 2)
    assert "x_train" in caught.value.hint


@pytest.mark.parametrize("arguments", [{"holdout": 1.0}, {"holdout": -0.1}, {"mean": (1.0, 2.0)}, {"std": (0.0,)}])
def test_arguments_out_of_range(tmp_path: Path, arguments: dict[str, Any]) -> None:
    path = _write(tmp_path, "npz", _images((2, 2)), _labels())
    with pytest.raises(ConfigError):
        load_dataset(path, (1, 2, 2), 3, **arguments)


# ---------------------------------------------------------------------------------------------------- image folders


def _image_folder(root: Path, classes: dict[str, int], size: tuple[int, int] = (6, 5), mode: str = "RGB") -> Path:
    image = pytest.importorskip("PIL.Image", reason="fedzo[images] is not installed")
    for value, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for k in range(count):
            image.new(mode, size, color=tuple([10 * value + k] * 3) if mode == "RGB" else 10 * value + k).save(
                root / name / f"{k}.png"
            )
    return root


def test_image_folder_by_sorted_names(tmp_path: Path) -> None:
    root = _image_folder(tmp_path, {"cat": 2, "dog": 0, "emu": 1})
    data = load_dataset(root, (3, 5, 6), 3)
    batch = data.train.batch(np.arange(3))
    assert batch.y.tolist() == [0, 0, 2]
    np.testing.assert_allclose(batch.x[:, 0, 0, 0], np.array([0, 1, 20]) / 255.0, atol=1e-7)
    assert batch.x.shape == (3, 3, 5, 6)


def test_image_folder_by_numbers_with_splits_grey_and_resized(tmp_path: Path) -> None:
    _image_folder(tmp_path / "train", {"7": 2, "2": 1}, mode="L")
    _image_folder(tmp_path / "test", {"2": 1}, mode="L")
    data = load_dataset(tmp_path, (1, 8, 8), 10)
    assert data.train.labels.tolist() == [2, 7, 7]
    assert data.train.batch(np.arange(3)).x.shape == (3, 1, 8, 8)
    assert len(data.test) == 1


def test_image_folder_refusals(tmp_path: Path) -> None:
    root = _image_folder(tmp_path / "a", {"cat": 1, "dog": 1})
    with pytest.raises(DataError, match="2 class folders, the model has 3") as caught:
        load_dataset(root, (3, 5, 6), 3)
    assert "empty ones too" in caught.value.hint
    with pytest.raises(DataError, match=r"samples of shape \(4,\)"):
        load_dataset(root, (4,), 2)
    with pytest.raises(DataError, match="MiB decoded"):
        load_dataset(root, (3, 600, 600), 2, limit_mib=2)
    (root / "cat" / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad\.png cannot be decoded"):
        load_dataset(root, (3, 5, 6), 2)


def test_image_folder_without_pillow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _image_folder(tmp_path, {"0": 1, "1": 1})
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError) as caught:
        load_dataset(root, (3, 5, 6), 2)
    assert caught.value.hint == 'pip install "fedzo[images]"'


# ----------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("n", "batch"), [(10, 3), (10, 5), (10, 10), (7, 16), (1, 4), (97, 32)])
def test_every_sample_comes_once_an_epoch(n: int, batch: int) -> None:
    size = min(n, batch)
    steps = n  # n steps are exactly `size` epochs
    stream = np.concatenate([batch_indices(5, step, 2, n, batch) for step in range(steps)])
    assert stream.shape == (size * n,)
    for epoch in stream.reshape(size, n):
        assert sorted(epoch.tolist()) == list(range(n))


def test_batches_depend_on_seed_device_and_step_only() -> None:
    first = batch_indices(5, 3, 1, 1000, 32)
    assert first.dtype == np.int64
    first[:] = 0  # owned by the caller: the next call is not affected
    again = batch_indices(5, 3, 1, 1000, 32)
    assert again.any()
    for other in (batch_indices(6, 3, 1, 1000, 32), batch_indices(5, 3, 2, 1000, 32), batch_indices(5, 4, 1, 1000, 32)):
        assert other.tolist() != again.tolist()


def test_golden_batch_indices() -> None:
    """A device that is updated between two rounds must go on with the same batches."""
    assert batch_indices(1, 0, 0, 20, 8).tolist() == GOLDEN[0]
    assert batch_indices(1, 1234567, 3, 20, 8).tolist() == GOLDEN[1]


GOLDEN = (
    [2, 16, 1, 4, 7, 18, 10, 14],
    [14, 16, 19, 3, 18, 8, 3, 15],
)


@pytest.mark.parametrize("arguments", [(1, -1, 0, 5, 2), (1, 0, 0, 0, 2), (1, 0, 0, 5, 0)])
def test_batch_arguments_out_of_range(arguments: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(ConfigError):
        batch_indices(*arguments)


def test_a_file_without_rights_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 1, 4, 4), np.float32), y=np.arange(2))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("zipfile.ZipFile", refuse)
    with pytest.raises(DataError, match=r"a\.npz cannot be read: Permission denied$") as caught:
        load_dataset(tmp_path / "a.npz", (1, 4, 4), 2)
    assert "right to read" in caught.value.hint
