"""Real processes for tests, over gloo or NCCL: started once, each case gets a fresh group of the size it wants."""

import gc
import importlib.util
import itertools
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist

START_TIMEOUT_S = 300.0
CASE_TIMEOUT_S = 120.0
_MOST_THREADS = 200
"""Of a worker. Some libraries never let go of a case's groups, whose threads wake up so often that thousands of them
take all there is of the machine."""


class RankPool:
    """Up to four worker processes. A case is a module-level function; it runs on ranks 0 to n - 1 at once.

    Args:
        device: `cuda` gives each worker the GPU of its number; this very process stays on the CPU.
    """

    def __init__(self, device: Literal["cpu", "cuda"] = "cpu") -> None:
        self._device = device
        self._workers: list[tuple[multiprocessing.process.BaseProcess, multiprocessing.connection.Connection]] = []
        # Where the ranks of all cases find each other, at once: a file is only looked at now and then.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._cases = itertools.count(1)

    def run(self, world_size: int, case: Callable[..., Any], *args: Any) -> list[Any]:
        """What `case(*args)` returns on each rank. A rank that raises fails the test with its traceback."""
        if any(psutil.Process(process.pid).num_threads() > _MOST_THREADS for process, _ in self._workers):
            self.close()
        self._start(world_size)
        where, number = (case.__code__.co_filename, case.__name__), next(self._cases)
        for rank, (_, connection) in enumerate(self._workers[:world_size]):
            connection.send((where, args, rank, world_size, number))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + CASE_TIMEOUT_S
        while len(results) < world_size:
            waiting = {self._workers[rank][1]: rank for rank in range(world_size) if rank not in results}
            ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise AssertionError(f"ranks {sorted(waiting.values())} did not end in {CASE_TIMEOUT_S} s: {where}")
            for connection in ready:
                succeeded, value = connection.recv()  # type: ignore[union-attr]
                if not succeeded:
                    if world_size > 1:
                        self.close()  # the other ranks wait for this one
                    raise AssertionError(f"rank {waiting[connection]}:\n{value}")  # type: ignore[index]
                results[waiting[connection]] = value  # type: ignore[index]
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        """End the workers: a closed pipe tells an idle one to leave; one that hangs is killed."""
        for _, connection in self._workers:
            connection.close()
        for process, _ in self._workers:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers.clear()

    def _start(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        first = len(self._workers)
        while len(self._workers) < count:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._device, len(self._workers), self._store.port))
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        for _, connection in self._workers[first:]:  # on a loaded machine, imports take longer than most cases
            if not connection.poll(START_TIMEOUT_S):
                self.close()
                raise AssertionError(f"a worker did not start in {START_TIMEOUT_S} s")
            connection.recv()


def _serve(
    connection: multiprocessing.connection.Connection, choice: Literal["cpu", "cuda"], local_rank: int, port: int
) -> None:
    # Without a barrier a case that ends at once closes the connections that the others are still making.
    os.environ.update(OMP_NUM_THREADS="1", TORCH_DIST_INIT_BARRIER="1")
    if choice == "cuda":
        os.environ.update(LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE=str(local_rank + 1))
    from megatron_ee.device import choose_device
    from megatron_ee.log import quiet_dependencies

    torch.set_num_threads(1)
    quiet_dependencies()
    device = choose_device(choice)
    from megatron_ee.parallel.mesh import close_mesh

    meeting_place = dist.TCPStore("127.0.0.1", port)
    cases = itertools.count(1)
    connection.send("ready")
    while True:
        try:
            (path, name), args, rank, world_size, number = connection.recv()
        except EOFError:
            return
        try:
            store = dist.PrefixStore(f"case {number}", meeting_place)
            dist.init_process_group(
                device.backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
            )
            connection.send((True, getattr(_module_of(path), name)(*args)))
        except Exception:
            connection.send((False, traceback.format_exc()))
        finally:
            close_mesh()
            # Cycles keep a case's groups, and each of gloo's has threads that wake up a hundred times a second. What is
            # left are mostly modules: frozen, they are not searched each time, which takes a sixth of a second.
            if next(cases) % 8 == 0:
                gc.unfreeze()
            gc.collect()
            gc.freeze()


def _module_of(path: str) -> Any:
    """A test module by its file: test folders are no packages."""
    name = "rank_case_" + Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
