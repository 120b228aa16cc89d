"""What a server does about drift: say so, or verify strictly, until it is started again or for a number of requests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from vllm_cospec.config import Settings
from vllm_cospec.drift import DriftDetector, Finished
from vllm_cospec.reports import COUNTS, StepCounts
from vllm_cospec.requests import request_settings, served_settings
from vllm_cospec.shared_counts import WatchCounters

logger = init_logger("vllm.cospec")

STRICT = "cospec_strict"  # attribute of vLLM's SchedulerOutput: everything is verified strictly
UNWATCHED = "cospec_unwatched"  # attribute of vLLM's Request: it was verified strictly in part


class Watch:
    """The drift test over one engine's requests, and what its alarm leads to."""

    def __init__(self, settings: Settings):
        """Begin with what calibration saw.

        Args:
            settings: with ``traffic``.
        """
        assert settings.traffic is not None
        self._detector = DriftDetector(settings.traffic)
        self._falls_back, self._pause = settings.on_drift == "strict", settings.drift_pause
        self._left = 0  # requests until arbitration comes back
        self.strict = False
        """Whether verification is strict now."""

    def finished(self, request: Finished | None) -> bool:
        """Take in a request that has ended; returns whether it raised an alarm.

        Args:
            request: what was counted of it; None where it had settings of its own, or was verified strictly in part.
        """
        if self.strict:
            self._left -= 1
            if self._pause is not None and self._left <= 0:
                self.strict = False
                self._detector.reset()
                logger.warning("CoSpec: requests are arbitrated again, and watched from here on.")
            return False
        if request is None or self._detector.alarm or not self._detector.add(request):
            return False
        self.strict = self._falls_back
        self._left = self._pause or 0
        what = "go on being arbitrated (on_drift='log')"
        if self.strict:
            back = "the server is started again" if self._pause is None else f"{self._pause} of them have ended"
            what = f"are verified strictly until {back}"
        logger.warning(
            "CoSpec: traffic is not what the arbiter was calibrated on (%s, noticed after %d requests); requests %s.",
            self._detector.reason(), self._detector.requests, what,
        )  # fmt: skip
        return True


class RequestWatch:
    """Counts requests that have ended and tells the watch of them, in the scheduler, which knows what was delivered."""

    def __init__(self, settings: Settings, engine: int):
        """Begin with what calibration saw, if that is known.

        Args:
            settings: with ``counts_requests``.
            engine: which of the server's engines this is, for the counters.
        """
        self._settings = settings
        self._watch = Watch(settings) if settings.traffic is not None else None
        self._usual = request_settings(None, settings)  # what is watched
        self._counters = WatchCounters(settings.counters, engine)
        self._counters.open(create=True)

    def scheduled(self, scheduler_output: Any, requests: Iterable[Any]) -> None:
        """Say on the way to the workers what holds for a step.

        Args:
            scheduler_output: vLLM's SchedulerOutput.
            requests: that are in it, vLLM's Request.
        """
        if self._watch is not None and self._watch.strict:
            setattr(scheduler_output, STRICT, True)
            for request in requests:
                setattr(request, UNWATCHED, True)

    def ended(self, request: Any) -> None:
        """Take in a request, vLLM's Request, that has ended or was given up."""
        step: StepCounts | None = getattr(request, COUNTS, None)
        counts = step.of(request.request_id) if step is not None else None
        found = None
        if counts is not None and not getattr(request, UNWATCHED, False):
            own, scores = served_settings(request.sampling_params, self._settings), counts.scores
            if own.arbitrated:
                self._counters.count_response(counts.overrides, scores)
            if own == self._usual:
                whole = request.status != RequestStatus.FINISHED_ABORTED
                found = Finished(request.num_output_tokens, int(scores.sum()), counts.overrides, scores, whole)
        if self._watch is not None and self._watch.finished(found):
            self._counters.count_alarm()


def strict(scheduler_output: Any) -> bool:
    """Return whether everything is verified strictly in a step, in a worker."""
    return getattr(scheduler_output, STRICT, False)
