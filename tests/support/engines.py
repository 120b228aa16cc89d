"""Real vLLM engines, each in a process of its own: vLLM's kernel registry, numba and the random state are global.

The processes are forked from one that has imported vLLM, which takes several times as long as starting an engine with
the bundled pair. As a program this file runs a job by itself, from standard input to standard output.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

IMPORTED = [
    "vllm.entrypoints.llm",
    "vllm.model_executor.models.llama",
    "vllm.v1.worker.cpu_worker",
    "vllm_cospec.plugin",
    "vllm_cospec.workers.cpu",
]
TIMEOUT_S = 1200  # minutes on a loaded machine
DEFAULTS: dict[str, Any] = {
    "dtype": "float32", "max_model_len": 128, "kv_cache_memory_bytes": 2**28, "enforce_eager": True,
    "max_num_seqs": 16, "disable_log_stats": False,
}  # fmt: skip
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other


def run_by_itself(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job, see :func:`run`, in a new process: for an engine that starts processes of its own."""
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def run_forked(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job, see :func:`run`, in a fork of a process that has imported vLLM."""
    return forked(run, job, IMPORTED)


def forked(function: Callable[[Any], dict[str, Any]], job: Any, imported: Sequence[str]) -> dict[str, Any]:
    """Call a function in a fork of a process that has imported these modules; the first call says which."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(imported))
    ours, theirs = context.Pipe()
    with tempfile.NamedTemporaryFile(prefix="engine-", suffix=".log") as log:
        process = context.Process(target=_serve, args=(theirs, function, job, log.name))
        process.start()
        theirs.close()
        try:
            result = ours.recv() if ours.poll(TIMEOUT_S) else f"no result within {TIMEOUT_S} s"
        except EOFError:
            process.join()
            result = f"the engine's process ended with {process.exitcode}"
        finally:
            process.kill()  # a result is there or none will come; what an orderly exit does takes seconds
            process.join()
        assert isinstance(result, dict), f"{result}\n{Path(log.name).read_text(errors='replace')[-4000:]}"
    return result


def _serve(connection: Connection, function: Callable[[Any], dict[str, Any]], job: Any, log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    gc.freeze()  # vLLM collects garbage again and again: not through all that was imported
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    try:
        connection.send(function(job))
    except BaseException:
        connection.send(traceback.format_exc())


def _end_with(connection: Connection) -> None:
    """End this process when whoever asked is gone."""
    connection.poll(None)  # nothing is ever sent this way
    os._exit(1)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Build an engine in this process and run a job on it.

    Args:
        job: "engine": arguments of ``LLM`` beside ``DEFAULTS``; "mend": stock vLLM with its sampling mended; "runs":
            each {"name", "prompts", "params"}, ``params`` for all prompts or a list with one entry for each, and
            optionally "one_at_a_time"; "between_steps", see :func:`interrupted`; "in_parts": the prompts are the input
            of one request, one after the other, see :func:`in_parts`.

    Returns:
        "runs": name -> for each prompt its completions; "metrics": vLLM's counters; "decisions": what was collected;
        "described": what each worker says is served, none of stock vLLM.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    engine = DEFAULTS | job["engine"]
    if job.get("mend"):
        engine["worker_cls"] = "mended_worker.MendedCPUWorker"
    llm = LLM(**engine)
    runs = {}
    for run in job["runs"]:
        prompts, params = run["prompts"], run["params"]
        per_prompt = [sampling_params(p) for p in (params if isinstance(params, list) else [params] * len(prompts))]
        groups = [[i] for i in range(len(prompts))] if run.get("one_at_a_time") else [list(range(len(prompts)))]
        if run.get("in_parts"):
            runs[run["name"]] = [[{"token_ids": tokens}] for tokens in in_parts(llm, prompts, per_prompt[0])]
            continue
        outputs = []
        with interrupted(llm, **run.get("between_steps", {})):
            for group in groups:
                outputs += llm.generate([prompts[i] for i in group], [per_prompt[i] for i in group], use_tqdm=False)
        runs[run["name"]] = [[completion(o) for o in output.outputs] for output in outputs]
    ours = (engine.get("speculative_config") or {}).get("method") == "cospec"
    described = llm.collective_rpc("cospec_describe") if ours else []
    return {"runs": runs, "metrics": counters(llm), "decisions": decisions(llm), "described": described}


def in_parts(llm: Any, prompts: list[str], params: Any) -> list[list[int]]:
    """Return what a request responds to each part of its input, where the parts come one by one."""
    engine = llm.llm_engine
    for i in range(len(prompts) + 1):
        prompt, more = (*prompts, prompts[0])[i], i < len(prompts)  # the last one only says that nothing follows
        request = engine.input_processor.process_inputs(
            "parts", prompt, params, supported_tasks=engine.get_supported_tasks(), resumable=more
        )
        engine.engine_core.add_request(request)
    responses: list[list[int]] = [[]]
    for _ in range(len(prompts) * params.max_tokens):
        for output in engine.engine_core.get_output().outputs:
            responses[-1] += output.new_token_ids
            if output.finish_reason is not None:
                responses.append([])
    assert len(responses) > len(prompts), f"it stands still after {responses}"
    return responses[:-1]


@contextlib.contextmanager
def interrupted(llm: Any, reset: int = 0, pause: int = 0, idle: int = 0, guests: int = 0) -> Iterator[None]:
    """Do between an engine's steps what an operator, a client or a data-parallel rank may do; 0 for never.

    Args:
        llm: the engine.
        reset: after every so many steps forget the KV cache, under the running requests.
        pause: after every so many steps pause, keep the requests, and go on.
        idle: after every so many steps run a batch of nothing, as a rank does while others work.
        guests: after every so many steps abort a long strict request and send another.
    """
    engine, numbers, guest = llm.llm_engine, itertools.count(1), {"ignore_eos": True, "max_tokens": 80}
    strict = sampling_params(guest | {"extra_args": {"cospec_policy": "strict"}})
    step, present = engine.step, list[str]()

    def step_and_more() -> Any:
        outputs, number = step(), next(numbers)
        if reset and number % reset == 0:
            assert llm.reset_prefix_cache(reset_running_requests=True)
        if pause and number % pause == 0:
            llm.sleep(level=0, mode="keep")
            assert llm.wake_up(tags=["scheduling"])
        if idle and number % idle == 0:
            engine.model_executor.driver_worker.execute_dummy_batch()
        alone = engine.get_num_unfinished_requests() == len(present)
        if guests and (alone or number % guests == 0):
            engine.abort_request(present)
            present[:] = [] if alone else [f"guest {number}"]
            for name in present:
                engine.add_request(name, "1+1?2;" * 8, strict)
        return outputs

    engine.step = step_and_more
    yield
    engine.step = step


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
        "metrics": metrics.to_dict() if (metrics := getattr(output, "spec_decode_metrics", None)) else None,
    }


def counters(llm: Any) -> dict[str, float]:
    """Return vLLM's counters by name, those of a position or a reason as ``name[label]`` (reasons summed, too).

    Of a histogram ``name_count`` and ``name_sum``.
    """
    found: dict[str, float] = {}
    for metric in llm.get_metrics():
        if hasattr(metric, "value"):
            names = {metric.name}
            for label in ("position", "reason"):
                if label in metric.labels:
                    names = {f"{metric.name}[{metric.labels[label]}]"} | (names if label == "reason" else set())
            for name in names:
                found[name] = found.get(name, 0) + metric.value
        elif hasattr(metric, "sum"):
            for part in ("count", "sum"):
                found[f"{metric.name}_{part}"] = getattr(metric, part)
    return found


def decisions(llm: Any) -> list[dict[str, Any]]:
    """Take the decisions that were collected."""
    worker = getattr(llm.llm_engine.model_executor, "driver_worker", None)  # one of several has no driver in reach
    sampler = getattr(getattr(worker, "worker", None), "cospec", None)
    if sampler is None:
        return []
    return [
        {"request_id": d.request_id, "output_position": d.output_position, "kept": d.kept}
        for d in sampler.take_decisions()
    ]


if __name__ == "__main__":
    results_to = os.dup(1)
    os.dup2(2, 1)  # the engine logs to standard output; results must stand alone there
    result = run(json.load(sys.stdin))
    with os.fdopen(results_to, "w") as out:
        json.dump(result, out)
