"""The counters between worker and ``/metrics``: nothing is exported twice, lost, or larger than it can be."""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import time
from dataclasses import replace
from multiprocessing import util
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_cospec.config import Settings
from vllm_cospec.health import REASONS
from vllm_cospec.kernels.policies import Typical
from vllm_cospec.metrics import DIRECTORY_VARIABLE, CoSpecDecodingProm, Counters, counters_directory, log_line

K = 3
fork = multiprocessing.get_context("fork")  # a spawned process would import vLLM again


@pytest.fixture
def writer(tmp_path: Path) -> Counters:
    counters = Counters(str(tmp_path), 0, K)
    assert counters.open(create=True)
    return counters


@pytest.fixture(autouse=True)
def _own_directory_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, "")  # recorded by monkeypatch, so it is taken back
    monkeypatch.delenv(DIRECTORY_VARIABLE)


def settings_for(directory: Path) -> Settings:
    return Settings(
        policy=Typical(),
        threshold=0.5,
        max_overrides=None,
        exact_tokens=0,
        collect=False,
        draft_logits=True,
        num_speculative_tokens=K,
        counters=str(directory),
    )


def test_totals_are_the_sum_of_what_was_added(writer: Counters) -> None:
    writer.add(5, np.array([2, 1, 0]))
    writer.add(4, np.array([0, 1, 1]))
    mismatches, overrides, _ = writer.totals()
    assert mismatches == 9
    assert overrides.tolist() == [2, 2, 1]


def test_a_block_shorter_than_k_counts_at_its_own_positions(writer: Counters) -> None:
    writer.add(1, np.array([1]))
    assert writer.totals().overrides.tolist() == [1, 0, 0]


def test_unhealthy_positions_are_counted_by_reason(writer: Counters) -> None:
    writer.add(0, np.zeros(K, np.int64), np.arange(len(REASONS)))
    writer.add(1, np.zeros(K, np.int64))
    writer.add(0, np.zeros(K, np.int64), np.ones(len(REASONS), np.int64))
    assert writer.take_unexported().unhealthy.tolist() == [1 + i for i in range(len(REASONS))]
    mismatches, overrides, unhealthy = writer.take_unexported()
    assert (mismatches, overrides.sum(), unhealthy.sum()) == (0, 0, 0)
    assert writer.totals().unhealthy.tolist() == [1 + i for i in range(len(REASONS))]


def test_totals_do_not_change_what_is_left_to_export(writer: Counters) -> None:
    writer.add(2, np.array([1, 0, 0]))
    writer.totals()
    assert writer.take_unexported()[0] == 2
    assert writer.totals()[0] == 2


def test_what_one_reader_took_no_other_takes(tmp_path: Path, writer: Counters) -> None:
    first, second = Counters(str(tmp_path), 0, K), Counters(str(tmp_path), 0, K)
    writer.add(3, np.array([1, 1, 0]))
    assert (first.take_unexported()[0], second.take_unexported()[0]) == (3, 0)
    writer.add(2, np.array([0, 0, 1]))
    mismatches, overrides, _ = second.take_unexported()
    assert (mismatches, overrides.tolist()) == (2, [0, 0, 1])
    assert first.take_unexported()[0] == 0


def test_engines_do_not_share_counters(tmp_path: Path, writer: Counters) -> None:
    other = Counters(str(tmp_path), 1, K)
    other.open(create=True)
    writer.add(1, np.array([0, 0, 0]))
    assert other.totals()[0] == 0


def test_a_worker_that_starts_again_does_not_export_again(tmp_path: Path, writer: Counters) -> None:
    writer.add(3, np.array([1, 0, 0]))
    writer.take_unexported()
    restarted = Counters(str(tmp_path), 0, K)
    restarted.open(create=True)
    restarted.add(1, np.array([0, 0, 1]))
    mismatches, overrides, _ = Counters(str(tmp_path), 0, K).take_unexported()
    assert (mismatches, overrides.tolist()) == (1, [0, 0, 1])


@pytest.mark.parametrize("read", ["totals", "take_unexported"])
def test_a_reader_before_the_writer_sees_zeros_and_then_the_counts(tmp_path: Path, read: str) -> None:
    reader = Counters(str(tmp_path / "later"), 0, K)
    mismatches, overrides, unhealthy = getattr(reader, read)()
    assert (mismatches, overrides.tolist(), unhealthy.tolist()) == (0, [0] * K, [0] * len(REASONS))
    writer = Counters(str(tmp_path / "later"), 0, K)
    writer.open(create=True)
    writer.add(2, np.array([1, 0, 0]))
    mismatches, overrides, _ = getattr(reader, read)()
    assert (mismatches, overrides.tolist()) == (2, [1, 0, 0])


def test_a_reader_creates_nothing(tmp_path: Path) -> None:
    Counters(str(tmp_path / "none"), 0, K).take_unexported()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("read", ["totals", "take_unexported"])
@pytest.mark.parametrize("size", [0, 1, 8 * K, 2 * 8 * (K + 1)])
def test_a_file_of_another_size_reads_as_zeros(tmp_path: Path, size: int, read: str) -> None:
    (tmp_path / "engine-0").write_bytes(b"\x01" * size)
    mismatches, overrides, _ = getattr(Counters(str(tmp_path), 0, K), read)()
    assert (mismatches, overrides.tolist()) == (0, [0] * K)
    assert (tmp_path / "engine-0").read_bytes() == b"\x01" * size


def test_reading_goes_on_when_the_directory_was_cleaned_away(tmp_path: Path, writer: Counters) -> None:
    reader = Counters(str(tmp_path), 0, K)
    reader.take_unexported()
    shutil.rmtree(tmp_path)  # what cleaners of temporary directories do under a long-running server
    writer.add(2, np.array([1, 0, 0]))
    assert reader.totals()[0] == 2
    assert reader.take_unexported()[0] == 2


def _write(directory: str, num_positions: int, rounds: int, stop: Event | None = None) -> None:
    """Count ``rounds`` times, with ``stop`` again and again until it is set; every mismatch is overridden."""
    counters = Counters(directory, 0, num_positions)
    counters.open(create=True)
    ones = np.ones(num_positions, np.int64)
    again = True
    while again:
        for _ in range(rounds):
            counters.add(num_positions, ones)
        again = stop is not None and not stop.is_set()


def _take(directory: str, num_positions: int, stop: Event, queue: Queue[tuple[int, list[int]]]) -> None:
    counters = Counters(directory, 0, num_positions)
    mismatches, overrides = 0, np.zeros(num_positions, np.int64)
    finished = False
    while not finished:
        finished = stop.is_set()  # one more round after the writer has ended
        more, per_position, _ = counters.take_unexported()
        assert more >= 0
        assert (per_position >= 0).all()
        mismatches += more
        overrides += per_position
    queue.put((mismatches, overrides.tolist()))


def test_two_processes_export_everything_exactly_once_while_a_third_counts(tmp_path: Path) -> None:
    rounds, stop, queue = 20_000, fork.Event(), fork.Queue()
    readers = [fork.Process(target=_take, args=(str(tmp_path), K, stop, queue)) for _ in range(2)]
    writer = fork.Process(target=_write, args=(str(tmp_path), K, rounds))
    for process in (*readers, writer):
        process.start()
    writer.join(300)
    stop.set()
    taken = [queue.get(timeout=300) for _ in readers]
    for process in readers:
        process.join(300)
    assert [process.exitcode for process in (*readers, writer)] == [0, 0, 0]
    assert sum(mismatches for mismatches, _ in taken) == K * rounds
    assert np.sum([overrides for _, overrides in taken], axis=0).tolist() == [rounds] * K


# 100 positions: so wide that one copy of the row does not read it strictly from front to back
@pytest.mark.parametrize("num_positions", [1, 5, 16, 100])
def test_a_reader_never_sees_more_overrides_than_mismatches(tmp_path: Path, num_positions: int) -> None:
    stop = fork.Event()
    writer = fork.Process(target=_write, args=(str(tmp_path), num_positions, 1000, stop))
    reader = Counters(str(tmp_path), 0, num_positions)
    writer.start()
    exported_mismatches = exported_overrides = 0
    seen: set[int] = set()
    enough = time.monotonic() + 1
    while len(seen) < 2 or time.monotonic() < enough:  # at least two moments of the writer, on a busy machine too
        for _ in range(1000):
            mismatches, overrides, _ = reader.totals()
            assert overrides.sum() <= mismatches
            seen.add(mismatches)
        mismatches, overrides, _ = reader.take_unexported()
        exported_mismatches += mismatches
        exported_overrides += int(overrides.sum())
        assert exported_overrides <= exported_mismatches
    stop.set()
    writer.join()
    assert writer.exitcode == 0
    mismatches, overrides, _ = reader.totals()
    assert mismatches == overrides.sum() == num_positions * overrides[0]


def test_every_configured_engine_gets_a_directory_of_its_own() -> None:
    first, second = counters_directory(), counters_directory()
    assert first != second
    assert Path(first).is_dir()
    assert Path(second).is_dir()
    assert os.environ[DIRECTORY_VARIABLE] == f"{os.getpid()}:{second}"


def test_a_child_process_inherits_the_directory() -> None:
    directory = counters_directory()
    queue = fork.Queue()
    child = fork.Process(target=lambda: queue.put(counters_directory()))
    child.start()
    assert queue.get(timeout=300) == directory
    child.join(300)
    assert Path(directory).is_dir()


def test_a_directory_that_is_gone_is_not_inherited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, f"1:{tmp_path / 'gone'}")
    directory = counters_directory()
    assert directory != str(tmp_path / "gone")
    assert Path(directory).is_dir()


@pytest.mark.parametrize("value", ["", ":", "1", "1:", "nonsense", "x:y:z", "1:/dev/null"])
def test_a_variable_that_makes_no_sense_is_ignored(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, value)
    assert Path(counters_directory()).is_dir()


def test_the_directory_goes_with_the_process_that_made_it_and_not_with_its_children() -> None:
    def make_and_end(queue: Any) -> None:
        directory = counters_directory()
        child = os.fork()
        if child == 0:
            util._exit_function()  # type: ignore[attr-defined]  # what it does at its own end
            os._exit(0)
        os.waitpid(child, 0)
        queue.put((directory, Path(directory).is_dir()))

    queue = fork.SimpleQueue()
    maker = fork.Process(target=make_and_end, args=(queue,))
    maker.start()
    directory, still_there = queue.get()
    maker.join(300)
    assert still_there
    assert not Path(directory).exists()


def _prom(speculative_config: SimpleNamespace) -> Any:
    class Prom(CoSpecDecodingProm):
        registry = CollectorRegistry()
        _counter_cls = functools.partial(Counter, registry=registry)  # type: ignore[assignment]
        _gauge_cls = functools.partial(Gauge, registry=registry)  # type: ignore[assignment]

    return Prom(speculative_config, ["model_name", "engine"], {0: ["m", "0"], 1: ["m", "1"]})


def _value(counter: Any) -> float:
    return counter._value.get()


def test_prometheus_gets_each_count_once_and_for_its_own_engine(tmp_path: Path, writer: Counters) -> None:
    prom = _prom(SimpleNamespace(num_speculative_tokens=K, cospec=settings_for(tmp_path)))
    stats = SpecDecodingStats.new(K)
    stats.observe_draft(num_draft_tokens=K, num_accepted_tokens=2)
    writer.add(3, np.array([1, 0, 1]), np.arange(len(REASONS)))
    prom.observe(stats, 0)
    prom.observe(stats, 0)
    prom.observe(stats, 1)
    assert [_value(prom.cospec_mismatches[engine]) for engine in (0, 1)] == [3, 0]
    assert [_value(prom.cospec_overrides[engine]) for engine in (0, 1)] == [2, 0]
    assert [_value(counter) for counter in prom.cospec_per_position[0]] == [1, 0, 1]
    assert [_value(counter) for counter in prom.cospec_unhealthy[0]] == list(range(len(REASONS)))
    assert sum(_value(counter) for counter in prom.cospec_unhealthy[1]) == 0
    assert _value(prom.counter_spec_decode_num_accepted_tokens[0]) == 4  # vLLM's own go on counting


def test_what_is_served_is_a_gauge_whose_labels_say_whether_it_is_lossy(tmp_path: Path) -> None:
    settings = replace(settings_for(tmp_path), max_regret=0.0, scope="answer", request_settings=("policy", "scope"))
    prom = _prom(SimpleNamespace(num_speculative_tokens=K, cospec=settings))
    labels = {
        "model_name": "m", "engine": "1", "lossy": "false", "policy": settings.policy.policy, "max_regret": "0.0",
        "threshold": "", "max_overrides": "", "exact_tokens": "0", "scope": "answer", "on_drift": "",
        "request_settings": "policy,scope", "num_speculative_tokens": str(K),
    }  # fmt: skip
    assert prom.registry.get_sample_value("vllm:cospec_info", labels) == 1
    assert replace(settings, max_regret=None).described()["lossy"] is True


def test_prometheus_without_cospec_is_stock() -> None:
    prom = _prom(SimpleNamespace(num_speculative_tokens=K))
    prom.observe(SpecDecodingStats.new(K), 0)
    assert not prom.cospec
    assert not hasattr(prom, "cospec_mismatches")


def test_the_log_line_tells_what_was_counted_since_the_last_one(tmp_path: Path, writer: Counters) -> None:
    vllm_config = SimpleNamespace(speculative_config=SimpleNamespace(cospec=settings_for(tmp_path)))
    stat_logger = SimpleNamespace(vllm_config=vllm_config, engine_index=0)
    assert log_line(stat_logger) is None
    writer.add(4, np.array([1, 0, 0]))
    assert "Mismatches: 4, Overrides: 1, Override rate: 25.0%" in (log_line(stat_logger) or "")
    assert log_line(stat_logger) is None
    writer.add(2, np.array([1, 1, 0]))
    assert "Mismatches: 2, Overrides: 2, Override rate: 100.0%" in (log_line(stat_logger) or "")


def test_the_log_line_tells_why_drafts_were_verified_strictly(tmp_path: Path, writer: Counters) -> None:
    vllm_config = SimpleNamespace(speculative_config=SimpleNamespace(cospec=settings_for(tmp_path)))
    stat_logger = SimpleNamespace(vllm_config=vllm_config, engine_index=0)
    unhealthy = np.zeros(len(REASONS), np.int64)
    unhealthy[REASONS.index("context")], unhealthy[REASONS.index("cache")] = 10, 2
    writer.add(0, np.zeros(K, np.int64), unhealthy)
    line = log_line(stat_logger) or ""
    assert line.endswith("Strict for want of a whole draft: 12 positions (context 10, cache 2)")
    assert "rate" not in line
    assert log_line(stat_logger) is None
    writer.add(1, np.zeros(K, np.int64))
    assert (log_line(stat_logger) or "").endswith("Override rate: 0.0%")


@pytest.mark.parametrize("speculative_config", [None, SimpleNamespace()])
def test_there_is_no_log_line_without_cospec(speculative_config: SimpleNamespace | None) -> None:
    vllm_config = SimpleNamespace(speculative_config=speculative_config)
    assert log_line(SimpleNamespace(vllm_config=vllm_config, engine_index=0)) is None
