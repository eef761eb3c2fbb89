"""Writes latent caches in a process, and in one of two ranks; test_encode_latents.py compares."""

import os
import shutil
import signal

import torch

from aligntok.cache import shard_name
from aligntok.data import Shapes
from aligntok.errors import UserError
from aligntok.programs.encode import Views, encode
from aligntok.programs.fabric import make_fabric
from tests.conftest import Tiny

KILLS = 13


def write(fabric, folder, seed=0):
    tokenizer = Tiny.tokenizer(seed)
    tokenizer.set_latent_statistics(torch.zeros(4), torch.full((4,), 0.5))
    encode(tokenizer, Shapes(43, 16), folder, Views(), fabric, shard_size=10, batch_size=4, min_psnr=0.0)


def killed(fabric, folder, at):
    """Write in a child that dies just before its file number ``at`` takes its place; then go on."""
    child = os.fork()
    if not child:
        replace, count = os.replace, 0

        def replace_or_die(*args):
            nonlocal count
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            replace(*args)

        os.replace = replace_or_die
        write(fabric, folder)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), status
    write(fabric, folder)


def write_alone(root):
    fabric = make_fabric("cpu", 1)
    write(fabric, root / "one")
    for at in range(KILLS):
        killed(fabric, root / f"killed_{at:02d}", at)


def write_as_rank(root):
    """Return the error of a folder that holds something else."""
    fabric = make_fabric("cpu", 2)
    write(fabric, root / "two")
    if fabric.global_rank == 0:
        shutil.copytree(root / "two", root / "two_resumed")
        (root / "two_resumed" / shard_name(3)).unlink()
    fabric.barrier()
    write(fabric, root / "two_resumed")  # one shard for two ranks
    try:
        write(fabric, root / "two", seed=1)
    except UserError as error:
        return str(error)
