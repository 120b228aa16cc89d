"""Runs one real vLLM engine in a process of its own: a job as JSON on standard input, the results on standard output.

A process per engine keeps them apart: vLLM's kernel registry, numba and the random state are global.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other


def sampling_params(keys: dict[str, Any]) -> Any:
    """Build SamplingParams; ``json_schema`` and ``regex`` stand for a structured output."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    keys = dict(keys)
    schema, regex = keys.pop("json_schema", None), keys.pop("regex", None)
    if schema is not None or regex is not None:
        keys["structured_outputs"] = StructuredOutputsParams(json=schema, regex=regex)
    return SamplingParams(**keys)


def completion(output: Any) -> dict[str, Any]:
    """Return what a test may want of one completion."""
    logprobs = None
    if output.logprobs is not None:
        logprobs = [
            {str(token): (entry.logprob, entry.rank) for token, entry in position.items()}
            for position in output.logprobs
        ]
    return {
        "token_ids": list(output.token_ids),
        "text": output.text,
        "finish_reason": output.finish_reason,
        "logprobs": logprobs,
    }


def main() -> None:
    """Run the job."""
    job = json.load(sys.stdin)
    results_to = os.dup(1)
    os.dup2(2, 1)  # the engine logs to standard output; results must stand alone there
    from vllm import LLM

    if job.get("mend"):
        job["engine"]["worker_cls"] = "mended_worker.MendedCPUWorker"
    engine = {"dtype": "float32", "max_model_len": 128, "kv_cache_memory_bytes": 2**28, "enforce_eager": True,
              "max_num_seqs": 16, "disable_log_stats": False} | job["engine"]  # fmt: skip
    llm = LLM(**engine)
    runs = {}
    for run in job["runs"]:
        prompts, params = run["prompts"], run["params"]
        per_prompt = [sampling_params(p) for p in (params if isinstance(params, list) else [params] * len(prompts))]
        groups = [[i] for i in range(len(prompts))] if run.get("one_at_a_time") else [list(range(len(prompts)))]
        outputs = []
        for group in groups:
            outputs += llm.generate([prompts[i] for i in group], [per_prompt[i] for i in group], use_tqdm=False)
        runs[run["name"]] = [[completion(o) for o in output.outputs] for output in outputs]
    metrics: dict[str, float] = {}
    for metric in llm.get_metrics():
        if hasattr(metric, "value"):
            names = {metric.name}
            for label in ("position", "reason"):
                if label in metric.labels:
                    names = {f"{metric.name}[{metric.labels[label]}]"} | (names if label == "reason" else set())
            for name in names:
                metrics[name] = metrics.get(name, 0) + metric.value
    decisions = []
    worker = getattr(llm.llm_engine.model_executor, "driver_worker", None)  # one of several has no driver in reach
    sampler = getattr(getattr(worker, "worker", None), "cospec", None)
    if sampler is not None:
        decisions = [
            {"request_id": d.request_id, "output_position": d.output_position, "kept": d.kept}
            for d in sampler.take_decisions()
        ]
    with os.fdopen(results_to, "w") as out:
        json.dump({"runs": runs, "metrics": metrics, "decisions": decisions}, out)


if __name__ == "__main__":
    main()
