"""Settings and state of the requests on a device, by slot: how either runner keeps the kernels' table.

V2 has slots of its own, and settings of a slot become visible with its staged writes: :class:`StagedSlots`. V1 moves
requests about in its batch; there each is placed in a slot for as long as it runs: :class:`PlacedSlots`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor

from vllm_cospec.config import Settings
from vllm_cospec.kernels import UNLIMITED
from vllm_cospec.kernels.reach import STOPS
from vllm_cospec.kernels.regret import in_units
from vllm_cospec.kernels.scores import NUM_BINS
from vllm_cospec.kernels.triton.step import Slots
from vllm_cospec.reports import StepCounts
from vllm_cospec.requests import response_ends, served_settings
from vllm_cospec.runners.parts import Parts

SLOT, SPENT = "cospec_slot", "cospec_spent"  # attributes of vLLM's CachedRequestState, on V1
_INTEGERS = ("arbitrated", "max_overrides", "exact_tokens", "response_start", "forced")
_FLOATS = ("threshold", "max_regret")


@dataclass(frozen=True)
class SlotEntry:
    """One request's settings, in the numbers of :class:`vllm_cospec.kernels.triton.step.Slots`."""

    arbitrated: bool
    threshold: float
    max_overrides: int
    max_regret: float  # in_units
    exact_tokens: int
    written: int  # tokens of the response that stand in the prompt; training
    forced: int
    overrides: int  # made before this engine saw the request; training
    ends: list[int]  # see vllm_cospec.kernels.reach.ends_of
    scope: str


def slot_entry(sampling_params: Any, settings: Settings, room: int) -> SlotEntry:
    """Return what a request is served with.

    Args:
        sampling_params: of the request.
        settings: of the server.
        room: tokens that the model's length leaves its response.
    """
    own = served_settings(sampling_params, settings)
    branch = own.branch
    return SlotEntry(
        arbitrated=own.arbitrated,
        threshold=own.threshold,
        max_overrides=UNLIMITED if own.max_overrides is None else min(own.max_overrides, UNLIMITED),
        max_regret=in_units(own.max_regret),
        exact_tokens=min(own.exact_tokens, UNLIMITED),
        written=branch.written if branch else 0,
        forced=2 * branch.decided_at + branch.keep if branch else -1,
        overrides=branch.overrides if branch else 0,
        ends=response_ends(sampling_params, branch, room),
        scope=own.scope,
    )


class Spent:
    """What the request in each slot has spent of its budgets. One that loses its slot takes it along to the next."""

    def __init__(self, size: int, device: torch.device, scores: bool):
        self._table = torch.zeros(3 + NUM_BINS * scores, size, dtype=torch.int32, device=device)
        self.overrides = self._table[0]  # [S], the kernels add to it
        self.regret = self._table[1].view(torch.float32)  # [S], likewise; nats
        self.stops = self._table[2]  # [S], likewise; blocks that ended at a mismatch
        self.scores = self._table[3:].T if scores else None  # [S, NUM_BINS], likewise; histogram of the arbiter's

    def enter(self, slot: int, entry: SlotEntry, carried: Tensor | None) -> None:
        """Start a slot with what the request has carried along, or with what its settings say."""
        if carried is None:
            self._table[:, slot].fill_(0)
            self.overrides[slot].fill_(entry.overrides)
        else:
            self._table[:, slot].copy_(carried)

    def leave(self, slot: int) -> Tensor:
        """Return what was spent in a slot, to be carried along."""
        return self._table[:, slot].clone()

    def counts(self, slots: dict[str, int]) -> Callable[[], StepCounts]:
        """Send what was spent to the host; what is returned waits for it, and gives it.

        Args:
            slots: of each request, by its id.
        """
        device = self._table.device
        copy = self._table.clone() if device.type == "cpu" else self._table.to("cpu", non_blocking=True)
        sent = None if device.type == "cpu" else torch.Event(device)
        if sent is not None:
            sent.record()

        def read() -> StepCounts:
            if sent is not None:
                sent.synchronize()
            overrides, regret, stops = copy[0].numpy(), copy[1].view(torch.float32).numpy(), copy[2].numpy()
            return StepCounts(slots, overrides + stops, overrides, regret, copy[3:].numpy().T)

        return read


class StagedSlots:
    """The table of Model Runner V2, whose slots these are; the runner's own wrappers tell it of requests."""

    def __init__(self, runner: Any, settings: Settings):
        size = runner.max_num_reqs
        self._runner = runner
        self._settings = settings
        self.arbitrated = UvaBackedTensor(size, dtype=torch.int32)
        self._threshold = UvaBackedTensor(size, dtype=torch.float32)
        self._max_overrides = UvaBackedTensor(size, dtype=torch.int32)
        self._exact_tokens = UvaBackedTensor(size, dtype=torch.int32)
        self._written = UvaBackedTensor(size, dtype=torch.int32)
        self._forced = UvaBackedTensor(size, dtype=torch.int32)
        self._max_regret = UvaBackedTensor(size, dtype=torch.float32)
        self._ends = UvaBackedTensor((size, 1 + STOPS), dtype=torch.int32)
        self._spent = Spent(size, runner.device, settings.counts_scores)
        self.parts = Parts(size, settings, runner.device)
        self._preempted: dict[str, Tensor] = {}

    def add_request(self, slot: int, request: Any) -> None:
        """Take up a request, vLLM's NewRequestData; slots are recycled, so everything is overwritten."""
        length = length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
        entry = slot_entry(request.sampling_params, self._settings, self._runner.max_model_len - length)
        self.arbitrated.np[slot] = entry.arbitrated
        self._threshold.np[slot] = entry.threshold
        self._max_overrides.np[slot] = entry.max_overrides
        self._exact_tokens.np[slot] = entry.exact_tokens
        self._written.np[slot] = entry.written
        self._forced.np[slot] = entry.forced
        self._max_regret.np[slot] = entry.max_regret
        self._ends.np[slot] = entry.ends
        self.parts.enter(slot, entry.scope, length, request.prefill_token_ids or request.prompt_token_ids)
        self._spent.enter(slot, entry, self._preempted.pop(request.req_id, None))

    def apply_staged_writes(self) -> None:
        """Make what was written visible on the device."""
        for tensor in (
            self.arbitrated, self._threshold, self._max_overrides, self._max_regret, self._exact_tokens, self._written,
            self._forced, self._ends,
        ):  # fmt: skip
            tensor.copy_to_uva()

    @property
    def ends(self) -> Tensor:
        """What ends the response in each slot, int32 [S, 1 + STOPS]."""
        return self._ends.gpu

    def finish_requests(self, scheduler_output: Any) -> None:
        """Remember what preempted requests have used of their budgets; they still have their slots."""
        for req_id in scheduler_output.preempted_req_ids or ():
            slot = self._runner.req_states.req_id_to_index.get(req_id)
            if slot is not None:
                self._preempted[req_id] = self._spent.leave(slot)
        for req_id in scheduler_output.finished_req_ids:
            self._preempted.pop(req_id, None)

    def on_device(self, arbitrated: Tensor) -> Slots:
        """Return the table as the kernels take it; ``arbitrated``, int32 [S], is this step's."""
        response_start = self._runner.req_states.prompt_len.gpu
        if self._settings.collect:
            response_start = response_start - self._written.gpu
        return Slots(
            arbitrated=arbitrated,
            threshold=self._threshold.gpu,
            max_overrides=self._max_overrides.gpu,
            max_regret=self._max_regret.gpu,
            exact_tokens=self._exact_tokens.gpu,
            overrides_so_far=self._spent.overrides,
            regret_so_far=self._spent.regret,
            response_start=response_start,
            forced=self._forced.gpu,
            stops=self._spent.stops if self._settings.counts_requests else None,
            scores=self._spent.scores,
        )

    def counts(self) -> Callable[[], StepCounts]:
        """Note what was counted of every request; what is returned gives it."""
        return self._spent.counts(dict(self._runner.req_states.req_id_to_index))


class PlacedSlots:
    """The table of Model Runner V1.

    The host's copy is sent whole when a request enters, so that steps in flight keep the one they were launched with.
    """

    def __init__(self, runner: Any, settings: Settings):
        self.size = runner.max_num_reqs
        self._runner = runner
        self._settings = settings
        self._owners: list[Any] = [lambda: None] * self.size  # weak references to the requests
        self._integers = np.zeros((len(_INTEGERS), self.size), np.int32)
        self._floats = np.zeros((len(_FLOATS), self.size), np.float32)
        self._seed = np.zeros(self.size, np.int64)
        self._ends = np.zeros((self.size, 1 + STOPS), np.int32)
        self._spent = Spent(self.size, runner.device, settings.counts_scores)
        self.parts = Parts(self.size, settings, runner.device)
        self._send()

    def place(self) -> tuple[np.ndarray, list[int]]:
        """Give newcomers a slot.

        Returns:
            The slot of every request of the runner's batch, int64 [B]; which of them have been given just now.
        """
        batch = [self._runner.requests[request_id] for request_id in self._runner.input_batch.req_ids]
        slots = np.array([getattr(request, SLOT, -1) for request in batch], np.int64)
        new = np.flatnonzero(slots < 0)
        if len(new):
            taken = set(slots.tolist())
            free = sorted(set(range(self.size)) - taken, key=lambda slot: self._owners[slot]() is not None)
            for index, slot in zip(new, free, strict=False):
                self._give(slot, batch[index])
                slots[index] = slot
            self._send()
        return slots, slots[new].tolist()

    def slot_of(self, request: Any) -> int | None:
        """Return the slot of a request, None if it has none."""
        slot = getattr(request, SLOT, -1)
        return None if slot < 0 else slot

    @property
    def ends(self) -> Tensor:
        """What ends the response in each slot, int32 [S, 1 + STOPS]."""
        return self._sent[3]

    def leave(self, request: Any) -> None:
        """Take a preempted request's slot; what it has spent goes with it."""
        slot = self.slot_of(request)
        if slot is not None:
            setattr(request, SPENT, self._spent.leave(slot))
            setattr(request, SLOT, -1)
            self._owners[slot] = lambda: None

    def arbitrated(self, slots: np.ndarray) -> np.ndarray:
        """Return which of these slots' requests want to be arbitrated, bool [B]."""
        return self._integers[0, slots] != 0

    def on_device(self, left_out: np.ndarray) -> tuple[Slots, Tensor]:
        """Return the table as the kernels take it, and the seeds of sampled actions, int64 [S].

        Args:
            left_out: slots that are strict in this step, whatever they want.
        """
        columns = dict(zip(_INTEGERS + _FLOATS, [*self._sent[0], *self._sent[1]], strict=True))
        if len(left_out):
            arbitrated = self._integers[0].copy()
            arbitrated[left_out] = 0
            columns["arbitrated"] = async_tensor_h2d(arbitrated, self._runner.device)
        spent = self._spent
        table = Slots(
            overrides_so_far=spent.overrides, regret_so_far=spent.regret,
            stops=spent.stops if self._settings.counts_requests else None, scores=spent.scores, **columns,
        )  # fmt: skip
        return table, self._sent[2]

    def counts(self) -> Callable[[], StepCounts]:
        """Note what was counted of every request of the runner's batch; what is returned gives it."""
        batch = {request_id: self.slot_of(self._runner.requests[request_id]) for request_id in self._batch()}
        return self._spent.counts({request_id: slot for request_id, slot in batch.items() if slot is not None})

    def _batch(self) -> list[str]:
        return list(self._runner.input_batch.req_ids)

    def _give(self, slot: int, request: Any) -> None:
        before = self._owners[slot]()
        if before is not None:
            self.leave(before)
        room = self._runner.max_model_len - request.num_prompt_tokens
        entry = slot_entry(request.sampling_params, self._settings, room)
        self._integers[:, slot] = (
            entry.arbitrated, entry.max_overrides, entry.exact_tokens, request.num_prompt_tokens - entry.written,
            entry.forced,
        )  # fmt: skip
        self._floats[:, slot] = entry.threshold, entry.max_regret
        self._ends[slot] = entry.ends
        tokens = None if request.prompt_token_ids is None else request.prompt_token_ids + request.output_token_ids
        self.parts.enter(slot, entry.scope, request.num_prompt_tokens, tokens)
        seed = getattr(request.sampling_params, "seed", None)
        self._seed[slot] = np.random.randint(2**62) if seed is None else seed
        self._spent.enter(slot, entry, getattr(request, SPENT, None))
        self._owners[slot] = weakref.ref(request)
        setattr(request, SLOT, slot)

    def _send(self) -> None:
        self._sent = [
            async_tensor_h2d(table.copy(), self._runner.device)
            for table in (self._integers, self._floats, self._seed, self._ends)
        ]
