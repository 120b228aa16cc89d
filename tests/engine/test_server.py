"""A real server, asked over HTTP by the OpenAI client."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from descendants import descendants, survivors
from safetensors.torch import save_file
from transformers import AutoTokenizer

from vllm_cospec.arbiter import Arbiter, ArtefactConfig, Provenance, current_schema, save_artefact, tokenizer_hash
from vllm_cospec.server import Server
from vllm_cospec.training.measure.demonstration import SERVER_ARGUMENTS

NUM_CALLS = 300
SCHEMA = {
    "type": "object",
    "properties": {"value": {"type": "integer"}},
    "required": ["value"],
    "additionalProperties": False,
}
BAD_KEYS: list[dict[str, Any]] = [
    {"cospec_policy": "nope"},
    {"cospec_threshold": 1.5},
    {"cospec_threshold": 0.25},  # below the artefact's
    {"cospec_max_overrides": -1},
    {"cospec_max_overrides": "many"},
    {"cospec_exact_tokens": 0.5},
    {"cospec_typo": 1},
    {"cospec_policy": [1]},
    {"cospec_max_overrides": True},  # which vLLM would read as 1
]


@pytest.fixture(scope="module")
def arbiter(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real artefact for the bundled target, with untrained weights: this file is about serving."""
    torch.manual_seed(3)
    vocabulary = AutoTokenizer.from_pretrained(pair / "target").get_vocab()
    config = ArtefactConfig(
        schema=current_schema(draft_logits=True),
        hidden_sizes=(32,),
        threshold=0.3,  # scores are about 0.5
        provenance=Provenance(vocab_size=len(vocabulary), tokenizer_hash=tokenizer_hash(vocabulary)),
    )
    directory = tmp_path_factory.mktemp("artefact") / "arbiter"
    save_artefact(directory, Arbiter((32,)), config, "An untrained arbiter.\n")
    return directory


def write_adapter(directory: Path, target: Path) -> Path:
    """An adapter of rank 8 on every layer's output projection, strong enough to change what the target writes."""
    config = json.loads((target / "config.json").read_text())
    size, rank = config["hidden_size"], 8
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.o_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(rank, size, generator=generator) / size**0.5
        weights[f"{name}.lora_B.weight"] = torch.randn(size, rank, generator=generator) / rank**0.5
    directory.mkdir()
    save_file(weights, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["o_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module", params=["learned", pytest.param("rule", marks=pytest.mark.slow)])
def server(
    request: pytest.FixtureRequest, pair: Path, arbiter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server with an adapter that counts per request."""
    directory = tmp_path_factory.mktemp("server")
    adapter = write_adapter(directory / "adapter", pair / "target")
    arguments = (
        *SERVER_ARGUMENTS, "--per-request-spec-decode-metrics", "detailed",
        "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"adapter={adapter}",
        "--enable-auto-tool-choice", "--tool-call-parser", "pythonic",
    )  # fmt: skip
    policy: Any = str(arbiter) if request.param == "learned" else {"policy": "typical", "posterior_threshold": 0.05}
    log = directory / f"{request.param}.log"
    with Server(pair / "target", {"method": "cospec", "arbiter": policy}, arguments, log=log) as server:
        server.wait_until_ready()
        yield server


def client(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=240)


def check_counters(server: Server) -> dict[str, float]:
    counters = server.counters()
    mismatches, overrides = counters["vllm:cospec_num_mismatches"], counters["vllm:cospec_num_overrides"]
    per_position = [v for name, v in counters.items() if name.startswith("vllm:cospec_num_overrides_per_pos[")]
    assert len(per_position) == 7  # as many as the recipe drafts
    assert overrides <= mismatches
    assert sum(per_position) == overrides
    assert counters["vllm:spec_decode_num_accepted_tokens"] <= counters["vllm:spec_decode_num_draft_tokens"]
    return counters


async def one_call(api: openai.AsyncOpenAI, kind: str, prompt: str, seed: int) -> str:
    """Make one call; returns what came back, "aborted" for a call that was dropped half-way."""
    common: dict[str, Any] = {"model": "demo", "max_tokens": 60}
    if kind == "schema":
        answer = await api.chat.completions.create(
            messages=[{"role": "user", "content": prompt}],
            response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}},
            temperature=0,
            **common,
        )
        return answer.choices[0].message.content or ""
    if kind == "aborted":
        stream = await api.completions.create(prompt=prompt, stream=True, temperature=0, **common)
        async for _ in stream:
            break
        await stream.close()
        return "aborted"
    keys = {
        "strict": {"cospec_policy": "strict"},
        "budget": {"cospec_max_overrides": 1, "cospec_exact_tokens": 3},
    }.get(kind)
    sampling: dict[str, Any] = {"temperature": 0}
    if kind == "sampled":
        sampling = {"temperature": 0.8, "top_p": 0.95, "seed": seed}
    extra = {"vllm_xargs": keys} if keys else {}
    answer = await api.completions.create(prompt=prompt, extra_body=extra, **sampling, **common)
    return answer.choices[0].text


async def ask_all(server: Server, prompts: list[str]) -> list[tuple[str, str]]:
    kinds = ["strict", "arbitrated", "budget", "sampled", "schema", "aborted"]
    random.Random(0).shuffle(kinds)
    async with client(server) as api:
        calls = [(kinds[i % len(kinds)], prompts[i % len(prompts)]) for i in range(NUM_CALLS)]
        texts = await asyncio.gather(*(one_call(api, kind, prompt, i) for i, (kind, prompt) in enumerate(calls)))
    return [(kind, text) for (kind, _), text in zip(calls, texts, strict=True)]


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_300_concurrent_calls_are_all_answered(server: Server, prompts: list[str]) -> None:
    answers = asyncio.run(ask_all(server, prompts))
    assert len(answers) == NUM_CALLS
    for kind, text in answers:
        assert text, kind
        if kind == "schema":
            assert text.lstrip().startswith("{")
            if text.rstrip().endswith("}"):
                assert isinstance(json.loads(text)["value"], int)
        elif kind in ("strict", "arbitrated", "budget"):
            assert text[0].isdigit()
    assert server.alive()
    assert check_counters(server)["vllm:cospec_num_overrides"] > 0


@pytest.mark.engine
def test_a_bad_value_is_a_400_with_a_reason_and_the_server_lives_on(server: Server, prompts: list[str]) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as api:
        for keys in BAD_KEYS:
            with pytest.raises(openai.BadRequestError) as caught:
                api.completions.create(model="demo", prompt=prompts[0], extra_body={"vllm_xargs": keys})
            assert next(iter(keys)) in str(caught.value)
        assert api.completions.create(model="demo", prompt=prompts[0], max_tokens=20).choices[0].text
    assert server.alive()


@pytest.mark.engine
def test_keys_are_checked_with_beam_search_too(server: Server, prompts: list[str]) -> None:
    beams: dict[str, Any] = {"use_beam_search": True}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as api:

        def ask(keys: dict[str, Any]) -> openai.types.Completion:
            body = beams | {"vllm_xargs": keys}
            return api.completions.create(model="demo", prompt=prompts[0], n=2, max_tokens=8, extra_body=body)

        with pytest.raises(openai.BadRequestError, match="cospec_policy: 'nope'"):
            ask({"cospec_policy": "nope"})
        assert [bool(choice.text) for choice in ask({"cospec_policy": "strict"}).choices] == [True, True]


@pytest.mark.engine
def test_strict_and_structured_requests_consult_nobody(server: Server, prompts: list[str]) -> None:
    before = check_counters(server)["vllm:cospec_num_mismatches"]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as api:
        for prompt in prompts[:8]:
            api.completions.create(
                model="demo", prompt=prompt, temperature=0, extra_body={"vllm_xargs": {"cospec_policy": "strict"}}
            )
            api.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": prompt}],
                max_tokens=40,
                response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
            )
    assert check_counters(server)["vllm:cospec_num_mismatches"] == before


@pytest.mark.engine
def test_requests_that_declare_tools_are_strict_unless_they_name_the_policy(
    server: Server, prompts: list[str], request: pytest.FixtureRequest
) -> None:
    policy = "learned" if "learned" in request.node.callspec.id else "typical"
    tools = [{"type": "function", "function": {"name": "sum", "parameters": SCHEMA}}]
    declared: dict[str, Any] = {"tools": tools, "tool_choice": "auto"}

    def disagreements(keys: dict[str, Any], **declared: Any) -> float:
        before = check_counters(server)["vllm:cospec_num_mismatches"]
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as api:
            for prompt in prompts[:8]:
                messages: Any = [{"role": "user", "content": prompt}]
                api.chat.completions.create(
                    model="demo", messages=messages, max_tokens=40, temperature=0, extra_body={"vllm_xargs": keys},
                    **declared,
                )  # fmt: skip
        return check_counters(server)["vllm:cospec_num_mismatches"] - before

    assert disagreements({}) > 0
    assert disagreements({}, **declared) == 0
    assert disagreements({"cospec_policy": policy}, **declared) > 0
    assert disagreements({}, tools=tools, tool_choice="none") > 0  # it may not call them


def ask_several(server: Server, prompts: list[str], model: str, **keys: Any) -> tuple[list[str], float]:
    """Return the texts, and how many mismatches were counted meanwhile."""
    before = server.counters()["vllm:cospec_num_mismatches"]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as api:
        answer = api.completions.create(
            model=model, prompt=prompts, max_tokens=40, temperature=0, extra_body={"vllm_xargs": keys}
        )
    return [choice.text for choice in answer.choices], server.counters()["vllm:cospec_num_mismatches"] - before


@pytest.mark.engine
def test_a_request_with_an_adapter_is_strict_unless_it_names_the_policy(
    server: Server, prompts: list[str], request: pytest.FixtureRequest
) -> None:
    """The drafter drafts as the target would without one."""
    some, policy = prompts[:16], "learned" if "learned" in request.node.callspec.id else "typical"
    base, disagreements = ask_several(server, some, "demo")
    assert disagreements > 0
    adapted, disagreements = ask_several(server, some, "adapter")
    assert adapted != base
    assert disagreements == 0
    assert ask_several(server, some, "adapter", cospec_policy="strict") == (adapted, 0)
    named, disagreements = ask_several(server, some, "adapter", cospec_policy=policy)
    assert named != adapted
    assert disagreements > 0


@pytest.mark.engine
def test_answers_say_what_was_done_to_them(server: Server, prompts: list[str]) -> None:
    before, reports = check_counters(server), []
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as api:
        for prompt in prompts[:5]:
            answer: Any = api.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=60)
            speculative = answer.metrics["speculative_decoding"]
            assert len(speculative["per_step_accepted"]) == speculative["num_spec_steps"]
            reports.append(speculative["cospec"])
    after = check_counters(server)
    for name in ("num_mismatches", "num_overrides"):
        counted = after[f"vllm:cospec_{name}"] - before[f"vllm:cospec_{name}"]
        assert sum(report[name] for report in reports) == counted > 0, name


@pytest.mark.engine
def test_lossy_verification_is_announced_once(server: Server) -> None:
    assert server.log is not None
    lines = [line for line in server.log.read_text().splitlines() if "LOSSY" in line]
    assert len(lines) == 1
    assert "WARNING" in lines[0]


@pytest.mark.engine
@pytest.mark.timeout(120)
def test_the_log_tells_the_override_rate(server: Server, prompts: list[str]) -> None:
    """vLLM logs its figures every ten seconds while there is something to tell."""
    assert server.log is not None
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as api:
        while "CoSpec metrics: Policy: " not in (log := server.log.read_text()):
            api.completions.create(model="demo", prompt=prompts[0], max_tokens=40, temperature=0)
    line = next(line for line in log.splitlines() if "CoSpec metrics" in line)
    assert re.search(r"Mismatches: [1-9]\d*, Overrides: \d+, Override rate: \d+\.\d%", line), line


@pytest.mark.engine
@pytest.mark.parametrize(
    "sent", [signal.SIGKILL, *(pytest.param(sent, marks=pytest.mark.slow) for sent in (signal.SIGINT, signal.SIGTERM))]
)
def test_an_interrupted_demo_leaves_no_process_behind(sent: signal.Signals) -> None:
    """Ctrl-C, a polite kill and one that leaves no time to clean up, while the engine core starts: its deafest hour."""
    command = [str(Path(sys.executable).with_name("cospec")), "demo"]
    demo = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while not descendants(demo.pid, "spawn_main"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        time.sleep(2)
        started = descendants(demo.pid)
        demo.send_signal(sent)
        demo.wait(60)
        assert not survivors(started, timeout=30)
    finally:
        demo.kill()
