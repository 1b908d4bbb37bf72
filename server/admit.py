"""Have the SuperLink admit every provisioned key and refuse every retired one."""

from collections.abc import Iterator
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)

from core.checkpoint import write_json
from core.errors import UserError
from server.control import Control
from server.provision import Provisioned


def admit(calls: Control, directory: Path) -> Iterator[str]:
    """Register keys of DIR/sites, unregister keys of DIR/retired, and say what was done.

    What the SuperLink knows decides, by the key itself; DIR/registered only tells the node ids.

    Args:
        calls: The control service of the directory's SuperLink.
        directory: What `provision` made.

    Yields:
        Lines for the coordinator.

    Raises:
        UserError: the SuperLink is away, or a key was unregistered before, for good.

    Guarantees:
        Killed at any instant and run again, it completes; run twice, it changes nothing.
        Retired keys are refused before new ones are admitted.
        A key that the SuperLink admits and this directory does not know is named.
    """
    place = Provisioned(directory.absolute(), "")
    sites = {f.stem: _key(f) for f in sorted((place.directory / "sites").glob("*.pub"))}
    retired = {f.stem: _key(f) for f in sorted((place.directory / "retired").glob("*.pub"))}
    yield from _refuse(calls, retired)
    yield from _admit(calls, place, sites)


def _refuse(calls: Control, retired: dict[str, bytes]) -> Iterator[str]:
    known = {node.public_key: node for node in calls.nodes() if node.admitted}
    for name, key in retired.items():
        if key in known:
            calls.unregister(known[key].node_id)
            yield f"{name}: retired key refused from now on"


def _admit(calls: Control, place: Provisioned, sites: dict[str, bytes]) -> Iterator[str]:
    known = {node.public_key: node for node in calls.nodes()}
    spent = []
    for site, key in sites.items():
        node = known.pop(key, None)
        if node is not None and not node.admitted:
            spent.append(site)
            continue
        node_id = node.node_id if node else calls.register(key, site)
        write_json(place.node(site), {"node-id": node_id})
        yield f"site {site}: {'admitted already' if node else 'admitted'}"
    for node in known.values():
        if node.admitted:
            yield (
                f"node {node.node_id}: admitted, but its key is in neither sites/ nor retired/ of "
                f"'{place.directory}'; if you do not know it, have it refused: "
                f"{place.flower('unregister', node.node_id)}"
            )
    if spent:
        raise UserError(
            f"site '{spent[0]}': its key was refused before and Flower takes no key twice; give it "
            f"a new one: fedmermed-server provision '{place.directory}' --rotate {spent[0]}"
        )


def _key(file: Path) -> bytes:
    """A public key as Flower stores it."""
    try:
        key = load_ssh_public_key(file.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise UserError(
            f"public key '{file}' cannot be read: {error}; put it back from your backup"
        ) from None
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
