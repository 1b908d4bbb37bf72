import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from core.errors import UserError
from core.medmnist import SETS, SIZES, check_set, download, download_set, file_name
from core.modalities import MODALITIES

CONTENT = bytes(range(256)) * 4096  # 1 MiB: several chunks
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT with ranges; `asked` keeps the Range headers, `cut` breaks a transfer."""

    asked: ClassVar[list[str | None]] = []
    cut: ClassVar[int | None] = None
    ranges = True

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.asked.append(wanted)
        if "missing" in self.path:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: Handler.cut])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    Handler.asked, Handler.cut, Handler.ranges = [], None, True
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def quiet(done: int, total: int) -> None:
    pass


def test_a_file_arrives_whole_with_progress_and_is_not_fetched_twice(
    address: str, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    target = tmp_path / "deep" / "a.npz"
    download(f"{address}/a", target, MD5, lambda done, total: seen.append((done, total)))
    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == ["a.npz"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    download(f"{address}/a", target, MD5, quiet)
    assert Handler.asked == [None]


def test_a_broken_transfer_is_kept_and_continued(address: str, tmp_path: Path) -> None:
    Handler.cut = 700_000
    with pytest.raises(UserError, match=r"broke after 700,000 of 1,048,576 bytes.*it continues"):
        download(f"{address}/a", tmp_path / "a.npz", MD5, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz.partial"]
    Handler.cut = None
    seen: list[tuple[int, int]] = []
    download(f"{address}/a", tmp_path / "a.npz", MD5, lambda *args: seen.append(args))
    assert Handler.asked == [None, "bytes=700000-"]
    assert seen[0][0] > 700_000
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert (tmp_path / "a.npz").read_bytes() == CONTENT


def test_a_download_killed_before_the_rename_is_finished(address: str, tmp_path: Path) -> None:
    (tmp_path / "a.npz.partial").write_bytes(CONTENT)
    download(f"{address}/a", tmp_path / "a.npz", MD5, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_server_without_ranges_makes_it_start_over(address: str, tmp_path: Path) -> None:
    Handler.ranges = False
    (tmp_path / "a.npz.partial").write_bytes(CONTENT[:1000])
    download(f"{address}/a", tmp_path / "a.npz", MD5, quiet)
    assert (tmp_path / "a.npz").read_bytes() == CONTENT


def test_a_wrong_checksum_removes_what_arrived(address: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"expected MD5 {'0' * 32}, received {MD5}"):
        download(f"{address}/a", tmp_path / "a.npz", "0" * 32, quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_that_is_there_already_is_fetched_again(
    address: str, tmp_path: Path
) -> None:
    (tmp_path / "a.npz").write_bytes(b"damaged")
    download(f"{address}/a", tmp_path / "a.npz", MD5, quiet)
    assert (tmp_path / "a.npz").read_bytes() == CONTENT


def test_http_errors_and_a_server_that_is_down_are_one_line(address: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the server answered HTTP 404 \(Not Found\)"):
        download(f"{address}/missing", tmp_path / "a.npz", MD5, quiet)
    for nowhere in ("http://127.0.0.1:9/a", "http://no-such-host.invalid/a"):
        with pytest.raises(UserError, match=r"cannot be downloaded: .*check network and disk") as e:
            download(nowhere, tmp_path / "sub" / "a.npz", MD5, quiet)
        assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_the_sets_cover_the_seven_modalities_with_a_checksum_for_each_size() -> None:
    assert tuple(facts.modality for facts in SETS.values()) == MODALITIES
    sums = [facts.md5[size] for facts in SETS.values() for size in SIZES]
    assert len(set(sums)) == 28
    assert all(len(md5) == 32 and int(md5, 16) for md5 in sums)
    counts = {"organamnist": 11, "pathmnist": 9, "octmnist": 4, "dermamnist": 7, "retinamnist": 5}
    assert all(len(SETS[name].classes) == count for name, count in counts.items())


def test_official_names_are_used_and_others_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert file_name("octmnist", 28) == "octmnist.npz"
    assert file_name("octmnist", 224) == "octmnist_224.npz"
    for name, size in (("chestmnist", 28), ("octmnist", 32)):
        with pytest.raises(UserError, match=f"no MedMNIST set '{name}' at {size} px; sets: organ"):
            check_set(name, size)
    asked: list[object] = []
    monkeypatch.setattr("core.medmnist.download", lambda *args: asked.append(args))
    download_set(tmp_path, "breastmnist", 64, quiet)
    url = "https://zenodo.org/records/10519652/files/breastmnist_64.npz?download=1"
    md5 = "742edef2a1fd1524b2efff4bd7ba9364"
    assert asked == [(url, tmp_path / "breastmnist_64.npz", md5, quiet)]
