"""Starting Ray: again on a busy machine, and in one sentence when it will not start."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from vllm_cospec.errors import ConfigError, TrainingError
from vllm_cospec.training.config import PairConfig, TaskConfig, TrainConfig
from vllm_cospec.training.rollout import session
from vllm_cospec.training.rollout.actors import RolloutActor, require_task_here
from vllm_cospec.training.rollout.session import START_ATTEMPTS, ray_session, require_room
from vllm_cospec.training.tasks.grading import Graders


class Ray:
    """Stands for ray.init: fails some times."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls: list[dict[str, Any]] = []

    def init(self, **options: Any) -> None:
        self.calls.append(options)
        if len(self.calls) <= self.failures:
            raise Exception("The current node timed out\n  during startup.")


def replace(monkeypatch: pytest.MonkeyPatch, failures: int) -> Ray:
    stand_in = Ray(failures)
    monkeypatch.setattr(ray, "init", stand_in.init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return stand_in


def test_a_node_that_is_late_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = replace(monkeypatch, START_ATTEMPTS - 1)
    with ray_session(None, cpus=2.5):
        assert [call["num_cpus"] for call in stand_in.calls] == [3] * START_ATTEMPTS


def test_what_keeps_ray_from_starting_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = replace(monkeypatch, START_ATTEMPTS)
    with pytest.raises(
        ConfigError, match=r"^ray_address: Ray does not start .*\(The current node timed out during startup"
    ):
        ray_session(None, cpus=1).__enter__()
    assert len(stand_in.calls) == START_ATTEMPTS


def test_an_interrupt_while_ray_starts_finds_something_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its start is done Ray does not know of the processes it has made."""
    done = []

    def init(**options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        done.append("started")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: done.append("stopped"))
    with pytest.raises(KeyboardInterrupt), ray_session(None, cpus=1):
        done.append("used")
    assert done == ["started", "stopped"]


def test_actors_leave_their_temporary_files_where_they_go_with_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = replace(monkeypatch, 0)
    with ray_session(None, cpus=1):
        variables = stand_in.calls[0]["runtime_env"]["env_vars"]
        assert variables["TMPDIR"] == stand_in.calls[0]["_temp_dir"]
        assert not variables["TORCHINDUCTOR_CACHE_DIR"].startswith(variables["TMPDIR"])  # it is used again


def test_a_cluster_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = replace(monkeypatch, 1)
    with pytest.raises(ConfigError, match=r"^ray_address: 'elsewhere:6379' cannot be used \("):
        ray_session("elsewhere:6379", cpus=1).__enter__()
    assert [call["address"] for call in stand_in.calls] == ["elsewhere:6379"]


def test_local_means_local_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    stand_in = replace(monkeypatch, 0)
    with ray_session(None, cpus=1):
        assert stand_in.calls[0]["address"] == "local"


def test_uv_run_starts_workers_in_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", raising=False)
    replace(monkeypatch, 0)
    with ray_session(None, cpus=1):
        assert os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"


def test_a_long_directory_for_temporary_files_gives_way_to_a_short_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    stand_in = replace(monkeypatch, 0)
    with ray_session(None, cpus=1):
        directory = stand_in.calls[0]["_temp_dir"]
        assert len(directory) <= 40
        assert os.path.isdir(directory)
    monkeypatch.setattr(session, "SHORT_DIRECTORIES", ("/nowhere",))
    with pytest.raises(ConfigError, match=r"TMPDIR: .* is too long for Ray's sockets, and none of /nowhere"):
        ray_session(None, cpus=1).__enter__()


def test_ray_that_runs_in_this_process_already_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match=r"ray_address: Ray runs in this process already; call ray.shutdown"):
        ray_session(None, cpus=1).__enter__()


def nodes(monkeypatch: pytest.MonkeyPatch, *resources: dict[str, float]) -> None:
    found = [{"Alive": True, "Resources": own} for own in resources]
    monkeypatch.setattr(ray, "nodes", lambda: [*found, {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}])


def test_what_engines_need_is_compared_with_what_the_nodes_offer(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    nodes(monkeypatch, {"CPU": 4.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 1.0})
    require_room(3, 1.0, 1.0, said.append)
    require_room(6, 1.0, 0.5, said.append)
    assert said == []
    require_room(4, 1.0, 1.0, said.append)
    require_room(3, 1.0, 2.0, said.append)
    assert said[0].startswith("the cluster has room for 3 of 4 engines (4 CPUs and 2 GPUs; 16 CPUs and 1 GPUs)")
    assert said[1].startswith("the cluster has room for 1 of 3 engines")
    with pytest.raises(ConfigError, match=r"rollout.gpus_per_actor: an engine needs 1 CPUs and 4 GPUs, and no node"):
        require_room(1, 1.0, 4.0)
    with pytest.raises(ConfigError, match=r"rollout.cpus_per_actor: an engine needs 32 CPUs and 0 GPUs, and no node"):
        require_room(1, 32.0, 0.0)


def test_a_node_without_the_models_is_named(tmp_path: Path) -> None:
    """As an actor finds it there: the driver's look at its own disk says nothing about another one's."""
    pair = PairConfig(target=str(tmp_path / "target"), draft="org/draft", num_speculative_tokens=3)
    config = TrainConfig(pair=pair, task=TaskConfig(name="demo"))
    with pytest.raises(ConfigError) as error:
        RolloutActor(config, {}).ready()
    assert str(error.value).startswith(f"pair.target: no model at '{tmp_path}/target' (config.json is missing) on the ")
    assert f"node {socket.gethostname()}; put models at the same path on every node" in str(error.value)


def test_a_node_without_the_tasks_own_modules_is_named() -> None:
    """Its grading processes find that out: the driver has imported the reward from its own working directory."""
    task = TaskConfig(name="demo", reward="only_on_the_driver:score", reward_processes=1)
    with Graders(task) as graders, pytest.raises(ConfigError) as error:
        require_task_here(graders)
    assert str(error.value).startswith("task.reward: 'only_on_the_driver:score' cannot be imported (ModuleNotFound")
    assert f"on the node {socket.gethostname()}; put modules and files that the task names at the" in str(error.value)


def test_a_session_works_off_the_main_thread_and_its_logs_outlive_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a cluster in RAY_ADDRESS that is not there, and a TMPDIR that is too long for Ray's sockets."""
    (tmp_path / ("x" * 60)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 60)))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    found: list[object] = []

    def run() -> None:
        try:
            with ray_session(None, cpus=1, logs=tmp_path / "logs", say=found.append):
                found.append(ray.get(ray.remote(lambda: 7).remote()))
                raise TrainingError("stop")
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(200)
    assert found[0] == 7
    assert found[1] == f"Ray's logs: {tmp_path / 'logs'}"
    assert isinstance(found[2], TrainingError)
    assert (tmp_path / "logs" / "gcs_server.out").exists()
