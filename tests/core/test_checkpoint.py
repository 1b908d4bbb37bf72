import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from core.checkpoint import (
    commit_directory,
    load_arrays,
    save_arrays,
    sha256_arrays,
    sha256_file,
    write_atomically,
)
from core.errors import UserError


def test_arrays_come_back_with_their_bits_and_metadata(tmp_path: Path) -> None:
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3).T, "a": np.array(7, np.int64)}
    digest = save_arrays(tmp_path / "x.safetensors", arrays, {"round": "3"})
    loaded, metadata = load_arrays(tmp_path / "x.safetensors")
    assert digest == sha256_file(tmp_path / "x.safetensors")
    assert sha256_arrays(loaded) == sha256_arrays(arrays)
    assert metadata == {"round": "3"}


def test_equal_contents_give_equal_files_in_every_process(tmp_path: Path) -> None:
    program = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from core.checkpoint import save_arrays\n"
        "print(save_arrays(Path(sys.argv[1]), {'x': np.ones((3, 5), np.float32), 'y': np.ones(1)},"
        " {name: name for name in 'abcdefgh'}))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "x.safetensors")]
    digests = {subprocess.run(command, capture_output=True, check=True).stdout for _ in range(4)}
    assert len(digests) == 1
    loaded, metadata = load_arrays(tmp_path / "x.safetensors")
    assert loaded["x"].tolist() == np.ones((3, 5)).tolist()
    assert metadata == {name: name for name in "abcdefgh"}


def test_a_file_is_what_the_safetensors_library_would_write(tmp_path: Path) -> None:
    names = "bool uint8 int8 int16 uint16 float16 int32 uint32 float32 float64 int64 uint64"
    arrays = {f"{n[-2:]}/{n}": np.arange(3).astype(n) for n in names.split()}
    arrays |= {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 4), np.float32)}
    arrays |= {"columns": np.ones((2, 3), order="F"), "\u00e9": np.ones(1, np.float32)}
    for metadata in (None, {}, {"round": "3"}):
        save_arrays(tmp_path / "x", arrays, metadata)
        rows = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        assert (tmp_path / "x").read_bytes() == save(rows, metadata)


def test_big_endian_arrays_keep_their_values(tmp_path: Path) -> None:
    save_arrays(tmp_path / "x", {"x": np.arange(3, dtype=">f4")})
    assert load_arrays(tmp_path / "x")[0]["x"].tolist() == [0, 1, 2]


def test_a_digest_tells_names_shapes_and_types_apart() -> None:
    zeros = np.zeros(4, np.float32)
    others = [{"y": zeros}, {"x": zeros.reshape(2, 2)}, {"x": zeros.astype(np.int32)}]
    assert len({sha256_arrays(a) for a in [{"x": zeros}, *others]}) == 4


def test_a_torn_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "torn.safetensors"
    save_arrays(path, {"x": np.zeros(100, np.float32)})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"torn\.safetensors' is not a whole"):
        load_arrays(path)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    write_atomically(path, b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    aside, final = tmp_path / ".aside", tmp_path / "final"
    aside.mkdir()
    (aside / "file").write_text("1")
    commit_directory(aside, final)
    assert (final / "file").read_text() == "1"
    assert not aside.exists()


def test_a_private_file_is_its_owners_from_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: (seen.append(os.fstat(number).st_mode & 0o777), sync(number))
    )
    write_atomically(tmp_path / "key", b"secret", mode=0o600)
    assert seen[0] == 0o600
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
