from server.provision import provision
from server.serve import PartName, open_service


def test_both_parts_share_a_private_secret_wherever_it_is(tmp_path):
    study, secret = tmp_path / "study", tmp_path / "link" / "secret"
    list(provision(study, address="fl.example.org:443", sites=["a"]))
    first, again = (
        open_service(study, [part], secret=secret) for part in (PartName.SUPERLINK, PartName.APPS)
    )
    held = secret.read_bytes()
    assert len(held) >= 32
    assert secret.stat().st_mode & 0o777 == 0o600
    assert not (study / "superexec.secret").exists()
    for part in (first.superlink_part(), again.apps_part()):
        assert str(secret) in part.command
    open_service(study, [PartName.SUPERLINK], secret=secret)
    assert secret.read_bytes() == held
