"""Model Runner V1 on a CPU: a rejection sampler that arbitrates, in place of the stock one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_cospec.config import Settings
from vllm_cospec.health import Reason
from vllm_cospec.kernels import UNLIMITED, cpu
from vllm_cospec.kernels.batch import Batch, BatchResult, LogitRows, Requests
from vllm_cospec.kernels.cpu import (
    Decide,
    Found,
    Network,
    argmax,
    greedy_verdicts,
    rule,
    verify_batch,
)
from vllm_cospec.kernels.policies import Policy, Rule
from vllm_cospec.kernels.reach import ANSWERING, SCOPES, out_of_scope, part_after, parts
from vllm_cospec.kernels.regret import in_units
from vllm_cospec.kernels.scores import NUM_BINS, SCORE_EDGES
from vllm_cospec.metrics import Counters, counters_of_this_rank
from vllm_cospec.reports import StepCounts
from vllm_cospec.requests import RequestSettings, action_coin, response_ends, served_settings
from vllm_cospec.runners.recorder import ProposedBlock, Recorder, draft_probabilities
from vllm_cospec.runners.replay import Replay
from vllm_cospec.runners.trace import Decision
from vllm_cospec.runners.v1 import StepNotes, V1Sampler, V1Step

STATE = "cospec_state"  # attribute of vLLM's CachedRequestState: lives and dies with the request
# Places in RequestState.numbers; what ends the response stands behind them.
ARBITRATED, MAX_OVERRIDES, EXACT_TOKENS, THRESHOLD, MAX_REGRET, SCOPE, WRITTEN, BRANCHED, ENDS = range(9)


@dataclass
class RequestState:
    """What is remembered of a request between steps."""

    settings: RequestSettings
    numbers: tuple[float, ...]  # what the settings are for the loops, see ARBITRATED and so on
    seed: int | None  # of the request
    mismatches: int = 0
    overrides: int = 0
    regret: float = 0.0  # nats, of the overrides
    part: int = ANSWERING  # of the response that its next token belongs to, see vllm_cospec.kernels.reach
    seen: int = 0  # output tokens looked at for it
    scores: np.ndarray = field(
        default_factory=lambda: np.zeros(NUM_BINS, np.int64)
    )  # int64 [bins], where they are watched


@dataclass
class CPUNotes(StepNotes):
    """And what this sampler knows of the step's B requests."""

    blocks: list[ProposedBlock | None] = field(default_factory=list)  # what was proposed for each
    cached: list[Any] = field(default_factory=list)  # vLLM's CachedRequestState
    states: list[RequestState] = field(default_factory=list)
    table: np.ndarray = field(default_factory=lambda: np.zeros((ENDS, 0)))  # float64 [numbers, B]


class V1CPUSampler(V1Sampler):
    """Verifies drafts on the CPU with a policy at the mismatches."""

    recorder: Recorder

    def __init__(self, runner: Any, settings: Settings, counters: Counters | None):
        super().__init__(runner)
        self._settings = settings
        self._counters = counters
        self.recorder = Recorder(runner, settings)
        self._notes: CPUNotes = CPUNotes()
        self._replay = Replay(runner, lambda cached: self._state(cached).settings.branch) if settings.collect else None
        self.decisions: list[Decision] = []
        self.sample_actions = False
        """Training: draw the action with the arbiter's probability instead of comparing with the threshold."""
        self._arbiter: Any = None
        self._network: Network | None = None
        if settings.policy.arbiter is not None:
            from vllm_cospec.arbiter import load_artefact

            self._arbiter, _ = load_artefact(Path(settings.policy.arbiter))
            self._network = self._arbiter.network()

    def open_step(self, request_ids: Sequence[str]) -> None:
        """As the base's."""
        self._notes.blocks = self.recorder.take(request_ids)

    def find_probabilities(
        self, metadata: SpecDecodeMetadata, given: Tensor | None, sampling_metadata: Any
    ) -> Tensor | None:
        """As the base's."""
        own = draft_probabilities(self._notes.blocks, metadata.num_draft_tokens, metadata.draft_token_ids)
        return given if own is None else own

    def find_wanted(self) -> np.ndarray:
        """As the base's."""
        requests, notes = self._runner.requests, self._notes
        notes.cached = [requests[request_id] for request_id in self._runner.input_batch.req_ids]
        notes.states = [getattr(cached, STATE, None) or self._state(cached) for cached in notes.cached]
        notes.table = np.array([state.numbers for state in notes.states]).reshape(len(notes.states), -1).T
        return notes.table[ARBITRATED] != 0

    def find_reasons(self, metadata: SpecDecodeMetadata) -> list[Reason | None]:
        """As the base's."""
        drafts, reasons, start = metadata.draft_token_ids.tolist(), [], 0
        for block, count in zip(self._notes.blocks, metadata.num_draft_tokens, strict=True):
            reasons.append(_reason(block, drafts[start : start + count]))
            start += count
        return reasons

    def count_unhealthy(self, positions: np.ndarray) -> None:
        """As the base's."""
        if self._counters is not None:
            self._counters.add(0, positions[:0], positions)

    def best_tokens(self, logits: Tensor) -> Tensor:
        """As the base's."""
        return argmax(logits)

    def scan(self, step: V1Step) -> Tensor:
        """As the base's."""
        verdict, metadata = self.strict_verdict(step), step.metadata
        best = verdict.argmax if step.processed is step.raw else argmax(step.raw)
        return self._verify(
            metadata, metadata.draft_token_ids.long().numpy(), step.legal.numpy(),
            accepted=verdict.accepted, target_tokens=verdict.target_tokens, bonus_tokens=step.bonus_tokens.view(-1),
            raw_target_logits=step.raw, processed_target_logits=step.processed, raw_argmax=best,
            acceptance_ratio=verdict.acceptance_ratio, uniform=verdict.uniform,
        )  # fmt: skip

    def scan_unprocessed(self, metadata: SpecDecodeMetadata, logits: Tensor, bonus_tokens: Tensor) -> Tensor | None:
        """As the base's."""
        if logits.dtype != torch.float32:
            return None
        verdict = greedy_verdicts(metadata.draft_token_ids, metadata.target_logits_indices, logits)
        return self._verify(
            metadata, verdict.drafts, verdict.legal,
            accepted=verdict.accepted, target_tokens=verdict.best, bonus_tokens=bonus_tokens.view(-1),
            raw_target_logits=logits, processed_target_logits=logits, raw_argmax=verdict.best, logit_rows=verdict.rows,
        )  # fmt: skip

    def _verify(self, metadata: SpecDecodeMetadata, drafts: np.ndarray, legal: np.ndarray, **verdict: Any) -> Tensor:
        """Walk the blocks; ``drafts`` int64 [N], ``legal`` bool [N], and the verdict in the words of ``Batch``."""
        requests, counts = self._requests(), np.array(metadata.num_draft_tokens, np.int64)
        markers = self._settings.thinking_tokens
        if markers is not None and self._notes.table[SCOPE].any():
            legal = legal & ~self._out_of_scope(drafts, counts, markers)
        batch = Batch(
            draft_tokens=drafts,
            num_draft_tokens=counts,
            draft_logits=self._draft_logits if self._settings.draft_logits else None,
            num_speculative_tokens=self._settings.num_speculative_tokens,
            max_draft_tokens=metadata.max_spec_len,
            requests=requests,
            legal=legal,
            ends=np.ascontiguousarray(self._notes.table[ENDS:].T, np.int64),
            **verdict,
        )
        collect = self._settings.collect or self._settings.counts_scores
        result = verify_batch(batch, self._decide(requests), collect)
        self._account(result, self._notes.states)
        return result.output

    def set_arbiter(self, state_dict: dict[str, Tensor]) -> None:
        """Replace the arbiter's weights in memory; takes effect at the next step."""
        self._arbiter.load_state_dict(state_dict)
        self._network = self._arbiter.network()

    def set_policy(self, policy: Policy) -> None:
        """Replace a rule by another; takes effect at the next step."""
        self._settings = replace(self._settings, policy=policy)

    def take_decisions(self) -> list[Decision]:
        """Return what was recorded since the last call, and forget it."""
        taken, self.decisions = self.decisions, []
        return taken

    def request_counts(self) -> Callable[[], StepCounts]:
        """As the contract's."""
        ids = self._runner.input_batch.req_ids
        states = [getattr(self._runner.requests[request_id], STATE, None) for request_id in ids]
        known = [(request_id, state) for request_id, state in zip(ids, states, strict=True) if state is not None]
        own = [state for _, state in known]
        found = StepCounts(
            {request_id: at for at, (request_id, _) in enumerate(known)},
            np.array([state.mismatches for state in own], np.int64),
            np.array([state.overrides for state in own], np.int64),
            np.array([state.regret for state in own], np.float64),
            np.array([state.scores for state in own], np.int64),
        )
        return lambda: found

    def warm_up(self) -> None:
        """Compile the loops or load them, so that nothing is compiled while requests wait."""
        if self._settings.policy.policy != "strict":
            cpu.warm_up(self._settings.num_speculative_tokens if self._settings.draft_logits else 0)

    def _state(self, cached: Any) -> RequestState:
        state = getattr(cached, STATE, None)
        if state is None:
            settings = served_settings(cached.sampling_params, self._settings)
            room = self._runner.max_model_len - cached.num_prompt_tokens
            numbers = _numbers(settings, response_ends(cached.sampling_params, settings.branch, room))
            state = RequestState(settings, numbers, getattr(cached.sampling_params, "seed", None))
            if settings.branch is not None:
                state.overrides = settings.branch.overrides
            setattr(cached, STATE, state)
        return state

    def _requests(self) -> Requests:
        """Line up settings and state of the batch."""
        notes, table = self._notes, self._notes.table
        forced_at = forced_keep = None
        if table[BRANCHED].any():
            branches = [state.settings.branch for state in notes.states]
            forced_at = np.array([b.decided_at if b else -1 for b in branches], np.int64)
            forced_keep = np.array([b.keep if b else False for b in branches])
        spent = [(len(c.output_token_ids), s.overrides, s.regret)
                 for c, s in zip(notes.cached, notes.states, strict=True)]  # fmt: skip
        length, overrides, regret = np.array(spent, np.float64).reshape(-1, 3).T
        return Requests(
            arbitrated=table[ARBITRATED] != 0,
            junk=notes.left_out,
            output_position=(table[WRITTEN] + length).astype(np.int64),
            overrides_so_far=overrides.astype(np.int64),
            max_overrides=table[MAX_OVERRIDES].astype(np.int64),
            exact_tokens=table[EXACT_TOKENS].astype(np.int64),
            threshold=table[THRESHOLD].astype(np.float32),
            regret_so_far=regret.copy(),
            max_regret=table[MAX_REGRET].copy(),
            forced_at=forced_at,
            forced_keep=forced_keep,
        )

    def _out_of_scope(self, drafts: np.ndarray, counts: np.ndarray, markers: tuple[int, int]) -> np.ndarray:
        """Return which drafts lie outside of the part of the response that their requests have chosen, bool [N]."""
        request = np.repeat(np.arange(len(counts)), counts)
        local = np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)
        before, places = torch.from_numpy(drafts).roll(1), torch.from_numpy(local)
        start = np.array([self._part(i, markers) for i in range(len(counts))], np.int64)
        part = parts(torch.where(places > 0, before, -1), places, markers, torch.from_numpy(start[request]))
        scope = torch.from_numpy(self._notes.table[SCOPE].astype(np.int64)[request])
        return out_of_scope(part, scope).numpy()

    def _part(self, index: int, markers: tuple[int, int]) -> int:
        """Return the part of its response that a request of the batch goes on in."""
        state, cached = self._notes.states[index], self._notes.cached[index]
        if state.seen == 0:
            state.part = part_after(ANSWERING, cached.prompt_token_ids or [], markers)
        state.part = part_after(state.part, cached.output_token_ids[state.seen :], markers)
        state.seen = len(cached.output_token_ids)
        return state.part

    def _draft_logits(self, request: np.ndarray, position: np.ndarray) -> LogitRows:
        """Return the draft logits of M (request, position) pairs."""
        blocks = [block for block in (self._notes.blocks[index] for index in request.tolist()) if block is not None]
        together = blocks[0].proposals
        if all(block.proposals is together for block in blocks):
            return LogitRows(together.logits, position, np.array([block.row for block in blocks], np.int64))
        copies = torch.stack([block.logits(at) for block, at in zip(blocks, position.tolist(), strict=True)])
        every = np.arange(len(blocks))
        return LogitRows([copies] * len(together.logits), every * 0, every)  # as many tensors: that many are compiled

    def _decide(self, requests: Requests) -> Decide:
        policy, network, states = self._settings.policy, self._network, self._notes.states

        def coins(found: Found) -> np.ndarray:
            seeds, places = [states[i].seed for i in found.request], found.output_position.tolist()
            return np.array(
                [torch.rand(()).item() if s is None else action_coin(s, p) for s, p in zip(seeds, places, strict=True)]
            )

        def learned(found: Found) -> tuple[np.ndarray, np.ndarray]:
            assert network is not None
            score = network.scores(found.statistics)
            if self.sample_actions:
                return coins(found).astype(np.float32) < score, score
            return score > requests.threshold[found.request], score

        return rule(policy) if isinstance(policy, Rule) else learned

    def _account(self, result: BatchResult, states: list[RequestState]) -> None:
        """Carry counts over to the requests, the counters and the record."""
        counts = (result.mismatches.tolist(), result.overrides.tolist(), result.regret.tolist())
        for state, mismatches, overrides, regret in zip(states, *counts, strict=True):
            if mismatches:
                state.mismatches += mismatches
                state.overrides += overrides
                state.regret += regret
        if any(counts[0]) and self._counters is not None:
            self._counters.add(sum(counts[0]), result.overrides_per_position)
        for consulted in result.consulted if self._settings.counts_scores else ():
            assert consulted.probability is not None
            bins = np.searchsorted(SCORE_EDGES, consulted.probability, side="right")
            for request, bin_ in zip(consulted.request.tolist(), bins.tolist(), strict=True):
                states[request].scores[bin_] += 1
        ids = self._runner.input_batch.req_ids
        for consulted in result.consulted if self._settings.collect else ():
            for i, request in enumerate(consulted.request):
                self.decisions.append(
                    Decision(
                        request_id=ids[request],
                        output_position=int(consulted.output_position[i]),
                        block_position=int(consulted.position[i]),
                        statistics=torch.from_numpy(consulted.statistics[i]),
                        kept=bool(consulted.kept[i]),
                        probability=None if consulted.probability is None else float(consulted.probability[i]),
                        generator=None if self._replay is None else self._replay.state_of(int(request)),
                    )
                )


def _numbers(settings: RequestSettings, ends: list[int]) -> tuple[float, ...]:
    """Return ``RequestState.numbers``; ``ends`` is from :func:`vllm_cospec.kernels.reach.ends_of`."""
    return (
        settings.arbitrated, UNLIMITED if settings.max_overrides is None else settings.max_overrides,
        settings.exact_tokens, settings.threshold, in_units(settings.max_regret), SCOPES.index(settings.scope),
        settings.branch.written if settings.branch else 0, settings.branch is not None, *ends,
    )  # fmt: skip


def _reason(block: ProposedBlock | None, drafts: list[int]) -> Reason | None:
    """Return why these drafts of a request are not whole, or None."""
    if block is None:
        return Reason.SKIPPED if drafts else None
    if block.reason is None and list(block.tokens[: len(drafts)]) != drafts:
        return Reason.LOST
    return block.reason


def install(runner: Any, settings: Settings, engine_index: int) -> V1CPUSampler:
    """Put arbitration into a loaded V1 runner.

    Args:
        runner: vLLM's GPUModelRunner or a subclass, with drafter and sampler built.
        settings: of the server.
        engine_index: which of the server's engines this is, for the counters.
    """
    counters = counters_of_this_rank(settings, engine_index)
    runner.rejection_sampler = V1CPUSampler(runner, settings, counters)
    return runner.rejection_sampler
