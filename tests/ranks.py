"""Ranks that are processes of their own, without importing torch, Lightning and aligntok anew in each.

One server per pytest worker (``multiprocessing``'s "forkserver") imports them once, starts no thread, and is forked for
every rank. What a rank calls is a function of a test module, or of a module beside it::

    def work(folder):
        ...
        return weights

    first, second = run_ranks(2, work, tmp_path)

A launch that is itself under test (torchrun, Lightning's and Fabric's launchers) starts real processes instead.
"""

import atexit
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

import torch
from lightning.pytorch.utilities import rank_zero_only

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "torchvision", "aligntok.cli", "sklearn.datasets"])


def run_ranks(world_size, function, *args, seconds=240):
    """Call a function on each rank of a job, in the environment of a cluster, and return what the ranks return.

    What they print is printed here. The first rank that fails, or a job that is too slow, ends all of them with an
    ``AssertionError`` that shows what each printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"NODE_RANK": "0", "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    job = {**os.environ, **job, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    call = pickle.dumps((function, args))  # unpickled, which imports the function's module, in the rank's environment
    with tempfile.TemporaryDirectory() as folder:
        texts, values = ([Path(folder, f"{rank}.{kind}") for rank in range(world_size)] for kind in ("txt", "pt"))
        ranks = [
            SERVER.Process(target=_rank, args=({**job, "LOCAL_RANK": str(rank)}, text, value, call))
            for rank, (text, value) in enumerate(zip(texts, values, strict=True))
        ]
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # of the server: numpy starts threads, too
            for rank in ranks:
                rank.start()
        waiting, end = {rank.sentinel: rank for rank in ranks}, time.monotonic() + seconds
        try:
            while waiting and not any(rank.exitcode for rank in ranks):
                ended = wait(waiting, end - time.monotonic())
                assert ended, f"no end after {seconds} s"
                for sentinel in ended:
                    waiting.pop(sentinel).join()
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
            for rank, text in enumerate(texts):
                print(f"rank {rank}:", text.read_text()[-4000:] if text.exists() else "did not start")
        codes = [rank.exitcode for rank in ranks]
        assert not any(codes), f"ranks ended with {codes}"
        return [torch.load(value, weights_only=False) for value in values]


def _rank(environment, text, value, call):
    """Be a rank, like a process that was started in this environment with its output in a file."""
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(text, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
        stream.reconfigure(line_buffering=True)
    rank_zero_only.rank = int(environment["LOCAL_RANK"])  # Lightning reads it from the environment at its import
    torch.set_num_threads(1)  # another number of threads would round in another way
    try:
        function, args = pickle.loads(call)
        torch.save(function(*args), value)
    finally:
        atexit._run_exitfuncs()  # a forked process of multiprocessing skips them: ours leaves the process group
