"""``--speculative-config`` as JSON and by dotted keys, through vLLM's own parser."""

import json
from typing import Any

import pytest
from configurations import Pair, plugin
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_cospec.kernels.policies import Typical

plugin.register()
DRAFT = {"model": "org/draft", "num_speculative_tokens": 3}


def parsed(*arguments: Any) -> Any:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return parser.parse_args(list(arguments)).speculative_config


def as_json(**keys: Any) -> Any:
    return ["--speculative-config", json.dumps(keys)]


@pytest.mark.parametrize("flag", ["--speculative-config", "--speculative_config", "-sc"])
@pytest.mark.parametrize("equals", [True, False])
def test_dotted_keys_join_the_object(flag: str, equals: bool) -> None:
    dotted = [f"{flag}.exact_tokens=4"] if equals else [f"{flag}.exact_tokens", "4"]
    expected = {"method": "cospec", **DRAFT, "exact_tokens": 4}
    assert parsed(*as_json(method="cospec", **DRAFT), *dotted) == expected
    assert parsed(*dotted, *as_json(method="cospec", **DRAFT)) == expected
    assert parsed(*as_json(**DRAFT), "--speculative-config.method", "CoSpec", *dotted) == expected | {
        "method": "CoSpec"
    }


@pytest.mark.parametrize(
    ("before", "key", "value", "after"),
    [
        ({"policy": "typical"}, "arbiter.posterior_alpha", "0.5", {"policy": "typical", "posterior_alpha": 0.5}),
        ({"policy": "typical", "posterior_alpha": 0.1}, "arbiter.posterior_alpha", "0.5",
         {"policy": "typical", "posterior_alpha": 0.5}),
        ({"policy": "typical", "posterior_alpha": 0.1}, "arbiter.policy", "mars", {"policy": "mars"}),
        ({"policy": "typical"}, "arbiter", "org/arbiter", "org/arbiter"),
        ("org/arbiter", "arbiter.policy", "mars", {"policy": "mars"}),
    ],
)  # fmt: skip
def test_parameters_join_their_policy_and_another_policy_takes_its_place(
    before: Any, key: str, value: Any, after: Any
) -> None:
    config = parsed(*as_json(method="cospec", arbiter=before), f"--speculative-config.{key}", value)
    assert config == {"method": "cospec", "arbiter": after}


def test_other_methods_are_parsed_as_ever() -> None:
    assert parsed(*as_json(method="ngram", num_speculative_tokens=3)) == {
        "method": "ngram",
        "num_speculative_tokens": 3,
    }
    assert parsed(*as_json(method="ngram"), "--speculative-config.num_speculative_tokens", "3") == {
        "num_speculative_tokens": 3
    }
    assert parsed(*as_json(method="cospec")) == {"method": "cospec"}
    assert parsed() is None


@pytest.mark.parametrize("order", [1, -1])
def test_what_the_parser_joined_gets_through_vllm(pair: Pair, order: Any) -> None:
    flags = [
        as_json(method="cospec", model=str(pair.draft), num_speculative_tokens=3, arbiter={"policy": "typical"}),
        ["--speculative-config.arbiter.posterior_alpha", "0.5"],
    ][::order]
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = ["--model", str(pair.target), "--max-model-len", "64", "--enforce-eager", *flags[0], *flags[1]]
    config = EngineArgs.from_cli_args(parser.parse_args(arguments)).create_engine_config()
    assert config.speculative_config.cospec.policy == Typical(posterior_alpha=0.5)
