"""One of the processes that train a site's round together; `client.ranks` starts and watches it.

    python -P -m client.rank DIRECTORY RANK

It reads the round from the directory; the first rank leaves there what came of it. On its standard
output it tells, in lines of JSON, how far it is or what went wrong. It speaks to no one else but
the other ranks, over the loopback or between the GPUs.

**Guarantees**:
    - It ends when its standard input does: with whoever started it, however that ended.
    - It changes nothing of the site's state, and writes nothing outside the directory.
"""

import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn

from core.checkpoint import load_arrays, read_json, save_arrays, write_json
from core.config import recipe_from_json
from core.errors import UserError
from core.sites import open_site
from core.wire import GlobalState

REQUEST: Final = "request.json"
RECEIVED: Final = "received.safetensors"
UPDATE: Final = "update.safetensors"
FACTS: Final = "update.json"
PRIVATE: Final = "private.safetensors"

Tell = Callable[[dict[str, Any]], None]


def main() -> None:
    """Train, or tell why not."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    # What libraries print goes to the log; the line to whoever started us holds our words alone.
    with open(os.dup(1), "w", buffering=1, encoding="utf-8") as line:
        os.dup2(2, 1)

        def tell(words: dict[str, Any]) -> None:
            print(json.dumps(words), file=line)

        sys.exit(_work(Path(sys.argv[1]), int(sys.argv[2]), tell))


def _end_with_input() -> NoReturn:
    while os.read(0, 1):
        pass
    os._exit(1)


def _work(directory: Path, rank: int, tell: Tell) -> int:
    """The process's exit status."""
    import torch

    from core.ranks import RankLost

    try:
        _train(directory, rank, tell)
    except RankLost as error:
        tell({"lost": _first_line(error)})
    except (UserError, torch.OutOfMemoryError) as error:
        tell({"error": _first_line(error)})
    except Exception as error:
        logging.exception("rank %d failed", rank)
        tell({"error": f"{type(error).__name__}: {_first_line(error)}"})
    else:
        return 0
    return 1


def _train(directory: Path, rank: int, tell: Tell) -> None:
    import torch

    from core.ranks import join_ranks
    from core.site_round import help_round, site_round

    request = read_json(directory / REQUEST)
    recipe = recipe_from_json(request["recipe"], "the recipe")
    devices = request["devices"]
    torch.set_num_threads(request["threads"])
    device = torch.device(devices[rank])
    received = GlobalState.from_arrays(load_arrays(directory / RECEIVED)[0])
    kept = load_arrays(Path(request["private"]))[0] if request["private"] else {}
    shards = [shard for path in request["shards"] for shard in open_site(Path(path))]

    def on_step(done: int, steps: int, loss: float) -> None:
        on_gpu = device.type == "cuda"
        taken = torch.cuda.max_memory_allocated() if on_gpu else None
        tell({"done": done, "steps": steps, "loss": loss, "gpu_bytes": taken})

    seconds = recipe.federation.round_timeout_seconds  # after it nobody waits for the round
    with join_ranks(directory / "meet", rank, len(devices), device, seconds) as ranks:
        if rank > 0:
            help_round(
                recipe, received, shards, kept, site=request["site"],
                first_step=request["first_step"], device=devices[rank], ranks=ranks,
            )  # fmt: skip
            return
        update, private = site_round(
            recipe, received, shards, kept, site=request["site"],
            first_step=request["first_step"], device=devices[rank], on_step=on_step, ranks=ranks,
        )  # fmt: skip
    save_arrays(directory / PRIVATE, private, sync=False)
    save_arrays(directory / UPDATE, update.to_arrays(), sync=False)
    write_json(directory / FACTS, {"metrics": update.metrics, "num_examples": update.num_examples})


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


if __name__ == "__main__":
    main()
