"""Arrays from files of users: ``.npz``, ``.npy`` and IDX, read without trusting a header.

No reader unpickles, allocates more than the limit, or allocates for a size that the file does not hold. Uncompressed
arrays are mapped, not read: their pages leave the process once they were read (see :mod:`.mapped`), so a board with
little RAM can train on a file larger than its RAM.

The IDX format is that of the MNIST files: http://yann.lecun.com/exdb/mnist (big-endian header, then the values).
"""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from ...protocol.errors import DataError

__all__ = ["member_names", "read_idx", "read_npy", "read_npz"]

_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_BROKEN_FILE = (
    OSError,
    EOFError,
    OverflowError,
    ValueError,
    zlib.error,
    zipfile.BadZipFile,
    RuntimeError,
    struct.error,
)


def member_names(path: Path) -> set[str]:
    """Names of the arrays in a ``.npz`` file.

    Raises:
        DataError: It is no zip file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {name[:-4] for name in archive.namelist() if name.endswith(".npy")}
    except _BROKEN_FILE as error:
        raise _unusable(path, error, "is no .npz file") from None


def read_npz(path: Path, names: Iterable[str], limit_mib: int) -> dict[str, NDArray[Any]]:
    """Arrays of a ``.npz`` file: mapped when it was written by ``np.savez``, read when compressed.

    Args:
        path: The file.
        names: Which arrays.
        limit_mib: Largest size of one compressed array in memory.

    Returns:
        The arrays by name, read-only when mapped.

    Raises:
        DataError: The file is damaged, an array is over the limit, or it holds Python objects.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                info = archive.getinfo(f"{name}.npy")
                label = f"{path}[{name}]"
                with archive.open(info) as member:
                    shape, fortran, dtype, header_bytes = _npy_header(member, label)
                    size = math.prod(shape) * dtype.itemsize
                    if header_bytes + size != info.file_size:
                        raise DataError(f"{label} has {info.file_size} bytes, its header says {header_bytes + size}")
                    if info.compress_type == zipfile.ZIP_STORED:
                        start = _data_offset(path, info) + header_bytes
                        arrays[name] = _mapped(path, start, shape, fortran, dtype)
                    else:
                        flat = _read_exactly(member, size, limit_mib, label)
                        arrays[name] = flat.view(dtype).reshape(shape, order="F" if fortran else "C")
    except KeyError as error:
        raise DataError(f"{path} has no array {error}") from None
    except _BROKEN_FILE as error:
        raise _unusable(path, error, "is damaged") from None
    return arrays


def read_npy(path: Path) -> NDArray[Any]:
    """A ``.npy`` file, mapped and read-only.

    Raises:
        DataError: The file is missing or damaged, or it holds Python objects.
    """
    try:
        with path.open("rb") as file:
            shape, fortran, dtype, header_bytes = _npy_header(file, str(path))
        size = math.prod(shape) * dtype.itemsize
        if path.stat().st_size != header_bytes + size:
            raise DataError(f"{path} has {path.stat().st_size} bytes, its header says {header_bytes + size}")
        return _mapped(path, header_bytes, shape, fortran, dtype)
    except _BROKEN_FILE as error:
        raise _unusable(path, error, "is no .npy file") from None


def read_idx(path: Path, limit_mib: int) -> NDArray[Any]:
    """An IDX file, mapped; or a ``.gz`` of one, read into memory.

    Raises:
        DataError: The file is missing, damaged or, compressed, over the limit.
    """
    packed = path.suffix == ".gz"
    try:
        with path.open("rb") as raw:
            file: IO[bytes] = cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if packed else raw
            magic = file.read(4)
            if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_TYPES or not 1 <= magic[3] <= 8:
                raise DataError(f"{path} is no IDX file: it starts with {magic.hex() or 'nothing'}")
            dtype = np.dtype(_IDX_TYPES[magic[2]])
            shape = struct.unpack(f">{magic[3]}I", file.read(4 * magic[3]))
            size = math.prod(shape) * dtype.itemsize
            if packed:
                array = _read_exactly(file, size, limit_mib, str(path)).view(dtype).reshape(shape)
                if file.read(1):
                    raise DataError(f"{path} holds more than the {size} bytes that its header says")
                return array
        start = 4 + 4 * len(shape)
        if path.stat().st_size != start + size:
            raise DataError(f"{path} has {path.stat().st_size} bytes, its header says {start + size}")
        return _mapped(path, start, shape, False, dtype)
    except _BROKEN_FILE as error:
        raise _unusable(path, error, "is damaged") from None


def _unusable(path: Path, error: Exception, what: str) -> DataError:
    if isinstance(error, PermissionError):
        return DataError(f"{path} cannot be read: {error.strerror}", hint="give this user the right to read it")
    return DataError(f"{path} {what}: {error}")


def _npy_header(file: IO[bytes], label: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    except Exception as error:
        # numpy tokenises the header as Python text, which fails in a dozen ways.
        raise DataError(f"{label} is no .npy array: {str(error).splitlines()[0] if str(error) else error!r}") from error
    if dtype.hasobject:
        raise DataError(
            f"{label} holds Python objects, which are never loaded",
            hint="store numbers: np.savez(path, x=np.stack(list_of_arrays), y=labels)",
        )
    if any(n < 0 for n in shape):
        raise DataError(f"{label} has the impossible shape {shape}")
    return tuple(shape), bool(fortran), np.dtype(dtype), file.tell()


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored member start; the central directory does not say."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if magic != b"PK\x03\x04":
        raise DataError(f"{path} is damaged: {info.filename} has no local header")
    return int(info.header_offset) + _LOCAL_HEADER.size + int(name_bytes) + int(extra_bytes)


def _mapped(path: Path, start: int, shape: tuple[int, ...], fortran: bool, dtype: np.dtype[Any]) -> NDArray[Any]:
    if math.prod(shape) == 0:
        return np.empty(shape, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape, order="F" if fortran else "C")


def _read_exactly(file: IO[bytes], size: int, limit_mib: int, label: str) -> NDArray[np.uint8]:
    if size > limit_mib << 20:
        raise DataError(
            f"{label} unpacks to {size / 2**20:.1f} MiB, the limit is {limit_mib} MiB",
            hint="write it uncompressed (np.savez or np.save): then it is mapped and takes no memory",
        )
    # Pages are touched only as bytes come, so a header that lies costs address space, not memory.
    out = np.empty(size, dtype=np.uint8)
    done = 0
    while done < size:
        part = file.read(min(size - done, 1 << 20))
        if not part:
            raise DataError(f"{label} ends after {done} bytes, its header says {size}")
        out[done : done + len(part)] = np.frombuffer(part, dtype=np.uint8)
        done += len(part)
    return out
