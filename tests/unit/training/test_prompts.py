"""From prompts to token ids: chat templates with their arguments and a system prompt, or none; options of look-ups."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.config import PairConfig, TaskConfig, bundled
from vllm_cospec.training.prompts import Prompts, hub_options, max_model_len, target_config, target_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% endfor %}{% if add_generation_prompt %};{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}!{% endif %}"
)
DRAFT = str(bundled("draft"))


def tokenizer(template: str | None) -> Any:
    found = AutoTokenizer.from_pretrained(bundled("target"))
    found.chat_template = template
    return found


def shown(template: str | None, **task: Any) -> str:
    own = tokenizer(template)
    tokens = Prompts(own, TaskConfig.model_validate(task)).encode("12+3?")
    assert all(isinstance(token, int) for token in tokens)
    return own.decode(tokens, skip_special_tokens=True)


def test_prompts_go_through_the_chat_template_where_there_is_one() -> None:
    assert shown(None) == "12+3?"
    assert shown(TEMPLATE) == "u:12+3?;"
    assert shown(TEMPLATE, apply_chat_template=False) == "12+3?"
    assert shown(TEMPLATE, apply_chat_template=True) == "u:12+3?;"


def test_a_system_prompt_and_arguments_reach_the_template() -> None:
    assert shown(TEMPLATE, system="Be brief.") == "s:Be brief.u:12+3?;"
    assert shown(TEMPLATE, chat_template={"enable_thinking": False}) == "u:12+3?;!"
    assert shown(TEMPLATE, chat_template={"enable_thinking": True}) == "u:12+3?;"


@pytest.mark.parametrize(
    ("template", "task", "message"),
    [
        (None, {"apply_chat_template": True}, "task.apply_chat_template: the tokenizer has no chat template"),
        (None, {"system": "x"}, "task.system: prompts go through no chat template here"),
        (
            TEMPLATE,
            {"chat_template": {"x": 1}, "apply_chat_template": False},
            "task.chat_template: prompts go",
        ),
        ("{{ raise_exception('no roles') }}", {}, "task.chat_template: the template refuses the prompt .*no roles"),
    ],
)
def test_what_a_template_cannot_do_is_refused(template: str | None, task: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Prompts(tokenizer(template), TaskConfig.model_validate(task)).encode("1?")


def pair(**engine: Any) -> PairConfig:
    return PairConfig(target=str(bundled("target")), draft=DRAFT, num_speculative_tokens=3, engine=engine)


def test_every_look_up_of_the_target_is_told_what_the_engine_is_told() -> None:
    assert hub_options(pair()) == {"trust_remote_code": False, "revision": None}
    told = pair(trust_remote_code=True, revision="abc", tokenizer_revision="def")
    assert hub_options(told) == {"trust_remote_code": True, "revision": "abc"}
    assert hub_options(told, tokenizer=True) == {"trust_remote_code": True, "revision": "def"}
    assert target_tokenizer(pair(tokenizer=DRAFT)).name_or_path == DRAFT
    assert target_config(pair()).vocab_size == 100
    assert (max_model_len(pair(max_model_len=77)), max_model_len(pair())) == (77, 128)


def test_a_target_that_cannot_be_looked_up_is_one_sentence() -> None:
    nowhere = PairConfig(target="/nowhere", draft=DRAFT, num_speculative_tokens=3)
    for look_up in (target_config, target_tokenizer):
        with pytest.raises(ConfigError, match=r"pair.target: '/nowhere' has no"):
            look_up(nowhere)
