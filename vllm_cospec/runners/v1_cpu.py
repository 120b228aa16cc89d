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
from vllm_cospec.drift import histogram
from vllm_cospec.health import Reason
from vllm_cospec.kernels import UNLIMITED
from vllm_cospec.kernels.cpu import Batch, BatchResult, Requests, argmax, verify_batch
from vllm_cospec.kernels.policies import Mismatches, Policy, Rule
from vllm_cospec.kernels.reach import ANSWERING, SCOPES, out_of_scope, part_after, parts, undeliverable
from vllm_cospec.kernels.regret import in_units
from vllm_cospec.metrics import Counters, counters_of_this_rank
from vllm_cospec.reports import StepCounts
from vllm_cospec.requests import RequestSettings, action_coin, response_ends, served_settings
from vllm_cospec.runners.recorder import ProposedBlock, Recorder, draft_probabilities
from vllm_cospec.runners.replay import Replay
from vllm_cospec.runners.trace import Decision
from vllm_cospec.runners.v1 import V1Sampler, V1Step

STATE = "cospec_state"  # attribute of vLLM's CachedRequestState: lives and dies with the request


@dataclass
class RequestState:
    """What is remembered of a request between steps."""

    settings: RequestSettings
    seed: int | None  # of the request
    ends: list[int]  # see vllm_cospec.kernels.reach.ends_of
    mismatches: int = 0
    overrides: int = 0
    regret: float = 0.0  # nats, of the overrides
    part: int = ANSWERING  # of the response that its next token belongs to, see vllm_cospec.kernels.reach
    seen: int = 0  # output tokens looked at for it
    scores: np.ndarray = field(default_factory=lambda: histogram(np.zeros(0)))  # int64 [bins], where they are watched


class V1CPUSampler(V1Sampler):
    """Verifies drafts on the CPU with a policy at the mismatches."""

    reads_in_place = True
    recorder: Recorder

    def __init__(self, runner: Any, settings: Settings, counters: Counters | None):
        super().__init__(runner)
        self._settings = settings
        self._counters = counters
        self.recorder = Recorder(runner, settings)
        self._blocks: list[ProposedBlock | None] = []  # of the requests of the running step
        self._replay = Replay(runner, lambda cached: self._state(cached).settings.branch) if settings.collect else None
        self.decisions: list[Decision] = []
        self.sample_actions = False
        """Training: draw the action with the arbiter's probability instead of comparing with the threshold."""
        self._arbiter: Any = None
        if settings.policy.arbiter is not None:
            from vllm_cospec.arbiter import load_artefact

            self._arbiter, _ = load_artefact(Path(settings.policy.arbiter))

    def open_step(self, request_ids: Sequence[str]) -> None:
        """As the base's."""
        self._blocks = self.recorder.take(request_ids)

    def find_probabilities(
        self, metadata: SpecDecodeMetadata, given: Tensor | None, sampling_metadata: Any
    ) -> Tensor | None:
        """As the base's."""
        own = draft_probabilities(self._blocks, metadata.num_draft_tokens, metadata.draft_token_ids)
        return given if own is None else own

    def find_wanted(self) -> np.ndarray:
        """As the base's."""
        self._states = [
            self._state(self._runner.requests[request_id]) for request_id in self._runner.input_batch.req_ids
        ]
        return np.array([state.settings.arbitrated for state in self._states], bool)

    def find_reasons(self, metadata: SpecDecodeMetadata) -> list[Reason | None]:
        """As the base's."""
        drafts, reasons, start = metadata.draft_token_ids.tolist(), [], 0
        for block, count in zip(self._blocks, metadata.num_draft_tokens, strict=True):
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
        verdict = self.strict_verdict(step)
        requests = self._requests()
        legal, beyond = self._reach(step, requests.output_position)
        batch = Batch(
            draft_tokens=step.metadata.draft_token_ids.long(),
            num_draft_tokens=np.array(step.metadata.num_draft_tokens, np.int64),
            accepted=verdict.accepted,
            target_tokens=verdict.target_tokens,
            bonus_tokens=step.bonus_tokens.view(-1),
            raw_target_logits=step.raw,
            processed_target_logits=step.processed,
            raw_argmax=verdict.argmax if step.processed is step.raw else argmax(step.raw),
            draft_logits=self._draft_logits if self._settings.draft_logits else None,
            num_speculative_tokens=self._settings.num_speculative_tokens,
            max_draft_tokens=step.metadata.max_spec_len,
            requests=requests,
            acceptance_ratio=verdict.acceptance_ratio,
            uniform=verdict.uniform,
            logit_rows=step.rows,
            legal=legal,
            undeliverable=beyond,
        )
        collect = self._settings.collect or self._settings.traffic is not None
        result = verify_batch(batch, self._decide(requests, self._states), collect)
        self._account(result, self._states)
        return result.output

    def set_arbiter(self, state_dict: dict[str, Tensor]) -> None:
        """Replace the arbiter's weights in memory; takes effect at the next step."""
        self._arbiter.load_state_dict(state_dict)

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
        """There is nothing to compile."""

    def _state(self, cached: Any) -> RequestState:
        state = getattr(cached, STATE, None)
        if state is None:
            settings = served_settings(cached.sampling_params, self._settings)
            room = self._runner.max_model_len - cached.num_prompt_tokens
            ends = response_ends(cached.sampling_params, settings.branch, room)
            state = RequestState(settings, getattr(cached.sampling_params, "seed", None), ends)
            if settings.branch is not None:
                state.overrides = settings.branch.overrides
            setattr(cached, STATE, state)
        return state

    def _requests(self) -> Requests:
        """Line up settings and state of the batch."""
        settings = [state.settings for state in self._states]
        cached = [self._runner.requests[request_id] for request_id in self._runner.input_batch.req_ids]
        branches = [s.branch for s in settings]
        forced_at = forced_keep = None
        written = np.zeros(len(cached), np.int64)
        if any(branches):
            written = np.array([b.written if b else 0 for b in branches], np.int64)
            forced_at = np.array([b.decided_at if b else -1 for b in branches], np.int64)
            forced_keep = np.array([b.keep if b else False for b in branches])
        return Requests(
            arbitrated=np.array([s.arbitrated for s in settings]) & ~self._left_out,
            junk=self._left_out,
            output_position=written + np.array([len(request.output_token_ids) for request in cached], np.int64),
            overrides_so_far=np.array([state.overrides for state in self._states], np.int64),
            max_overrides=np.array(
                [UNLIMITED if s.max_overrides is None else s.max_overrides for s in settings], np.int64
            ),
            exact_tokens=np.array([s.exact_tokens for s in settings], np.int64),
            threshold=np.array([s.threshold for s in settings], np.float32),
            regret_so_far=np.array([state.regret for state in self._states]),
            max_regret=np.array([in_units(s.max_regret) for s in settings]),
            forced_at=forced_at,
            forced_keep=forced_keep,
        )

    def _reach(self, step: V1Step, output_position: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return which drafts may be kept, and which cannot reach their responses, bool [N] each."""
        drafts, counts = step.metadata.draft_token_ids, np.array(step.metadata.num_draft_tokens, np.int64)
        request = np.repeat(np.arange(len(counts)), counts)
        local = np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)
        ends = np.array([state.ends for state in self._states], np.int64).reshape(len(counts), -1)[request]
        before, places = drafts.roll(1), torch.from_numpy(local)
        beyond = undeliverable(
            before, places, torch.from_numpy(output_position[request] + local), torch.from_numpy(ends)
        )
        scopes = np.array([SCOPES.index(state.settings.scope) for state in self._states], np.int64)
        markers = self._settings.thinking_tokens
        if markers is None or not scopes.any():
            return step.legal, beyond
        start = np.array([self._part(i, markers) for i in range(len(counts))], np.int64)
        part = parts(torch.where(places > 0, before, -1), places, markers, torch.from_numpy(start[request]))
        return step.legal & ~out_of_scope(part, torch.from_numpy(scopes[request])), beyond

    def _part(self, index: int, markers: tuple[int, int]) -> int:
        """Return the part of its response that a request of the batch goes on in."""
        state, cached = self._states[index], self._runner.requests[self._runner.input_batch.req_ids[index]]
        if state.seen == 0:
            state.part = part_after(ANSWERING, cached.prompt_token_ids or [], markers)
        state.part = part_after(state.part, cached.output_token_ids[state.seen :], markers)
        state.seen = len(cached.output_token_ids)
        return state.part

    def _draft_logits(self, request: np.ndarray, position: np.ndarray) -> Tensor:
        """Return the draft logits of M (request, position) pairs, [M, V]."""
        blocks = [self._blocks[index] for index in request]
        return torch.stack([block.logits(at) for block, at in zip(blocks, position, strict=True) if block is not None])

    def _decide(self, requests: Requests, states: list[RequestState]) -> Any:
        policy = self._settings.policy

        def coins(mismatches: Mismatches, request: np.ndarray) -> Tensor:
            seeds = [states[i].seed for i in request]
            places = mismatches.output_position.tolist()
            return torch.tensor(
                [torch.rand(()).item() if s is None else action_coin(s, p) for s, p in zip(seeds, places, strict=True)]
            )

        def learned(mismatches: Mismatches, request: np.ndarray) -> tuple[Tensor, Tensor]:
            score = self._arbiter(mismatches.statistics)
            if self.sample_actions:
                return coins(mismatches, request) < score, score
            return score > torch.from_numpy(requests.threshold[request]), score

        def rule(mismatches: Mismatches, request: np.ndarray) -> tuple[Tensor, None]:
            assert isinstance(policy, Rule)
            return policy.keep(mismatches), None

        return rule if policy.arbiter is None else learned

    def _account(self, result: BatchResult, states: list[RequestState]) -> None:
        """Carry counts over to the requests, the counters and the record."""
        for index in np.flatnonzero(result.mismatches):
            states[index].mismatches += int(result.mismatches[index])
            states[index].overrides += int(result.overrides[index])
            states[index].regret += float(result.regret[index])
        if result.num_mismatches and self._counters is not None:
            self._counters.add(result.num_mismatches, result.overrides_per_position)
        for consulted in result.consulted if self._settings.traffic is not None else ():
            assert consulted.probability is not None
            scores = consulted.probability.numpy()
            for i, request in enumerate(consulted.request):
                states[request].scores += histogram(scores[i : i + 1])
        ids = self._runner.input_batch.req_ids
        for consulted in result.consulted if self._settings.collect else ():
            for i, request in enumerate(consulted.request):
                self.decisions.append(
                    Decision(
                        request_id=ids[request],
                        output_position=int(consulted.output_position[i]),
                        block_position=int(consulted.position[i]),
                        statistics=consulted.statistics[i],
                        kept=bool(consulted.kept[i]),
                        probability=None if consulted.probability is None else float(consulted.probability[i]),
                        generator=None if self._replay is None else self._replay.state_of(int(request)),
                    )
                )


def _reason(block: ProposedBlock | None, drafts: list[int]) -> Reason | None:
    """Return why these drafts of a request are not whole, or None."""
    if block is None:
        return Reason.SKIPPED if drafts else None
    if block.reason is None and block.tokens[: len(drafts)].tolist() != drafts:
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
