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
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor
from vllm.v1.sample.rejection_sampler import (
    GREEDY_TEMPERATURE,
    RejectionSampler,
    apply_sampling_constraints,
    generate_uniform_probs,
    sample_recovered_tokens,
)

from vllm_cospec.config import Settings
from vllm_cospec.kernels import UNLIMITED
from vllm_cospec.kernels.cpu import Batch, BatchResult, Requests, argmax, verify_batch
from vllm_cospec.kernels.policies import Mismatches, Policy, Rule
from vllm_cospec.metrics import Counters, counters_of_this_rank
from vllm_cospec.requests import RequestSettings, action_coin, served_settings
from vllm_cospec.runners.recorder import ProposalRecorder, Proposals
from vllm_cospec.runners.trace import Decision

STATE = "cospec_state"  # attribute of vLLM's CachedRequestState: lives and dies with the request


@dataclass
class RequestState:
    """What is remembered of a request between steps."""

    settings: RequestSettings
    seed: int | None  # of the request
    overrides: int = 0


@dataclass
class Verdict:
    """What strict verification says of each of N draft positions by itself."""

    accepted: Tensor  # [N] bool
    target_tokens: Tensor  # [N] int64, emitted where the draft is not kept
    argmax: Tensor  # [N] int64, of the processed logits
    acceptance_ratio: Tensor | None  # [N] float32, None when every request is greedy
    uniform: Tensor | None  # [N] float32


class CoSpecRejectionSampler(RejectionSampler):
    """Verifies drafts on the CPU with a policy at the mismatches."""

    def __init__(self, runner: Any, settings: Settings, counters: Counters | None):
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
        if settings.policy.arbiter is not None:
            from vllm_cospec.arbiter import load_artefact

            self._arbiter, _ = load_artefact(Path(settings.policy.arbiter))

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
            # as stock, but without a copy of the logits when nobody asked for logprobs
            sampling_metadata=replace(sampling_metadata, max_num_logprobs=-1)
            if sampling_metadata.max_num_logprobs is not None
            else sampling_metadata,
            predict_bonus_token=True,
            logprobs_mode_override="processed_logits" if self.is_processed_logprobs_mode else "raw_logits",
        )
        rows_of_drafts = None
        if logits.dtype == torch.float32 and _unprocessed(sampling_metadata):
            raw, rows_of_drafts = logits, metadata.target_logits_indices  # no copy: most rows are read but once
        else:
            raw = logits[metadata.target_logits_indices].float()
        processed = raw
        if num_drafts and rows_of_drafts is None:
            processed = self.apply_logits_processors(raw.clone(), sampling_metadata, metadata)
            processed = apply_sampling_constraints(processed, metadata.cu_num_draft_tokens, sampling_metadata)
        rows, requests = self._requests(states, proposals, metadata)
        verdict = self._strict_verdict(metadata, draft_probs, processed, rows_of_drafts, sampling_metadata)
        batch = Batch(
            draft_tokens=metadata.draft_token_ids.long(),
            num_draft_tokens=np.array(metadata.num_draft_tokens, np.int64),
            accepted=verdict.accepted,
            target_tokens=verdict.target_tokens,
            bonus_tokens=bonus.sampled_token_ids.view(-1),
            raw_target_logits=raw,
            processed_target_logits=processed,
            raw_argmax=verdict.argmax if processed is raw else argmax(raw),
            draft_logits=self._draft_logits(proposals, rows) if self._settings.draft_logits else None,
            num_speculative_tokens=self._settings.num_speculative_tokens,
            max_draft_tokens=metadata.max_spec_len,
            requests=requests,
            acceptance_ratio=verdict.acceptance_ratio,
            uniform=verdict.uniform,
            logit_rows=rows_of_drafts,
        )
        result = verify_batch(batch, self._decide(requests, states), self._settings.collect)
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

    def set_policy(self, policy: Policy) -> None:
        """Replace a rule by another; takes effect at the next step."""
        self._settings = replace(self._settings, policy=policy)

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
            settings = served_settings(cached.sampling_params, self._settings)
            state = RequestState(settings, getattr(cached.sampling_params, "seed", None))
            if settings.branch is not None:
                state.overrides = settings.branch.overrides
            setattr(cached, STATE, state)
        return state

    def _strict_verdict(
        self,
        metadata: Any,
        draft_probs: Tensor | None,
        processed: Tensor,
        rows_of_drafts: Tensor | None,
        sampling_metadata: Any,
    ) -> Verdict:
        """Decide every position as strict verification does, drawing its random numbers in its order."""
        drafts = metadata.draft_token_ids.long()
        vocabulary = processed.shape[1]
        uniform = ratio = None
        if len(drafts) and not sampling_metadata.all_greedy:
            uniform = generate_uniform_probs(
                len(drafts), metadata.num_draft_tokens, sampling_metadata.generators, processed.device
            ).float()
        best = argmax(processed) if len(drafts) else drafts
        if rows_of_drafts is not None:
            best = best[rows_of_drafts]
        accepted, targets = drafts == best, best
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
                torch.tensor(metadata.num_draft_tokens)
            )
            accepted = torch.where(sampled, (drafts >= 0) & (q > 0) & (ratio >= uniform), accepted)
            targets = torch.where(sampled, recovered.long(), best)
            ratio, uniform = torch.where(sampled, ratio, 0.0), torch.where(sampled, uniform, 1.0)
        return Verdict(accepted, targets, best, ratio, uniform)

    def _requests(
        self, states: list[RequestState], proposals: Proposals | None, metadata: Any
    ) -> tuple[np.ndarray, Requests]:
        """Line up settings and state of the batch, and find the requests whose drafts are junk.

        Returns:
            The row of each request in the proposals, -1 for none, and the rest.
        """
        ids = self._runner.input_batch.req_ids
        rows = np.full(len(ids), -1) if proposals is None else proposals.rows_of(ids)
        drafts = metadata.draft_token_ids.numpy()
        junk = np.ones(len(ids), bool)
        end = 0
        for i, n in enumerate(metadata.num_draft_tokens):
            start, end = end, end + n
            if proposals is not None and rows[i] >= 0:
                junk[i] = not proposals.proposed(int(rows[i]), drafts[start:end])
        settings = [state.settings for state in states]
        branches = [s.branch for s in settings]
        forced_at = forced_keep = None
        written = np.zeros(len(ids), np.int64)
        if any(branches):
            written = np.array([b.written if b else 0 for b in branches], np.int64)
            forced_at = np.array([b.decided_at if b else -1 for b in branches], np.int64)
            forced_keep = np.array([b.keep if b else False for b in branches])
        return rows, Requests(
            arbitrated=np.array([s.arbitrated for s in settings]),
            junk=junk,
            output_position=written + np.array([len(self._runner.requests[i].output_token_ids) for i in ids], np.int64),
            overrides_so_far=np.array([state.overrides for state in states], np.int64),
            max_overrides=np.array(
                [UNLIMITED if s.max_overrides is None else s.max_overrides for s in settings], np.int64
            ),
            exact_tokens=np.array([s.exact_tokens for s in settings], np.int64),
            threshold=np.array([s.threshold for s in settings], np.float32),
            forced_at=forced_at,
            forced_keep=forced_keep,
        )

    @staticmethod
    def _draft_logits(proposals: Proposals | None, rows: np.ndarray) -> Any:
        def gather(request: np.ndarray, position: np.ndarray) -> Tensor:
            assert proposals is not None  # else every request is junk, and nothing is consulted
            return proposals.gather_logits(rows[request], position)

        return gather

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
        for index in np.flatnonzero(result.overrides):
            states[index].overrides += int(result.overrides[index])
        if result.num_mismatches and self._counters is not None:
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


def _unprocessed(sampling_metadata: Any) -> bool:
    """Whether a batch's logits reach verification as the model gave them, and nobody wants them afterwards.

    Everything that vLLM's ``apply_logits_processors`` and ``apply_sampling_constraints`` do is ruled out here.
    """
    holder = sampling_metadata.thinking_budget_state_holder
    return (
        sampling_metadata.all_greedy
        and sampling_metadata.max_num_logprobs is None
        and sampling_metadata.no_penalties
        and not sampling_metadata.bad_words_token_ids
        and sampling_metadata.allowed_token_ids_mask is None
        and not any(  # the only processor that stock applies to draft rows
            isinstance(processor, MinTokensLogitsProcessor) and processor.min_toks
            for processor in sampling_metadata.logitsprocs.non_argmax_invariant
        )
        and not (holder is not None and holder.has_tracked_requests())
    )


def install(runner: Any, settings: Settings, engine_index: int) -> CoSpecRejectionSampler:
    """Put arbitration into a loaded V1 runner.

    Args:
        runner: vLLM's GPUModelRunner or a subclass, with drafter and sampler built.
        settings: of the server.
        engine_index: which of the server's engines this is, for the counters.
    """
    counters = counters_of_this_rank(settings, engine_index)
    runner.rejection_sampler = CoSpecRejectionSampler(runner, settings, counters)
    return runner.rejection_sampler
