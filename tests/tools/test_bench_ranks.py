"""Processes of a bench: what they return, and that none is left behind."""

import multiprocessing
import os
import time

import pytest
import torch.distributed as dist

from tools.bench_ranks import RankError, run_on_ranks


def _rank(factor: int) -> int:
    return factor * dist.get_rank()


def _fail_on_the_second(how: str) -> None:
    if dist.get_rank() == 0:
        time.sleep(600)
    if how == "raises":
        raise RankError("there is no room")
    os._exit(3)


def test_every_rank_answers() -> None:
    assert run_on_ranks(2, _rank, 10) == [0, 10]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("how", "said"), [("raises", "rank 1: there is no room"), ("dies", "rank 1 died")])
def test_a_failure_ends_all(how: str, said: str) -> None:
    with pytest.raises(RankError, match=said):
        run_on_ranks(2, _fail_on_the_second, how)
    assert not multiprocessing.active_children()
