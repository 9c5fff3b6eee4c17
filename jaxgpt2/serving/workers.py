"""Worker processes, and the queue before them.

A worker is a process that runs one job at a time; if it dies, the job that it ran fails and a new process takes its
place. Clients take turns: whoever sends a hundred jobs waits a hundred turns, and whoever sends one waits for one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import multiprocessing
from collections import deque
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from pebble import ProcessExpired, ProcessPool

from jaxgpt2.errors import InputError
from jaxgpt2.executors.cluster import connect
from jaxgpt2.serving.files import APIError
from jaxgpt2.serving.work import Done, Job, perform, start_worker


class WorkerDied(Exception):
    """The process that ran a job ended before the job did."""


class TookTooLong(Exception):
    """A job ran longer than it may, and was stopped with its process."""


class Worker(Protocol):
    async def run(self, job: Job) -> Done:
        """Raises WorkerDied or TookTooLong; the next job finds a fresh process."""
        ...

    def close(self) -> None: ...


class LocalWorker:
    """A process of this machine.

    timeout: seconds of a job, the loading of keys included.
    """

    def __init__(self, timeout: float, threads: int | None):
        self._timeout, self._threads = timeout, threads
        self._pool = self._start()

    def _start(self) -> ProcessPool:
        # A process that is spawned inherits nothing: no socket, no memory of the server.
        context = multiprocessing.get_context("spawn")
        return ProcessPool(1, initializer=start_worker, initargs=[self._threads], context=context)

    async def run(self, job: Job) -> Done:
        try:
            future: Future[Done] = self._pool.schedule(perform, args=[job], timeout=self._timeout)
            return await asyncio.wrap_future(future)
        except TimeoutError:
            raise TookTooLong from None
        except ProcessExpired as error:
            raise WorkerDied(f"exit code {error.exitcode}") from None
        except (BrokenExecutor, RuntimeError) as error:
            # It died where the pool itself cannot go on, as while it was handed the job.
            self._pool.stop()
            self._pool = self._start()
            raise WorkerDied(f"{type(error).__name__}") from None

    def close(self) -> None:
        self._pool.stop()
        self._pool.join()


class DaskWorker:
    """A worker of a Dask cluster, which has the bundle and the state directory under the same paths."""

    def __init__(self, client: Any, address: str, timeout: float):
        self._client, self._address, self._timeout = client, address, timeout
        self._thread = ThreadPoolExecutor(1)  # waits for the cluster, as long as a job takes

    async def run(self, job: Job) -> Done:
        from distributed import CancelledError, KilledWorker

        # Keys stay loaded where they were used, so jobs return to their worker while it is there.
        task = self._client.submit(
            perform, job, pure=False, retries=0, workers=[self._address], allow_other_workers=True
        )
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, task.result, self._timeout)
        except (KilledWorker, CancelledError) as error:  # the latter: the scheduler is gone
            raise WorkerDied(type(error).__name__) from None
        except TimeoutError:
            raise TookTooLong from None
        finally:
            with contextlib.suppress(Exception):
                task.cancel()

    def close(self) -> None:
        self._client.close()
        self._thread.shutdown()


def dask_workers(address: str, timeout: float) -> list[Worker]:
    """A worker for each that the Dask scheduler at an address has.

    Raises:
        InputError: Dask is not installed, or no scheduler with workers answers.
    """
    client = connect(address)
    addresses = list(client.scheduler_info(n_workers=-1)["workers"])
    if not addresses:
        client.close()
        raise InputError(f"the Dask scheduler at {address} has no workers")
    return [DaskWorker(client, worker, timeout) for worker in addresses]


class Scheduler:
    """Jobs on their way to workers.

    limit: jobs that may wait. The next one is refused.
    """

    def __init__(self, workers: Sequence[Worker], limit: int):
        self.workers = list(workers)
        self.limit = limit
        self.idle = list(workers)
        # The keys that each worker used last: it need not load them again.
        self._loaded: dict[Worker, Path] = {}
        # Clients in the order of their turns, each with its jobs in theirs.
        self._waiting: dict[str, deque[tuple[Job, asyncio.Future[Done]]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._seconds = 1.0  # of a job, about

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> int:
        return len(self.workers) - len(self.idle)

    def check(self) -> None:
        """Raises APIError if a job that came now would have no place."""
        if self.waiting >= self.limit:
            wait = self._seconds * (self.waiting + 1) / len(self.workers)
            raise APIError(503, "busy", "the server has as much to do as it can queue", min(max(wait, 1), 60))

    async def run(self, client: str, job: Job) -> Done:
        """Raises APIError if the queue is full, WorkerDied or TookTooLong."""
        self.check()
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append((job, future))
        self._dispatch()
        return await future

    def _dispatch(self) -> None:
        while self.idle and self._waiting:
            client = next(iter(self._waiting))
            queue = self._waiting.pop(client)
            job, future = queue.popleft()
            if queue:
                self._waiting[client] = queue  # behind all others
            if future.cancelled():
                continue
            worker = min(self.idle, key=functools.partial(self._unprepared, job))
            self.idle.remove(worker)
            self._loaded[worker] = job.keys
            task = asyncio.create_task(self._work(worker, job, future))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _unprepared(self, job: Job, worker: Worker) -> bool:
        return self._loaded.get(worker) != job.keys

    async def _work(self, worker: Worker, job: Job, future: asyncio.Future[Done]) -> None:
        started = asyncio.get_running_loop().time()
        try:
            done = await worker.run(job)
        except Exception as error:
            if not future.cancelled():
                future.set_exception(error)
        else:
            if not future.cancelled():
                future.set_result(done)
        finally:
            self._seconds += 0.2 * (asyncio.get_running_loop().time() - started - self._seconds)
            self.idle.append(worker)
            self._dispatch()

    async def finish(self) -> None:
        """Waits for the jobs that run, drops those that wait, and ends the workers."""
        for queue in self._waiting.values():
            for _, future in queue:
                future.cancel()
        self._waiting.clear()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self.workers:
            await asyncio.to_thread(worker.close)
