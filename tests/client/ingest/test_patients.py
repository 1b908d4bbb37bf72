"""The secret of a site, and the keys it makes of its patients."""

import hashlib
import hmac
import os
import stat
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import pytest

from client.ingest.patients import key_check, load_secret, patient_key, split_of
from core.errors import UserError

SECRET = bytes(range(32))


def test_a_new_secret_is_random_kept_and_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "secret"
    secret = load_secret(path)
    assert len(secret) == 32
    assert load_secret(path) == secret == load_secret(path, create=False)
    assert load_secret(tmp_path / "other") != secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["secret"]


def test_the_secret_is_text_that_a_person_can_type_back(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    secret = load_secret(path)
    note, digits = path.read_text().splitlines()
    assert note.startswith("# ")
    assert digits == secret.hex()
    path.write_text(f"{digits[:32].upper()}\n{digits[32:]}\n\n")
    assert load_secret(path) == secret


def test_two_processes_that_start_at_once_share_one_secret(tmp_path: Path) -> None:
    context = get_context("fork")
    for attempt in range(5):
        with context.Pool(4) as pool:
            found = pool.map(load_secret, [tmp_path / str(attempt)] * 4, chunksize=1)
        assert len(set(found)) == 1
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o620, 0o644])
def test_a_secret_that_others_can_reach_is_refused_with_the_command_that_mends_it(
    tmp_path: Path, mode: int
) -> None:
    path = tmp_path / "my secret"
    load_secret(path)
    path.chmod(mode)
    with pytest.raises(UserError, match=rf"mode {mode:04o}\); type: chmod 600 '.*/my secret'$"):
        load_secret(path)
    path.chmod(0o400)
    load_secret(path)


def test_what_is_no_secret_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    with pytest.raises(UserError, match="does not exist; copy it back from its backup"):
        load_secret(path, create=False)
    for text in ("", "# note\n" + "a" * 62, "g" * 64, "a" * 66, "é" * 64):
        path.write_text(text)
        path.chmod(0o600)
        with pytest.raises(UserError, match="expected 64 hexadecimal digits"):
            load_secret(path)
        assert path.read_text() == text
    with pytest.raises(UserError, match="Is a directory"):
        load_secret(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(UserError, match="is not a file"):
        load_secret(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="does not exist"):
        load_secret(tmp_path / "dangling")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be read or written: .*; give another place"):
        load_secret(tmp_path / "file" / "secret")


def test_an_unreadable_secret_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = tmp_path / "secret"
    load_secret(path)
    path.chmod(0o000)
    with pytest.raises(UserError, match="Permission denied"):
        load_secret(path)


def test_a_key_is_the_hmac_of_the_identity_in_its_own_domain() -> None:
    message = b"fedmermed patient 1\x00dicom:12"
    expected = hmac.new(SECRET, message, hashlib.sha256).hexdigest()[:32]
    assert patient_key(SECRET, "dicom:12") == expected
    identities = ["dicom:12", "dicom:1", "folder:12", "dicom:12 ", "", "dicom:\udc80", "\ud800"]
    keys = {patient_key(secret, text) for secret in (SECRET, bytes(32)) for text in identities}
    assert len(keys) == 2 * len(identities)


def test_the_check_tells_secrets_apart_and_is_no_patients_key() -> None:
    assert key_check(SECRET) == key_check(bytes(SECRET)) != key_check(bytes(32))
    assert key_check(SECRET) != patient_key(SECRET, "")
    assert SECRET.hex()[:8] not in key_check(SECRET)


def test_splits_are_fixed_by_the_key_and_have_their_shares() -> None:
    # Expected from `printf p0 | sha256sum` and so on: first bytes 16 f6 bd dc b1, and 70 % is b3,
    # 85 % is d9. A later import of the same patients must not move any into training.
    keys = {"p0": "train", "p1": "test", "p12": "val", "p13": "test", "p14": "train"}
    assert {key: split_of(key) for key in keys} == keys
    counts = Counter(split_of(patient_key(SECRET, str(n))) for n in range(10_000))
    assert counts["train"] == pytest.approx(7_000, abs=150)
    assert counts["val"] == pytest.approx(1_500, abs=120)
