"""Training with real engines: the whole command, and what must hold when parts of it are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from descendants import descendants, survivors
from transformers import AutoTokenizer

from vllm_cospec.arbiter import ArtefactConfig, load_artefact
from vllm_cospec.calibration import Conditions
from vllm_cospec.fingerprint import template_hash, weights_hash
from vllm_cospec.training.config import bundled
from vllm_cospec.training.learning.checkpoint import Checkpoint, load_latest
from vllm_cospec.training.measure.fixed_sequence import threshold_sequence

UPDATES = 9
CONFIG = """
iterations = {updates}
seed = 3
[pair]
target = "bundled:target"
draft = "bundled:draft"
num_speculative_tokens = 7
[pair.engine]
dtype = "float32"
max_model_len = 128
max_num_seqs = 32
enforce_eager = true
kv_cache_memory_bytes = 67108864
[rollout]
actors = {actors}
prompts_per_iteration = 24
prompts_per_unit = 8
branches_per_response = 1
max_tokens = 60
[learner]
warm_start_iterations = 2
minibatch_size = 8
[selection]
every = 4
problems = 10
[calibration]
problems = 20
thresholds = [0.3, 0.5]
"""
IN_A_LOOP = """
import asyncio, sys
from pathlib import Path
from vllm_cospec.training.config import load_train_config
from vllm_cospec.training.trainer import Trainer

async def cell():  # of a notebook: in the main thread, with an event loop that runs
    Trainer(load_train_config(Path(sys.argv[1])), Path(sys.argv[2]), resume=True).run()

asyncio.run(cell())
"""
DIES_BEFORE_ITS_SECOND_CHECKPOINT = """
import os, signal, sys
from pathlib import Path
from vllm_cospec.training.config import load_train_config
from vllm_cospec.training.trainer import Trainer

class Dying(Trainer):
    saved = 0
    def _save(self):
        if self.saved:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save()
        self.saved += 1

Dying(load_train_config(Path(sys.argv[1])), Path(sys.argv[2]), resume=True).run()
"""
IN_PROCESS = """
import sys
from pathlib import Path
from vllm_cospec.training.config import load_train_config
from vllm_cospec.training.rollout.in_process import rollouts, training_engine
from vllm_cospec.training.trainer import Trainer

config = load_train_config(Path(sys.argv[1]))
trainer = Trainer(config, Path(sys.argv[2]), resume=False)
with training_engine(config, trainer.learner.weights()) as (engine, graders):
    trainer.run_with(rollouts(engine, graders, config))
"""
LOSES_A_NODE_IN_A_THREAD = """
import asyncio, sys
from pathlib import Path
from ray.cluster_utils import Cluster
from vllm_cospec.training.config import load_train_config
from vllm_cospec.training.trainer import Trainer

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
node = cluster.add_node(num_cpus=1, include_dashboard=False)

class Unlucky(Trainer):
    def _save(self):
        super()._save()
        if node in cluster.worker_nodes:  # the next iteration is under way
            cluster.remove_node(node, allow_graceful=False)

config = load_train_config(Path(sys.argv[1])).model_copy(update={"ray_address": cluster.address})
asyncio.run(asyncio.to_thread(lambda: Unlucky(config, Path(sys.argv[2]), resume=True).run()))
cluster.shutdown()
"""


def write_config(directory: Path, actors: int) -> Path:
    path = directory / f"{actors}.toml"
    path.write_text(CONFIG.format(updates=UPDATES, actors=actors))
    return path


@contextmanager
def training(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start or continue a run in a process group of its own."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes], timeout: float = 300) -> Any:
    """Return what the condition returns once it is true."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        assert process.poll() is None, "the run ended before its time"
        time.sleep(0.05)
    raise AssertionError("it never happened")


def updates(output: Path) -> int:
    log = output / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def final(output: Path) -> Checkpoint:
    found = load_latest(output / "checkpoints")
    assert found is not None
    assert found.updates == UPDATES
    return found


def require_same(expected: Checkpoint, found: Checkpoint) -> None:
    assert expected.tensors.keys() == found.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(tensor, found.tensors[name]), name
    assert expected.facts["best"] == found.facts["best"]
    for name in ("responses", "branches", "discarded_branches", "telling_branches", "generated_tokens"):
        assert expected.facts["totals"][name] == found.facts["totals"][name]  # nothing was counted twice


def check_calibrated(directory: Path) -> ArtefactConfig:
    _, artefact = load_artefact(directory)
    thresholds = [point.threshold for point in artefact.calibration]
    assert thresholds == list(threshold_sequence([0.3, 0.5]))
    assert artefact.threshold in thresholds
    said = artefact.statement
    assert said is not None
    assert (said.level, said.test, said.speed_weight) == (0.95, "exact", 0.02)
    assert said.conditions == Conditions(
        draft=weights_hash(str(bundled("draft"))), num_speculative_tokens=7, dtype="float32",
        chat_template=template_hash(AutoTokenizer.from_pretrained(bundled("target")).chat_template),
        temperature=(0.0, 0.0), top_p=(1.0, 1.0),
    )  # fmt: skip
    bounds = [point.loss_bound for point in artefact.calibration if point.loss_bound is not None]
    assert len(bounds) == len(thresholds)
    assert bounds[0] == 0.0
    assert bounds == sorted(bounds)
    return artefact


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_a_run_that_was_killed_again_and_again_ends_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    # The whole command, on one actor.
    command = [sys.executable, "-m", "vllm_cospec.cli", "train", "--config", str(write_config(tmp_path, 1))]
    done = subprocess.run(
        [*command, "--output", str(straight)], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "not spent generating" in " ".join(done.stdout.split())
    artefact = check_calibrated(straight / "arbiter")
    assert artefact.provenance.training_config["iterations"] == UPDATES
    card = (straight / "arbiter" / "README.md").read_text()
    assert "Calibration (20 problems" in card
    for name in ("learning.png", "thresholds.png", "config.json"):
        assert (straight / name).stat().st_size > 0
    assert list((straight / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == list(range(1, UPDATES + 1))
    assert 0 <= lines[-1]["accuracy"] <= 1 < lines[-1]["acceptance_length"]
    held_out = [json.loads(line) for line in (straight / "held_out.jsonl").read_text().splitlines()]
    assert [(line["update"], line["problems"]) for line in held_out] == [(4, 10), (8, 10), (9, 10)]
    # A second time over it: refused.
    refused = subprocess.run(
        [*command, "--output", str(straight)], capture_output=True, text=True, timeout=100, check=False
    )
    assert refused.returncode == 1
    assert "is not empty; pass --resume" in refused.stderr

    log = tmp_path / "broken.log"
    # Without Ray, on an engine of the driver's own process.
    own = tmp_path / "own"
    with training([sys.executable, "-c", IN_PROCESS, str(write_config(tmp_path, 1)), str(own)], log) as process:
        assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
    require_same(final(straight), final(own))

    # On two actors, as from a notebook: one is killed in mid-rollout, then, inside that iteration, the driver. It goes
    # on with one.
    one, two = write_config(tmp_path, 1), write_config(tmp_path, 2)
    with training([sys.executable, "-c", IN_A_LOOP, str(two), str(broken)], log) as process:
        wait_for(lambda: updates(broken) >= 1, process)
        victim = wait_for(lambda: descendants(process.pid, "ray::RolloutActor.work"), process)[0]
        victim.kill()
        wait_for(lambda: "another takes over" in log.read_text(), process)
        assert updates(broken) < UPDATES
        everyone = descendants(process.pid)
        process.kill()
    # Ray's agents first try for a minute to report the raylet's end to a GCS that is gone as well.
    assert not survivors(everyone, timeout=180)
    # Between two iterations: an update is taken and logged, its checkpoint not written yet.
    saved = load_latest(broken / "checkpoints")
    assert saved is not None
    with training([sys.executable, "-c", DIES_BEFORE_ITS_SECOND_CHECKPOINT, str(one), str(broken)], log) as process:
        assert process.wait(timeout=300) == -signal.SIGKILL
    assert updates(broken) == saved.updates + 2
    again = load_latest(broken / "checkpoints")
    assert again is not None
    assert again.updates == saved.updates + 1
    # Ctrl-C, which a terminal sends to the driver and to Ray's processes alike.
    with training([*command, "--output", str(broken), "--resume"], log) as process:
        wait_for(lambda: updates(broken) > saved.updates + 2, process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    last = log.read_text().strip().splitlines()[-1]
    assert last.startswith(f"cospec: stopped after update {updates(broken)} of {UPDATES}; continue with --resume")
    # In a thread, on a cluster of two nodes, one of which is lost for good in the middle of an iteration.
    before = log.read_text().count("another takes over")
    with training([sys.executable, "-c", LOSES_A_NODE_IN_A_THREAD, str(two), str(broken)], log) as process:
        assert process.wait(timeout=300) == 0
    assert log.read_text().count("another takes over") > before
    assert "Traceback" not in log.read_text()

    lines = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == list(range(1, UPDATES + 1))
    require_same(final(straight), final(broken))
