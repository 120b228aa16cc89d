"""Model Runner V1: a rejection sampler that arbitrates, in place of the stock one.

Batches in which no request is arbitrated go to the stock sampler untouched. In the others the stock helpers run in
the stock order, so that every random number is the one strict verification would have drawn; only the scan of the
blocks is ours. Requests that are strict in a mixed batch therefore get exactly the stock's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.rejection_sampler import (
    GREEDY_TEMPERATURE,
    RejectionSampler,
    apply_sampling_constraints,
    generate_uniform_probs,
    sample_recovered_tokens,
)

from vllm_cospec.config import Settings
from vllm_cospec.kernels.cpu import UNLIMITED, Batch, BatchResult, Requests, verify_batch
from vllm_cospec.metrics import Counters
from vllm_cospec.policies import Learned, Mismatches
from vllm_cospec.requests import RequestSettings, served_settings
from vllm_cospec.runners.decision import Decision
from vllm_cospec.runners.proposals import ProposalRecorder, Proposals

STATE = "cospec_state"  # attribute of vLLM's CachedRequestState: lives and dies with the request


@dataclass
class RequestState:
    """What is remembered of a request between steps."""

    settings: RequestSettings
    overrides: int = 0


class CoSpecRejectionSampler(RejectionSampler):
    """Verifies drafts on the CPU with a policy at the mismatches."""

    def __init__(self, runner: Any, settings: Settings, counters: Counters):
        stock = runner.rejection_sampler
        super().__init__(stock.sampler, runner.speculative_config, runner.device)
        self._runner = runner
        self._settings = settings
        self._counters = counters
        self._recorder = ProposalRecorder(runner, settings.draft_logits)
        self.decisions: list[Decision] = []
        self.sample_actions = False
        """Training: draw the action with the arbiter's probability instead of comparing with the threshold."""
        self._arbiter: Any = None
        if isinstance(settings.policy, Learned):
            from vllm_cospec.arbiter import load_artefact

            self._arbiter, _ = load_artefact(Path(settings.policy.artefact))

    def forward(
        self, metadata: Any, draft_probs: Tensor | None, logits: Tensor, sampling_metadata: Any
    ) -> SamplerOutput:
        """Verify one step; arguments and result are those of the stock sampler.

        Args:
            metadata: which rows are drafts, which are bonus rows.
            draft_probs: [N, V] float32, or None for greedy drafts.
            logits: [N + B, V] target logits after the grammar mask.
            sampling_metadata: of the batch.
        """
        proposals = self._recorder.take()
        states = self._states(len(metadata.num_draft_tokens))
        num_drafts = len(metadata.draft_token_ids)
        # When all drafts of a step were trimmed away, stock's top-k fails on the CPU for want of a row.
        stock_fails = num_drafts == 0 and sampling_metadata.top_k is not None
        if states is None or not (stock_fails or any(state.settings.arbitrated for state in states)):
            return super().forward(metadata, draft_probs, logits, sampling_metadata)

        bonus = self.sampler(
            logits=logits[metadata.bonus_logits_indices],
            sampling_metadata=replace(sampling_metadata, max_num_logprobs=-1),
            predict_bonus_token=True,
            logprobs_mode_override="processed_logits" if self.is_processed_logprobs_mode else "raw_logits",
        )
        raw = logits[metadata.target_logits_indices].float()
        processed = raw
        if num_drafts:
            processed = self.apply_logits_processors(raw.clone(), sampling_metadata, metadata)
            processed = apply_sampling_constraints(processed, metadata.cu_num_draft_tokens, sampling_metadata)
        batch = self._strict_verdict(metadata, draft_probs, raw, processed, bonus.sampled_token_ids, sampling_metadata)
        batch.requests = self._requests(states, proposals, metadata)
        if self._settings.draft_logits:
            batch.draft_logits = self._draft_logits(proposals)
        result = verify_batch(batch, self._decide(batch.requests.threshold), self._settings.collect)
        self._account(result, states)

        logprobs = None
        if sampling_metadata.max_num_logprobs is not None:
            logprobs = self._get_logprobs_tensors(
                sampling_metadata.max_num_logprobs,
                metadata,
                logits,
                processed if self.is_processed_logprobs_mode else raw,
                bonus.logprobs_tensors.logprobs,
                result.output,
            )
        return SamplerOutput(sampled_token_ids=result.output, logprobs_tensors=logprobs)

    def set_arbiter(self, state_dict: dict[str, Tensor]) -> None:
        """Replace the arbiter's weights in memory; takes effect at the next step."""
        self._arbiter.load_state_dict(state_dict)

    def take_decisions(self) -> list[Decision]:
        """Return what was recorded since the last call, and forget it."""
        taken, self.decisions = self.decisions, []
        return taken

    def _states(self, num_requests: int) -> list[RequestState] | None:
        """Return the state of every request of the batch; None for vLLM's dummy batches."""
        request_ids = self._runner.input_batch.req_ids
        if len(request_ids) != num_requests:
            return None
        return [self._state(self._runner.requests[request_id]) for request_id in request_ids]

    def _state(self, cached: Any) -> RequestState:
        state = getattr(cached, STATE, None)
        if state is None:
            state = RequestState(served_settings(cached.sampling_params, self._settings))
            setattr(cached, STATE, state)
        return state

    def _strict_verdict(
        self,
        metadata: Any,
        draft_probs: Tensor | None,
        raw: Tensor,
        processed: Tensor,
        bonus_tokens: Tensor,
        sampling_metadata: Any,
    ) -> Batch:
        """Decide every position as strict verification does, drawing its random numbers in its order."""
        drafts = metadata.draft_token_ids.long()
        vocabulary = processed.shape[1]
        num_draft_tokens = np.array(metadata.num_draft_tokens, np.int64)
        uniform = ratio = None
        if len(drafts) and not sampling_metadata.all_greedy:
            uniform = generate_uniform_probs(
                len(drafts), metadata.num_draft_tokens, sampling_metadata.generators, processed.device
            ).float()
        argmax = processed.argmax(dim=-1)
        accepted, targets = drafts == argmax, argmax
        if uniform is not None:
            probabilities = processed.softmax(dim=-1, dtype=torch.float32)
            recovered = sample_recovered_tokens(
                metadata.max_spec_len,
                metadata.num_draft_tokens,
                metadata.cu_num_draft_tokens,
                metadata.draft_token_ids,
                draft_probs,
                probabilities,
                sampling_metadata,
                processed.device,
                self.use_fp64_gumbel,
            )
            index = drafts.clamp(0, vocabulary - 1).unsqueeze(1)
            p = probabilities.gather(1, index).squeeze(1)
            q = torch.ones_like(p) if draft_probs is None else draft_probs.gather(1, index).squeeze(1)
            ratio = torch.where(q > 0, p / q, 0.0)
            sampled = (sampling_metadata.temperature != GREEDY_TEMPERATURE).repeat_interleave(
                torch.from_numpy(num_draft_tokens)
            )
            accepted = torch.where(sampled, (drafts >= 0) & (q > 0) & (ratio >= uniform), accepted)
            targets = torch.where(sampled, recovered.long(), argmax)
            ratio, uniform = torch.where(sampled, ratio, 0.0), torch.where(sampled, uniform, 1.0)
        return Batch(
            draft_tokens=drafts,
            num_draft_tokens=num_draft_tokens,
            accepted=accepted,
            target_tokens=targets,
            bonus_tokens=bonus_tokens.view(-1),
            raw_target_logits=raw,
            processed_target_logits=processed,
            raw_argmax=raw.argmax(dim=-1),
            draft_logits=None,
            num_speculative_tokens=self._settings.num_speculative_tokens,
            max_draft_tokens=metadata.max_spec_len,
            requests=None,  # type: ignore[arg-type]  # filled by the caller
            acceptance_ratio=ratio,
            uniform=uniform,
        )

    def _requests(self, states: list[RequestState], proposals: Proposals | None, metadata: Any) -> Requests:
        """Line up settings and state of the batch, and find the requests whose drafts are junk."""
        ids = self._runner.input_batch.req_ids
        self._rows = np.full(len(ids), -1) if proposals is None else proposals.rows_of(ids)
        drafts = metadata.draft_token_ids.numpy()
        junk = np.ones(len(ids), bool)
        end = 0
        for i, n in enumerate(metadata.num_draft_tokens):
            start, end = end, end + n
            if proposals is not None and self._rows[i] >= 0:
                junk[i] = not proposals.proposed(int(self._rows[i]), drafts[start:end])
        settings = [state.settings for state in states]
        return Requests(
            arbitrated=np.array([s.arbitrated for s in settings]),
            junk=junk,
            output_position=np.array([len(self._runner.requests[i].output_token_ids) for i in ids], np.int64),
            overrides_so_far=np.array([state.overrides for state in states], np.int64),
            max_overrides=np.array(
                [UNLIMITED if s.max_overrides is None else s.max_overrides for s in settings], np.int64
            ),
            exact_tokens=np.array([s.exact_tokens for s in settings], np.int64),
            threshold=np.array([s.threshold for s in settings], np.float32),
        )

    def _draft_logits(self, proposals: Proposals | None) -> Any:
        def gather(request: np.ndarray, position: np.ndarray) -> Tensor:
            assert proposals is not None  # else every request is junk, and nothing is consulted
            return proposals.gather_logits(self._rows[request], position)

        return gather

    def _decide(self, thresholds: np.ndarray) -> Any:
        policy = self._settings.policy

        def learned(mismatches: Mismatches, request: np.ndarray) -> tuple[Tensor, Tensor]:
            score = self._arbiter(mismatches.statistics)
            if self.sample_actions:
                return torch.rand_like(score) < score, score
            return score > torch.from_numpy(thresholds[request]), score

        def rule(mismatches: Mismatches, request: np.ndarray) -> tuple[Tensor, None]:
            return policy.keep(mismatches), None

        return learned if isinstance(policy, Learned) else rule

    def _account(self, result: BatchResult, states: list[RequestState]) -> None:
        """Carry counts over to the requests, the counters and the record."""
        for index in np.flatnonzero(result.overrides):
            states[index].overrides += int(result.overrides[index])
        if result.num_mismatches:
            self._counters.add(result.num_mismatches, result.overrides_per_position)
        ids = self._runner.input_batch.req_ids
        for consulted in result.consulted:
            for i, request in enumerate(consulted.request):
                self.decisions.append(
                    Decision(
                        request_id=ids[request],
                        output_position=int(consulted.output_position[i]),
                        block_position=int(consulted.position[i]),
                        statistics=consulted.statistics[i],
                        kept=bool(consulted.kept[i]),
                        probability=None if consulted.probability is None else float(consulted.probability[i]),
                    )
                )


def install(runner: Any, settings: Settings, engine_index: int) -> CoSpecRejectionSampler:
    """Put arbitration into a loaded V1 runner.

    Args:
        runner: vLLM's GPUModelRunner or a subclass, with drafter and sampler built.
        settings: of the server.
        engine_index: which of the server's engines this is, for the counters.
    """
    counters = Counters(settings.counters, engine_index, settings.num_speculative_tokens)
    counters.open(create=True)
    runner.rejection_sampler = CoSpecRejectionSampler(runner, settings, counters)
    return runner.rejection_sampler
