"""The seven MedMNIST sets that stand for our modalities: facts, and a download that resumes.

Addresses and MD5 sums are those of the official record (https://zenodo.org/records/10519652,
MedMNIST v2/v3, doi 10.1038/s41597-022-01721-8). The files carry their own licences: CC BY 4.0, and
CC BY-NC 4.0 for dermamnist.
"""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from core.checkpoint import sync_directory
from core.errors import UserError

BASE_URL: Final = "https://zenodo.org/records/10519652/files"
SIZES: Final = (28, 64, 128, 224)
CHUNK_BYTES: Final = 1 << 18
TIMEOUT_SECONDS: Final = 30.0


@dataclass(frozen=True)
class MedMnistSet:
    """One set: the modality it stands for, its classes in label order, MD5 by size in pixels."""

    modality: str
    classes: tuple[str, ...]
    md5: dict[int, str]


SETS: Final = {
    "organamnist": MedMnistSet(
        "ct",
        (
            "bladder",
            "femur-left",
            "femur-right",
            "heart",
            "kidney-left",
            "kidney-right",
            "liver",
            "lung-left",
            "lung-right",
            "pancreas",
            "spleen",
        ),
        {
            28: "68e3f8846a6bd62f0c9bf841c0d9eacc",
            64: "2dcccc29b88e6da5a01161ef20cda288",
            128: "eeae80d0a227a8d099027e1b3cfd3b60",
            224: "50747347e05c87dd3aaf92c49f9f3170",
        },
    ),
    "pneumoniamnist": MedMnistSet(
        "cxr",
        ("normal", "pneumonia"),
        {
            28: "28209eda62fecd6e6a2d98b1501bb15f",
            64: "8f4eceb4ccffa70c672198ea285246c6",
            128: "05b46931834c231683c68f40c47b2971",
            224: "d6a3c71de1b945ea11211b03746c1fe1",
        },
    ),
    "breastmnist": MedMnistSet(
        "us",
        ("malignant", "normal or benign"),
        {
            28: "750601b1f35ba3300ea97c75c52ff8f6",
            64: "742edef2a1fd1524b2efff4bd7ba9364",
            128: "363e4b3f8d712e9b5de15470a2aaadf1",
            224: "b56378a6eefa9fed602bb16d192d4c8b",
        },
    ),
    "pathmnist": MedMnistSet(
        "pathology",
        (
            "adipose",
            "background",
            "debris",
            "lymphocytes",
            "mucus",
            "smooth muscle",
            "normal colon mucosa",
            "cancer-associated stroma",
            "colorectal adenocarcinoma epithelium",
        ),
        {
            28: "a8b06965200029087d5bd730944a56c1",
            64: "55aa9c1e0525abe5a6b9d8343a507616",
            128: "ac42d08fb904d92c244187169d1fd1d9",
            224: "2c51a510bcdc9cf8ddb2af93af1eadec",
        },
    ),
    "retinamnist": MedMnistSet(
        "cfp",
        ("grade 0", "grade 1", "grade 2", "grade 3", "grade 4"),
        {
            28: "bd4c0672f1bba3e3a89f0e4e876791e4",
            64: "afda852cc34dcda56f86ad2b2457dbcc",
            128: "e48e916a24454daf90583d4e6efb1a18",
            224: "eae7e3b6f3fcbda4ae613ebdcbe35348",
        },
    ),
    "octmnist": MedMnistSet(
        "oct",
        ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
        {
            28: "c68d92d5b585d8d81f7112f81e2d0842",
            64: "e229e9440236b774d9f0dfef9d07bdaf",
            128: "0a97e76651ace45c5d943ee3f65b63ae",
            224: "abc493b6d529d5de7569faaef2773ba3",
        },
    ),
    "dermamnist": MedMnistSet(
        "dermatology",
        (
            "actinic keratoses and intraepithelial carcinoma",
            "basal cell carcinoma",
            "benign keratosis-like lesions",
            "dermatofibroma",
            "melanoma",
            "melanocytic nevi",
            "vascular lesions",
        ),
        {
            28: "0744692d530f8e62ec473284d019b0c7",
            64: "b70a2f5635c6199aeaa28c31d7202e1f",
            128: "2defd784463fa5243564e855ed717de1",
            224: "8974907d8e169bef5f5b96bc506ae45d",
        },
    ),
}
"""Set name -> facts, in the order of our modalities."""


def file_name(name: str, size_px: int) -> str:
    """The official file name of a set at a size: 28 px carries no number."""
    return f"{name}.npz" if size_px == 28 else f"{name}_{size_px}.npz"


def check_set(name: str, size_px: int) -> None:
    """Refuse a set or a size that the record does not hold."""
    if name not in SETS or size_px not in SIZES:
        raise UserError(
            f"no MedMNIST set '{name}' at {size_px} px; sets: {', '.join(SETS)}; "
            f"sizes: {', '.join(map(str, SIZES))}"
        )


def download_set(
    directory: Path, name: str, size_px: int, progress: Callable[[int, int], None]
) -> Path:
    """Download one set into a directory; does nothing when it is already there and whole.

    Args:
        directory: Target directory, made when missing.
        name: A key of `SETS`.
        size_px: One of `SIZES`.
        progress: Called with bytes present and bytes in all after each chunk.

    Raises:
        UserError: unknown set or size, and whatever `download` raises.
    """
    check_set(name, size_px)
    file = file_name(name, size_px)
    url = f"{BASE_URL}/{file}?download=1"
    return download(url, directory / file, SETS[name].md5[size_px], progress)


def download(url: str, target: Path, md5: str, progress: Callable[[int, int], None]) -> Path:
    """Fetch a file beside its target, continue after a kill, check it, then rename it into place.

    What has arrived stays in `<target>.partial` when the connection breaks, and the next call asks
    for the rest only.

    Args:
        url: Source; it may ignore range requests, then the download starts over.
        target: Final path; it appears only when the checksum is right.
        md5: Expected MD5 in hex.
        progress: Called with bytes present and bytes in all (0 when unknown) after each chunk.

    Raises:
        UserError: no connection, an HTTP error, a broken transfer (the partial file is kept), or
            a wrong checksum (the partial file is removed).
    """
    if target.exists() and _md5_file(target) == md5:
        return target
    partial = target.with_name(f"{target.name}.partial")
    try:
        _fetch(url, partial, progress)
    except urllib.error.HTTPError as error:
        raise UserError(
            f"'{target.name}': the server answered HTTP {error.code} ({error.reason}); try later"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"'{target.name}' cannot be downloaded: {reason}; check network and disk, then run "
            "the same command again: it continues where it stopped"
        ) from None
    found = _md5_file(partial)
    if found != md5:
        partial.unlink()
        raise UserError(
            f"'{target.name}': expected MD5 {md5}, received {found}; the file was removed, "
            "run the same command again"
        )
    os.replace(partial, target)
    sync_directory(target.parent)
    return target


def _fetch(url: str, partial: Path, progress: Callable[[int, int], None]) -> None:
    """Append to `partial` what it still lacks."""
    present = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={present}-"} if present else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        # Nothing after `present`: the file was whole when the process was killed.
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and present:
            return
        raise
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            present = 0
        length = int(response.headers.get("Content-Length", 0))
        total = present + length if length else 0
        partial.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "ab" if present else "wb") as file:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                present += len(chunk)
                progress(present, total)
            file.flush()
            os.fsync(file.fileno())
    if total and present < total:
        raise OSError(f"the connection broke after {present:,} of {total:,} bytes")


def _md5_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
