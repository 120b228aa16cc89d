"""Generate with one engine on interpreted V2."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from engines import interrupted
from triton.runtime import interpreter

from vllm_cospec.health import REASONS
from vllm_cospec.kernels.triton import launch, workspace

BLOCK_SIZE = 1024
"""One tile, where a GPU has eight: the bundled vocabulary does not fill it."""


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Run every batch of the request through one engine in this process, which belongs to it from then on.

    Args:
        request: ``target``, ``speculative_config``, and ``batches``: lists of {prompt, sampling parameters, ``regex``
            for a structured output, ``as_embeddings``}; ``options`` of the engine; ``v1_on_a_device``;
            ``max_chunk_logits``: verify at most so many rows at once; ``dummy_runs``: make one after every step, as a
            data-parallel rank does that has nothing to do; ``between_steps`` of batches: see ``engines.interrupted``.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if request.get("v1_on_a_device"):
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    _make_haste()
    from vllm import LLM

    if request.get("v1_on_a_device"):  # the CPU worker installs what the GPU worker would on Model Runner V1
        from vllm_cospec.runners import v1_cpu, v1_gpu

        v1_cpu.install = v1_gpu.install  # type: ignore[assignment]
    if request.get("max_chunk_logits"):
        from vllm.v1.worker.gpu.spec_decode import rejection_sampler

        rejection_sampler.get_max_chunk_logits = lambda vocab_size: request["max_chunk_logits"]
    options = {
        "max_model_len": 128, "max_num_seqs": 4, "kv_cache_memory_bytes": 2**25, "dtype": "float32",
        "enforce_eager": True, "seed": 0, "disable_log_stats": False, **request.get("options", {}),
    }  # fmt: skip
    llm = LLM(model=request["target"], speculative_config=request["speculative_config"], **options)
    worker = llm.llm_engine.model_executor.driver_worker.worker
    chunks: list[int] = []
    if request.get("max_chunk_logits"):
        verify = worker.cospec._verify
        worker.cospec._verify = lambda logits, *args: chunks.append(len(logits)) or verify(logits, *args)  # type: ignore[func-returns-value]
    if request.get("dummy_runs"):
        _follow_with_dummy_runs(worker)
    texts, logprobs, reports = [], [], []
    for batch in request["batches"]:
        entries = [dict(entry) for entry in batch]  # those of another batch may be the same ones
        prompts = [_prompt(entry, llm, worker) for entry in entries]
        with interrupted(llm, **request.get("between_steps", {}) if len(entries) > 1 else {}):
            outputs = llm.generate(prompts, [_parameters(entry) for entry in entries], use_tqdm=False)
        texts.append([list(output.outputs[0].token_ids) for output in outputs])
        logprobs.append([_logprobs(output.outputs[0]) for output in outputs])
        reports.append([_report(output.outputs[0]) for output in outputs])
    answer: dict[str, Any] = {
        "tokens": texts,
        "logprobs": logprobs,
        "reports": reports,
        "chunks": chunks,
        "runner": type(worker.model_runner).__module__,
    }
    if hasattr(worker, "cospec"):
        sampler = worker.cospec
        answer["sampler"] = type(sampler).__module__
        answer["keeps_draft_logits"] = sampler._keeps_draft_logits
        unhealthy = sampler._counters.unhealthy.tolist()
        answer["counters"] = sampler._counters.on_device.tolist()[: -len(unhealthy)]
        answer["unhealthy"] = {reason: count for reason, count in zip(REASONS, unhealthy, strict=True) if count}
        answer["decisions"] = [
            {
                "request": d.request_id,
                "position": d.output_position,
                "statistics": d.statistics.tolist(),
                "kept": d.kept,
                "probability": d.probability,
            }
            for d in sampler.take_decisions()
        ]
    answer["metrics"] = {
        m.name: m.value for m in llm.get_metrics() if m.name.startswith("vllm:") and hasattr(m, "value")
    }
    return answer


def _make_haste() -> None:
    """Leave out what the interpreter would do at every step and other tests do: test_decisions.py and its like.

    They look for overflows, and go through blocks of the vocabulary as large as they are on a GPU.
    """
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    launch.BLOCK_SIZE = workspace.BLOCK_SIZE = BLOCK_SIZE


def _prompt(entry: dict[str, Any], llm: Any, worker: Any) -> Any:
    text = entry.pop("prompt")
    if not entry.pop("as_embeddings", False):
        return text
    tokens = torch.tensor(llm.get_tokenizer().encode(text))
    return {"prompt_embeds": worker.model_runner.model.embed_input_ids(tokens).detach()}


def _parameters(entry: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    regex = entry.pop("regex", None)
    if regex is not None:
        entry["structured_outputs"] = StructuredOutputsParams(regex=regex)
    return SamplingParams(**entry)


def _follow_with_dummy_runs(worker: Any) -> None:
    sample_tokens = worker.sample_tokens

    def sample_and_idle(*args: Any, **options: Any) -> Any:
        result = sample_tokens(*args, **options)
        worker.execute_dummy_batch()
        return result

    worker.sample_tokens = sample_and_idle


def _logprobs(completion: Any) -> list[float] | None:
    """Log-probability of every token that was emitted, where they were asked for."""
    if completion.logprobs is None:
        return None
    return [entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)]


def _report(completion: Any) -> dict[str, Any] | None:
    """What vLLM and we counted of a completion, where that was asked for."""
    metrics = getattr(completion, "spec_decode_metrics", None)
    return None if metrics is None else metrics.to_dict()
