"""Generated batches for the fused kernels, what the reference makes of them, and what stock verification does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from policy_examples import EXAMPLES
from torch import Tensor
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.gumbel import tl_rand32
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

from vllm_cospec.arbiter import Arbiter
from vllm_cospec.kernels import UNLIMITED
from vllm_cospec.kernels.cpu import divergence, mixture_lead, top_k_entropy
from vllm_cospec.kernels.policies import Mismatches, Policy, Rule
from vllm_cospec.kernels.reach import ends_of
from vllm_cospec.kernels.reference import Block, BlockResult, verify_block
from vllm_cospec.kernels.regret import in_units
from vllm_cospec.kernels.scores import NUM_BINS
from vllm_cospec.kernels.triton.launch import arbitrate
from vllm_cospec.kernels.triton.policies import compile_policy
from vllm_cospec.kernels.triton.step import Memory, Rows, Sampling, Slots
from vllm_cospec.kernels.triton.workspace import Workspace

CPU = torch.device("cpu")
POISON = -7777

POLICIES = EXAMPLES


def arbiter(*hidden: int) -> Arbiter:
    """A network of these widths with random weights."""
    torch.manual_seed(sum(hidden))
    network = Arbiter(hidden)
    network.mean.normal_()
    network.scale.uniform_(0.5, 3)
    return network.eval().requires_grad_(False)


def set_bias(network: Arbiter, value: float) -> None:
    """Set the last layer's bias: with 50 the network keeps everything, with -50 nothing."""
    list(network.parameters())[-1].fill_(value)


@dataclass
class Case:
    """One step of a batch, in the layout of Model Runner V2."""

    raw: Tensor  # [R, V]
    processed: Tensor  # [R, V], possibly raw itself
    draft: Any  # [S, K, V]
    draft_sampled: Tensor  # [R] int32
    num_drafts: list[int]  # [B]
    slot: list[int]  # [B]
    num_speculative_steps: int
    temperature: Tensor  # [S]
    seed: Tensor  # [S]
    pos: Tensor  # [R]
    slots: Slots

    @property
    def starts(self) -> list[int]:
        """First row of each request, and the number of rows."""
        return np.concatenate([[0], np.cumsum(np.array(self.num_drafts) + 1)]).tolist()

    def layout(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """cu_num_logits, idx_mapping, expanded_idx_mapping, expanded_local_pos, typed as the runner's."""
        counts, device = torch.tensor(self.num_drafts) + 1, self.raw.device
        slot = torch.tensor(self.slot, dtype=torch.int64)
        local = torch.cat([torch.arange(int(n)) for n in counts]).to(torch.int32)
        starts = torch.tensor(self.starts, dtype=torch.int32)
        return starts.to(device), slot.to(device), slot.repeat_interleave(counts).to(device), local.to(device)

    def stock(self, processed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Stock V2 verification of this step, optionally with other processed logits."""
        cu, slot, expanded, local = self.layout()
        return rejection_sample(
            self.processed if processed is None else processed, self.draft, self.draft_sampled, cu, self.pos, slot,
            expanded, local, self.temperature, self.seed, self.num_speculative_steps,
        )  # fmt: skip

    def rows(self) -> Rows:
        """The step as the kernels take it."""
        first, request_slot, slot, step = self.layout()
        return Rows(
            raw=self.raw, processed=self.processed, draft=self.draft, drafted=self.draft_sampled, first=first,
            position=self.pos, request_slot=request_slot, slot=slot, step=step, num_steps=self.num_speculative_steps,
        )  # fmt: skip

    def prepared(
        self,
        policy: Policy,
        arbiter: Arbiter | None = None,
        collect: bool = False,
        sample_actions: bool = False,
        space: Workspace | None = None,
        rows: Rows | None = None,
    ) -> tuple[Callable[[], Any], Tensor, Slots]:
        """Fused verification as a call, which returns a ``Verified``; beside it the counters and slots it adds to.

        In a workspace of its own, and of its own rows, unless others are given.
        """
        device = self.raw.device
        slots = Slots(**{name: value.clone() for name, value in vars(self.slots).items()})
        counters = torch.zeros(self.num_speculative_steps + 1, dtype=torch.int64, device=device)
        program = replace(compile_policy(policy, device, arbiter, collect), sample_actions=sample_actions)
        memory = Memory(counters, space or Workspace(device, self.raw.shape[1], 1, 1))
        arguments = rows or self.rows(), Sampling(self.temperature, self.seed), slots, program, memory
        return lambda: arbitrate(*arguments), counters, slots

    def ours(self, policy: Policy, arbiter: Arbiter | None = None, **options: Any) -> tuple[Any, Tensor, Slots]:
        """Fused verification -> result (a ``Verified``, with a trace if collected), counters, slots afterwards."""
        verify, counters, slots = self.prepared(policy, arbiter, **options)
        return verify(), counters, slots


def with_budgets(slots: Slots, generator: np.random.Generator) -> Slots:
    """The same slots with budgets of regret, some of them spent in part or more than that."""
    size = len(slots.max_regret)
    budget = np.array([in_units(x) for x in generator.choice([0.0, 1e-4, 0.05, 1.0, 6.0, 30.0], size)])
    spent = np.array([in_units(x) for x in budget * generator.choice([0.0, 0.3, 1.0, 1.5], size)])
    return replace(slots, max_regret=torch.tensor(budget).float(), regret_so_far=torch.tensor(spent).float())


def make_slots(size: int, generator: np.random.Generator, arbitrated: float = 0.85) -> Slots:
    """Settings of ``size`` slots, most of them arbitrated and without limits."""

    def pick(values: list[float], weights: list[float], of: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(generator.choice(values, size, p=weights), dtype=of)

    return Slots(
        arbitrated=torch.tensor(generator.random(size) < arbitrated, dtype=torch.int32),
        threshold=torch.tensor(generator.random(size), dtype=torch.float32),
        max_overrides=pick([UNLIMITED, 0, 1, 3], [0.7, 0.05, 0.1, 0.15]),
        exact_tokens=pick([0, 3, 9], [0.7, 0.2, 0.1]),
        overrides_so_far=pick([0, 1, 2], [0.7, 0.2, 0.1]),
        max_regret=torch.full((size,), torch.inf),
        regret_so_far=torch.zeros(size),
        response_start=torch.tensor(generator.integers(1, 5, size), dtype=torch.int32),
        forced=torch.full((size,), -1, dtype=torch.int32),
        ends=torch.tensor([ends_of(UNLIMITED, [])] * size, dtype=torch.int32),
        stops=torch.arange(size, dtype=torch.int32) % 3,
        scores=(torch.arange(size * NUM_BINS, dtype=torch.int32) % 5).view(size, NUM_BINS),
    )


REGIMES = ("plain", "saturated", "masked", "ties", "nan")


def logits_of(regime: str, shape: tuple[int, ...], generator: np.random.Generator) -> Tensor:
    """Logits of one regime, float32."""
    values = torch.tensor(generator.normal(0, 3, shape), dtype=torch.float32)
    if regime == "saturated":
        index = torch.tensor(generator.integers(0, shape[-1], (*shape[:-1], 1)))
        values.scatter_(-1, index, float(generator.choice([50.0, 300.0, 3000.0])))
    if regime == "masked":
        keep = torch.tensor(generator.random(shape) < 0.1)
        keep[..., :2] = True
        values = values.masked_fill(~keep, float("-inf"))
    if regime == "ties":
        values = (values / 2).round()
    if regime == "nan":
        values[torch.tensor(generator.random(shape[:-1]) < 0.3)[..., None] & (torch.arange(shape[-1]) == 5)] = torch.nan
    return values


def make_case(
    seed: int,
    vocab: int = 111,
    k: int = 5,
    requests: int = 4,
    regime: str = "plain",
    dtype: torch.dtype = torch.float32,
    draft_logits: bool = True,
    sampled: float = 0.5,
    separate: bool = False,
    agreement: float = 0.5,
    arbitrated: float = 0.85,
    full: bool = False,
    budgets: bool = False,
) -> Case:
    """A batch of ``requests`` with up to ``k`` drafts each, in scattered slots.

    Args:
        sampled: share of requests with a temperature.
        separate: processed logits are a changed float32 copy.
        agreement: share of positions where the draft is the target's first choice.
        full: every request has ``k`` drafts; else 0 to ``k``.
        budgets: of regret, for every request.
    """
    g = np.random.default_rng(seed)
    size = requests + 3
    num_drafts = [k] * requests if full else g.integers(0, k + 1, requests).tolist()
    slot = g.permutation(size)[:requests].tolist()
    rows = sum(num_drafts) + requests
    clean = "plain" if regime == "nan" and not separate else regime
    raw = logits_of(clean, (rows, vocab), g).to(dtype)
    processed = raw
    if separate:
        base = torch.where(raw.isnan(), 0.0, raw.float())
        processed = base / float(g.choice([0.5, 1.0, 2.0]))
        processed[torch.tensor(g.random(processed.shape) < 0.2)] = float("-inf")
        processed[:, :2] = 0.0  # every row keeps something to draw
    draft = logits_of(regime, (size, k, vocab), g).to(dtype) if draft_logits else None
    tokens = torch.tensor(g.integers(0, vocab, rows), dtype=torch.int32)
    row = 0
    temperature = torch.where(
        torch.tensor(g.random(size) < sampled), torch.tensor(g.choice([0.5, 1.0, 1.3], size)), 0.0
    )
    for request, n in enumerate(num_drafts):
        for i in range(n):
            choice = torch.where(processed[row + i].isnan(), -torch.inf, processed[row + i])
            if g.random() < agreement:
                tokens[row + i + 1] = choice.argmax()
            elif g.random() < 0.6:  # a serious rival, so that policies have something to weigh
                tokens[row + i + 1] = choice.topk(3).indices[int(g.integers(0, 3))]
            elif g.random() < 0.2:
                tokens[row + i + 1] = -1
            if draft is not None and tokens[row + i + 1] >= 0 and g.random() < 0.7:
                draft[slot[request], i, int(tokens[row + i + 1])] = 6.0
        row += n + 1
    starts = np.concatenate([[0], np.cumsum(np.array(num_drafts) + 1)])
    slots = make_slots(size, g, arbitrated)
    if budgets:
        slots = with_budgets(slots, g.spawn(1)[0])
    pos = torch.cat(
        [
            torch.arange(n + 1) + int(slots.response_start[s]) - 1 + int(g.integers(0, 9))
            for n, s in zip(num_drafts, slot, strict=True)
        ]
    )
    assert len(pos) == starts[-1]
    return Case(
        raw, processed, draft, tokens, num_drafts, slot, k, temperature.float(),
        torch.tensor(g.integers(-(2**62), 2**62, size)), pos.to(torch.int64), slots,
    )  # fmt: skip


@triton.jit
def _uniform_kernel(out_ptr, seed_ptr, pos_ptr, SIZE: tl.constexpr, n) -> None:  # type: ignore[no-untyped-def]
    index = tl.arange(0, SIZE)
    mask = index < n
    u = tl_rand32(tl.load(seed_ptr + index, mask=mask), tl.load(pos_ptr + index, mask=mask), includes_zero=False)
    tl.store(out_ptr + index, u, mask=mask)


def uniforms(case: Case) -> Tensor:
    """The number strict verification draws at every row, float32 [R]."""
    _, _, expanded, _ = case.layout()
    n = len(expanded)
    out = torch.empty(n, device=case.raw.device)
    _uniform_kernel[(1,)](out, case.seed[expanded].contiguous(), case.pos, triton.next_power_of_2(n), n)
    return out


@dataclass
class Expected:
    """What the reference makes of a batch."""

    results: list[BlockResult]
    ambiguous: list[bool]  # a comparison so close that float32 may decide it either way


def regret_of(slots: Slots, slot: int) -> dict[str, Any]:
    """Budget of a slot and what is spent of it, as the reference takes them."""
    budget = float(slots.max_regret[slot])
    return {"regret_so_far": float(slots.regret_so_far[slot]), "max_regret": budget if budget < torch.inf else None}


def _mismatch(z: Tensor, y: Tensor, d: int, scale: float, **rest: Tensor) -> Mismatches:
    """What a rule sees of a row of target logits z and draft logits y, [V], a little off by ``scale``."""
    token = torch.tensor([d])
    return Mismatches(
        target_logit_draft=z[d][None] * scale,
        target_logit_top=z.max()[None],
        draft_token=token,
        target_token=z.argmax()[None],
        top_k_entropy=lambda count: top_k_entropy(z[None], count) * scale,
        divergence=lambda kind: divergence(z[None], y[None], kind) * scale,
        mixture_lead=lambda weight: mixture_lead(z[None], y[None], token, weight) + (scale - 1),
        **rest,
    )


def expected(case: Case, policy: Policy, arbiter: Arbiter | None = None, u: Tensor | None = None) -> Expected:
    """Verify every request with the reference, on the CPU; ``u``: the uniforms, where kernels cannot run there."""
    u = uniforms(case) if u is None else u
    out = Expected([], [])
    starts = case.starts
    for request, n in enumerate(case.num_drafts):
        slot, rows = case.slot[request], range(starts[request], starts[request] + n)
        drafts = [int(case.draft_sampled[row + 1]) for row in rows]
        temperature = float(case.temperature[slot])
        accepted, ratios, close = [], [], False
        for i, row in enumerate(rows):
            token = max(drafts[i], 0)
            if temperature == 0:
                accepted.append(drafts[i] >= 0 and int(case.processed[row].argmax()) == drafts[i])
                ratios.append(0.0)
                continue
            logp = torch.log_softmax(case.processed[row].double(), -1)[token]
            logq = torch.zeros((), dtype=torch.float64)
            if case.draft is not None:
                logq = torch.log_softmax(case.draft[slot, i].float().double() / temperature, -1)[token]
            margin = float(logp - logq - torch.log(u[row].double()))
            close |= abs(margin) < 1e-4
            accepted.append(drafts[i] >= 0 and margin > 0)
            ratios.append(float((logp - logq).exp()) if logq > -torch.inf else 0.0)
        settings = case.slots
        limit = int(settings.max_overrides[slot])
        block = Block(
            draft_tokens=drafts, accepted_by_strict=accepted, target_tokens=[POISON] * n, bonus_token=POISON,
            raw_target_logits=case.raw[starts[request] : starts[request] + n].float(),
            processed_target_logits=case.processed[starts[request] : starts[request] + n].float(),
            draft_logits=None if case.draft is None else case.draft[slot, :n].float(),
            num_speculative_tokens=case.num_speculative_steps,
            arbitrated=bool(settings.arbitrated[slot]),
            output_position=int(case.pos[starts[request]]) + 1 - int(settings.response_start[slot]),
            overrides_so_far=int(settings.overrides_so_far[slot]),
            max_overrides=None if limit == UNLIMITED else limit,
            exact_tokens=int(settings.exact_tokens[slot]),
            **regret_of(settings, slot),
        )  # fmt: skip
        near = [close]

        def keep(statistics: Tensor, position: int) -> bool:
            row = rows[position]  # noqa: B023 - called within this iteration
            if policy.arbiter is not None:
                assert arbiter is not None
                score = float(arbiter(statistics[None])[0])
                bound = float(settings.threshold[slot])  # noqa: B023
                near[0] |= abs(score - bound) < 1e-4  # noqa: B023
                return score > bound
            assert isinstance(policy, Rule)
            run = 0
            while position + 1 + run < n and accepted[position + 1 + run]:  # noqa: B023
                run += 1
            z = case.raw[row].float()
            y = z if block.draft_logits is None else block.draft_logits[position]  # noqa: B023
            answers = [
                bool(
                    policy.keep(
                        _mismatch(
                            z, y, drafts[position], scale,  # noqa: B023
                            statistics=statistics[None] * scale,
                            output_position=torch.tensor([block.output_position + position]),  # noqa: B023
                            natively_accepted_after=torch.tensor([run]),
                            block_remaining=torch.tensor([n - position - 1]),  # noqa: B023
                            acceptance_ratio=torch.tensor([ratios[position]]) * scale,  # noqa: B023
                            uniform=torch.ones(1) if temperature == 0 else u[row][None],  # noqa: B023
                        )
                    )
                )
                for scale in (1.0, 1 - 1e-5, 1 + 1e-5)
            ]  # fmt: skip
            near[0] |= len(set(answers)) > 1  # noqa: B023
            return answers[0]

        out.results.append(verify_block(block, keep))
        out.ambiguous.append(near[0])
    return out


def pushed(case: Case, num_accepted: list[int]) -> Tensor:
    """Processed logits that make stock verification accept exactly these drafts before it reaches an unchanged row."""
    processed = case.processed.float().clone()
    for request, count in enumerate(num_accepted):
        start = case.starts[request]
        for row in range(start, start + count):
            processed[row] = -1e4
            processed[row, int(case.draft_sampled[row + 1])] = 1e4
    return processed
