"""Files of moments, in the safetensors format: 8 bytes of length, a JSON header, and then arrays.

Anything that reads safetensors reads them. The metadata describe the states, and everything else in
the header follows from them, so a reader works out the header that a file must have and compares.
The last tensor has a CRC-32 of the header and of each tensor before it.

A file is input from outside. Nothing in it is used before it is checked, and no number in it
decides how much memory is asked for before the size of the file confirms it.

References:
  Hugging Face, `safetensors <https://huggingface.co/docs/safetensors>`_
"""

import json
import math
import os
import struct
import zlib
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from . import _ext, _metadata
from ._ahead import ahead
from ._contents import Contents, Damaged, FilePart

_SUMS = "crc32"
_DTYPES = {"uint8": "U8", "uint16": "U16", "uint32": "U32", "float32": "F32"}
_MAX_HEADER = 100 * 2**20  # bytes, as in safetensors itself

# --- Writing -------------------------------------------------------------------------------------


def write(path: str, states: Sequence[Contents | None], **extra: Any) -> int:
    """Writes states into an existing, empty file. Several threads read, sum and write them at once.

    Args:
      path: the file.
      states: what to write; None for a state that was never updated.
      **extra: what else the metadata say, for `read` to return.

    Returns:
      The number of bytes written.
    """
    return _add_sums(path, _ext.write_arrays(path, _parts(states, extra)))


class Background:
    """The same while others go on. When it was made, nobody has to keep the states any more."""

    def __init__(self, path: str, states: Sequence[Contents | None], room: int, **extra: Any):
        """`room`: bytes of host memory for what the disk takes later."""
        self._path = path
        self._save = _ext.BackgroundSave(path, _parts(states, extra), room)

    def finish(self) -> int:
        """Waits for the rest, once; as `write`."""
        return _add_sums(self._path, self._save.finish())


def _parts(states: Sequence[Contents | None], extra: dict[str, Any]) -> list[Any]:
    """What a file consists of but for the checksums, as the extension takes it."""
    text = _encode_header(states, extra)
    return [struct.pack("<Q", len(text)), text, *map(_source_of, _metadata.entries_of(states))]


def _add_sums(path: str, sums: Sequence[int]) -> int:
    with open(path, "ab") as file:
        file.write(np.array(sums[1:], "<u4"))  # the length has none
        return file.tell()


def stream(file: BinaryIO, states: Sequence[Contents | None], **extra: Any) -> int:
    """The same, into something that takes bytes one after the other, such as a remote file."""
    text = _encode_header(states, extra)
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    sums, written = [zlib.crc32(text)], 8 + len(text)
    for data, crc in ahead(_metadata.entries_of(states), _read_entry, _nbytes_of):
        file.write(data)
        written += len(data)
        sums.append(crc)
    file.write(np.array(sums, "<u4").tobytes())
    return written + 4 * len(sums)


def _source_of(entry: _metadata.Entry) -> Any:
    """What an entry consists of, as the extension takes it."""
    data = entry.contents.data(entry.leaf, entry.box, entry.field.name)
    return np.ascontiguousarray(data) if isinstance(data, np.ndarray) else data


def _read_entry(entry: _metadata.Entry) -> tuple[memoryview, int]:
    """The bytes of an array, and their checksum."""
    array = entry.read()
    assert array.dtype == entry.field.dtype and array.shape == entry.shape, entry.key
    data = memoryview(np.ascontiguousarray(array).reshape(-1)).cast("B")
    return data, zlib.crc32(data)


def _nbytes_of(entry: _metadata.Entry) -> int:
    return entry.field.dtype.itemsize * math.prod(entry.shape)


def _encode_header(states: Sequence[Contents | None], extra: dict[str, Any]) -> bytes:
    header, _ = _layout(states)
    about = {"__metadata__": {"paged_optax": _metadata.encode(states, **extra)}}
    text = json.dumps(about | header).encode()
    return text + b" " * (-len(text) % 8)


def _layout(states: Sequence[Contents | None]) -> tuple[dict[str, Any], int]:
    """The entries of all tensors in the header, and the bytes of their data."""
    header: dict[str, Any] = {}
    end = 0

    def add(key: str, dtype: np.dtype, shape: Sequence[int]) -> None:
        nonlocal end
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[key] = {
            "dtype": _DTYPES[dtype.name],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }

    for entry in _metadata.entries_of(states):
        add(entry.key, entry.field.dtype, entry.shape)
    add(_SUMS, np.dtype(np.uint32), [1 + len(header)])
    return header, end


# --- Reading -------------------------------------------------------------------------------------


def read(path: str) -> tuple[list[Contents | None], dict[str, Any]]:
    """The states in a file, and what else its metadata say.

    Reads the header alone. An array is read, and its checksum compared, when it is asked for.

    Raises:
      Damaged: if the file is not complete and as it was written.
      ValueError: if a newer version of the library wrote it.
      OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            text = _read_header(file, size)
            found = json.loads(text)
            states, about = _metadata.decode(found.pop("__metadata__")["paged_optax"])
            header, data = _layout(states)
            _check(found, header, 8 + len(text) + data, size)
            begin = header.pop(_SUMS)["data_offsets"][0]
            file.seek(8 + len(text) + begin)
            sums = np.frombuffer(_read_exactly(file, data - begin), "<u4").tolist()
            if sums[0] != zlib.crc32(text):
                raise Damaged("the checksum of the header is wrong")
        except _metadata.Newer as error:
            raise ValueError(f"{path}: {error}") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise Damaged(f"{path} is damaged: {error}") from None
    entries = zip(header.items(), sums[1:], strict=True)
    parts = {key: _part(path, 8 + len(text), entry, crc) for (key, entry), crc in entries}
    return _metadata.with_data(states, parts), about


def _part(path: str, start: int, entry: dict[str, Any], crc: int) -> FilePart:
    begin, end = entry["data_offsets"]
    return FilePart(path, start + begin, end - begin, crc)


def _read_header(file: BinaryIO, size: int) -> bytes:
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if length > min(size - 8, _MAX_HEADER):
        raise Damaged("it is cut off in its header")
    return _read_exactly(file, length)


def _read_exactly(file: BinaryIO, nbytes: int) -> bytes:
    data = file.read(nbytes)
    if len(data) != nbytes:
        raise Damaged("it is cut off")
    return data


def _check(tensors: dict[str, Any], header: dict[str, Any], needed: int, size: int) -> None:
    """Compares the header with the one that follows from the metadata, and the size of the file."""
    if list(tensors) != list(header):
        raise Damaged("its tensors are not those that its metadata describe")
    for key, entry in header.items():
        if tensors[key] != entry:
            raise Damaged(f"{key} is not as its metadata describe it")
    if size != needed:
        raise Damaged(f"it has {size} bytes, and its header describes {needed}")
