"""Finding the uncompressed entries of a zip file without copying or trusting any of it.

PyTorch stores every record uncompressed, so an entry is a range of the mapped file. Compressed,
encrypted, overlapping or badly named entries are refused: nothing is ever inflated or written
anywhere.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

from optlm.checkpoint.faults import fault_error
from optlm.checkpoint.files import map_file
from optlm.checkpoint.tensor import Array
from optlm.errors import CheckpointError

MAX_ENTRIES = 100_000  # OPT-175B in one part has 1,540 tensors
MAX_DIRECTORY_BYTES = 32 * 2**20

_END = struct.Struct("<4s4H2LH")  # end of central directory
_LOCATOR = struct.Struct("<4sLQL")  # where its 64-bit form is
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.+@ -]+(/[A-Za-z0-9_.+@ -]+)*")


@dataclass(frozen=True, kw_only=True)
class _Entry:
    name: str
    header: int  # offset of the local header
    size: int


@dataclass(frozen=True, kw_only=True)
class _Directory:
    entries: int
    size: int
    offset: int


def open_zip(path: Path) -> dict[str, Array]:
    """Entry name to its bytes, a view of the mapped file.

    Raises:
        CheckpointError: not a zip file, cut off, or with an entry that is refused.
    """
    data = map_file(path)
    if data[:4].tobytes() != b"PK\x03\x04":
        raise _not_a_zip(path, data)
    directory = _find_directory(path, data)
    entries = _read_directory(path, data, directory)
    views = {}
    reached, previous = 0, ""
    for entry in sorted(entries, key=lambda entry: entry.header):
        if entry.header < reached:
            raise _bad(path, f"the entries {previous!r} and {entry.name!r} overlap")
        begin = _data_offset(path, data, entry, directory.offset)
        reached, previous = begin + entry.size, entry.name
        if reached > directory.offset:
            raise fault_error("truncated", path, f"the entry {entry.name!r} runs past its end")
        views[entry.name] = data[begin:reached]
    return views


def _bad(path: Path, message: str) -> CheckpointError:
    return fault_error("zip", path, message)


def _not_a_zip(path: Path, data: Array) -> CheckpointError:
    if data[:1].tobytes() == b"\x80":
        return fault_error(
            "legacy-torch",
            path,
            "was written by PyTorch before 1.6; load it there and save it again as safetensors",
        )
    if not data.size:
        return fault_error("truncated", path, "is empty")
    return _bad(path, "is not a zip file, as torch.save writes")


def _find_directory(path: Path, data: Array) -> _Directory:
    tail = data[max(0, data.size - _END.size - 0xFFFF) :].tobytes()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise fault_error("truncated", path, "has no zip directory at its end; it seems cut off")
    _, disk, first_disk, here, entries, size, offset, comment = _END.unpack_from(tail, at)
    end = data.size - len(tail) + at
    if at + _END.size + comment != len(tail):
        raise _bad(path, "has bytes after its zip directory")
    if 0xFFFF in (here, entries) or 0xFFFFFFFF in (size, offset):
        disk, first_disk, entries, size, offset = _find_directory64(path, data, end)
    if disk or first_disk:
        raise _bad(path, "is one part of a zip file split over several")
    if entries > MAX_ENTRIES or size > MAX_DIRECTORY_BYTES:
        raise _bad(path, f"lists {entries} entries in {size} bytes; the limit is {MAX_ENTRIES}")
    if offset + size > end:
        raise fault_error("truncated", path, "has a zip directory that runs past its end")
    return _Directory(entries=entries, size=size, offset=offset)


def _find_directory64(path: Path, data: Array, end: int) -> tuple[int, int, int, int, int]:
    begin = end - _LOCATOR.size
    if begin < 0:
        raise _bad(path, "lacks the 64-bit zip directory it refers to")
    signature, _, at, _ = _LOCATOR.unpack_from(data[begin:end].tobytes())
    if signature != b"PK\x06\x07" or at + _END64.size > begin:
        raise _bad(path, "lacks the 64-bit zip directory it refers to")
    fields = _END64.unpack_from(data[at : at + _END64.size].tobytes())
    if fields[0] != b"PK\x06\x06":
        raise _bad(path, "lacks the 64-bit zip directory it refers to")
    _, _, _, _, disk, first_disk, _, entries, size, offset = fields
    return disk, first_disk, entries, size, offset


def _read_directory(path: Path, data: Array, directory: _Directory) -> list[_Entry]:
    raw = data[directory.offset : directory.offset + directory.size].tobytes()
    entries: dict[str, _Entry] = {}
    at = 0
    for _ in range(directory.entries):
        if at + _CENTRAL.size > len(raw):
            raise fault_error("truncated", path, "has a zip directory that is cut off")
        entry, at = _read_entry(path, raw, at)
        if entry.name in entries:
            raise _bad(path, f"names the entry {entry.name!r} twice")
        entries[entry.name] = entry
    if at != len(raw):
        raise _bad(path, "has a zip directory with bytes that belong to no entry")
    return list(entries.values())


def _read_entry(path: Path, raw: bytes, at: int) -> tuple[_Entry, int]:
    fields = _CENTRAL.unpack_from(raw, at)
    flags, method, stored, size = fields[3], fields[4], fields[8], fields[9]
    name_length, extra_length, comment_length, header = *fields[10:13], fields[16]
    name_at = at + _CENTRAL.size
    extra_at = name_at + name_length
    following = extra_at + extra_length + comment_length
    if fields[0] != b"PK\x01\x02" or following > len(raw):
        raise _bad(path, "has a broken zip directory")
    name = _checked_name(path, raw[name_at:extra_at])
    if flags & 1:
        raise _bad(path, f"the entry {name!r} is encrypted")
    if method:
        raise _bad(path, f"the entry {name!r} is compressed; torch.save stores entries as they are")
    extra = raw[extra_at : extra_at + extra_length]
    size, stored, header = _wide_fields(path, name, extra, [size, stored, header])
    if size != stored:
        raise _bad(path, f"the entry {name!r} claims {size} bytes and stores {stored}")
    return _Entry(name=name, header=header, size=size), following


def _checked_name(path: Path, raw: bytes) -> str:
    name = raw.decode("utf-8", errors="replace")
    if not _PLAIN_NAME.fullmatch(name) or ".." in name.split("/"):
        raise fault_error(
            "zip-path", path, f"the entry name {name[:80]!r} is not a plain relative path"
        )
    return name


def _wide_fields(path: Path, name: str, extra: bytes, fields: list[int]) -> list[int]:
    """Replace each 0xFFFFFFFF by its 64-bit value from the extra field with id 1."""
    if 0xFFFFFFFF not in fields:
        return fields
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        wide = extra[at + 4 : at + 4 + length]
        at += 4 + length
        wanted = fields.count(0xFFFFFFFF)
        if kind == 1 and len(wide) >= 8 * wanted:
            values = iter(struct.unpack_from(f"<{wanted}Q", wide))
            return [next(values) if field == 0xFFFFFFFF else field for field in fields]
    raise _bad(path, f"the entry {name!r} lacks its 64-bit sizes")


def _data_offset(path: Path, data: Array, entry: _Entry, limit: int) -> int:
    begin = entry.header + _LOCAL.size
    if begin > limit:
        raise fault_error("truncated", path, f"the entry {entry.name!r} begins past its end")
    fields = _LOCAL.unpack_from(data[entry.header : begin].tobytes())
    name = data[begin : begin + fields[9]].tobytes()
    if fields[0] != b"PK\x03\x04" or name != entry.name.encode():
        raise _bad(path, f"the entry {entry.name!r} is not where the directory says")
    return int(begin + fields[9] + fields[10])
