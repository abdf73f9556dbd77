"""Files are whole or not there; stores know what they are."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from openmm_hvpcg import storage
from openmm_hvpcg._version import __version__
from openmm_hvpcg.errors import DataError, StorageError
from openmm_hvpcg.units import UNITS

Usage = namedtuple("Usage", "total used free")


def write_and_fail(path: Path, error: BaseException) -> None:
    with storage.atomic_path(path) as temporary:
        temporary.write_text("half of the ne")
        raise error


class TestAtomicPath:
    def test_new_file(self, tmp_path: Path) -> None:
        target = tmp_path / "deep" / "down" / "a.txt"
        storage.write_text(target, "µ\n")
        assert target.read_bytes() == "µ\n".encode()
        assert os.listdir(target.parent) == ["a.txt"]

    def test_failure_leaves_the_old_file_and_nothing_else(self, tmp_path: Path) -> None:
        target = tmp_path / "a.txt"
        target.write_text("old")
        with pytest.raises(ZeroDivisionError):
            write_and_fail(target, ZeroDivisionError())
        assert target.read_text() == "old"
        assert os.listdir(tmp_path) == ["a.txt"]

    def test_old_file_stays_until_the_end(self, tmp_path: Path) -> None:
        target = tmp_path / "a.txt"
        target.write_text("old")
        with storage.atomic_path(target) as temporary:
            temporary.write_text("new")
            assert target.read_text() == "old"
            assert temporary.suffix == ".txt"  # mdtraj and numpy choose the format by it
        assert target.read_text() == "new"

    def test_json_that_cannot_be_written_keeps_the_old(self, tmp_path: Path) -> None:
        target = tmp_path / "a.json"
        storage.write_json(target, {"b": 1, "a": [2.5, None]})
        assert list(json.loads(target.read_text())) == ["b", "a"]
        with pytest.raises(TypeError):
            storage.write_json(target, {"b": object()})
        assert json.loads(target.read_text())["b"] == 1
        assert os.listdir(tmp_path) == ["a.json"]

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM])
    def test_disk_errors_are_explained(self, tmp_path: Path, number: int) -> None:
        with pytest.raises(StorageError, match=r"a\.txt") as caught:
            write_and_fail(tmp_path / "a.txt", OSError(number, os.strerror(number)))
        assert caught.value.__cause__ is not None
        assert os.listdir(tmp_path) == []

    def test_other_os_errors_pass(self, tmp_path: Path) -> None:
        with pytest.raises(ConnectionResetError):
            write_and_fail(tmp_path / "a.txt", ConnectionResetError(errno.ECONNRESET, "reset"))

    def test_file_in_the_place_of_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        for target in (tmp_path / "file" / "a.txt", tmp_path / "file" / "deep" / "a.txt"):
            with pytest.raises(StorageError, match="in the way"):
                storage.write_text(target, "x")
        (tmp_path / "folder").mkdir()
        with pytest.raises(StorageError, match="in the way"):
            storage.write_text(tmp_path / "folder", "x")
        assert (tmp_path / "file").read_text() == "mine"
        assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


class TestFreeSpace:
    def test_enough_and_not_enough(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def usage(path: Path) -> Usage:
            asked.append(path)
            return Usage(0, 0, 1_000_000)

        monkeypatch.setattr(shutil, "disk_usage", usage)
        storage.check_free_space(tmp_path / "not" / "there" / "yet", 1_000_000)
        assert asked == [tmp_path]  # the nearest folder that exists
        with pytest.raises(StorageError, match=r"expected 2\.0 MB free, got 1\.0 MB"):
            storage.check_free_space(tmp_path / "x", 2_000_000)

    def test_this_disk_is_not_that_big(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="not enough disk space"):
            storage.check_free_space(tmp_path, 2**70)


class TestHash:
    def test_never_changes(self) -> None:
        # Hashes are stored in files: another value would cut old datasets off from their inputs. Reference: sha256sum.
        assert storage.compute_hash("abc") == storage.compute_hash(b"abc")
        # printf 'abc\0' | sha256sum
        assert storage.compute_hash("abc").startswith("dc1114cd074914bd872cc1f9a23ec910")
        # printf '<i8(2,)\1\0\0\0\0\0\0\0\2\0\0\0\0\0\0\0\0' | sha256sum
        assert storage.compute_hash(np.array([1, 2])).startswith("6a1f6673133a1a341ba0154347edabda")

    def test_parts_are_told_apart(self) -> None:
        x = np.arange(6.0)
        hashes = {
            storage.compute_hash(*parts)
            for parts in (
                ("ab", "c"),
                ("a", "bc"),
                ("abc",),
                (x,),
                (x.reshape(2, 3),),
                (x.reshape(3, 2),),
                (x.astype(np.float32),),
                (x + 1e-12,),
                (x, ""),
            )
        }
        assert len(hashes) == 9

    def test_memory_layout_does_not_matter(self) -> None:
        x = np.arange(12.0).reshape(3, 4)
        assert storage.compute_hash(np.asfortranarray(x)) == storage.compute_hash(x)
        assert storage.compute_hash(np.repeat(x, 2, axis=1)[:, ::2]) == storage.compute_hash(x)

    @settings(deadline=None, derandomize=True)
    @given(st.lists(st.binary(max_size=8), max_size=4))
    def test_is_a_function_of_the_parts(self, parts: list[bytes]) -> None:
        assert storage.compute_hash(*parts) == storage.compute_hash(*(bytes(p) for p in parts))
        assert storage.compute_hash(*parts) != storage.compute_hash(*parts, b"")

    def test_file(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"abc")
        # FIPS 180-2, example B.1
        assert storage.hash_file(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")


class TestStore:
    def create(self, path: Path, **attributes: Any) -> Any:
        return storage.create_store(path, "frames", 3, attributes)

    def edit(self, path: Path, **attributes: Any) -> None:
        zarr.open_group(str(path), mode="r+").attrs.update(attributes)

    def test_header(self, tmp_path: Path) -> None:
        self.create(tmp_path / "a.zarr", colour="blue")
        attributes = dict(storage.open_store(tmp_path / "a.zarr", "frames", 3).attrs)
        assert attributes == {
            "format": "openmm-hvpcg/frames",
            "format_version": 3,
            "units": UNITS,
            "package_version": __version__,
            "colour": "blue",
        }

    def test_does_not_overwrite(self, tmp_path: Path) -> None:
        self.create(tmp_path / "a.zarr", colour="blue")
        with pytest.raises(StorageError, match="already exists"):
            self.create(tmp_path / "a.zarr", colour="red")
        assert storage.open_store(tmp_path / "a.zarr", "frames", 3).attrs["colour"] == "blue"
        assert os.listdir(tmp_path) == ["a.zarr"]

    def test_failure_leaves_nothing(self, tmp_path: Path) -> None:
        def fail(group: Any) -> None:
            group.create_array("x", data=np.arange(3))
            raise OSError(errno.ENOSPC, "no space left on device")

        with pytest.raises(StorageError, match="no space left"):
            storage.create_store(tmp_path / "a.zarr", "frames", 3, {}, fail)
        assert os.listdir(tmp_path) == []

    def test_arrays_are_there_from_the_start(self, tmp_path: Path) -> None:
        def add(group: Any) -> None:
            assert not (tmp_path / "a.zarr").exists()
            group.create_array("x", data=np.arange(3))

        group = storage.create_store(tmp_path / "a.zarr", "frames", 3, {}, add)
        assert storage.read_array(group, "x", "").tolist() == [0, 1, 2]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"format": "openmm-hvpcg/labels"},
                "wrong kind of file: expected openmm-hvpcg/frames, got openmm-hvpcg/labels",
            ),
            ({"format_version": 4}, "too new: expected 3, got 4. Upgrade"),
            ({"format_version": 2}, "not supported: expected 3, got 2"),
            ({"format_version": "3"}, "not supported"),
            ({"units": {**UNITS, "length": "angstrom"}}, "units differ: expected .*nm.*got .*angstrom"),
            ({"units": None}, "units differ"),
        ],
    )
    def test_wrong_header(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        self.create(tmp_path / "a.zarr")
        self.edit(tmp_path / "a.zarr", **change)
        with pytest.raises(DataError, match=message):
            storage.open_store(tmp_path / "a.zarr", "frames", 3)

    def test_not_a_store(self, tmp_path: Path) -> None:
        (tmp_path / "text").write_text("hello")
        (tmp_path / "folder").mkdir()
        zarr.open_group(str(tmp_path / "foreign"), mode="w")
        self.create(tmp_path / "damaged")
        (tmp_path / "damaged" / "zarr.json").write_text("{")
        for name, message in {
            "text": "not a readable zarr group",
            "folder": "not a readable zarr group",
            "foreign": "wrong kind of file: .* got none",
            "damaged": "not a readable zarr group",
            "missing": "there is no frames store",
        }.items():
            with pytest.raises(DataError, match=message):
                storage.open_store(tmp_path / name, "frames", 3)


class TestReadArray:
    @pytest.fixture
    def group(self, tmp_path: Path) -> Any:
        group = storage.create_store(tmp_path / "a.zarr", "frames", 1, {})
        group.create_array("x", data=np.arange(12.0).reshape(3, 4), chunks=(2, 4))
        group.create_group("inner")
        return group

    def test_reads_whole(self, group: Any) -> None:
        for shape in (None, (3, 4), (None, 4)):
            assert storage.read_array(group, "x", "a", shape).tolist() == np.arange(12.0).reshape(3, 4).tolist()

    @pytest.mark.parametrize("shape", [(3, 5), (3,), (3, 4, 1), (None, 3)])
    def test_wrong_shape(self, group: Any, shape: tuple[int | None, ...]) -> None:
        with pytest.raises(DataError, match=r"'x' has the wrong shape: .* got \(3, 4\)"):
            storage.read_array(group, "x", "a", shape)

    def test_missing_or_no_array(self, group: Any) -> None:
        with pytest.raises(DataError, match="'y' is missing"):
            storage.read_array(group, "y", "a")
        with pytest.raises(DataError, match="'inner' is damaged"):
            storage.read_array(group, "inner", "a")

    @pytest.mark.parametrize("keep", [0, 5, -1])
    def test_cut_chunk(self, group: Any, tmp_path: Path, keep: int) -> None:
        chunk = tmp_path / "a.zarr" / "x" / "c" / "1" / "0"
        chunk.write_bytes(chunk.read_bytes()[:keep])
        with pytest.raises(DataError, match=r"a\.zarr: array 'x' is damaged"):
            storage.read_array(group, "x", tmp_path / "a.zarr")
