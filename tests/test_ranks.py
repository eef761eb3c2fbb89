"""What runs ranks tells of their failures."""

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks


def add_up(numbers):
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]))
    total = torch.tensor(numbers[dist.get_rank()])
    dist.all_reduce(total)
    print(f"{dist.get_rank()} of {os.environ['WORLD_SIZE']}")
    return total, os.getpid(), os.getcwd(), os.environ["OURS"]


def fail(how):
    if os.environ["LOCAL_RANK"] == "0":
        time.sleep(1000)  # as a rank that waits for the other in gloo
    print("so far so good")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(how) if isinstance(how, int) else print(1 / how)


def test_ranks_are_processes_that_talk_to_each_other(in_folder, monkeypatch, capsys):
    monkeypatch.setenv("OURS", "ours")
    first, second = run_ranks(2, add_up, [1, 2])
    assert first[0] == second[0] == 3
    assert len({first[1], second[1], os.getpid()}) == 3
    assert first[2:] == second[2:] == (str(in_folder), "ours")
    assert "rank 1: 1 of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("how", "code", "words"), [(0.0, 1, "ZeroDivisionError"), (3, 3, "good"), ("kill", -9, "good")]
)
def test_a_rank_that_fails_ends_the_job_at_once(how, code, words, capsys):
    start = time.monotonic()
    with pytest.raises(AssertionError, match=rf"\[-9, {code}\]"):
        run_ranks(2, fail, how)
    assert time.monotonic() - start < 60
    assert words in capsys.readouterr().out


def test_ranks_that_do_not_end_are_killed():
    with pytest.raises(AssertionError, match="no end after 1 s"):
        run_ranks(1, fail, 0.0, seconds=1)
