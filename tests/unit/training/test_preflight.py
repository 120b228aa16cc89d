"""What can be known beforehand is said before anything starts: the setting, what it needs, what there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.config import RolloutConfig, SelectionConfig, TaskConfig, TrainConfig, load_train_config
from vllm_cospec.training.preflight import calibration_problems, check_training, held_out_problems, test_problems
from vllm_cospec.training.problems import Problems
from vllm_cospec.training.tasks import split_of

test_problems.__test__ = False  # type: ignore[attr-defined] # the split's name, not a test
DEMO = load_train_config(Path(__file__).parents[3] / "training" / "configs" / "demo.toml")
LONG = "1+" * 60 + "1?"  # 122 characters, a token each, and one for the beginning: of 128 there are 5 left


def write(path: Path, prompts: list[str], answer: str = "1") -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt in prompts))
    return path


def run(path: Path, *, calibration: int = 20, prompts: int = 8, held_out: int = 5, **rollout: object) -> TrainConfig:
    return DEMO.model_copy(
        update={
            "task": TaskConfig(name="jsonl", options={"path": str(path)}),
            "rollout": RolloutConfig.model_validate({"prompts_per_iteration": prompts, "max_tokens": 16, **rollout}),
            "selection": SelectionConfig(every=5, problems=held_out),
            "calibration": DEMO.calibration.model_copy(update={"problems": calibration}),
        }
    )


def numbered(count: int) -> list[str]:
    return [f"{i}+1?" for i in range(count)]


def supply(prompts: list[str], *splits: str) -> int:
    return sum(split_of(prompt) in splits for prompt in prompts)


def test_a_data_set_that_is_too_small_is_named_by_field_need_and_supply(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", numbered(900))
    train, calibration = supply(numbered(900), "train", "pretrain"), supply(numbered(900), "calibration")
    for config, message in (
        (
            run(path, prompts=1000),
            f"rollout.prompts_per_iteration: 1000 problems are asked for, and 5 more are held out; .* has {train} ",
        ),
        (
            run(path, held_out=1000),
            f"selection.problems: 1000 problems are asked for; .*has {train} problems",
        ),
        (run(path, calibration=500), f"calibration.problems: 500 problems are asked for; .*has {calibration} problems"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_training(config)
    assert len(check_training(run(path)).known("train")) == train


def test_one_long_prompt_is_named_by_its_line_before_anything_starts(tmp_path: Path) -> None:
    prompts = numbered(900)
    where = next(i for i in range(400, 900) if split_of(LONG[:110] + prompts[i]) == "train")
    prompts[where] = LONG[:110] + prompts[where]
    path = write(tmp_path / "p.jsonl", prompts)
    with pytest.raises(
        ConfigError, match=r"long_prompts: 1 of \d+ prompts leave fewer than 16 of 128 tokens"
    ) as caught:
        check_training(run(path))
    assert f"p.jsonl, line {where + 1}: " in str(caught.value)
    assert '"leave_out"' in str(caught.value)
    said: list[str] = []
    problems = check_training(run(path, long_prompts="leave_out"), said.append)
    assert len(said) == 1
    assert f"line {where + 1}" in said[0]
    assert said[0].endswith("and are left out")
    train = supply(prompts, "train", "pretrain")
    everything = problems.draw(1, train - 1, "train", "rollout.prompts_per_iteration")
    assert prompts[where] not in {problem.prompt for problem in everything}
    with pytest.raises(ConfigError, match=r"rollout.prompts_per_iteration: "):
        problems.draw(1, train, "train", "rollout.prompts_per_iteration")


def test_evaluation_and_calibration_look_at_their_problems_too(tmp_path: Path) -> None:
    tests = write(tmp_path / "t.jsonl", [*numbered(20), LONG])
    config = run(write(tmp_path / "p.jsonl", numbered(900)))
    config = config.model_copy(
        update={"task": config.task.model_copy(update={"options": {**config.task.options, "test_path": str(tests)}})}
    )
    source = Problems(config.pair, config.task, config.rollout)
    with pytest.raises(ConfigError, match=r"t.jsonl, line 21: 123 tokens"):
        test_problems(config, source, 1, 10, "test", lambda text: None)
    lenient = config.model_copy(update={"rollout": config.rollout.model_copy(update={"long_prompts": "leave_out"})})
    said: list[str] = []
    source = Problems(lenient.pair, lenient.task, lenient.rollout)
    found = test_problems(lenient, source, 1, 20, "test", said.append)
    assert len(found) == 20
    assert LONG not in {problem.prompt for problem in found}
    assert "1 of 21 prompts" in said[0]
    with pytest.raises(ConfigError, match=r"--problems: 21 problems are asked for"):
        test_problems(lenient, source, 1, 21, "test", said.append)
    with pytest.raises(ConfigError, match=r"calibration.problems: 500 problems are asked for"):
        calibration_problems(run(tmp_path / "p.jsonl", calibration=500))


def test_a_gold_answer_that_cannot_be_graded_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", numbered(900))
    lines = path.read_text().splitlines()
    where = next(i for i, prompt in enumerate(numbered(900)) if split_of(prompt) == "calibration")
    lines[where] = json.dumps({"prompt": numbered(900)[where], "answer": "\\boxed{3"})
    path.write_text("\n".join(lines))
    config = run(path)
    with pytest.raises(ConfigError, match=rf'line {where + 1}: the answer .* does not score 1 .*task.reward = "exact"'):
        check_training(config)
    check_training(config.model_copy(update={"task": config.task.model_copy(update={"reward": "exact"})}))


def test_generators_are_checked_by_what_they_make_up() -> None:
    short = DEMO.pair.model_copy(update={"engine": {**DEMO.pair.engine, "max_model_len": 20}})
    few = DEMO.calibration.model_copy(update={"problems": 50})
    with pytest.raises(ConfigError, match=r"rollout.long_prompts: \d+ of \d+ prompts leave fewer than 16 of 20 tokens"):
        check_training(DEMO.model_copy(update={"pair": short, "calibration": few}))
    assert len(held_out_problems(DEMO, Problems(DEMO.pair, DEMO.task, DEMO.rollout))) == 200


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"reward": "nosuch:score"}, "task.reward: 'nosuch:score' cannot be imported"),
        ({"apply_chat_template": False, "system": "Be brief."}, "task.system: prompts go through no chat template"),
        ({"name": "jsonl", "options": {"path": "/nowhere"}}, "/nowhere: cannot be read"),
    ],
)
def test_tasks_that_cannot_be_had_are_refused(update: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_training(DEMO.model_copy(update={"task": TaskConfig.model_validate(update)}))
