"""What is exported of responses, and by several API servers together."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from drift_traffic import some
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.v1.request import RequestStatus
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_cospec.config import Settings
from vllm_cospec.kernels.policies import Learned
from vllm_cospec.kernels.scores import NUM_BINS, SCORE_EDGES
from vllm_cospec.metrics import CoSpecDecodingProm, Counters
from vllm_cospec.reports import COUNTS, StepCounts
from vllm_cospec.shared_counts import MOST_OVERRIDES, WatchCounters
from vllm_cospec.training.measure.traffic import traffic_of
from vllm_cospec.watch import RequestWatch, strict

K = 3


def settings_for(directory: Path) -> Settings:
    return Settings(
        policy=Learned(artefact="arbiter"), threshold=0.5, max_overrides=None, exact_tokens=0, collect=False,
        draft_logits=True, num_speculative_tokens=K, counters=str(directory), traffic=traffic_of(some(500, seed=1)),
        on_drift="strict",
    )  # fmt: skip


def test_responses_are_exported_as_histograms_once(tmp_path: Path) -> None:
    class Prom(CoSpecDecodingProm):
        registry = CollectorRegistry()
        _counter_cls = functools.partial(Counter, registry=registry)  # type: ignore[assignment]
        _gauge_cls = functools.partial(Gauge, registry=registry)  # type: ignore[assignment]
        _histogram_cls = functools.partial(Histogram, registry=registry)  # type: ignore[assignment]

    speculative = SimpleNamespace(num_speculative_tokens=K, cospec=settings_for(tmp_path))
    prom = Prom(speculative, ["engine"], {0: ["0"], 1: ["1"]})
    counters = WatchCounters(str(tmp_path), 1)
    counters.open(create=True)
    scores = np.zeros(NUM_BINS, np.int64)
    scores[[0, 3]] = 4, 2
    for overrides in (0, 2, 2, 100):
        counters.count_response(overrides, scores)
    counters.count_alarm()
    for _ in range(2):
        prom.observe(SpecDecodingStats.new(K), 0)
        prom.observe(SpecDecodingStats.new(K), 1)

    def value(name: str, **labels: str) -> float | None:
        return prom.registry.get_sample_value(name, {"engine": "1", **labels})

    assert value("vllm:cospec_num_drift_alarms_total") == 1
    assert value("vllm:cospec_overrides_per_response_count") == 4
    assert value("vllm:cospec_overrides_per_response_sum") == 0 + 2 + 2 + MOST_OVERRIDES
    below = {
        edge: value("vllm:cospec_overrides_per_response_bucket", le=edge) for edge in ("0.0", "1.0", "2.0", "63.0")
    }
    assert below == {"0.0": 1, "1.0": 1, "2.0": 3, "63.0": 3}
    assert value("vllm:cospec_score_count") == 24
    assert value("vllm:cospec_score_bucket", le=str(SCORE_EDGES[0])) == 16
    assert value("vllm:cospec_score_bucket", le=str(SCORE_EDGES[2])) == 16
    assert value("vllm:cospec_score_bucket", le=str(SCORE_EDGES[3])) == 24
    assert prom.registry.get_sample_value("vllm:cospec_score_count", {"engine": "0"}) == 0


def request_of(found: Any, **keys: Any) -> Any:
    """A request of vLLM's that has ended, as far as the watch looks at it."""
    from vllm import SamplingParams

    counts = StepCounts(
        place={"another": 0, "own": 1}, mismatches=np.array([0, found.mismatches]),
        overrides=np.array([0, found.overrides]), regret=np.array([0.0, 0.0]),
        scores=np.array([0 * found.histogram, found.histogram]),
    )  # fmt: skip
    return SimpleNamespace(
        request_id="own", num_output_tokens=found.tokens, sampling_params=SamplingParams(extra_args=keys or None),
        status=RequestStatus.FINISHED_STOPPED if found.whole else RequestStatus.FINISHED_ABORTED, **{COUNTS: counts},
    )  # fmt: skip


def test_the_scheduler_falls_back_when_requests_are_unlike_those_of_calibration(tmp_path: Path) -> None:
    watch = RequestWatch(settings_for(tmp_path), 0)
    usual, others = some(300, seed=2), some(200, seed=3, mismatch_rate=0.4)

    def step(*requests: Any) -> bool:
        output = SimpleNamespace()
        watch.scheduled(output, requests)
        return strict(output)

    for found in usual:
        watch.ended(request_of(found))
    for found in others:  # with a setting of their own they say nothing of the server's
        watch.ended(request_of(found, cospec_exact_tokens=1))
    watch.ended(request_of(usual[0], cospec_policy="strict"))  # not arbitrated, so not counted
    assert not step()
    needed = 0
    while not step():
        watch.ended(request_of(others[needed]))
        needed += 1
    assert needed < 100
    late = request_of(usual[0])
    assert step(late)
    watch.ended(late)
    taken = WatchCounters(str(tmp_path), 0).take_unexported()
    assert taken.alarms == 1
    assert taken.overrides.sum() == 300 + 200 + needed  # what was strict in part is left out
    assert taken.scores.sum() == sum(int(f.histogram.sum()) for f in [*usual, *others, *others[:needed]])


SERVERS = """
import multiprocessing, sys
from types import SimpleNamespace
from vllm.v1.spec_decode.metrics import SpecDecodingStats
from vllm_cospec.config import Settings
from vllm_cospec.kernels.policies import Typical
from vllm_cospec.metrics import CoSpecDecodingProm

directory, k = sys.argv[1], int(sys.argv[2])
settings = Settings(policy=Typical(), threshold=0.5, max_overrides=None, exact_tokens=0, collect=False,
                    draft_logits=True, num_speculative_tokens=k, counters=directory)

def serve(connection):
    speculative = SimpleNamespace(num_speculative_tokens=k, cospec=settings)
    prom = CoSpecDecodingProm(speculative, ["engine"], {0: ["0"], 1: ["1"]})
    while True:
        connection.send("ready")
        connection.recv()
        for engine in (0, 1):
            prom.observe(SpecDecodingStats.new(k), engine)

fork, servers = multiprocessing.get_context("fork"), {}
for line in sys.stdin:
    command, name = line.split()
    if command == "start":
        ours, theirs = fork.Pipe()
        servers[name] = fork.Process(target=serve, args=(theirs,), daemon=True), ours
        servers[name][0].start()
    elif command == "observe":
        servers[name][1].send("")
    if command == "kill":
        servers[name][0].kill()
        servers[name][0].join()
    else:
        servers[name][1].recv()
    print("done", flush=True)
"""
SCRAPE = """
from prometheus_client import CollectorRegistry, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
for name in ("vllm:cospec_num_mismatches", "vllm:cospec_num_overrides", "vllm:cospec_info"):
    for metric in registry.collect():
        if metric.name == name:
            print(name, *sorted(f"{s.labels['engine']}={s.value:g}" for s in metric.samples))
"""


def test_two_api_servers_and_one_that_is_started_again_export_every_engines_counts_once(tmp_path: Path) -> None:
    exported, counted = tmp_path / "prometheus", tmp_path / "counters"
    exported.mkdir()
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(exported)}
    engines = [Counters(str(counted), engine, K) for engine in (0, 1)]
    for engine in engines:
        engine.open(create=True)

    # one process that has imported vLLM and forks a server for each name
    servers = subprocess.Popen(
        [sys.executable, "-c", SERVERS, str(counted), str(K)], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def tell(command: str, name: str) -> None:
        assert servers.stdin is not None
        assert servers.stdout is not None
        servers.stdin.write(f"{command} {name}\n")
        servers.stdin.flush()
        assert "done" in (line.strip() for line in servers.stdout), "the servers ended"

    tell("start", "a")
    tell("start", "b")
    engines[0].add(5, np.array([2, 0, 1]))
    tell("observe", "a")
    engines[0].add(1, np.array([1, 0, 0]))
    engines[1].add(7, np.array([0, 4, 0]))
    tell("observe", "b")
    tell("observe", "a")
    tell("kill", "b")  # what it has exported stays exported
    engines[1].add(2, np.array([0, 0, 2]))
    tell("start", "c")
    tell("observe", "c")
    tell("kill", "a")
    tell("kill", "c")
    servers.communicate()
    done = subprocess.run([sys.executable, "-c", SCRAPE], env=environment, capture_output=True, text=True, check=True)
    assert "vllm:cospec_num_mismatches 0=6 1=9" in done.stdout
    assert "vllm:cospec_num_overrides 0=4 1=6" in done.stdout
    assert "vllm:cospec_info 0=1 1=1" in done.stdout


@pytest.mark.parametrize("overrides", [0, MOST_OVERRIDES - 1, MOST_OVERRIDES, MOST_OVERRIDES + 1, 10**6])
def test_a_response_with_many_overrides_counts_as_the_most(tmp_path: Path, overrides: int) -> None:
    counters = WatchCounters(str(tmp_path), 0)
    counters.open(create=True)
    counters.count_response(overrides, np.zeros(NUM_BINS, np.int64))
    assert np.flatnonzero(counters.take_unexported().overrides).tolist() == [min(overrides, MOST_OVERRIDES)]
    assert counters.take_unexported().overrides.sum() == 0
