"""What a run will do is counted from its settings, and its cost estimated from a probe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.config import TaskConfig, TrainConfig, load_train_config
from vllm_cospec.training.plan import Estimate, Workload, estimate, table, work_of
from vllm_cospec.training.preflight import check_training
from vllm_cospec.training.problems import Problems
from vllm_cospec.training.rollout.episodes import Episodes
from vllm_cospec.training.tasks import split_of

DEMO = load_train_config(Path(__file__).parents[3] / "training" / "configs" / "demo.toml")


def changed(config: TrainConfig, **parts: object) -> TrainConfig:
    merged = config.model_dump()
    for name, value in parts.items():
        merged[name] = merged[name] | value if isinstance(value, dict) else value
    return TrainConfig.model_validate(merged)


def test_the_work_of_the_demo_is_counted() -> None:
    # 60 updates of 4 units of 128; the best is chosen from update 6 on: 10, 20, ..., 60
    found = work_of(DEMO, check_training(DEMO))
    assert found == Workload(
        splits={}, updates=60, units=240, responses=30_720, branches=61_440, continuations=61_440,
        held_out_answers=6 * 200,
        calibration_answers=1000 * 18,  # 7 of the configuration, and 11 that continue them to both ends
    )  # fmt: skip
    assert found.answers == 30_720 + 1200 + 18_000


def test_each_further_continuation_of_an_action_is_counted_for_both() -> None:
    config = changed(DEMO, rollout={"temperature": 0.7, "continuations_per_action": 3})
    found = work_of(config, Problems(config.pair, config.task, config.rollout))
    assert (found.branches, found.continuations) == (61_440, 5 * 61_440)
    console = Console(width=200, record=True)
    console.print(table(config, found))
    assert "at most 61,440 branches with 307,200 continuations" in console.export_text()


def test_a_sequence_without_gaps_at_its_ends_is_not_continued() -> None:
    config = changed(DEMO, calibration={"thresholds": [0.0, 0.5, 1.0]})
    assert work_of(config, Problems(config.pair, config.task, config.rollout)).calibration_answers == 3000


@pytest.mark.parametrize(
    ("changes", "branches", "held_out"),
    [
        ({"selection": {"every": 0}}, 61_440, 0),
        ({"selection": {"every": 7}}, 61_440, (8 + 1) * 200),  # 7, 14, ..., 56, and the last
        ({"selection": {"every": 3}, "learner": {"warm_start_iterations": 0}}, 61_440, 20 * 200),
        ({"learner": {"advantage": "group"}, "rollout": {"responses_per_prompt": 2}}, 12_288, 1200),  # warm start only
    ],
)
def test_what_is_evaluated_and_where_there_are_branches(
    changes: dict[str, object], branches: int, held_out: int
) -> None:
    config = changed(DEMO, **changes)
    found = work_of(config, Problems(config.pair, config.task, config.rollout))
    assert (found.branches, found.held_out_answers) == (branches, held_out)


def test_splits_of_a_file_are_counted(tmp_path: Path) -> None:
    prompts = [f"{i}+1?" for i in range(400)]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": "1"}) + "\n" for prompt in prompts))
    config = DEMO.model_copy(update={"task": TaskConfig(name="jsonl", options={"path": str(path)})})
    splits = work_of(config, Problems(config.pair, config.task, config.rollout)).splits
    for split in ("calibration", "test"):
        assert splits[split] == sum(split_of(prompt) == split for prompt in prompts)
    assert sum(splits.values()) == 400


def probed() -> Episodes:
    """4 responses of 30 tokens, 5 branches of which one was discarded and two were telling, in 2 seconds."""
    return Episodes(
        problem=np.arange(4), reward=np.zeros(4), tokens=np.full(4, 30), steps=np.full(4, 10),
        capped=np.zeros(4, bool), episode=np.arange(4), kept=np.zeros(4, bool), branch_decision=np.arange(4),
        branch_keep=np.array([1.0, 0, 0, 1]), branch_drop=np.array([0.0, 0, 1, 1]),
        continuations=4, discarded=1, generated_tokens=220, generating_s=2.0,
    )  # fmt: skip


def test_a_probe_is_scaled_to_the_run() -> None:
    work = Workload(
        {},
        updates=10,
        units=20,
        responses=1000,
        branches=2000,
        continuations=2000,
        held_out_answers=100,
        calibration_answers=400,
    )
    found = estimate(DEMO, work, probed())
    # 100 tokens for 5 branches; 5 of the 8 that were asked for are there, as is to be expected of 2000: 1250
    tokens = 1500 * 30 + 1250 * 20
    assert found == Estimate(
        problems=4, tokens_per_response=30, tokens_per_continuation=20, branches=4, telling=2,
        tokens_per_label=110, tokens_per_second=110, tokens=tokens, engine_hours=tokens / 110 / 3600,
        hours=tokens / 110 / 3600 / 2,
    )  # fmt: skip


def test_a_plan_shows_where_nothing_was_telling() -> None:
    work = Workload({"train": 1234}, 10, 20, 1000, 2000, 2000, 100, 400)
    silent = probed()
    silent.branch_keep = silent.branch_drop
    found = estimate(DEMO, work, silent)
    assert (found.telling, found.tokens_per_label) == (0, None)
    console = Console(width=200, record=True)
    console.print(table(DEMO, work, found))
    text = console.export_text()
    assert "1,234 train" in text
    assert "0 of 4 branches changed the answer; check task.reward" in text
    with pytest.raises(ConfigError, match="the probe generated nothing"):
        estimate(DEMO, work, Episodes())


def test_a_plan_shows_its_counts() -> None:
    work = Workload({"train": 1234}, 10, 20, 1000, 2000, 2000, 100, 400)
    console = Console(width=200, record=True)
    console.print(table(DEMO, work))
    text = console.export_text()
    assert "1,234 train" in text
    assert "10, of 2 units: 1,000 responses and at most 2,000 branches" in text
    assert "at most 400 answers" in text
    assert "2, of 1 CPUs and 0 GPUs each" in text
    assert "probe" not in text
