"""A model measured at the sites, each on its own labels: the question and the checked answers."""

import json
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from rich.console import Console

from core.admission import Rejected, printable
from core.checkpoint import Arrays, sha256_file, write_json
from core.config import FederationConfig, ModelConfig, Recipe
from core.errors import UserError
from core.evaluation.pooled import Bins
from core.sites import open_sites
from core.wire import (
    BACKBONE,
    EVALUATION_COUNTS,
    HISTOGRAM,
    MEASURES,
    METHODS,
    SIDES,
    EvaluationReply,
    EvaluationRequest,
    evaluation_metric_is_declared,
    note_is_declared,
)
from server.engines import load_client_app
from server.evaluation_report import combine, show
from server.grid import FIRST_NODE_ID, InProcessGrid
from server.replies import to_record
from server.roster import Roster
from server.simulate import check_sites, place_data, write_site_file

ANSWER_SECONDS = 3600.0
MAX_EXAMPLES = 100_000_000


def evaluate(
    model: Path,
    *,
    data: Path | None = None,
    out: Path | None = None,
    probe_data: Path | None = None,
    last_blocks: int = 3,
    neighbours: int = 20,
) -> dict[str, Any]:
    """Have every site of a data directory measure a model, in this process, and show a table.

    Args:
        model: What `core.export.load_model` takes.
        data: Directory of NAME/site.toml, shards or npz files; without it the sites of the run
            directory `model`. Sites without a site file of their own have the default policy.
        out: Also write the figures here.
        probe_data: Labelled images of the evaluator, for a probe that scores all sites alike.
        last_blocks: Blocks whose tokens the probes see.
        neighbours: Images that vote.

    Raises:
        UserError: bad input, or no site answered.
    """
    console = Console()
    with tempfile.TemporaryDirectory(prefix="fedmermed-") as scratch:
        files = _site_files(model, data, Path(scratch))
        request, arrays = make_request(model, probe_data, last_blocks, neighbours)
        grid = InProcessGrid(load_client_app(), [{"site": str(file)} for file in files])
        places = {FIRST_NODE_ID + i: file.parent.name for i, file in enumerate(files)}
        answers, failures = ask_sites(grid, request, arrays, places=places)
    result = {
        "model": str(model),
        "sha256": sha256_file(model) if model.is_file() else None,
        "last_blocks": last_blocks,
        "neighbours": neighbours,
        "probe_data": str(probe_data) if probe_data else None,
        **combine(answers, request.probe_classes),
        "failures": failures,
    }
    if out is not None:
        write_json(out, result)
    if not answers:
        reasons = "; ".join(f"'{site}': {reason}" for site, reason in sorted(failures.items()))
        raise UserError(f"none of {len(files)} site(s) answered ({reasons}); mend them and repeat")
    show(result, console)
    return result


def make_request(
    model_path: Path, probe_data: Path | None, last_blocks: int, neighbours: int
) -> tuple[EvaluationRequest, Arrays]:
    """Load the model and fit the evaluator's probes, one a modality of its labelled images."""
    from core.device import resolve_device
    from core.evaluation.shared_probe import fit_shared_probe, probe_arrays, site_tasks
    from core.export import load_model

    model = load_model(model_path, resolve_device("auto"))
    state = model.backbone.state_dict()
    arrays: Arrays = {BACKBONE + name: tensor.cpu().numpy() for name, tensor in state.items()}
    probes = {}
    if probe_data is not None:
        shards = [shard for group in open_sites(probe_data).values() for shard in group]
        probes = {
            task.name: fit_shared_probe(model, task, last_blocks=last_blocks)
            for task in site_tasks(shards)
        }
        if not probes:
            raise UserError(f"'{probe_data}' holds no labelled image; no probe can be fitted")
        arrays |= probe_arrays(probes)
    set_by_site = ("model_name", "num_classes", "img_size", "dynamic_img_size")
    request = EvaluationRequest(
        study=secrets.token_hex(16),
        model=ModelConfig(
            backbone=model.arguments["model_name"],
            options={k: v for k, v in model.arguments.items() if k not in set_by_site},
        ),
        px=model.px,
        last_blocks=last_blocks,
        neighbours=neighbours,
        probe_classes={name: probe.classes for name, probe in probes.items()},
    )
    return request, arrays


def ask_sites(
    grid: Grid,
    request: EvaluationRequest,
    arrays: Arrays,
    *,
    places: Mapping[int, str],
    timeout_seconds: float = ANSWER_SECONDS,
) -> tuple[dict[str, EvaluationReply], dict[str, str]]:
    """Ask all connected sites and check what they answer.

    Args:
        grid: Reaches the sites.
        request: What to measure.
        arrays: The backbone and the probes under their wire names.
        places: Node -> what to call it should it not say which site it is.
        timeout_seconds: How long to wait for answers.

    Returns:
        Site -> its answer, and site -> why there is none.
    """
    roster = Roster(request.study)
    sites = roster.present(grid)
    failures = {places.get(n, f"node {n}"): reason for n, reason in roster.refused.items()}
    record = ConfigRecord({"request": json.dumps(request.model_dump(mode="json"))})
    content = RecordDict({"arrays": to_record(arrays), "config": record})
    messages = [
        Message(content, node, MessageType.EVALUATE, ttl=timeout_seconds)
        for _, node in sorted(sites.items())
    ]
    replies = list(grid.send_and_receive(messages, timeout=timeout_seconds))
    by_message = {reply.metadata.reply_to_message_id: reply for reply in replies}
    answers = {}
    for site, message in zip(sorted(sites), messages, strict=True):
        reply = by_message.get(message.metadata.message_id)
        if reply is None:
            failures[site] = "no reply before the deadline"
        elif reply.has_error():
            failures[site] = printable(reply.error.reason or "no reason given")
        else:
            try:
                answers[site] = read_reply(reply.content, request)
            except Rejected as rejected:
                failures[site] = f"reply rejected: {printable(str(rejected))}"
    return answers, failures


def read_reply(content: RecordDict, request: EvaluationRequest) -> EvaluationReply:
    """Take a reply apart and check it.

    Raises:
        Rejected: it is not what core/wire.py says, or its numbers cannot be.
    """
    kinds = (content.metric_records, content.array_records, content.config_records)
    names = ("metrics", "histograms", "notes")
    if [list(kind) for kind in kinds] != [[name] for name in names]:
        raise Rejected(f"it does not hold exactly the records {', '.join(names)}")
    notes = content.config_records["notes"]
    for name, text in notes.items():
        if not note_is_declared(name) or not isinstance(text, str):
            raise Rejected(f"note '{name}' is not on the list of what may be sent")
    metrics = dict(content.metric_records["metrics"])
    _check_metrics(metrics)
    histograms: Arrays = {}
    for name, array in content.array_records["histograms"].items():
        try:
            histograms[name] = array.numpy()
            Bins.from_array(histograms[name])
        except Exception as error:  # whatever hostile bytes make numpy raise
            raise Rejected(f"array '{printable(name, 80)}' {error}") from None
    _check_histograms(histograms, metrics, request)
    shown = {name: printable(str(text)) for name, text in notes.items()}
    return EvaluationReply(metrics, histograms, shown)  # type: ignore[arg-type]


def _check_histograms(
    histograms: Arrays, metrics: Mapping[str, Any], request: EvaluationRequest
) -> None:
    classes = {
        f"{HISTOGRAM}{modality}/{c}": modality
        for modality, names in request.probe_classes.items()
        for c in range(len(names))
    }
    for name in histograms:
        if (whole := name.rpartition("/")[0]) not in classes or name.rpartition("/")[
            2
        ] not in SIDES:
            raise Rejected(f"array '{printable(name, 80)}' was not asked for")
        both = [histograms.get(f"{whole}/{side}") for side in SIDES]
        images = sum(int(rows[:, 1].sum()) for rows in both if rows is not None)
        if images != metrics.get(f"num_test/{classes[whole]}"):
            raise Rejected(f"'{whole}' counts {images} images, not the modality's test images")
        if any(rows is None for rows in both):
            raise Rejected(f"'{whole}' lacks positives or negatives")


def _check_metrics(metrics: Mapping[str, Any]) -> None:
    for name, value in metrics.items():
        if not evaluation_metric_is_declared(name):
            raise Rejected(f"metric '{printable(name, 80)}' is not on the list of what may be sent")
        if name.partition("/")[0] in EVALUATION_COUNTS:
            if type(value) is not int or not 1 <= value <= MAX_EXAMPLES:
                raise Rejected(f"'{name}' is {value!r}, expected a whole number of images")
        elif type(value) is not float or not 0 <= value <= 1:
            raise Rejected(f"'{name}' is {value!r}, expected a number from 0 to 1")
    for modality in {name.partition("/")[2] for name in metrics}:
        own = {f"{method}_{measure}" for method in METHODS[:2] for measure in MEASURES}
        for name in sorted(own.union(EVALUATION_COUNTS)):
            if f"{name}/{modality}" not in metrics:
                raise Rejected(f"'{name}/{modality}' is missing")


def _site_files(model: Path, data: Path | None, scratch: Path) -> list[Path]:
    """Site files that are there; where only images are, files with the default policy."""
    home = data if data is not None else model / "sites"
    if files := sorted(home.glob("[!.]*/site.toml")):
        return files
    if data is None:
        raise UserError(f"'{model}' has no sites of its own (sites/NAME/site.toml); give --data")
    # Of a recipe, only what it says of sites is used.
    recipe = Recipe(federation=FederationConfig(min_sites=1))
    sites = open_sites(data)
    check_sites(list(sites), recipe)
    places = place_data(scratch, data, sites)
    return [write_site_file(scratch, name, path, recipe) for name, path in places.items()]
