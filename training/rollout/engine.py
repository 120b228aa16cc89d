"""A vLLM engine in this process, as rollouts and evaluation use it: requests in, responses with their decisions out.

Everything a response depends on stands in its request: actions are drawn from the request's seed, the prefix cache is
emptied before each run, and one run is scheduled like any other with the same requests. So the same run gives the same
responses on whichever actor it happens.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_cospec import compat
from vllm_cospec.arbiter import Arbiter, save_artefact
from vllm_cospec.errors import ConfigError
from vllm_cospec.training.artefact import artefact_config
from vllm_cospec.training.config import PairConfig, TaskConfig
from vllm_cospec.training.prompts import Prompts

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # decisions are taken from the worker in this process
os.environ["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"] = "1"  # they carry the ids that requests were given
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@dataclass(frozen=True)
class Request:
    """One response that is wanted."""

    prompt: list[int]  # token ids
    max_tokens: int
    seed: int
    temperature: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)  # cospec_* keys
    top_p: float = 1.0


@dataclass
class Response:
    """One response."""

    tokens: list[int]
    text: str
    emitted: list[int]  # tokens of each target step; the first is the prompt's own
    capped: bool  # ended by max_tokens
    decisions: list[Any] = field(default_factory=list)  # vllm_cospec.runners.trace.Decision, in order


Finished = Callable[[int, Response], Iterable[Request]]


class Engine:
    """vLLM with or without speculation, one run at a time."""

    def __init__(
        self,
        pair: PairConfig,
        arbiter: dict[str, Any] | None,
        role: str = "target",
        stock: bool = False,
        task: TaskConfig | None = None,
    ):
        """Start the engine.

        Args:
            pair: the models.
            arbiter: the policy, ``{"policy": NAME, ...}`` or ``{"hidden_sizes": ..., "state_dict": ...}`` for one in
                training; None for no arbitration.
            role: which model answers: target or draft (then without speculation).
            stock: without an arbiter: speculate as stock vLLM does, instead of not at all.
            task: how prompts go through the chat template.
        """
        from vllm import LLM

        if arbiter is not None:
            compat.require_plugin()
        model = pair.target if role == "target" else pair.draft
        if model is None:
            raise ConfigError("pair.draft: none is named, so there is no draft model to run alone")
        speculative = pair.speculative_config(None) if stock else None
        with tempfile.TemporaryDirectory(prefix="cospec-arbiter-") as scratch:
            if arbiter is not None:
                policy: Any = arbiter
                if "state_dict" in arbiter:
                    policy = str(Path(scratch) / "arbiter")
                    network = Arbiter(arbiter["hidden_sizes"])
                    network.load_state_dict(arbiter["state_dict"])
                    config = artefact_config(pair, network.hidden_sizes)
                    save_artefact(Path(policy), network, config, "An arbiter in training.\n")
                speculative = {**pair.speculative_config(policy), "collect": True}
            self._llm: Any = LLM(
                model=model, speculative_config=speculative, disable_log_stats=False, seed=0, **pair.engine
            )
        self._collects = arbiter is not None
        self._engine: Any = self._llm.llm_engine
        self._tokenizer: Any = self._llm.get_tokenizer()
        self._prompts = Prompts(self._tokenizer, task or TaskConfig())
        self._runs = 0
        self.max_model_len = self._llm.model_config.max_model_len
        self.dtype = str(self._llm.model_config.dtype).removeprefix("torch.")

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a problem, through the chat template where the tokenizer has one."""
        return self._prompts.encode(prompt)

    def decode(self, tokens: list[int]) -> str:
        """Return the text of a response."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def set_arbiter(self, state_dict: dict[str, Any], sample_actions: bool) -> None:
        """Replace the arbiter's weights; nothing is written or restarted."""
        self._llm.collective_rpc("cospec_set_arbiter", args=(state_dict, sample_actions))

    def set_policy(self, policy: Any) -> None:
        """Replace a rule by another one."""
        self._llm.collective_rpc("cospec_set_policy", args=(policy,))

    def start_afresh(self) -> None:
        """Forget all prompts, so that what follows does not depend on what came before."""
        self._llm.reset_prefix_cache()

    def run(self, requests: Sequence[Request], finished: Finished = lambda number, response: ()) -> list[Response]:
        """Generate one response per request, in their order.

        Args:
            requests: what is wanted.
            finished: called with the number of a request and its response as soon as that is complete; the requests it
                returns join the others, under the following numbers.
        """
        self._runs += 1
        wanted: list[Request] = []
        responses: list[Response] = []

        def add(more: Iterable[Request]) -> None:
            for request in more:
                self._add(f"{self._runs}-{len(wanted)}", request)
                wanted.append(request)
                responses.append(Response([], "", [], False))

        add(requests)
        while self._engine.has_unfinished_requests():
            complete = []
            for output in self._engine.step():
                number, completion = int(output.request_id.partition("-")[2]), output.outputs[0]
                response = responses[number]
                if completion.token_ids:
                    response.emitted.append(len(completion.token_ids))
                response.tokens.extend(completion.token_ids)
                response.text += completion.text
                if output.finished:
                    response.capped = completion.finish_reason == "length"
                    complete.append(number)
            if complete:
                self._take_decisions(responses)
            for number in complete:
                response = responses[number]
                # tokens of a block beyond the end of the response were never emitted
                end = len(response.tokens) + wanted[number].extra.get("cospec_branch", {}).get("written", 0)
                response.decisions = [d for d in response.decisions if d.output_position < end]
                add(finished(number, response))
        return responses

    def _add(self, request_id: str, request: Request) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            output_kind=RequestOutputKind.DELTA,
            extra_args=request.extra,
        )
        self._engine.add_request(request_id, {"prompt_token_ids": request.prompt}, params)

    def _take_decisions(self, responses: Sequence[Response]) -> None:
        """Give each response of this run the decisions that were recorded since the last time."""
        if not self._collects:
            return
        for decision in self._llm.collective_rpc("cospec_take_decisions")[0]:
            run, _, number = decision.request_id.partition("-")
            if run == str(self._runs):
                responses[int(number)].decisions.append(decision)
