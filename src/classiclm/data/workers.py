"""Worker processes that make pieces."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any

from classiclm.data.cleaning import Step
from classiclm.data.duplicates import Near
from classiclm.data.pieces import Block, make_piece, write_piece
from classiclm.data.tokenizer import Tokenizer
from classiclm.data.tokenizers import from_json
from classiclm.errors import RESOURCE, Error

_ASKING = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]


class Pool:
    """Worker processes with at most one block waiting, so that memory stays bounded; without any, work is done here."""

    def __init__(self, n_workers: int, tokenizer: Tokenizer, path: Path):
        """path: of the tokenizer's file, from which each worker reads it."""
        self._tokenizer, self._waiting = tokenizer, n_workers + 1
        self._futures: set[Future[None]] = set()
        self._executor = None
        if n_workers > 1:
            context = multiprocessing.get_context("spawn")
            with _signals_held():  # it starts a process that keeps its books
                self._executor = ProcessPoolExecutor(n_workers, context, _start_worker, (path,))

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._executor is None:
            return
        whole = False
        try:
            if kind is None:
                self._collect(0)
                whole = True
        finally:
            self._end(self._executor, kill=not whole)

    def _end(self, executor: ProcessPoolExecutor, kill: bool) -> None:
        """Workers at a piece that nobody waits for are killed: a piece bears its name only when it is whole. So is
        one that was being started when the pool broke, for which the executor would wait for ever."""
        for process in list(executor._processes.values()) if kill else ():  # Python 3.14 has kill_workers()
            process.kill()
        executor.shutdown(cancel_futures=True)

    def submit(self, path: Path, block: Block, steps: Sequence[Step], near: Near | None) -> None:
        """Have one piece made; waits while enough are being made."""
        if self._executor is None:
            write_piece(path, make_piece(block, steps, near, self._tokenizer))
            return
        with _worker_died(self._executor), _signals_held():  # a worker that starts now never hears of them
            self._futures.add(self._executor.submit(_work, path, block, steps, near))
        self._collect(self._waiting - 1)

    def _collect(self, n_left: int) -> None:
        while len(self._futures) > n_left:
            done, self._futures = wait(self._futures, return_when=FIRST_COMPLETED)
            for future in done:
                with _worker_died():
                    future.result()


class _worker_died:
    """Turns the end of a worker into an Error (exit 4)."""

    def __init__(self, starting: ProcessPoolExecutor | None = None):
        """starting: that may be starting a worker, whose pipes are closed under its hands if another one dies now."""
        self._starting = starting

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, _: object) -> None:
        closed = isinstance(e, OSError) and self._starting is not None and self._starting._broken
        if isinstance(e, BrokenProcessPool) or closed:
            fix = "run the same command again, which goes on from there; if memory is short, with fewer --workers"
            raise Error("a worker process", "was killed", fix, RESOURCE) from e


@contextmanager
def _signals_held() -> Iterator[None]:
    """Signals wait, so that no process is left half started; and one that starts now never hears of any, for it
    inherits what is held. Those that go to a whole group, as Ctrl-C does, are for the parent: it ends the workers."""
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []  # what other threads, which libraries have started, were handed
    handlers = {number: signal.signal(number, lambda number, _: waiting.append(number)) for number in _ASKING}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for first in waiting[:1]:
        _act(handlers[signal.Signals(first)], first)


def _act(handler: Any, number: int) -> None:
    """What the signal would have done had it come now."""
    if callable(handler):
        handler(number, None)
    elif handler == signal.SIG_DFL:
        signal.raise_signal(number)


_worker: dict[str, Tokenizer] = {}  # of a worker process: what it was started with


def _start_worker(tokenizer: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have workers of their own
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker["tokenizer"] = from_json(tokenizer.read_text(encoding="utf-8"), tokenizer)


def _die_with_parent() -> None:
    """A parent that was killed cannot end its workers, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(path: Path, block: Block, steps: Sequence[Step], near: Near | None) -> None:
    write_piece(path, make_piece(block, steps, near, _worker["tokenizer"]))
