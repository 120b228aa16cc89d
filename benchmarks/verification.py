"""Measured on the CPU: the whole ``forward`` of the arbitrating V1 sampler against the stock one's, same inputs."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_cospec.arbiter import Arbiter, ArtefactConfig, Provenance, current_schema, save_artefact
from vllm_cospec.config import Settings
from vllm_cospec.kernels.policies import Learned
from vllm_cospec.runners import v1_cpu
from vllm_cospec.runners.recorder import Proposals, ProposedBlock

BATCHES = (8, 32)
BUNDLED_STEP = (100, 16, 7)  # vocabulary, requests and K of the bundled pair
OVERRIDE_RATE = 0.3  # that of the bundled arbiter


def greedy_metadata() -> SamplingMetadata:
    """Sampling metadata of a batch of greedy requests without penalties."""
    empty = torch.empty(0)
    return SamplingMetadata(
        temperature=None, all_greedy=True, all_random=False, top_p=None, top_k=None, generators={},
        max_num_logprobs=None, no_penalties=True, prompt_token_ids=None, frequency_penalties=empty,
        presence_penalties=empty, repetition_penalties=empty, output_token_ids=[], allowed_token_ids_mask=None,
        bad_words_token_ids={}, logitsprocs=LogitsProcessors(),
    )  # fmt: skip


def metadata_of(drafts: torch.Tensor) -> SpecDecodeMetadata:
    """Layout of B requests with K drafts each, [B, K]: rows of a request are consecutive, its bonus row last."""
    batch, k = drafts.shape
    metadata = SpecDecodeMetadata.make_dummy(drafts.tolist(), torch.device("cpu"))
    rows = torch.arange(batch * (k + 1), dtype=torch.int32).view(batch, k + 1)
    metadata.target_logits_indices = rows[:, :k].reshape(-1)
    metadata.bonus_logits_indices = rows[:, k].contiguous()
    metadata.logits_indices = rows.reshape(-1)
    return metadata


def arbitrating_sampler(stock: RejectionSampler, batch: int, vocab_size: int, k: int, directory: Path) -> Any:
    """The V1 sampler with an untrained network of the default size, in a stand-in for the runner."""
    torch.manual_seed(0)
    artefact = directory / "arbiter"
    config = ArtefactConfig(
        schema=current_schema(draft_logits=True), hidden_sizes=(32, 32), threshold=0.5,
        provenance=Provenance(vocab_size=vocab_size, tokenizer_hash="0" * 16),
    )  # fmt: skip
    save_artefact(artefact, Arbiter((32, 32)), config, "untrained, for timing")
    ids = [str(i) for i in range(batch)]
    request = SimpleNamespace(sampling_params=None, output_token_ids=[0] * 20, num_prompt_tokens=20)
    runner = SimpleNamespace(
        rejection_sampler=stock,
        speculative_config=SimpleNamespace(rejection_sample_method="standard", method="draft_model"),
        device=torch.device("cpu"),
        max_model_len=4096,
        drafter=SimpleNamespace(propose=None, _sample_draft_tokens=None),
        input_batch=SimpleNamespace(
            req_ids=ids, generators={}, num_reqs=batch, num_computed_tokens_cpu=np.full(batch, 20)
        ),
        query_start_loc=SimpleNamespace(np=np.arange(batch + 1) * (k + 1)),
        discard_request_mask=SimpleNamespace(np=np.zeros(batch, bool)),
        _update_states=None,
        take_draft_token_ids=None,
        _input_fits_in_drafter=None,
        _get_spec_decode_draft_probs=None,
        requests={i: SimpleNamespace(**vars(request)) for i in ids},
    )
    settings = Settings(
        policy=Learned(artefact=str(artefact)), threshold=0.5, max_overrides=None, exact_tokens=0, collect=False,
        draft_logits=True, num_speculative_tokens=k, counters=str(directory),
    )  # fmt: skip
    return v1_cpu.V1CPUSampler(runner, settings, counters=None)


def compare(vocab_size: int, batch: int, k: int, agreement: float, rounds: int) -> dict[str, Any]:
    """Time both samplers in alternation on one greedy step.

    Returns:
        Median milliseconds of each, their ratio, and of one pass over the same logits, the memory floor.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch * (k + 1), vocab_size, generator=generator)
    drafts = logits.view(batch, k + 1, -1)[:, :k].argmax(-1)
    drafts = torch.where(torch.rand(batch, k, generator=generator) < agreement, drafts, (drafts + 1) % vocab_size)
    draft_logits = [torch.randn(batch, vocab_size, generator=generator) for _ in range(k)]
    metadata, sampling = metadata_of(drafts), greedy_metadata()
    current_platform.register_triton_kernel_overrides()  # as vLLM does: its kernels have stand-ins in C++ on the CPU
    stock = RejectionSampler(Sampler())
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        ours = arbitrating_sampler(stock, batch, vocab_size, k, Path(directory))

        def run_ours() -> Any:
            proposed = Proposals(drafts.tolist(), draft_logits)
            ours.recorder._blocks = {
                name: ProposedBlock(proposed, row) for row, name in enumerate(ours._runner.requests)
            }
            return ours(metadata, None, logits, sampling)

        ours._settings = replace(ours._settings, collect=True)
        run_ours()  # under a threshold of 0.5 an untrained network may keep everything, or nothing
        scores = torch.tensor([decision.probability for decision in ours.take_decisions()])
        threshold = float(scores.quantile(1 - OVERRIDE_RATE))
        ours._settings = replace(ours._settings, collect=False, threshold=threshold)
        for request in ours._runner.requests.values():
            delattr(request, v1_cpu.STATE)
        runs = {
            "stock": lambda: stock(metadata, None, logits, sampling),
            "ours": run_ours,
            "floor": lambda: logits.sum(),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(rounds + 2):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if turn >= 2:  # the first two warm caches and allocator
                    times[name].append((time.perf_counter() - start) * 1e3)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "vocab": vocab_size,
        "batch": batch,
        "num_draft_tokens": k,
        "agreement": agreement,
        "stock_ms": median["stock"],
        "ours_ms": median["ours"],
        "ratio": median["ours"] / median["stock"],
        "floor_ms": median["floor"],
    }
