"""The zip reader: every form torch.save may write, and no other."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from optlm.checkpoint.torchzip import read_torch
from optlm.checkpoint.ziparchive import MAX_ENTRIES, open_zip
from optlm.errors import CheckpointError

ENTRIES = {"a/data.pkl": b"first", "a/data/0": bytes(range(200)), "a/empty": b""}


def write(path: Path, entries: dict[str, bytes] | None = None) -> bytearray:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in (entries or ENTRIES).items():
            file.writestr(zipfile.ZipInfo(name), data)
    return bytearray(path.read_bytes())


def test_entries_are_views_of_the_file(tmp_path: Path) -> None:
    write(tmp_path / "x.zip")
    found = open_zip(tmp_path / "x.zip")
    assert {name: view.tobytes() for name, view in found.items()} == ENTRIES
    assert not any(view.flags.owndata for view in found.values())


def test_64_bit_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What files above 4 GB have, here written small."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 3)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", allowZip64=True) as file:
        for name, data in ENTRIES.items():
            file.writestr(zipfile.ZipInfo(name), data)
    raw = bytearray((tmp_path / "x.zip").read_bytes())
    struct.pack_into("<HHLL", raw, raw.rindex(END) + 8, *[0xFFFF] * 2, *[0xFFFFFFFF] * 2)
    (tmp_path / "x.zip").write_bytes(raw)
    found = open_zip(tmp_path / "x.zip")
    assert {name: view.tobytes() for name, view in found.items()} == ENTRIES
    for wrong in (b"PK\x06\x06", b"PK\x06\x07"):
        (tmp_path / "x.zip").write_bytes(raw.replace(wrong, b"PKxx"))
        with pytest.raises(CheckpointError, match="lacks the 64-bit zip directory"):
            open_zip(tmp_path / "x.zip")
    (tmp_path / "x.zip").write_bytes(raw.replace(b"\x01\x00\x10\x00", b"\x09\x00\x10\x00"))
    with pytest.raises(CheckpointError, match="lacks its 64-bit sizes"):
        open_zip(tmp_path / "x.zip")


def test_torch_records_of_2_gb_and_more_have_such_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.arange(10.0)
    torch.save({"a": values}, tmp_path / "x.bin")
    with zipfile.ZipFile(tmp_path / "x.bin") as file:
        entries = {name: file.read(name) for name in file.namelist()}
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 3)
    write(tmp_path / "y.bin", entries)
    found = read_torch(tmp_path / "y.bin")["a"].raw()
    np.testing.assert_array_equal(found, values.numpy())


CENTRAL, END = b"PK\x01\x02", b"PK\x05\x06"


def _set(signature: bytes, offset: int, form: str, value: int) -> Callable[[bytearray], object]:
    """Overwrite a field of the last structure with this signature."""

    def change(raw: bytearray) -> None:
        struct.pack_into("<" + form, raw, raw.rindex(signature) + offset, value)

    return change


def _overlap(raw: bytearray) -> None:
    """The third entry's header moves into the data of the second, under the same name."""
    third = raw.rindex(b"PK\x03\x04")
    begin = raw.index(b"a/data/0") + 8
    raw[begin : begin + 37] = raw[third : third + 37]
    struct.pack_into("<L", raw, raw.rindex(CENTRAL) + 42, begin)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(END, 4, "H", 1), "one part of a zip file split"),
        (_set(END, 10, "H", 9), "is cut off"),
        (_set(END, 10, "H", 2), "belong to no entry"),
        (_set(END, 12, "L", 2**31), "limit is"),
        (_set(END, 16, "L", 2**20), "runs past its end"),
        (_set(END, 20, "H", 7), "bytes after its zip directory"),
        (_set(END, 10, "H", 0xFFFF), "lacks the 64-bit"),
        (_set(CENTRAL, 0, "L", 0), "broken zip directory"),
        (_set(CENTRAL, 8, "H", 1), "is encrypted"),
        (_set(CENTRAL, 10, "H", 8), "is compressed"),
        (_set(CENTRAL, 24, "L", 5), "claims 5 bytes and stores 0"),
        (_set(CENTRAL, 42, "L", 7), "is not where the directory says|overlap"),
        (_set(CENTRAL, 42, "L", 2**30), "begins past its end"),
        (
            lambda raw: raw.__setitem__(slice(raw.index(b"a/d"), raw.index(b"a/d") + 1), b"b"),
            "is not where",
        ),
        (_overlap, "overlap"),
    ],
)
def test_broken_structures_are_named(
    change: Callable[[bytearray], object], message: str, tmp_path: Path
) -> None:
    raw = write(tmp_path / "x.zip")
    change(raw)
    (tmp_path / "x.zip").write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        open_zip(tmp_path / "x.zip")


def test_an_entry_that_runs_into_the_directory(tmp_path: Path) -> None:
    raw = write(tmp_path / "x.zip", {"a/data/0": b"0123"})
    at = raw.rindex(CENTRAL)
    struct.pack_into("<LL", raw, at + 20, 400, 400)
    (tmp_path / "x.zip").write_bytes(raw)
    with pytest.raises(CheckpointError, match="runs past its end"):
        open_zip(tmp_path / "x.zip")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x", "a/../b", "a\\b", "a//b", "C:/x", "a/\u2066b", "a/b/"]
)
def test_names_that_are_no_plain_paths(name: str, tmp_path: Path) -> None:
    write(tmp_path / "x.zip", {name: b"x"})
    with pytest.raises(CheckpointError, match="zip-path"):
        open_zip(tmp_path / "x.zip")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_appears_twice(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("a/b", b"one")
        file.writestr("a/b", b"two")
    with pytest.raises(CheckpointError, match="twice"):
        open_zip(tmp_path / "x.zip")


def test_too_many_entries(tmp_path: Path) -> None:
    raw = write(tmp_path / "x.zip")
    end = raw.rindex(END)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
    wide = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, *[MAX_ENTRIES + 1] * 2, 0, 0)
    struct.pack_into("<H", raw, end + 10, 0xFFFF)
    (tmp_path / "x.zip").write_bytes(raw[:end] + wide + locator + raw[end:])
    with pytest.raises(CheckpointError, match=f"lists {MAX_ENTRIES + 1} entries"):
        open_zip(tmp_path / "x.zip")
