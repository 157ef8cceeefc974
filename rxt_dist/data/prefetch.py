"""A background thread that computes the next items while the current one is in use, or none at all."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

ItemT = TypeVar("ItemT")


class _Step(Protocol):
    """A dataclass with the time its consumer waited for it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def wait_seconds(self) -> float: ...


StepT = TypeVar("StepT", bound=_Step)

_POLL_SECONDS = 0.02  # how soon a thread that waits for room notices that it is to stop


class _End:
    """What the thread puts after its last item: nothing more will come, because of ``error`` if any."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Prefetcher(Generic[ItemT]):
    """Runs an iterator in a thread, at most ``depth`` items ahead; with 0 there is no thread.

    An exception of the iterator is raised by :meth:`get` in its place in the sequence, and again by every
    later call.
    """

    def __init__(self, items: Iterator[ItemT], depth: int) -> None:
        """Start the thread. ``depth`` items are kept ready."""
        self._queue: queue.Queue[ItemT | _End] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._end: _End | None = None
        self._inline = items if depth == 0 else None
        self._thread: threading.Thread | None = None
        if self._inline is not None:
            return
        # The thread must not refer to this object, or an abandoned prefetcher would never be collected.
        arguments = (items, self._queue, self._stop)
        self._thread = threading.Thread(target=_fill, args=arguments, name="rxt-prefetch", daemon=True)
        weakref.finalize(self, self._stop.set)
        self._thread.start()

    def get(self) -> tuple[ItemT, float]:
        """The next item and the seconds that the caller waited for it.

        Raises:
            StopIteration: the iterator is exhausted.
            RuntimeError: :meth:`close` was called.
            BaseException: whatever the iterator raised.
        """
        start = time.perf_counter()
        while self._end is None:
            if self._stop.is_set():
                raise RuntimeError("the data loader is closed")
            if self._inline is not None:
                item = _computed(self._inline)
            else:
                try:
                    item = self._queue.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    continue
            if not isinstance(item, _End):
                return item, time.perf_counter() - start
            self._end = item
        if self._end.error is not None:
            raise self._end.error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it; may be called more than once."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


def _computed(items: Iterator[ItemT]) -> ItemT | _End:
    try:
        return next(items)
    except StopIteration:
        return _End(None)
    except BaseException as error:  # kept, so that it is raised again as by a thread
        return _End(error)


def _fill(items: Iterator[ItemT], target: queue.Queue[ItemT | _End], stop: threading.Event) -> None:
    def put(item: ItemT | _End) -> bool:
        while not stop.is_set():
            try:
                target.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    try:
        for item in items:
            if not put(item):
                return
        put(_End(None))
    except BaseException as error:  # delivered to the consumer, which raises it
        put(_End(error))


class PrefetchedLoader(Generic[StepT]):
    """Endless iterator over the steps of one rank, which a thread builds ahead (with 0 ``prefetch_steps``
    each is built when it is asked for).

    Call :meth:`close` (or use ``with``) when done.
    """

    def __init__(self, steps: Iterator[StepT], prefetch_steps: int) -> None:
        self._prefetcher = Prefetcher(steps, prefetch_steps)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StepT:
        """The next step, with the seconds that the caller waited for it in its ``wait_seconds``.

        Raises:
            DataError: a shard is missing or damaged, or the state to start from does not fit.
        """
        step, wait_seconds = self._prefetcher.get()
        return replace(step, wait_seconds=wait_seconds)

    def close(self) -> None:
        """Stop the background thread; the loader cannot be used any more."""
        self._prefetcher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
