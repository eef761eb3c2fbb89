"""Writes latent caches in processes of their own; test_encode_latents.py starts one, and two on gloo, and compares.

Usage: latent_worker.py FOLDER, with Lightning's LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

import importlib.util
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from aligntok.cache import shard_name
from aligntok.data import Shapes
from aligntok.errors import UserError
from aligntok.programs.encode import Views, encode
from aligntok.programs.fabric import make_fabric

WORLD = int(os.environ["WORLD_SIZE"])
RANK = int(os.environ["LOCAL_RANK"])
KILLS = 13
FABRIC = make_fabric("cpu", WORLD)


def load_tiny():
    spec = importlib.util.spec_from_file_location("tiny_conftest", Path(__file__).parents[1] / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Tiny


def write(tiny, folder, seed=0):
    torch.set_num_threads(1)
    tokenizer = tiny.tokenizer(seed)
    tokenizer.set_latent_statistics(torch.zeros(4), torch.full((4,), 0.5))
    encode(tokenizer, Shapes(43, 16), folder, Views(), FABRIC, shard_size=10, batch_size=4, min_psnr=0.0)


def killed(tiny, folder, at):
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
        write(tiny, folder)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), status
    write(tiny, folder)


def main(root):
    tiny = load_tiny()
    if WORLD == 1:
        write(tiny, root / "one")
        for at in range(KILLS):
            killed(tiny, root / f"killed_{at:02d}", at)
        return
    write(tiny, root / "two")
    if RANK == 0:
        shutil.copytree(root / "two", root / "two_resumed")
        (root / "two_resumed" / shard_name(3)).unlink()
    torch.distributed.barrier()
    write(tiny, root / "two_resumed")  # one shard for two ranks
    try:
        write(tiny, root / "two", seed=1)
    except UserError as error:
        print(f"refused: {error}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
