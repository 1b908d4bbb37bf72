import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.__main__ import main
from core.modalities import MODALITIES
from core.shards import open_shard
from core.sites import open_sites

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a `fedmermed-site` command line; gives its exit status, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedmermed-site", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return (int(end.value.code or 0), *capfd.readouterr())

    return run


def images(folder: Path, count: int = 6) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = rng.integers(0, 256, (20, 24), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def one_line(errors: str) -> str:
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    return errors


def test_a_folder_becomes_a_shard_with_a_summary_and_a_sheet(site: Run, tmp_path: Path) -> None:
    images(tmp_path / "export" / "oct" / "drusen")
    images(tmp_path / "export" / "oct" / "normal", 3)
    (tmp_path / "export" / "notes.txt").write_text("no image")
    options = ("--px", 16, "--labels", "folder", "--duplicates", "keep", "--jobs", 1)
    status, output, _ = site("prepare", tmp_path / "export", tmp_path / "shard", *options)
    assert status == 0
    assert "OCT" in output
    assert "9 pictures of 9 patients are ready to train" in " ".join(output.split())
    assert f"1 of 10 files gave no picture; each with its reason: {tmp_path}" in output
    assert (tmp_path / "shard.report" / "sheet-oct.png").exists()
    assert open_shard(tmp_path / "shard", verify=True).name == "shard"
    status, output, _ = site("show", tmp_path / "shard", "--sheet", tmp_path / "sheet.png")
    assert status == 0
    assert "normal" in output
    assert "9 images of 9 patients, 16 px, grey" in output
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == ((2 * 18 - 2) * 4, (12 * 18 - 2) * 4, 3)
    first = open_shard(tmp_path / "shard").images[0, :, :, 0]
    np.testing.assert_array_equal(sheet[:64:4, :64:4, 0], first)


def test_npz_files_of_several_modalities_join_in_one_shard(site: Run, tmp_path: Path) -> None:
    grey, colour = np.full((2, 8, 8), 7, np.uint8), np.full((2, 8, 8, 3), 9, np.uint8)
    np.savez(tmp_path / "us_a.npz", train_images=grey, train_labels=[0, 1], class_names=["b", "a"])
    np.savez(tmp_path / "us_b.npz", test_images=grey, test_labels=[0, 1], class_names=["a", "c"])
    np.savez(tmp_path / "cfp.npz", train_images=colour)
    sources = [tmp_path / name for name in ("us_a.npz", "us_b.npz", "cfp.npz")]
    status, _, _ = site("prepare", *sources, tmp_path / "shard", "--name", "eyes and more")
    assert status == 0
    shard = open_shard(tmp_path / "shard", verify=True)
    assert shard.name == "eyes and more"
    assert shard.classes == {"us": ("b", "a", "c"), "cfp": ()}
    assert shard.label.tolist() == [0, 1, 1, 2, -1, -1]
    assert shard.patient.tolist() == [0, 1, 2, 3, 4, 5]
    assert shard.images.shape == (6, 8, 8, 3)
    assert shard.images[:, 0, 0].tolist() == [[7] * 3] * 4 + [[9] * 3] * 2


def test_a_csv_becomes_a_shard(site: Run, tmp_path: Path) -> None:
    images(tmp_path / "files", 2)
    (tmp_path / "list.csv").write_text(
        "image_path,modality,patient\nfiles/0.png,cxr,7\nfiles/1.png,us,7\n"
    )
    options = ("--duplicates", "keep", "--burned-in", "accept", "--no-sheets")
    assert site("prepare", tmp_path / "list.csv", tmp_path / "shard", *options)[0] == 0
    assert not list((tmp_path / "shard.report").glob("*.png"))
    assert open_shard(tmp_path / "shard").patient.tolist() == [0, 0]
    assert open_shard(tmp_path / "shard").images.shape == (2, 64, 64, 1)


def test_phantoms_make_seven_sites(site: Run, tmp_path: Path) -> None:
    options = ("--patients", 4, "--images-per-patient", 2, "--px", 16)
    assert site("phantoms", tmp_path / "data", *options)[0] == 0
    sites = open_sites(tmp_path / "data")
    assert sorted(sites) == sorted(MODALITIES)
    assert all(len(shards[0].images) == 8 for shards in sites.values())


def test_phantoms_never_replace_prepared_images(site: Run, tmp_path: Path) -> None:
    images(tmp_path / "export" / "ct")
    assert site("prepare", tmp_path / "export", tmp_path / "data" / "ct", "--px", 16)[0] == 0
    status, _, errors = site("phantoms", tmp_path / "data", "--patients", 1)
    assert status == 2
    assert "holds shard 'ct', not 'phantoms-ct'" in one_line(errors)
    assert len(open_shard(tmp_path / "data" / "ct", verify=True).images) == 6


def damaged_npz(folder: Path) -> list[Path]:
    np.savez(folder / "ct.npz", train_images=np.zeros((9, 8, 8), np.uint8))
    (folder / "ct.npz").write_bytes((folder / "ct.npz").read_bytes()[:200])
    return [folder / "ct.npz"]


def empty_npz(folder: Path) -> list[Path]:
    np.savez(folder / "ct.npz", train_images=np.zeros((0, 8, 8), np.uint8))
    return [folder / "ct.npz"]


def npz_and_folder(folder: Path) -> list[Path]:
    np.savez(folder / "ct.npz", train_images=np.zeros((9, 8, 8), np.uint8))
    return [folder / "ct.npz", images(folder / "a")]


def bad_csv(folder: Path) -> list[Path]:
    (folder / "list.csv").write_text("image_path,modality\na.png,ct\nb.png,mri\n")
    return [folder / "list.csv"]


def unequal_sizes(folder: Path) -> list[Path]:
    for name, px in (("ct", 8), ("us", 16)):
        np.savez(folder / f"{name}.npz", train_images=np.zeros((1, px, px), np.uint8))
    return [folder / "ct.npz", folder / "us.npz"]


@pytest.mark.parametrize(
    ("make_sources", "message"),
    [
        (lambda folder: [folder / "nowhere"], "does not exist; check the path"),
        (lambda folder: [], "expected at least one SOURCE"),
        (damaged_npz, "is not a whole npz file"),
        (empty_npz, "is empty (0 images)"),
        (npz_and_folder, "npz files are prepared by themselves"),
        (bad_csv, "list.csv', line 3: expected a modality of"),
        (unequal_sizes, "differ in pixel size ('ct' 8 px, 'us' 16 px)"),
    ],
)
def test_bad_sources_give_one_line_and_leave_nothing(
    site: Run, tmp_path: Path, make_sources: Callable[[Path], list[Path]], message: str
) -> None:
    sources = make_sources(tmp_path)
    before = sorted(tmp_path.iterdir())
    secret = tmp_path / "keys" / "secret"
    status, _, errors = site("prepare", *sources, tmp_path / "shard", "--secret", secret)
    assert status == 2
    assert message in one_line(errors)
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "keys"] == before


def test_without_any_picture_the_status_is_2_and_the_report_is_there(
    site: Run, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("no image")
    status, _, errors = site("prepare", tmp_path / "in", tmp_path / "shard")
    assert status == 2
    assert "no picture came out of 1 files (1 not an image file we know)" in one_line(errors)
    assert (tmp_path / "shard.report" / "report.html").exists()
    assert not (tmp_path / "shard").exists()


def test_a_shard_that_is_there_is_prepared_again_only_when_asked(site: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "ct.npz", train_images=np.zeros((2, 8, 8), np.uint8))
    assert site("prepare", tmp_path / "ct.npz", tmp_path / "shard")[0] == 0
    status, _, errors = site("prepare", tmp_path / "ct.npz", tmp_path / "shard")
    assert status == 2
    assert "is prepared already; --restart prepares it anew" in one_line(errors)
    assert site("prepare", tmp_path / "ct.npz", tmp_path / "shard", "--restart")[0] == 0


def test_after_ctrl_c_the_same_command_continues(site: Run, tmp_path: Path) -> None:
    source, target = images(tmp_path / "in" / "ct", 400), tmp_path / "out" / "shard"
    command = [sys.executable, "-m", "client", "prepare", source.parent, target, "--jobs", "1"]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, text=True, start_new_session=True,
        # Tests that a shell runs in the background may have been told to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    raw = tmp_path / "out" / ".shard.preparing" / "pictures.raw"
    while process.poll() is None and not (raw.exists() and raw.stat().st_size > 10_000):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the command
    output, _ = process.communicate()
    assert process.returncode == 130
    assert "stopped; the same command continues" in output
    deadline = time.monotonic() + 20
    while has_processes(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not has_processes(process.pid)
    status, output, _ = site("prepare", source.parent, target)
    assert status == 0
    assert len(open_shard(target, verify=True).images) == 400


def has_processes(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_unknown_modality_is_refused(site: Run, tmp_path: Path) -> None:
    source = images(tmp_path / "in")
    status, _, errors = site("prepare", source, tmp_path / "shard", "--modality", "mri")
    assert status == 2
    assert "expected --modality ct, cxr" in one_line(errors)


def test_a_target_that_is_not_a_shard_is_left_alone(site: Run, tmp_path: Path) -> None:
    source, target = images(tmp_path / "in"), images(tmp_path / "photos")
    status, _, errors = site("prepare", source, target, "--modality", "ct")
    assert status == 2
    assert "is not a shard; it is left as it is" in one_line(errors)
    assert len(list(target.iterdir())) == 6


def test_show_refuses_a_missing_and_a_damaged_shard(site: Run, tmp_path: Path) -> None:
    status, _, errors = site("show", tmp_path / "nowhere")
    assert status == 2
    assert "is not a shard (no manifest.json)" in one_line(errors)
    images(tmp_path / "in" / "ct")
    assert site("prepare", tmp_path / "in", tmp_path / "shard")[0] == 0
    data = bytearray((tmp_path / "shard" / "images.npy").read_bytes())
    data[-1] ^= 1
    (tmp_path / "shard" / "images.npy").write_bytes(data)
    status, _, errors = site("show", tmp_path / "shard", "--sheet", tmp_path / "sheet.png")
    assert status == 2
    assert "is damaged: its sha256" in one_line(errors)
    assert not (tmp_path / "sheet.png").exists()


def test_download_of_a_file_already_there_needs_no_network(
    site: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from core.medmnist import SETS

    monkeypatch.setitem(SETS["octmnist"].md5, 28, hashlib.md5(b"here").hexdigest())
    (tmp_path / "octmnist.npz").write_bytes(b"here")
    status, output, _ = site("download", tmp_path, "--set", "octmnist")
    assert status == 0
    assert "1 checked files" in output


def test_download_without_a_network_is_one_line(
    site: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.medmnist.BASE_URL", "http://127.0.0.1:9")
    status, _, errors = site("download", tmp_path / "data", "--set", "octmnist")
    assert status == 2
    assert "check network and disk" in one_line(errors)
    assert not (tmp_path / "data").exists()
    status, _, errors = site("download", tmp_path / "data", "--set", "mnist")
    assert status == 2
    assert "no MedMNIST set 'mnist'" in one_line(errors)


def test_the_command_runs_as_a_module_and_loads_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['fedmermed-site', '--help']\n"
        "from client.__main__ import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'PIL', 'flwr'} & set(sys.modules)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-m", "client", "show", "nowhere"], cwd=root, capture_output=True
    )
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr


def test_preparing_loads_no_torch() -> None:
    code = (
        "import sys, client.ingest.command\n"
        "assert not {'torch', 'flwr', 'timm', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
