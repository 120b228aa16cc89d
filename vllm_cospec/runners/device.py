"""What both device samplers share: the policy as the kernels take it, counters and traces on the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger

from vllm_cospec.config import WHERE, Settings
from vllm_cospec.errors import ConfigError
from vllm_cospec.health import REASONS
from vllm_cospec.kernels.policies import Policy
from vllm_cospec.kernels.triton.policies import Program, compile_policy, flatten_weights
from vllm_cospec.kernels.triton.step import Memory, Trace
from vllm_cospec.kernels.triton.workspace import Workspace
from vllm_cospec.metrics import Counters, Totals
from vllm_cospec.runners.trace import Decision

logger = init_logger("vllm.cospec")


class DeviceCounters:
    """Counts on the device, carried to the shared file when a copy happens to have arrived.

    On a GPU the file lags a step behind: the copy of one step is read at the next. ``on_device`` has the layout of
    :class:`vllm_cospec.metrics.Counters`; the kernels add to its first K + 1 entries, :attr:`unhealthy` is the rest.
    """

    def __init__(self, counters: Counters | None, num_positions: int, device: torch.device):
        length = num_positions + 1 + len(REASONS)
        self.on_device = torch.zeros(length, dtype=torch.int64, device=device)
        self.unhealthy = self.on_device[num_positions + 1 :]  # [R], in the order of REASONS
        self._counters = counters
        self._on_host = torch.zeros(length, dtype=torch.int64, pin_memory=device.type != "cpu")
        self._copied = None if device.type == "cpu" else torch.Event(device)
        self._in_flight = False
        self._exported = np.zeros(length, np.int64)
        self._held = False

    def hold(self) -> None:
        """Hand nothing over until :meth:`start`."""
        self._held = True

    def start(self) -> None:
        """Count from 0 on."""
        self.on_device.zero_()
        self._held = False

    def export(self) -> None:
        """Hand over what has arrived and send the next copy; never waits."""
        if self._counters is None or self._held:
            return
        if self._copied is None:
            self._on_host.copy_(self.on_device)
            self._add()
            return
        if self._in_flight:
            if not self._copied.query():
                return
            self._add()
        self._on_host.copy_(self.on_device, non_blocking=True)
        self._copied.record()
        self._in_flight = True

    def _add(self) -> None:
        new = self._on_host.numpy() - self._exported
        if new.any():
            assert self._counters is not None
            self._counters.add(*Totals.of(new))
            self._exported += new


@dataclass(frozen=True)
class TracedStep:
    """A step's trace, still on the device, and what is needed to attribute it."""

    request_ids: dict[int, str]  # by slot
    slot: Tensor  # [R]
    local_pos: Tensor  # [R]
    output_position: Tensor  # [R]
    trace: Trace

    def decisions(self, has_probability: bool) -> list[Decision]:
        """Return the consulted mismatches. Waits for the device."""
        action = self.trace.action.cpu().numpy()
        slot, local, output = (t.cpu().numpy() for t in (self.slot, self.local_pos, self.output_position))
        statistics, probability = self.trace.statistics.cpu(), self.trace.probability.cpu()
        return [
            Decision(
                request_id=self.request_ids[int(slot[row])],
                output_position=int(output[row]),
                block_position=int(local[row]),
                statistics=statistics[row],
                kept=bool(action[row]),
                probability=float(probability[row]) if has_probability else None,
            )
            for row in np.flatnonzero(action >= 0)
        ]


def announce_draft_logits(logits: Tensor | None, settings: Settings) -> None:
    """Say at start-up what the draft logits take on the device, and what makes that less."""
    if logits is None:
        return
    without = "" if settings.reads_draft_logits else f"; with {WHERE}.draft_sample_method 'greedy' there are none"
    logger.info(
        "CoSpec keeps draft logits: %.2f GiB on the device, in proportion to max_num_seqs%s.",
        logits.nbytes / 2**30, without,
    )  # fmt: skip


class DevicePolicy:
    """Mixed into the samplers: the policy as the kernels take it, and what it decided, until somebody asks."""

    _counters: DeviceCounters

    def load_policy(self, settings: Settings, device: torch.device, keeps_draft_logits: bool) -> None:
        """Compile the settings' policy; called once, when the sampler is built.

        Raises:
            ArtefactError: the arbiter is damaged.
        """
        self._settings = settings
        self._device = device
        self._keeps_draft_logits = keeps_draft_logits
        self._steps: list[TracedStep] = []
        self.sample_actions = False
        """Training: draw the action with the arbiter's probability instead of comparing with the threshold."""
        self._program = self._compiled(settings.policy)

    def _compiled(self, policy: Policy) -> Program:
        arbiter = None
        if policy.arbiter is not None:
            from vllm_cospec.arbiter import load_artefact

            arbiter, _ = load_artefact(Path(policy.arbiter))
        return compile_policy(policy, self._device, arbiter, self._settings.collect)

    def load_memory(self, counters: Tensor, vocab_size: int, num_rows: int, num_requests: int, use_fp64: bool) -> None:
        """Allocate what the kernels work in, for the largest step; called once, when the sampler is built."""
        top_k = self._program.numbers.top_k
        space = Workspace(self._device, vocab_size, num_rows, num_requests, top_k, use_fp64)
        self._memory = Memory(counters, space)

    def hold_counts(self) -> None:
        """Count nothing that comes until :meth:`start_counts`: vLLM warms up with requests of its own."""
        self._counters.hold()

    def start_counts(self) -> None:
        """Count from here on, and forget what was decided before."""
        self._counters.start()
        self._steps = []

    @property
    def program(self) -> Program:
        """The policy as the next step takes it."""
        return replace(self._program, sample_actions=True) if self.sample_actions else self._program

    def set_arbiter(self, state_dict: dict[str, Tensor]) -> None:
        """Replace the arbiter's weights in memory; takes effect at the next step."""
        assert self._program.weights is not None
        self._program.weights.copy_(flatten_weights(state_dict))

    def set_policy(self, policy: Policy) -> None:
        """Replace the policy; takes effect at the next step, which may have to compile its kernels first.

        Raises:
            ConfigError: the policy reads draft logits, and none are kept.
        """
        if policy.looks_at_draft and self._settings.draft_logits and not self._keeps_draft_logits:
            raise ConfigError(
                f"policy {policy.policy!r}: reads draft logits, and this engine keeps none; start it with "
                f"{WHERE}.draft_sample_method 'probabilistic'"
            )
        self._program = self._compiled(policy)

    def take_decisions(self) -> list[Decision]:
        """Return what was recorded since the last call, and forget it. Waits for the device."""
        steps, self._steps = self._steps, []
        has_probability = self._settings.policy.arbiter is not None
        return [decision for step in steps for decision in step.decisions(has_probability)]
