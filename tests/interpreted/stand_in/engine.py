"""Generate with one engine on interpreted V2 and print what came out, as JSON: ``python -m engine REQUEST``."""

from __future__ import annotations

import json
import sys
from typing import Any


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Run every batch of the request through one engine.

    Args:
        request: ``target``, ``speculative_config``, and ``batches``: lists of {prompt, and sampling parameters};
            ``options`` of the engine; ``v1_on_a_device``; ``max_chunk_logits``: verify at most so many rows at once.
    """
    from vllm import LLM, SamplingParams

    if request.get("v1_on_a_device"):  # the CPU worker installs what the GPU worker would on Model Runner V1
        from vllm_cospec.runners import v1_cpu, v1_gpu

        v1_cpu.install = v1_gpu.install  # type: ignore[assignment]
    if request.get("max_chunk_logits"):
        from vllm.v1.worker.gpu.spec_decode import rejection_sampler

        rejection_sampler.get_max_chunk_logits = lambda vocab_size: request["max_chunk_logits"]
    llm = LLM(
        model=request["target"],
        speculative_config=request["speculative_config"],
        max_model_len=128,
        max_num_seqs=4,
        kv_cache_memory_bytes=2**25,
        dtype="float32",
        enforce_eager=True,
        seed=0,
        disable_log_stats=False,
        **request.get("options", {}),
    )
    worker = llm.llm_engine.model_executor.driver_worker.worker
    chunks: list[int] = []
    if request.get("max_chunk_logits"):
        verify = worker.cospec._verify
        worker.cospec._verify = lambda logits, *args: chunks.append(len(logits)) or verify(logits, *args)  # type: ignore[func-returns-value]
    texts, logprobs = [], []
    for batch in request["batches"]:
        prompts = [entry.pop("prompt") for entry in batch]
        outputs = llm.generate(prompts, [SamplingParams(**entry) for entry in batch], use_tqdm=False)
        texts.append([list(output.outputs[0].token_ids) for output in outputs])
        logprobs.append([_logprobs(output.outputs[0]) for output in outputs])
    answer: dict[str, Any] = {
        "tokens": texts,
        "logprobs": logprobs,
        "chunks": chunks,
        "runner": type(worker.model_runner).__module__,
    }
    if hasattr(worker, "cospec"):
        sampler = worker.cospec
        answer["sampler"] = type(sampler).__module__
        answer["counters"] = sampler._counters.on_device.tolist()
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


def _logprobs(completion: Any) -> list[float] | None:
    """Log-probability of every token that was emitted, where they were asked for."""
    if completion.logprobs is None:
        return None
    return [entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)]


if __name__ == "__main__":
    print("RESULT" + json.dumps(main(json.loads(sys.argv[1]))))
