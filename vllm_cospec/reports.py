"""What arbitration did to each request, beside vLLM's own figures of its speculative decoding, where it keeps them.

``--per-request-spec-decode-metrics`` lets vLLM's scheduler count per request; the last output of a request carries the
counts to the front end, for each choice of its own. What is ours travels with them: the worker hands its counts over
with the output of a step, the scheduler puts them behind vLLM's histogram, the only list that the message has at every
level of detail, and the front end takes them out again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from vllm.v1.metrics import stats
from vllm.v1.outputs import AsyncModelRunnerOutput

from vllm_cospec import compat
from vllm_cospec.hooks import STEP_OUTPUT
from vllm_cospec.kernels.regret import REGRET_UNIT

COUNTS = "cospec_counts"  # attribute of vLLM's ModelRunnerOutput, and of the Requests in it: its StepCounts


class RequestCounts(NamedTuple):
    """What was counted of one request."""

    mismatches: int
    overrides: int
    regret: float  # nats, of the overrides
    scores: np.ndarray  # int64 [NUM_BINS], of a trained arbiter, see vllm_cospec.kernels.scores; empty: not counted


@dataclass(frozen=True)
class StepCounts:
    """What was counted of requests up to a step, as a table: of most of them nobody asks before they end."""

    place: dict[str, int]
    """Of each request, by its id."""
    mismatches: np.ndarray  # integers [S]
    overrides: np.ndarray  # integers [S]
    regret: np.ndarray  # float [S], nats
    scores: np.ndarray  # integers [S, bins]

    def of(self, request_id: str) -> RequestCounts | None:
        """Return what was counted of a request; None where it is not in the table."""
        at = self.place.get(request_id)
        if at is None:
            return None
        scores = self.scores[at].astype(np.int64)
        return RequestCounts(int(self.mismatches[at]), int(self.overrides[at]), float(self.regret[at]), scores)


def attach(output: Any, counts: Callable[[], StepCounts]) -> Any:
    """Hand counts over with the output of the step they were made in.

    Args:
        output: what the worker returns: vLLM's ModelRunnerOutput, one that is still being computed, or None.
        counts: returns them; may wait for the device.
    """
    if isinstance(output, AsyncModelRunnerOutput):  # whose kernels may still run

        def wait() -> Any:
            return _with_counts(get_output(), counts())

        get_output = compat.wrap(STEP_OUTPUT, output, wait)
        return output
    return _with_counts(output, counts()) if output is not None else None


def _with_counts(output: Any, counts: StepCounts) -> Any:
    if output.req_ids:  # without any, vLLM shares one object
        setattr(output, COUNTS, counts)
    return output


def take_in(output: Any, requests: dict[str, Any]) -> None:
    """Keep what came with the output of a step with its requests, and behind vLLM's histograms; in the scheduler.

    Args:
        output: vLLM's ModelRunnerOutput.
        requests: vLLM's Request by id.
    """
    step: StepCounts | None = getattr(output, COUNTS, None)
    if step is None:
        return
    for request_id in output.req_ids:
        request = requests.get(request_id)
        if request is None or request_id not in step.place:
            continue
        setattr(request, COUNTS, step)
        metrics = getattr(request, "spec_decode_metrics", None)  # where this vLLM has them
        if metrics is not None and (counts := step.of(request_id)) is not None:
            regret = round(counts.regret / REGRET_UNIT)
            metrics.histogram[metrics.num_spec_tokens + 1 :] = [counts.mismatches, counts.overrides, regret]


@functools.cache
def request_metrics() -> Any:
    """Return the class of a request's metrics with what is ours beside vLLM's; None where vLLM has none."""
    base = getattr(stats, "RequestSpecDecodeMetrics", None)
    if base is None:
        return None

    @dataclass
    class CoSpecRequestMetrics(base):  # type: ignore[misc, valid-type]
        """What vLLM counts of a request, and what arbitration did to it."""

        num_mismatches: int = 0
        """Draft positions that strict verification rejects, as far as their tokens could reach the response."""
        num_overrides: int = 0
        """Those whose draft was kept."""
        regret: float = 0.0
        """Nats that the overrides gave up."""

        def to_dict(self) -> dict[str, Any]:
            """As vLLM's, for the response; ours stands under ``cospec``."""
            own = {"num_mismatches": self.num_mismatches, "num_overrides": self.num_overrides, "regret": self.regret}
            return {**super().to_dict(), "cospec": own}

    return CoSpecRequestMetrics


def take_out(metrics: Any) -> Any:
    """Return a request's metrics as the front end shows them.

    Args:
        metrics: vLLM's RequestSpecDecodeMetrics with the numbers of :func:`take_in`.
    """
    size = metrics.num_spec_tokens + 1
    mismatches, overrides, regret = metrics.histogram[size:]
    return request_metrics()(
        num_spec_tokens=metrics.num_spec_tokens,
        histogram=metrics.histogram[:size],
        num_draft_tokens=metrics.num_draft_tokens,
        per_step_accepted=metrics.per_step_accepted,
        per_step_drafted=metrics.per_step_drafted,
        num_mismatches=mismatches,
        num_overrides=overrides,
        regret=regret * REGRET_UNIT,
    )


def make_process_outputs(original: Any) -> Any:
    """Return ``OutputProcessor.process_outputs`` for a front end whose engine counts per request."""

    @functools.wraps(original)
    def process_outputs(self: Any, engine_core_outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        for output in engine_core_outputs:
            metrics = getattr(output, "spec_decode_metrics", None)
            if metrics is not None and len(metrics.histogram) > metrics.num_spec_tokens + 1:
                output.spec_decode_metrics = take_out(metrics)
        return original(self, engine_core_outputs, *args, **kwargs)

    return process_outputs
