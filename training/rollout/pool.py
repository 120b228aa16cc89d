"""A pool of actors that take units of work: dispatch, replacement of lost actors, retries within a budget.

A unit travels together with the weights it is to be done with, so that no actor can sample with others. A result is
counted once, by its key. When an actor with several units is lost, any of them may be the cause: the oldest may have
been done, its result still under way. So all of them become suspects, which are done by an actor that has nothing else,
and only what is lost there counts against a unit. One that is lost again and again is taken apart, and a single prompt
that always loses its actor is set aside.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray

from vllm_cospec.errors import CoSpecError, TrainingError

POLL_S = 1.0


class Work(Protocol):
    """A unit of work."""

    @property
    def key(self) -> Hashable:
        """What it is counted under."""

    def split(self) -> list[Any]:
        """Its parts; one part when it cannot be taken apart."""


@dataclass
class Job:
    """A unit in the pool, or a part of one."""

    work: Any
    payload: Any  # handed to the actor with the work: an object reference to the weights
    whole: Hashable  # key of the unit it is, or is a part of
    part: int = 0
    attempts: int = 0  # actors it has certainly cost
    suspect: bool = False  # has been with an actor that was lost, and is done alone from then on


@dataclass(eq=False)
class _Actor:
    handle: Any
    started: Any  # reference that resolves when it can work
    running: deque[tuple[Any, Job]] = field(default_factory=deque)  # (reference, job), oldest first
    since: float = 0.0  # when the oldest began, as far as we can see
    ready: bool = False

    def takes(self, job: Job, depth: int) -> bool:
        """Whether it may be handed this job now; suspects and others do not share an actor."""
        if not self.running:
            return True
        return len(self.running) < depth and not job.suspect and not self.running[-1][1].suspect


class Pool:
    """Actors of one kind. Its callers add work and wait for results by key."""

    def __init__(
        self,
        make_actor: Callable[[], Any],
        size: int,
        attempts: int = 3,
        unit_timeout_s: float = 900.0,
        start_timeout_s: float = 900.0,
        depth: int = 2,
        notice: Callable[[str], None] = lambda text: None,
    ):
        """Start the actors.

        Args:
            make_actor: returns a handle with methods ``ready()`` and ``work(unit, payload)``.
            size: number of actors.
            attempts: actors a unit may certainly have cost before it is taken apart or set aside.
            unit_timeout_s: after which an actor that works on one unit is taken for lost.
            start_timeout_s: likewise for its start.
            depth: units an actor is handed at a time, so that it need not wait for the next.
            notice: called with a sentence about each loss.
        """
        self._make_actor = make_actor
        self._attempts, self._depth = attempts, depth
        self._unit_timeout_s, self._start_timeout_s = unit_timeout_s, start_timeout_s
        self._notice = notice
        self._queue: deque[Job] = deque()
        self._results: dict[Hashable, list[Any]] = {}
        self._parts: dict[Hashable, dict[int, Any]] = {}  # finished parts of units that are not whole yet
        self._outstanding: dict[Hashable, int] = {}
        self._failed_starts = 0
        self.losses = 0
        self.set_aside: list[Any] = []
        self._actors = [self._new_actor() for _ in range(size)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            with contextlib.suppress(Exception):  # it may be gone already
                ray.kill(actor.handle)

    def submit(self, work: Iterable[Any], payload: Any = None) -> None:
        """Queue units; ``payload`` goes along with each."""
        for unit in work:
            self._outstanding[unit.key] = 1
            self._queue.append(Job(unit, payload, unit.key))

    def wait_until_ready(self) -> None:
        """Return when every actor can work.

        Raises:
            TrainingError: they cannot be started; carries the reason.
        """
        while not all(actor.ready for actor in self._actors):
            self._turn()

    def collect(self, keys: Iterable[Hashable], tick: Callable[[Any], None] = lambda result: None) -> list[Any]:
        """Wait for the results of units and hand them out, in the order of ``keys``.

        A unit that was taken apart gives the list of its parts' results, one that was set aside an empty list; any
        other a list of one.

        Args:
            keys: of submitted units.
            tick: called with each result as it arrives.

        Raises:
            CoSpecError: raised by the work itself, or actors cannot be started.
        """
        keys = list(keys)
        told: set[Hashable] = set()
        while True:
            for key in keys:
                if key in self._results and key not in told:
                    told.add(key)
                    tick(self._results[key])
            if len(told) == len(keys):
                return [self._results.pop(key) for key in keys]
            self._turn()

    def _new_actor(self) -> _Actor:
        handle = self._make_actor()
        return _Actor(handle, handle.ready.remote(), since=time.monotonic())

    def _turn(self) -> None:
        """Hand out work, wait a moment, take in what has come."""
        for actor in self._actors:
            while self._queue and actor.takes(self._queue[0], self._depth):
                job = self._queue.popleft()
                if not actor.running and actor.ready:
                    actor.since = time.monotonic()
                actor.running.append((actor.handle.work.remote(job.work, job.payload), job))
        waiting = {actor.started: actor for actor in self._actors if not actor.ready}
        waiting |= {reference: actor for actor in self._actors for reference, _ in actor.running}
        if not waiting:
            raise TrainingError("the pool was asked for a result nobody works on")
        done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        if not done:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_S)
        for reference in done:
            self._take(waiting[reference], reference)
        now = time.monotonic()
        for actor in list(self._actors):
            limit = self._unit_timeout_s if actor.ready else self._start_timeout_s
            if (actor.running or not actor.ready) and now - actor.since > limit:
                self._lost(actor, f"took longer than {limit:g} s")

    def _take(self, actor: _Actor, reference: Any) -> None:
        if actor not in self._actors:  # lost in the meantime, its work is queued again
            return
        try:
            value = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, CoSpecError):
                raise type(error.cause)(str(error.cause)) from None
            raise TrainingError(f"an actor failed: {type(error.cause).__name__}: {error.cause}") from error
        except ray.exceptions.RayError as error:
            self._lost(actor, " ".join(str(error).split())[:300])
            return
        actor.since = time.monotonic()
        if reference == actor.started:
            actor.ready, self._failed_starts = True, 0
            return
        actor.ready = True
        job = next(job for other, job in actor.running if other == reference)
        actor.running = deque(entry for entry in actor.running if entry[0] != reference)
        self._settle(job, value)

    def _settle(self, job: Job, *value: Any) -> None:
        """Note that a part is done; without a value: that it is given up."""
        if value:
            self._parts.setdefault(job.whole, {})[job.part] = value[0]
        self._outstanding[job.whole] -= 1
        if self._outstanding[job.whole] == 0:
            del self._outstanding[job.whole]
            self._results[job.whole] = [part for _, part in sorted(self._parts.pop(job.whole, {}).items())]

    def _give_up(self, job: Job) -> None:
        """Take a unit apart that has used up its attempts; set it aside when it is a single prompt."""
        parts = job.work.split()
        if len(parts) > 1:
            self._notice(f"unit {job.work.key} lost its actor {job.attempts} times and is taken apart")
            self._outstanding[job.whole] += len(parts) - 1
            self._queue.extendleft(Job(part, job.payload, job.whole, i, suspect=True) for i, part in enumerate(parts))
        else:
            self._notice(f"{job.work} lost its actor {job.attempts} times and is set aside")
            self.set_aside.append(job.work)
            self._settle(job)

    def _lost(self, actor: _Actor, why: str) -> None:
        """Replace an actor and queue its work again."""
        self.losses += 1
        with contextlib.suppress(Exception):
            ray.kill(actor.handle)
        actor.ready = actor.ready or _resolved(actor.started)
        if not actor.ready:
            self._failed_starts += 1
            if self._failed_starts > self._attempts:
                raise TrainingError(f"engines cannot be started: {why}")
        self._notice(f"an actor was lost ({why}); another takes over")
        jobs = [job for _, job in actor.running]
        if len(jobs) == 1 and actor.ready:
            jobs[0].attempts += 1
        for job in jobs:
            job.suspect = True
        self._actors[self._actors.index(actor)] = self._new_actor()
        for job in reversed(jobs):
            if job.attempts < self._attempts:
                self._queue.appendleft(job)
            else:
                self._give_up(job)


def _resolved(reference: Any) -> bool:
    """Whether a reference has a value, which may have arrived in the same moment as its actor's end."""
    done, _ = ray.wait([reference], timeout=0)
    try:
        return bool(done and ray.get(reference))
    except ray.exceptions.RayError:
        return False
