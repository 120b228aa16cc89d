"""From a problem's prompt to token ids: the same for training, evaluation and servers."""

from __future__ import annotations

from typing import Any

from vllm_cospec.errors import ConfigError, one_line
from vllm_cospec.training.config import PairConfig, TaskConfig


def hub_options(pair: PairConfig, tokenizer: bool = False) -> dict[str, Any]:
    """Return what every look-up of the target is told: code of its own, revision; as vLLM is told for the engine."""
    revision = pair.engine.get("revision")
    if tokenizer:
        revision = pair.engine.get("tokenizer_revision", revision)
    return {"trust_remote_code": bool(pair.engine.get("trust_remote_code", False)), "revision": revision}


def target_config(pair: PairConfig) -> Any:
    """Return the text part of the target's configuration.

    Raises:
        ConfigError: it cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(pair.target, **hub_options(pair)).get_text_config()
    except Exception as error:  # transformers and the hub raise many unrelated types
        raise ConfigError(f"pair.target: {pair.target!r} has no configuration ({one_line(error)})") from None


def target_tokenizer(pair: PairConfig) -> Any:
    """Return the tokenizer of the pair: the target's, or what ``engine.tokenizer`` names.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    where = pair.engine.get("tokenizer") or pair.target
    try:
        return AutoTokenizer.from_pretrained(where, **hub_options(pair, tokenizer=True))
    except Exception as error:  # likewise
        raise ConfigError(f"pair.target: {where!r} has no tokenizer ({one_line(error)})") from None


def max_model_len(pair: PairConfig) -> int | None:
    """Return how many tokens prompt and response may have together; None where only the engine knows."""
    given = pair.engine.get("max_model_len")
    if isinstance(given, int) and given > 0:
        return given
    found = getattr(target_config(pair), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


class Prompts:
    """Turns prompts into token ids, through the chat template where there is one."""

    def __init__(self, tokenizer: Any, task: TaskConfig):
        """Check that what the task wants of a template can be had.

        Args:
            tokenizer: of the pair.
            task: its system prompt, and how the template is applied.

        Raises:
            ConfigError: a template is asked for where there is none.
        """
        self._tokenizer, self._task = tokenizer, task
        wanted = task.apply_chat_template
        self._templated = bool(tokenizer.chat_template) if wanted is None else wanted
        if self._templated and not tokenizer.chat_template:
            raise ConfigError("task.apply_chat_template: the tokenizer has no chat template; leave it out")
        if not self._templated and (task.system or task.chat_template):
            field = "system" if task.system else "chat_template"
            raise ConfigError(f"task.{field}: prompts go through no chat template here; leave it out")

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt.

        Raises:
            ConfigError: the template refuses it.
        """
        if not self._templated:
            return self._tokenizer.encode(prompt)
        messages = [{"role": "user", "content": prompt}]
        if self._task.system:
            messages.insert(0, {"role": "system", "content": self._task.system})
        try:
            return self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False, **self._task.chat_template
            )
        except Exception as error:  # a template is a program
            raise ConfigError(f"task.chat_template: the template refuses the prompt ({one_line(error)})") from None
