"""Settings and state of the requests on a device, by slot: how either runner keeps the kernels' table.

V2 has slots of its own, and settings of a slot become visible with its staged writes: :class:`StagedSlots`. V1 moves
requests about in its batch; there each is placed in a slot for as long as it runs: :class:`PlacedSlots`. Both send one
:class:`Table`, and only when a request has entered.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.utils.torch_utils import async_tensor_h2d

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
_UNIT = 4  # int32: what a kernel is given begins at multiples of 16 bytes, or Triton compiles another for it


def _rounded(size: int) -> int:
    return -(-size // _UNIT) * _UNIT


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
        self._table = torch.zeros(3 + NUM_BINS * scores, _rounded(size), dtype=torch.int32, device=device)
        self.overrides = self._table[0, :size]  # [S], the kernels add to it
        self.regret = self._table[1, :size].view(torch.float32)  # [S], likewise; nats
        self.stops = self._table[2, :size]  # [S], likewise; blocks that ended at a mismatch
        # [S, NUM_BINS], likewise; histogram of the arbiter's scores
        self.scores = self._table[3:, :size].T if scores else None
        self._entered: dict[int, int] = {}  # slots that are not started yet, and the overrides they start with

    def enter(self, slot: int, entry: SlotEntry, carried: Tensor | None) -> None:
        """Start a slot, with :meth:`send`, with what the request has carried along or with what its settings say."""
        self._entered[slot] = entry.overrides
        if carried is not None:
            self.send()
            self._table[:, slot].copy_(carried)

    def leave(self, slot: int) -> Tensor:
        """Return what was spent in a slot, to be carried along."""
        self.send()
        return self._table[:, slot].clone()

    def send(self) -> None:
        """Start the slots that requests have entered, all at once."""
        if self._entered:
            slots, overrides = async_tensor_h2d(np.array([*self._entered.items()], np.int64).T, self._table.device)
            self._entered = {}
            self._table.index_fill_(1, slots, 0)
            self.overrides.index_copy_(0, slots, overrides.to(torch.int32))

    def counts(self, slots: dict[str, int]) -> Callable[[], StepCounts]:
        """Send what was spent to the host; what is returned waits for it, and gives it.

        Args:
            slots: of each request, by its id.
        """
        self.send()
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


class Settled(NamedTuple):
    """One setting of every slot, [S]."""

    np: np.ndarray
    gpu: Tensor


class Columns:
    """The settings of S slots, one after the other in a vector."""

    def __init__(self, size: int, vector: Tensor):
        """Cut up a vector of :meth:`length` int32."""
        self.vector = vector
        parts = vector.split(self._lengths(size))
        self.arbitrated, self.max_overrides, self.exact_tokens, self.response_start, self.forced = (
            part[:size] for part in parts[:5]
        )
        self.threshold, self.max_regret = (part[:size].view(torch.float32) for part in parts[5:7])
        self.seed = parts[7].view(torch.int64)[:size]  # int64, of sampled actions; V1's
        self.ends = parts[8][: size * (1 + STOPS)].view(size, 1 + STOPS)

    @staticmethod
    def _lengths(size: int) -> list[int]:
        rounded = _rounded(size)
        return [rounded] * 7 + [2 * rounded, (1 + STOPS) * rounded]

    @classmethod
    def length(cls, size: int) -> int:
        """Return how many int32 the settings of so many slots take."""
        return sum(cls._lengths(size))


class Table:
    """The settings of every slot on the host, and as they were last sent to the device, in one piece.

    What was sent is never written to again, so steps in flight keep the table they were launched with.
    """

    def __init__(self, size: int, device: torch.device, scores: bool):
        self._size, self._device = size, device
        self._host = Columns(size, torch.zeros(Columns.length(size), dtype=torch.int32))
        self._numpy = {name: part.numpy() for name, part in vars(self._host).items() if name != "vector"}
        self.spent = Spent(size, device, scores)
        self._changed = True
        self.send()

    def enter(self, slot: int, entry: SlotEntry, num_prompt_tokens: int, seed: int, carried: Tensor | None) -> None:
        """Write the settings of a request that enters a slot; slots are recycled, so everything is overwritten."""
        values = {
            "arbitrated": entry.arbitrated, "max_overrides": entry.max_overrides, "exact_tokens": entry.exact_tokens,
            "response_start": num_prompt_tokens - entry.written, "forced": entry.forced, "threshold": entry.threshold,
            "max_regret": entry.max_regret, "seed": seed, "ends": entry.ends,
        }  # fmt: skip
        for name, value in values.items():
            self._numpy[name][slot] = value
        self.spent.enter(slot, entry, carried)
        self._changed = True

    def send(self) -> None:
        """Make what was written visible on the device; where nothing was, nothing is sent."""
        if self._changed:
            self._sent = Columns(self._size, async_tensor_h2d(self._host.vector.clone(), self._device))
            self._changed = False
        self.spent.send()

    @property
    def arbitrated(self) -> Settled:
        """Which slots' requests want to be arbitrated, nonzero int32."""
        return Settled(self._numpy["arbitrated"], self._sent.arbitrated)

    @property
    def seed(self) -> Tensor:
        """Seeds of sampled actions, int64 [S]."""
        return self._sent.seed

    def on_device(self, arbitrated: Tensor | None = None) -> Slots:
        """Return the table as the kernels take it; ``arbitrated``, int32 [S], is this step's where it differs."""
        sent, spent = self._sent, self.spent
        return Slots(
            arbitrated=sent.arbitrated if arbitrated is None else arbitrated,
            threshold=sent.threshold,
            max_overrides=sent.max_overrides,
            max_regret=sent.max_regret,
            exact_tokens=sent.exact_tokens,
            overrides_so_far=spent.overrides,
            regret_so_far=spent.regret,
            response_start=sent.response_start,
            forced=sent.forced,
            ends=sent.ends,
            stops=spent.stops,
            scores=spent.scores,
        )


class StagedSlots:
    """The table of Model Runner V2, whose slots these are; the runner's own wrappers tell it of requests."""

    def __init__(self, runner: Any, settings: Settings):
        size = runner.max_num_reqs
        self._runner = runner
        self._settings = settings
        self._table = Table(size, runner.device, settings.counts_scores)
        self.parts = Parts(size, settings, runner.device)
        self._preempted: dict[str, Tensor] = {}

    @property
    def arbitrated(self) -> Settled:
        """Which slots' requests want to be arbitrated, nonzero int32."""
        return self._table.arbitrated

    def add_request(self, slot: int, request: Any) -> None:
        """Take up a request, vLLM's NewRequestData."""
        length = length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
        entry = slot_entry(request.sampling_params, self._settings, self._runner.max_model_len - length)
        self._table.enter(slot, entry, length, 0, self._preempted.pop(request.req_id, None))
        self.parts.enter(slot, entry.scope, length, request.prefill_token_ids or request.prompt_token_ids)

    def apply_staged_writes(self) -> None:
        """Make what was written visible on the device."""
        self._table.send()

    def finish_requests(self, scheduler_output: Any) -> None:
        """Remember what preempted requests have used of their budgets; they still have their slots."""
        for req_id in scheduler_output.preempted_req_ids or ():
            slot = self._runner.req_states.req_id_to_index.get(req_id)
            if slot is not None:
                self._preempted[req_id] = self._table.spent.leave(slot)
        for req_id in scheduler_output.finished_req_ids:
            self._preempted.pop(req_id, None)

    def on_device(self, arbitrated: Tensor) -> Slots:
        """Return the table as the kernels take it; ``arbitrated``, int32 [S], is this step's."""
        return self._table.on_device(arbitrated)

    def counts(self) -> Callable[[], StepCounts]:
        """Note what was counted of every request; what is returned gives it."""
        return self._table.spent.counts(dict(self._runner.req_states.req_id_to_index))


class PlacedSlots:
    """The table of Model Runner V1."""

    def __init__(self, runner: Any, settings: Settings):
        self.size = runner.max_num_reqs
        self._runner = runner
        self._settings = settings
        self._owners: list[Any] = [lambda: None] * self.size  # weak references to the requests
        self._table = Table(self.size, runner.device, settings.counts_scores)
        self.parts = Parts(self.size, settings, runner.device)

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
            self._table.send()
        return slots, slots[new].tolist()

    def slot_of(self, request: Any) -> int | None:
        """Return the slot of a request, None if it has none."""
        slot = getattr(request, SLOT, -1)
        return None if slot < 0 else slot

    def leave(self, request: Any) -> None:
        """Take a preempted request's slot; what it has spent goes with it."""
        slot = self.slot_of(request)
        if slot is not None:
            setattr(request, SPENT, self._table.spent.leave(slot))
            setattr(request, SLOT, -1)
            self._owners[slot] = lambda: None

    def arbitrated(self, slots: np.ndarray) -> np.ndarray:
        """Return which of these slots' requests want to be arbitrated, bool [B]."""
        return self._table.arbitrated.np[slots] != 0

    def on_device(self, left_out: np.ndarray) -> tuple[Slots, Tensor]:
        """Return the table as the kernels take it, and the seeds of sampled actions, int64 [S].

        Args:
            left_out: slots that are strict in this step, whatever they want.
        """
        if not len(left_out):
            return self._table.on_device(), self._table.seed
        arbitrated = self._table.arbitrated.np.copy()
        arbitrated[left_out] = 0
        return self._table.on_device(async_tensor_h2d(arbitrated, self._runner.device)), self._table.seed

    def counts(self) -> Callable[[], StepCounts]:
        """Note what was counted of every request of the runner's batch; what is returned gives it."""
        batch = {request_id: self.slot_of(self._runner.requests[request_id]) for request_id in self._batch()}
        return self._table.spent.counts({request_id: slot for request_id, slot in batch.items() if slot is not None})

    def _batch(self) -> list[str]:
        return list(self._runner.input_batch.req_ids)

    def _give(self, slot: int, request: Any) -> None:
        before = self._owners[slot]()
        if before is not None:
            self.leave(before)
        room = self._runner.max_model_len - request.num_prompt_tokens
        entry = slot_entry(request.sampling_params, self._settings, room)
        seed = getattr(request.sampling_params, "seed", None)
        seed = np.random.randint(2**62) if seed is None else seed
        self._table.enter(slot, entry, request.num_prompt_tokens, seed, getattr(request, SPENT, None))
        tokens = None if request.prompt_token_ids is None else request.prompt_token_ids + request.output_token_ids
        self.parts.enter(slot, entry.scope, request.num_prompt_tokens, tokens)
        self._owners[slot] = weakref.ref(request)
        setattr(request, SLOT, slot)
