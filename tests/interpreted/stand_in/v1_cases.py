"""Steps of Model Runner V1 for its two adapters, on the CPU and on a device, in a stand-in for the runner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from policy_examples import EXAMPLES
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from vllm_cospec.arbiter import Arbiter, ArtefactConfig, Provenance, current_schema, save_artefact
from vllm_cospec.config import Settings
from vllm_cospec.kernels.policies import (
    Cascade,
    Fly,
    Kl,
    Mars,
    Policy,
    Random,
    RelaxedTopK,
    Threshold,
    Typical,
)

CPU = torch.device("cpu")
K, VOCAB = 4, 111

POLICIES: dict[str, Policy | None] = {
    **{name: example for name, example in EXAMPLES.items() if name != "strict"},
    "typical": Typical(posterior_threshold=0.1),
    "relaxed_topk": RelaxedTopK(top_n=3, delta=0.6),
    "threshold": Threshold(single=0.05, acc=0.3),
    "cascade": Cascade(alpha=0.9),
    "mars": Mars(ratio=0.1),
    "fly": Fly(entropy_top_k=3, entropy_threshold=0.2, window=1),
    "kl": Kl(max_kl=9.0),
    "random": Random(rate=0.6, seed=5),
    "learned": None,  # its artefact is saved first, see save_arbiter
}
IDS = ["a", "b", "c", "d", "e"]
EXTRA: dict[str, dict[str, Any]] = {
    "b": {"cospec_policy": "strict"},
    "c": {"cospec_max_overrides": 2},
    "d": {"cospec_exact_tokens": 3},
}


def save_arbiter(directory: Path) -> str:
    """Save an untrained network with scores on both sides of the threshold, return where."""
    torch.manual_seed(0)
    network = Arbiter((16, 16))
    torch.nn.init.normal_(network.mean)
    torch.nn.init.normal_(list(network.parameters())[-2])  # weights of the last layer
    config = ArtefactConfig(
        schema=current_schema(draft_logits=True), hidden_sizes=(16, 16), threshold=0.5,
        provenance=Provenance(vocab_size=VOCAB, tokenizer_hash="0" * 16),
    )  # fmt: skip
    save_artefact(directory, network, config, "untrained")
    return str(directory)


class Drafter:
    """Proposes what it is told, through the methods the adapters wrap."""

    logits: Tensor  # [B, K, V]
    tokens: Tensor  # [B, K]
    metadata: SamplingMetadata
    step: int

    def __init__(self) -> None:
        self.model = SimpleNamespace(compute_logits=lambda step: self.logits[:, step].clone())

    def propose(self, **_: Any) -> Tensor:
        steps = [self._sample_draft_tokens(step, self.metadata)[0] for step in range(K)]
        return torch.stack(steps, dim=1)

    def _sample_draft_tokens(self, step: int, metadata: Any) -> tuple[Tensor, None]:
        return self._sample_from_logits(self.model.compute_logits(step), metadata)

    def _sample_from_logits(self, logits: Tensor, metadata: Any, step: int | None = None) -> tuple[Tensor, None]:
        if not metadata.all_greedy:
            logits.div_(0.5)  # as stock: in place
        place, self.step = self.step, self.step + 1
        return self.tokens[:, place], None


class Step:
    """One step of a V1 batch: B requests with up to K drafts, greedy and sampled, some with a restricted vocabulary."""

    def __init__(
        self, seed: int, ids: list[str], sampled: float = 0.5, probabilities: bool = True, junk: bool = True
    ) -> None:
        self.seed, self.ids = seed, ids
        g = np.random.default_rng(seed)
        batch = len(ids)
        self.num_drafts = g.integers(0, K + 1, batch).tolist()
        self.num_drafts[0] = K
        self.draft_logits = torch.tensor(g.normal(0, 2, (batch, K, VOCAB)), dtype=torch.float32)
        self.proposed = torch.tensor(g.integers(0, VOCAB, (batch, K)))
        rows = sum(self.num_drafts) + batch
        self.logits = torch.tensor(g.normal(0, 3, (rows, VOCAB)), dtype=torch.float32)
        row, drafts = 0, []
        for i, n in enumerate(self.num_drafts):
            for j in range(n):
                rival = self.logits[row + j].topk(3).indices[int(g.choice([0, 0, 0, 1, 2]))]
                self.proposed[i, j] = rival
                self.draft_logits[i, j, rival] = 5.0
            own = self.proposed[i, :n].clone()
            if junk and i == batch - 1:
                own.zero_()  # vLLM's filling where the drafter had no room
            drafts += own.tolist()
            row += n + 1
        self.drafts = torch.tensor(drafts, dtype=torch.int32)
        self.temperature = torch.where(torch.tensor(g.random(batch) < sampled), 0.8, 0.0).float()
        self.draft_probabilities = None
        if probabilities and sampled:
            flat = [self.draft_logits[i, j] for i, n in enumerate(self.num_drafts) for j in range(n)]
            self.draft_probabilities = torch.stack(flat).softmax(-1).contiguous()
        # what is illegal; vLLM's kernel for top-k and top-p cannot be interpreted
        self.mask = torch.tensor(g.random((batch, VOCAB)) < 0.2) if seed % 2 else None

    def metadata(self) -> SpecDecodeMetadata:
        counts = np.array(self.num_drafts)
        ends = np.cumsum(counts + 1)
        bonus = ends - 1
        return SpecDecodeMetadata(
            draft_token_ids=self.drafts,
            num_draft_tokens=self.num_drafts,
            cu_num_draft_tokens=torch.tensor(np.cumsum(counts), dtype=torch.int32),
            cu_num_sampled_tokens=torch.tensor(ends, dtype=torch.int32),
            target_logits_indices=torch.tensor(np.setdiff1d(np.arange(ends[-1]), bonus), dtype=torch.int32),
            bonus_logits_indices=torch.tensor(bonus, dtype=torch.int32),
            logits_indices=torch.arange(int(ends[-1]), dtype=torch.int32),
        )

    def sampling(self) -> SamplingMetadata:
        greedy = bool((self.temperature == 0).all())
        empty = torch.empty(0)
        return SamplingMetadata(
            temperature=None if greedy else self.temperature, all_greedy=greedy,
            all_random=bool((self.temperature != 0).all()), top_p=None, top_k=None,
            generators={} if greedy else {1: torch.Generator().manual_seed(self.seed)},
            max_num_logprobs=None, no_penalties=True, prompt_token_ids=None, frequency_penalties=empty,
            presence_penalties=empty, repetition_penalties=empty, output_token_ids=[[] for _ in self.ids],
            allowed_token_ids_mask=self.mask, bad_words_token_ids={}, logitsprocs=LogitsProcessors(),
        )  # fmt: skip


class Runner:
    """As much of a V1 runner as the adapters touch."""

    def __init__(self, ids: list[str], extra: dict[str, dict[str, Any]], size: int = 8) -> None:
        self.device = CPU
        self.max_num_reqs = size
        self.max_model_len = 100_000
        self.rejection_sampler = RejectionSampler(Sampler())
        self.speculative_config = SimpleNamespace(
            rejection_sample_method="standard",
            method="draft_model",
            parallel_drafting=False,
            draft_sample_method="probabilistic",
        )
        self.vllm_config = SimpleNamespace(observability_config=SimpleNamespace())
        self.model_config = SimpleNamespace(get_vocab_size=lambda: VOCAB, head_dtype=torch.float32)
        self.drafter = Drafter()
        self.requests: dict[str, CachedRequestState] = {}
        self.input_batch = SimpleNamespace(req_ids=[], generators={}, num_reqs=0)
        self.discard_request_mask = SimpleNamespace(np=np.zeros(size, bool))
        for i, name in enumerate(ids):
            self.add(name, 3 + i, extra.get(name))

    def add(self, name: str, prompt: int, extra: dict[str, Any] | None = None, **params: Any) -> None:
        asked = SamplingParams(**{"max_tokens": None, "extra_args": extra, **params})
        self.requests[name] = CachedRequestState(
            name, [0] * prompt, [], asked, None, ([],), 0, output_token_ids=[]
        )  # fmt: skip

    def _update_states(self, scheduler_output: Any) -> None:
        pass

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        raise NotImplementedError("cases call the sampler itself")

    def take_draft_token_ids(self) -> None:
        return None

    def _input_fits_in_drafter(self, metadata: Any) -> bool:
        return True

    def _get_spec_decode_draft_probs(self, metadata: Any) -> None:
        return None

    def run(self, sampler: Any, step: Step) -> Tensor:
        """Draft and verify, then append what came out to the requests."""
        self.input_batch.req_ids = step.ids
        drafter = self.drafter
        drafter.logits, drafter.tokens, drafter.metadata, drafter.step = (
            step.draft_logits, step.proposed, step.sampling(), 0
        )  # fmt: skip
        drafter.propose(common_attn_metadata=SimpleNamespace(seq_lens=torch.zeros(len(step.ids), dtype=torch.int32)))
        requests = [self.requests[name] for name in step.ids]
        starts = [r.num_prompt_tokens + len(r.output_token_ids) - 1 for r in requests]
        self.input_batch.num_reqs, self.input_batch.num_computed_tokens_cpu = len(starts), np.array(starts)
        self.query_start_loc = SimpleNamespace(np=np.cumsum([0, *(n + 1 for n in step.num_drafts)]))
        self.positions = torch.cat(
            [torch.arange(s, s + n + 1) for s, n in zip(starts, step.num_drafts, strict=True)]
        ).long()
        last = [r.output_token_ids[-1] if r.output_token_ids else 0 for r in requests]  # prompts are zeros
        ends = np.cumsum([0, *step.num_drafts])
        drafts = step.drafts.tolist()
        tokens = [t for i, one in enumerate(last) for t in (one, *drafts[ends[i] : ends[i + 1]])]
        self.input_ids = SimpleNamespace(gpu=torch.tensor(tokens, dtype=torch.int32))
        torch.manual_seed(step.seed)
        out = sampler(step.metadata(), step.draft_probabilities, step.logits.clone(), step.sampling())
        for request, row in zip(requests, out.sampled_token_ids.tolist(), strict=True):
            request.output_token_ids += [token for token in row if token >= 0]
        return out.sampled_token_ids


def installed(
    module: Any, policy: Policy, directory: Path, ids: list[str], extra: dict[str, dict[str, Any]] | None = None,
    size: int = 8, **changes: Any,
) -> tuple[Runner, Any]:  # fmt: skip
    settings = Settings(
        policy=policy, threshold=0.5, max_overrides=None, exact_tokens=0, collect=True, draft_logits=True,
        num_speculative_tokens=K, counters=str(directory / module.__name__),
    )  # fmt: skip
    runner = Runner(ids, extra or {}, size)
    return runner, module.install(runner, replace(settings, **changes), 0)
