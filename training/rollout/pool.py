"""A pool of actors that take units of work: dispatch, replacement of lost actors, retries within a budget.

A unit travels together with the weights it is to be done with, so that no actor can sample with others. A result is
counted once, by its key. When an actor with several units is lost, any of them may be the cause: the oldest may have
been done, its result still under way. So all of them become suspects, which are done by an actor that has nothing else,
and only what is lost there counts against a unit. One that is lost again and again is taken apart, and a single prompt
that always loses its actor is set aside. An actor whose work raises an exception is replaced like one that died: after
a device ran out of memory, an engine is in no known state.

Only actors that are ready are given work, so that one that never comes holds nothing hostage: its start is tried again,
with longer and longer pauses, while the others go on. When there is nothing left to hand out, a unit that takes much
longer than others is given to a second actor, and whichever result comes first counts.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray

from vllm_cospec.errors import CoSpecError, TrainingError
from vllm_cospec.training.rollout.losses import cause_of, is_full, is_of_the_actor, said_by
from vllm_cospec.training.rollout.placement import end

POLL_S = 1.0
GRACE_S = 30.0  # for the slower ones, once the first actor is ready
PAUSE_S, LONGEST_PAUSE_S = 2.0, 300.0  # before a start is tried again: memory is freed, a port is closed
IN_A_ROW = 3  # times the attempts, beside one loss of every actor, with no result between them: then nothing works
SLOW = 3.0  # times the median of the units done so far, after which a unit goes to a second actor as well
SLOW_AFTER_S = 10.0  # and no sooner than this


class UnitPool(Protocol):
    """What a run hands its units to: :class:`Pool`, or an engine of its own process."""

    set_aside: list[Any]

    def put(self, payload: Any) -> Any:
        """Return what units are to be submitted with, for a payload that many of them share."""

    def submit(self, work: Iterable[Any], payload: Any = None) -> None:
        """Queue units; ``payload`` goes along with each."""

    def collect(self, keys: Iterable[Hashable], tick: Callable[[Any], None] = ...) -> list[Any]:
        """Wait for the results of units and return them, a list for each."""


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
    holders: int = 0  # actors that have it
    done: bool = False  # its result has been counted, or it was given up


@dataclass(eq=False)
class _Actor:
    handle: Any = None  # None while a start is waited for
    started: Any = None  # reference that resolves when it can work
    running: deque[tuple[Any, Job]] = field(default_factory=deque)  # (reference, job), oldest first
    since: float = 0.0  # when the oldest began, as far as we can see
    ready: bool = False
    errors: int = 0  # in a row, that were not its own
    failed_starts: int = 0  # in a row, of its place

    def takes(self, job: Job, depth: int) -> bool:
        """Whether it may be handed this job now; suspects and others do not share an actor."""
        if not self.ready:
            return False
        if not self.running:
            return True
        if self.running[0][1].done:  # a straggler that another has overtaken
            return False
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
        pause_s: float = PAUSE_S,
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
            pause_s: before the first repetition of a start that failed; it doubles with each.
            depth: units an actor is handed at a time, so that it need not wait for the next.
            notice: called with a sentence about each loss.
        """
        self._make_actor = make_actor
        self._attempts, self._depth = attempts, depth
        self._unit_timeout_s, self._start_timeout_s, self._pause_s = unit_timeout_s, start_timeout_s, pause_s
        self._notice = notice
        self._queue: deque[Job] = deque()
        self._results: dict[Hashable, list[Any]] = {}
        self._parts: dict[Hashable, dict[int, Any]] = {}  # finished parts of units that are not whole yet
        self._outstanding: dict[Hashable, int] = {}
        self._ever_ready = False
        self._lost_in_a_row = 0
        self._durations: deque[float] = deque(maxlen=64)  # seconds of the last units
        self.losses, self.last_loss = 0, ""
        self.set_aside: list[Any] = []
        self._actors = [self._new_actor() for _ in range(size)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            end(actor.handle)

    def put(self, payload: Any) -> Any:
        """Return what units are to be submitted with, for a payload that many of them share: it travels once."""
        return ray.put(payload)

    def submit(self, work: Iterable[Any], payload: Any = None) -> None:
        """Queue units; ``payload`` goes along with each."""
        for unit in work:
            self._outstanding[unit.key] = 1
            self._queue.append(Job(unit, payload, unit.key))

    def wait_until_ready(self) -> None:
        """Return when every actor can work, or when the first has waited for the others for a while.

        Raises:
            CoSpecError: they cannot be started; carries the reason.
        """
        first: float | None = None
        while not all(actor.ready for actor in self._actors):
            self._turn()
            ready = sum(actor.ready for actor in self._actors)
            if ready and first is None:
                first = time.monotonic()
            if first is not None and ready < len(self._actors) and time.monotonic() - first > GRACE_S:
                self._notice(f"{ready} of {len(self._actors)} actors are ready and begin; the others join them")
                return

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
        self._start_again()
        for actor in self._actors:
            while self._queue and actor.takes(self._queue[0], self._depth):
                self._hand(actor, self._queue.popleft())
        if not self._queue:
            self._help_stragglers()
        waiting = {actor.started: actor for actor in self._actors if actor.handle is not None and not actor.ready}
        waiting |= {reference: actor for actor in self._actors for reference, _ in actor.running}
        if not self._outstanding and self._ever_ready and not waiting:
            raise TrainingError("the pool was asked for a result nobody works on")
        if waiting:
            done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
            if not done:
                done, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_S)
            for reference in done:
                self._take(waiting[reference], reference)
        else:
            time.sleep(min(POLL_S, self._pause_s))
        now = time.monotonic()
        for actor in list(self._actors):
            limit = self._unit_timeout_s if actor.ready else self._start_timeout_s
            waits = actor.running or (actor.handle is not None and not actor.ready)
            if waits and now - actor.since > limit:
                self._lost(actor, f"took longer than {limit:g} s")

    def _hand(self, actor: _Actor, job: Job) -> None:
        if not actor.running:
            actor.since = time.monotonic()
        job.holders += 1
        actor.running.append((actor.handle.work.remote(job.work, job.payload), job))

    def _start_again(self) -> None:
        """Start actors whose pause is over."""
        for place, actor in enumerate(self._actors):
            if actor.handle is None and time.monotonic() >= actor.since:
                self._actors[place] = self._new_actor()
                self._actors[place].failed_starts = actor.failed_starts

    def _help_stragglers(self) -> None:
        """Give units that take much longer than others to idle actors as well."""
        idle = [actor for actor in self._actors if actor.ready and not actor.running]
        if not idle or not self._durations:
            return
        limit = max(SLOW_AFTER_S, SLOW * statistics.median(self._durations))
        now = time.monotonic()
        for actor in sorted(self._actors, key=lambda other: other.since):
            if idle and actor.running and now - actor.since > limit:
                for _, job in list(actor.running):  # one that waits behind it is held up as well
                    if idle and job.holders == 1 and not job.done and not job.suspect:
                        self._notice(f"unit {job.work.key} takes longer than {limit:.0f} s and goes to a second actor")
                        self._hand(idle.pop(), job)

    def _take(self, actor: _Actor, reference: Any) -> None:
        if actor not in self._actors:  # lost in the meantime, its work is queued again
            return
        try:
            value = copy.deepcopy(ray.get(reference))  # arrays would lie in the object store for as long as they live
        except ray.exceptions.RayError as error:
            self._failed(actor, reference, error)
            return
        now = time.monotonic()
        if reference == actor.started:
            actor.ready, actor.failed_starts, self._ever_ready, actor.since = True, 0, True, now
            return
        actor.errors = 0
        self._durations.append(now - actor.since)
        actor.since = now
        job = self._let_go(actor, reference)
        self._lost_in_a_row = 0
        if not job.done:
            self._settle(job, value)

    def _failed(self, actor: _Actor, reference: Any, error: Exception) -> None:
        """Do what an error instead of a result asks for.

        Raises:
            CoSpecError: raised by the work itself; or a result finds no room, however often it is made.
        """
        cause = cause_of(error)
        # what is wrong with the configuration or a reward is wrong on every actor; a start that worked once is not
        if isinstance(cause, CoSpecError) and not (reference == actor.started and self._ever_ready):
            raise type(cause)(str(cause)) from None
        why = said_by(cause)
        if reference != actor.started and is_full(cause):
            self._repeat(actor, reference, why, full=True)
        elif isinstance(error, ray.exceptions.RayTaskError):
            self._lost(actor, f"raised {type(cause).__name__}: {why}")
        elif reference == actor.started or is_of_the_actor(error) or actor.errors >= self._attempts:
            self._lost(actor, why)
        else:
            self._repeat(actor, reference, why)

    def _let_go(self, actor: _Actor, reference: Any) -> Job:
        """Take a job from an actor that is done with it."""
        job = next(job for other, job in actor.running if other == reference)
        actor.running = deque(entry for entry in actor.running if entry[0] != reference)
        job.holders -= 1
        return job

    def _repeat(self, actor: _Actor, reference: Any, why: str, full: bool = False) -> None:
        """Queue a job again whose result was lost on its way; the actor is well.

        Raises:
            TrainingError: it found no room in a store that is ``full``, and not for the first time.
        """
        actor.errors += 1
        actor.since = time.monotonic()
        job = self._let_go(actor, reference)
        self._notice(f"a result was lost ({why}); its unit is repeated")
        job.attempts += 1
        if full and job.attempts >= self._attempts and not job.done:  # to set its prompts aside would lose them
            raise TrainingError(f"rollout: the result of unit {job.work.key} found no room {job.attempts} times: {why}")
        self._queue_again([job], why)

    def _queue_again(self, jobs: list[Job], why: str) -> None:
        for job in reversed(jobs):
            if job.done or job.holders:  # another actor has it too
                continue
            if job.attempts < self._attempts:
                self._queue.appendleft(job)
            else:
                self._give_up(job, why)

    def _settle(self, job: Job, *value: Any) -> None:
        """Note that a part is done; without a value: that it is given up."""
        job.done = True
        if value:
            self._parts.setdefault(job.whole, {})[job.part] = value[0]
        self._outstanding[job.whole] -= 1
        if self._outstanding[job.whole] == 0:
            del self._outstanding[job.whole]
            self._results[job.whole] = [part for _, part in sorted(self._parts.pop(job.whole, {}).items())]

    def _give_up(self, job: Job, why: str) -> None:
        """Take a unit apart that has used up its attempts; set it aside when it is a single prompt."""
        parts = job.work.split()
        if len(parts) > 1:
            self._notice(f"unit {job.work.key} lost its actor {job.attempts} times and is taken apart")
            job.done = True
            self._outstanding[job.whole] += len(parts) - 1
            self._queue.extendleft(Job(part, job.payload, job.whole, i, suspect=True) for i, part in enumerate(parts))
            return
        self._notice(f"{job.work} lost its actor {job.attempts} times and is set aside (the last one {why})")
        self.set_aside.append(job.work)
        self._settle(job)

    def _lost(self, actor: _Actor, why: str) -> None:
        """Replace an actor and queue its work again.

        Raises:
            TrainingError: no actor can be started, or so many were lost that no unit is the cause.
        """
        self.losses += 1
        self.last_loss = why
        end(actor.handle)
        actor.ready = actor.ready or _resolved(actor.started)
        place = self._actors.index(actor)
        if actor.ready:
            self._lost_in_a_row += 1
            if self._lost_in_a_row > len(self._actors) + IN_A_ROW * self._attempts:
                raise TrainingError(
                    f"rollout: {self._lost_in_a_row} actors in a row were lost with no result between them; the last "
                    f"one {why}"
                )
            self._notice(f"an actor was lost ({why}); another takes over")
            self._actors[place] = self._new_actor()
        else:
            failed = actor.failed_starts + 1
            if failed > self._attempts and not any(other.ready for other in self._actors):
                raise TrainingError(f"engines cannot be started: {why}")
            pause = min(LONGEST_PAUSE_S, self._pause_s * 2 ** (failed - 1))
            self._notice(f"an actor did not start ({why}); it is tried again in {pause:g} s, the others go on")
            self._actors[place] = _Actor(since=time.monotonic() + pause, failed_starts=failed)
        jobs = [job for _, job in actor.running]
        if len(jobs) == 1 and actor.ready:
            jobs[0].attempts += 1
        for job in jobs:
            job.suspect, job.holders = True, job.holders - 1
        self._queue_again(jobs, why)


def _resolved(reference: Any) -> bool:
    """Whether a reference has a value, which may have arrived in the same moment as its actor's end."""
    done, _ = ray.wait([reference], timeout=0)
    try:
        return bool(done and ray.get(reference))
    except ray.exceptions.RayError:
        return False
