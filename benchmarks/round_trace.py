"""Times inside the processes of a federation, taken from without; for round_overhead.py.

A `sitecustomize` that loads this file stands first on PYTHONPATH, so that every Python process of a
federation, of this commit or an older one, writes when it began and when it called some functions:
a JSON line an event, into the file that TRACE names. Seconds of CLOCK_MONOTONIC, one clock for all
processes of a machine.
"""

import functools
import importlib.abc
import importlib.util
import json
import os
import sys
import time

WATCHED = {
    "core.train": ["train"],
    "core.site_round": ["site_round"],
    "client.app": ["respond"],
    "server.intake": ["Intake.take"],
    "server.release": ["commit"],
    "flwr.supercore.runtime.runtime_http_client": ["RuntimeHttpClient.PullTaskInput"],
    "flwr.supernode.runtime.run_clientapp": ["push_message"],
    "flwr.supernode.start_client_internal": ["push_object_contents_from_iterable"],
    "flwr.supernode.fleet_http_client": [
        "FleetHttpClient.PullMessages",
        "FleetHttpClient.PushMessages",
        "FleetHttpClient.ConfirmMessageReceived",
    ],
    "flwr.supercore.superexec.plugin.base_exec_plugin": ["BaseExecPlugin.launch_task"],
    "flwr.superlink.grid.http_grid": ["HttpGrid.push_messages", "HttpGrid.pull_messages"],
    "torch": [],
}
"""Module -> its functions, none whose own code we look at; of a module also the time of its
import."""


PULLS = ("HttpGrid.pull_messages", "FleetHttpClient.PullMessages")
"""Those that mostly come back with nothing."""


def write(event, start, end, empty=False):
    line = {
        "event": event, "start": start, "end": end, "empty": empty, "pid": os.getpid(),
        "home": os.environ.get("FLWR_HOME", ""),
    }  # fmt: skip
    with open(os.environ["TRACE"], "ab", buffering=0) as file:  # one write: lines do not mix
        file.write(json.dumps(line).encode() + b"\n")


def timed(name, function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        start = time.monotonic()
        result = function(*args, **kwargs)
        nothing = name in PULLS and not getattr(result, "messages_list", result)
        write(name, start, time.monotonic(), nothing)
        return result

    return call


class Finder(importlib.abc.MetaPathFinder):
    """Finds watched modules as the others would, and times what is in them."""

    def find_spec(self, name, path, target=None):
        """Python's own search, less this finder."""
        if name not in WATCHED:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            start = time.monotonic()
            execute(module)
            write(f"import {name}", start, time.monotonic())
            for function in WATCHED[name]:
                holder = functools.reduce(getattr, function.split(".")[:-1], module)
                attribute = function.rpartition(".")[2]
                setattr(holder, attribute, timed(function, getattr(holder, attribute)))

        spec.loader.exec_module = exec_module
        return spec


def install():
    sys.meta_path.insert(0, Finder())
    now = time.monotonic()
    write("begin", now, now)
