"""Real processes for benches: as many ranks as asked for, over gloo, each with one thread; all are gone afterwards."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_ee.errors import UserError

TIMEOUT_S = 1800.0  # of all the work: who waits for a rank that hangs learns of it in the end


class RankError(UserError):
    """A rank cannot go on, died or hangs; the message says which."""


def run_on_ranks(world_size: int, case: Callable[..., Any], *args: Any) -> list[Any]:
    """What `case(*args)` returns on each rank.

    Args:
        case: a function at the top of a module. That module is imported once the device is chosen, so it may import
            megatron-core; where it is called from, the device has to be chosen before its import too.

    Raises:
        RankError: see there.
        RuntimeError: an error in `case`, with its traceback.
    """
    context = multiprocessing.get_context("spawn")
    workers: list[tuple[BaseProcess, Connection]] = []
    with tempfile.TemporaryDirectory(prefix="bench-ranks-") as folder:
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                store = str(Path(folder) / "store")
                process = context.Process(target=_serve, args=(theirs, rank, world_size, store), daemon=True)
                workers.append((process, ours))
                process.start()
                theirs.close()
            for _, connection in workers:
                connection.send((case, args))
            return _results(workers)
        finally:
            _end(workers)


def _results(workers: list[tuple[BaseProcess, Connection]]) -> list[Any]:
    """Of every rank; the first failure ends it, since the other ranks would wait for that one."""
    results: dict[int, Any] = {}
    rank_of = {id(connection): rank for rank, (_, connection) in enumerate(workers)}
    while len(results) < len(workers):
        waiting = [connection for rank, (_, connection) in enumerate(workers) if rank not in results]
        ready = multiprocessing.connection.wait(waiting, timeout=TIMEOUT_S)
        if not ready:
            raise RankError(f"no rank has ended in {TIMEOUT_S:g} s")
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = rank_of[id(connection)]
            try:
                succeeded, value = connection.recv()
            except EOFError:
                raise RankError(f"rank {rank} died") from None
            if not succeeded:
                raise value
            results[rank] = value
    return [results[rank] for rank in range(len(workers))]


def _end(workers: list[tuple[BaseProcess, Connection]]) -> None:
    for process, connection in workers:
        connection.close()
        if process.pid is not None:
            process.kill()
            process.join()


def _serve(connection: Connection, rank: int, world_size: int, store: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the parent, which then ends its ranks
    threading.Thread(target=_outlive_nobody, daemon=True).start()
    import torch
    import torch.distributed as dist

    from megatron_ee.device import choose_device
    from megatron_ee.log import quiet_dependencies

    torch.set_num_threads(1)
    quiet_dependencies()
    device = choose_device("cpu")
    file = dist.FileStore(store, world_size)  # type: ignore[attr-defined]
    dist.init_process_group(device.backend, store=file, rank=rank, world_size=world_size)
    try:
        case, args = connection.recv()
        connection.send((True, case(*args)))
    except UserError as error:
        connection.send((False, RankError(f"rank {rank}: {error}")))
    except Exception:
        connection.send((False, RuntimeError(f"rank {rank}:\n{traceback.format_exc()}")))


def _outlive_nobody() -> None:
    """A parent that was killed ends nothing any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "ranks are started by a bench"
    parent.join()
    os._exit(1)
