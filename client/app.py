"""The hospital's Flower ClientApp: translates messages, and lets no failure leave as a traceback.

Which site this process serves is told by the site file: `site` in the SuperNode's node config. The
simulation on Ray gives a partition number only; there FEDMERMED_SITES_DIR names a directory with
NAME/site.toml. Both are set on the site's machine; the run config, which the coordinator writes, is
never read.
"""

import importlib.metadata
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from pydantic import ValidationError

from client.audit import Audit
from client.egress import hold_evaluation, hold_query, hold_training
from client.policy import NotNow, Refusal, check_bundle, check_evaluation, check_hours
from client.rounds import Request, answer
from client.site import SiteConfig, load_site
from core.checkpoint import Arrays
from core.config import recipe_from_json
from core.errors import UserError
from core.npy import NotAnArray, read_npy
from core.wire import EPSILON, NOT_NOW, EvaluationRequest

LOG = logging.getLogger("fedmermed.site")
CLIENT_APP_ERROR = 2
"""Flower's code for a failure inside a ClientApp."""
FAILED = "the site could not do this; its log says why"
"""The reason that leaves when what failed has no text that may leave."""

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say who this site is."""
    return respond(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round on this site's images."""
    return respond(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure a backbone on this site's labelled images."""
    return respond(message, context)


def respond(message: Message, context: Context, bundle: str = "") -> Message:
    """Answer a message; whatever fails becomes an error reply with a plain reason.

    Args:
        message: Any message.
        context: Flower's, of which the node config alone is read.
        bundle: sha256 of the app bundle that the message's run was submitted with, where the
            launcher knows it.
    """
    kind = message.metadata.message_type
    try:
        site = load_site(_site_file(context))
        audit = Audit(site.state_path, bundle=bundle)
        act = {"query": _query, "train": _train, "evaluate": _evaluate}.get(kind, _unknown)
        return Message(act(message, site, audit), reply_to=message)
    except Refusal as refusal:
        LOG.warning("%s refused: %s", kind, refusal)
        code = NOT_NOW if isinstance(refusal, NotNow) else CLIENT_APP_ERROR
        return Message(Error(code, str(refusal)), reply_to=message)
    except Exception as error:
        # A UserError is a line that says what to do; of anything else we want to know where it was.
        LOG.error("%s failed: %s", kind, error, exc_info=not isinstance(error, UserError))
        # The text may name paths or values of this site: only its kind leaves.
        reason = f"the site could not do this ({type(error).__name__}); its log says why"
        return Message(Error(CLIENT_APP_ERROR, reason), reply_to=message)


def _unknown(message: Message, site: SiteConfig, audit: Audit) -> RecordDict:
    """Refuse a message of a type that Flower allows and this app has no use for."""
    with _failure_audited(audit, "other", understood=False):
        raise Refusal("this site answers messages of type query, train and evaluate alone")


def _query(message: Message, site: SiteConfig, audit: Audit) -> RecordDict:
    with _failure_audited(audit, "query", understood=False):
        study = str(message.content.config_records["config"]["study"])[:64]
    audit = replace(audit, study=study)
    audit.write("in", "query", "accepted for checking")
    try:
        version = importlib.metadata.version("fedmermed")
    except importlib.metadata.PackageNotFoundError:
        version = "checkout"
    with _failure_audited(audit, "query"):
        check_bundle(site.policy, audit.bundle)
        info = ConfigRecord({"site": site.name, "version": version})
        content = hold_query(site.name, RecordDict({"info": info}))
    audit.write("out", "query", f"sent site '{site.name}' and version {version}")
    return content


def _train(message: Message, site: SiteConfig, audit: Audit) -> RecordDict:
    started = time.monotonic()
    with _failure_audited(audit, "train", understood=False):
        request = _read(message)
    audit = replace(audit, study=request.study, round_number=request.round_number)
    audit.write("in", "train", "accepted for checking", arrays=request.arrays)
    with _failure_audited(audit, "train"):
        check_bundle(site.policy, audit.bundle)
        check_hours(site.policy)
        update, trained = answer(site, request)
        arrays, metrics = request.reply(update), update.to_metrics()
        content = RecordDict({"arrays": _record(arrays), "metrics": MetricRecord(dict(metrics))})
        hold_training(site.policy, request.recipe, request.arrays, content)
    audit.write(
        "out", "train", "trained and sent" if trained else "stored reply sent again",
        arrays=arrays, scalars=dict(metrics), epsilon=update.metrics.get(EPSILON),
        seconds=time.monotonic() - started,
    )  # fmt: skip
    return content


def _evaluate(message: Message, site: SiteConfig, audit: Audit) -> RecordDict:
    started = time.monotonic()
    with _failure_audited(audit, "evaluate", understood=False):
        request, arrays = _read_evaluation(message)
    audit = replace(audit, study=request.study)
    audit.write("in", "evaluate", "accepted for checking", arrays=arrays)
    with _failure_audited(audit, "evaluate"):
        check_bundle(site.policy, audit.bundle)
        check_hours(site.policy)
        check_evaluation(site.policy)
        from client.evaluation import measure  # imports torch

        reply = measure(site, request, arrays)
        content = RecordDict(
            {
                "metrics": MetricRecord(dict(reply.metrics)),
                "histograms": _record(reply.histograms),
                "notes": ConfigRecord(dict(reply.notes)),
            }
        )
        hold_evaluation(site.policy, content)
    audit.write(
        "out", "evaluate", "measured and sent", arrays=reply.histograms,
        scalars={**reply.metrics, **reply.notes}, seconds=time.monotonic() - started,
    )  # fmt: skip
    return content


@contextmanager
def _failure_audited(audit: Audit, kind: str, *, understood: bool = True) -> Iterator[None]:
    """Write the line of an error reply, and of a message in that was not understood."""
    started = time.monotonic()
    try:
        yield
    except Exception as error:
        # A refusal is plain; another error may name a path, which has no place in the audit file.
        why = str(error) if isinstance(error, Refusal) else type(error).__name__
        if not understood:
            audit.write("in", kind, f"not understood: {why}")
        audit.write("out", kind, f"not done: {why}", seconds=time.monotonic() - started)
        raise


def _read(message: Message) -> Request:
    """Take a train message apart.

    Raises:
        Refusal: the message is not what core/wire.py says.
    """
    records = message.content
    config = records.config_records.get("config", ConfigRecord())
    kinds = {"study": str, "round": int, "step": int, "recipe": str}
    if set(records) != {"arrays", "config"} or set(config) != set(kinds):
        raise Refusal("the message does not hold exactly what a train message should")
    for key, kind in kinds.items():
        if type(config[key]) is not kind:
            raise Refusal(f"'{key}' in the message is not of type {kind.__name__}")
    try:
        recipe = recipe_from_json(str(config["recipe"]), "the coordinator's recipe")
    except UserError as error:
        raise Refusal(str(error)) from None
    return Request(
        study=str(config["study"]),
        round_number=int(config["round"]),  # type: ignore[arg-type]
        step=int(config["step"]),  # type: ignore[arg-type]
        recipe=recipe,
        arrays=_arrays(records.array_records["arrays"]),
        expires=message.metadata.created_at + message.metadata.ttl,
    )


def _read_evaluation(message: Message) -> tuple[EvaluationRequest, Arrays]:
    """Take an evaluate message apart.

    Raises:
        Refusal: the message is not what core/wire.py says.
    """
    records = message.content
    config = records.config_records.get("config", ConfigRecord())
    if set(records) != {"arrays", "config"} or set(config) != {"request"}:
        raise Refusal("the message does not hold exactly what an evaluate message should")
    try:
        request = EvaluationRequest.model_validate_json(str(config["request"]))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise Refusal(f"the evaluation request: '{key}': {first['msg'].lower()}") from None
    return request, _arrays(records.array_records["arrays"])


def _record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def _arrays(record: ArrayRecord) -> Arrays:
    """Plain numbers, whatever bytes came.

    Raises:
        Refusal: an array is anything else.
    """
    try:
        return {name: read_npy(array.data).copy() for name, array in record.items()}
    except NotAnArray as error:
        raise Refusal(f"an array in the message cannot be decoded: {error}") from None


def _site_file(context: Context) -> Path:
    if "site" in context.node_config:
        return Path(str(context.node_config["site"]))
    directory = os.environ.get("FEDMERMED_SITES_DIR")
    if not directory:
        raise UserError("no site file: start the SuperNode with --node-config 'site=\"SITE.toml\"'")
    files = sorted(Path(directory).glob("*/site.toml"))
    return files[int(context.node_config["partition-id"])]
