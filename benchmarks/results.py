"""What a throughput run adds up to: a row per mode, ratios within rounds, a table."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from load import Reply
from rich.table import Table

from vllm_cospec.training.measure.intervals import mcnemar, wilson_interval

DRAFTS, ACCEPTED = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens"
TIMES = ("ttft_ms_p50", "tpot_ms_p50", "itl_ms_p99")
HEADINGS = (
    "mode", "tokens/s", "TTFT ms", "TPOT ms", "ITL p99 ms", "acceptance", "accuracy % (95 %)", "against target",
    "tokens", "capped",
)  # fmt: skip
PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"


@dataclass
class Tally:
    """What one mode has done so far, round by round."""

    replies: list[list[Reply]] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)  # of each problem, the first time it was answered
    seconds: list[float] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)

    def add(self, replies: list[Reply], scores: dict[int, float], seconds: float, counters: dict[str, float]) -> None:
        """Add a finished round; scores by the problem's number."""
        self.replies.append(replies)
        self.scores = scores | self.scores
        self.seconds.append(seconds)
        for name, value in counters.items():
            self.counters[name] = self.counters.get(name, 0.0) + value

    def speeds(self) -> list[float]:
        """Output tokens per second of each round."""
        tokens = [sum(reply.output_tokens for reply in replies) for replies in self.replies]
        return [count / seconds for count, seconds in zip(tokens, self.seconds, strict=True)]


def row(mode: str, tally: Tally, target: Tally | None) -> dict[str, Any]:
    """Return a mode's figures. Accuracy counts each problem once, however many rounds repeated it."""
    replies = [reply for own in tally.replies for reply in own]
    first = [reply.arrivals[0] for reply in replies if reply.arrivals]
    gaps = [gap for reply in replies for gap in np.diff(reply.arrivals)]
    per_token = [
        (reply.arrivals[-1] - reply.arrivals[0]) / (reply.output_tokens - 1)
        for reply in replies
        if len(reply.arrivals) > 1 and reply.output_tokens > 1
    ]
    seconds, scores = sum(tally.seconds), list(tally.scores.values())
    drafts = tally.counters.get(DRAFTS, 0.0)
    positions = sorted(
        (int(name.removeprefix(PER_POSITION).strip("[]")), value)
        for name, value in tally.counters.items()
        if name.startswith(f"{PER_POSITION}[")
    )
    found: dict[str, Any] = {
        "mode": mode,
        "tokens_per_s": sum(reply.output_tokens for reply in replies) / seconds,
        "requests_per_s": len(replies) / seconds,
        "ttft_ms_p50": _percentile(first, 50),
        "tpot_ms_p50": _percentile(per_token, 50),
        "itl_ms_p99": _percentile(gaps, 99),
        "acceptance_length": 1 + tally.counters.get(ACCEPTED, 0.0) / drafts if drafts else None,
        "acceptance_per_position": [value / drafts for _, value in positions] if drafts else None,
        "num_mismatches": int(tally.counters.get("vllm:cospec_num_mismatches", 0)),
        "num_overrides": int(tally.counters.get("vllm:cospec_num_overrides", 0)),
        "accuracy": sum(scores) / len(scores),
        "accuracy_ci95": list(wilson_interval(sum(scores), len(scores))),
        "num_problems": len(scores),
        "paired_vs_target": None,
        "mean_output_tokens": statistics.fmean(reply.output_tokens for reply in replies),
        "length_cap_hits": sum(reply.capped for reply in replies),
        "rounds_tokens_per_s": tally.speeds(),
    }
    if target is not None:
        pairs = [(tally.scores[number], target.scores[number]) for number in tally.scores.keys() & target.scores.keys()]
        gained, lost = sum(ours > theirs for ours, theirs in pairs), sum(ours < theirs for ours, theirs in pairs)
        found["paired_vs_target"] = {"gained": gained, "lost": lost, "p_value": mcnemar(gained, lost)}
    return found


def rows(tallies: dict[str, Tally]) -> list[dict[str, Any]]:
    """Return a row for every mode that finished a round."""
    target = tallies.get("target")
    target = target if target is not None and target.seconds else None
    return [row(mode, tally, None if tally is target else target) for mode, tally in tallies.items() if tally.seconds]


def finished(tallies: dict[str, Tally]) -> int:
    """Return the number of rounds that every mode has finished."""
    return min(len(tally.seconds) for tally in tallies.values())


def ratios(tallies: dict[str, Tally]) -> list[str]:
    """Return how much faster each mode is than ``target`` and ``standard``: medians of ratios within rounds."""
    lines = []
    for base in ("target", "standard"):
        for mode, tally in tallies.items():
            pairs = list(zip(tally.speeds(), tallies[base].speeds(), strict=False)) if base in tallies else []
            if mode in (base, "target") or not pairs:
                continue
            quotients = [ours / theirs for ours, theirs in pairs]
            spread = f" ({min(quotients):.2f} to {max(quotients):.2f} in {len(quotients)} rounds)"
            lines.append(f"{mode} / {base}: {statistics.median(quotients):.2f}{spread} tokens per second")
    return lines


def table(found: list[dict[str, Any]], title: str) -> Table:
    """Return the rows as a table."""
    shown = Table(title=title)
    for heading in HEADINGS:
        shown.add_column(heading, justify="left" if heading == "mode" else "right", no_wrap=heading != "mode")
    for line in found:
        low, high = line["accuracy_ci95"]
        paired, length = line["paired_vs_target"], line["acceptance_length"]
        shown.add_row(
            line["mode"],
            f"{line['tokens_per_s']:.0f}",
            *("" if line[name] is None else f"{line[name]:.1f}" for name in TIMES),
            f"{length:.2f}" if length else "",
            f"{100 * line['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})",
            f"+{paired['gained']} -{paired['lost']}, p = {paired['p_value']:.1g}" if paired else "",
            f"{line['mean_output_tokens']:.1f}",
            str(line["length_cap_hits"]),
        )
    return shown


def _percentile(seconds: list[float], percent: float) -> float | None:
    """Return a percentile in milliseconds; None of nothing."""
    return float(np.percentile(seconds, percent)) * 1e3 if seconds else None
