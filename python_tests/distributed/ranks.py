"""Processes of a gloo group that stay up and run one function after another: importing torch costs seconds, so each
world size is started once. They are forked from a server that has imported everything and started no threads."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

PRELOADED = [
    "torch",
    "torch.distributed",
    "torch._dynamo",
    "ltood_fast",
    "lightning_fabric",
    "torch.utils.tensorboard",
    "faiss",
]
TIMEOUT_S = 120


class Ranks:
    """`world` processes with one process group. ``run(function, *arguments)`` calls ``function(rank, world, ...)`` on
    all of them and returns a result a rank; what a rank raises is its result, as an exception of the same type."""

    def __init__(self, world: int, timeout_s: float = TIMEOUT_S):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.store = tempfile.mkdtemp()
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, world, os.path.join(self.store, "store"), timeout_s)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable, *arguments: object) -> list:
        self.start(function, *arguments)
        return [self.result(rank) for rank in range(len(self.pipes))]

    def start(self, function: Callable, *arguments: object) -> None:
        for pipe in self.pipes:
            pipe.send_bytes(_packed((function, arguments)))

    def result(self, rank: int) -> object:
        pipe = self.pipes[rank]
        if not pipe.poll(TIMEOUT_S):
            raise TimeoutError("a rank did not answer")
        try:
            return _unpacked(pipe.recv_bytes())
        except EOFError:
            return SystemExit("the process is gone")

    def results(self, function: Callable, *arguments: object) -> list:
        """As `run`, for what must not raise."""
        results = self.run(function, *arguments)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)


def _packed(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes) -> object:
    return torch.load(io.BytesIO(data), weights_only=False)


def _serve(pipe: Connection, rank: int, world: int, store: str, timeout_s: float) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    while True:
        try:
            function, arguments = _unpacked(pipe.recv_bytes())
        except EOFError:
            return
        try:
            result = function(rank, world, *arguments)
        except Exception as error:
            result = type(error)(str(error)) if type(error).__module__ == "builtins" else RuntimeError(str(error))
            result.__notes__ = [traceback.format_exc()]
        pipe.send_bytes(_packed(result))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
