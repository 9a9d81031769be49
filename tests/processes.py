"""Processes forked from one that has imported torch: a fresh interpreter would take seconds to import it again.

secateur is not imported there. So a process starts as a fresh one does where torch is there and secateur is not yet.
"""

import datetime
import os
import resource
import runpy
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed", "safetensors.torch", "pytest", "typer"])


def started(work, *arguments):
    """Start a process that does `work(*arguments)`; it has `exitcode`, `kill()` and `join()`."""
    process = FORKS.Process(target=work, args=arguments)
    process.start()
    return process


class Command:
    """A process that does `work(*arguments)`, and what it prints; `settings` are added to its environment."""

    def __init__(self, work, *arguments, **settings):
        self._said = tempfile.TemporaryDirectory()
        for name in ("1", "2"):
            Path(self._said.name, name).touch()  # it may be killed before it says anything
        self.process = started(_heard, self._said.name, settings, work, arguments)

    def done(self, seconds=120):
        """Wait for its end; returns the exit status and what it said, as `subprocess.run` does."""
        with self._said as folder:
            self.process.join(seconds)
            if self.process.exitcode is None:
                self.process.kill()
                raise TimeoutError(f"not done after {seconds} s")
            said = [Path(folder, name).read_text(errors="replace") for name in ("1", "2")]
        return subprocess.CompletedProcess([], self.process.exitcode, *said)


def _heard(folder, settings, work, arguments):
    for descriptor in (1, 2):
        with open(f"{folder}/{descriptor}", "wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ |= settings
    work(*arguments)


def secateur(*arguments):
    """What `python -W ignore -m secateur` does; given to `Command` with its arguments."""
    warnings.simplefilter("ignore")
    sys.argv = ["secateur", *map(str, arguments)]
    runpy.run_module("secateur", run_name="__main__")


def code(text):
    """What `python -W error -c text` does; given to `Command`."""
    warnings.simplefilter("error")
    exec(text, {"__name__": "__main__"})


def in_bounded_memory(size, work, *arguments):
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    work(*arguments)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def as_torchrun(processes, work, *arguments):
    """Start processes as torchrun does, each with its rank in the environment; returns what each said."""
    port = free_port()
    ranks = [
        Command(work, *arguments, RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in range(processes)
    ]
    return [rank.done() for rank in ranks]


def in_a_group(processes, work, *arguments):
    """Call `work(rank, *arguments)` in each process of a gloo group; an error in one is raised here."""
    context = (work, processes, free_port(), arguments)
    multiprocessing.start_processes(_and_no_more, context, processes, start_method="forkserver")


def joined(work, *arguments):
    """As `in_a_group`, in a process started `as_torchrun`: of these some may be lost."""
    ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _in_a_group(ranks[0], work, ranks[1], os.environ["MASTER_PORT"], arguments)


def _and_no_more(*context):
    """Without what follows at exit, where torch may wait for ever after a backward through DDP."""
    _in_a_group(*context)
    os._exit(0)


def _in_a_group(rank, work, processes, port, arguments):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=30)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=processes, timeout=timeout)
    try:
        work(rank, *arguments)
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
