"""What a run will do is counted from its settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from vllm_cospec.training.config import TaskConfig, TrainConfig, load_train_config
from vllm_cospec.training.plan import Workload, table, work_of
from vllm_cospec.training.preflight import check_training
from vllm_cospec.training.problems import Problems
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
        splits={}, updates=60, units=240, responses=30_720, branches=61_440, held_out_answers=6 * 200,
        calibration_answers=1000 * 8,
    )  # fmt: skip
    assert found.answers == 30_720 + 1200 + 8000


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


def test_a_plan_shows_its_counts() -> None:
    work = Workload({"train": 1234}, 10, 20, 1000, 2000, 100, 400)
    console = Console(width=200, record=True)
    console.print(table(DEMO, work))
    text = console.export_text()
    assert "1,234 train" in text
    assert "10, of 2 units: 1,000 responses and at most 2,000 branches" in text
    assert "at most 400 answers" in text
    assert "2, of 1 CPUs and 0 GPUs each" in text
