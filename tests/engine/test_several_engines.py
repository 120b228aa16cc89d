"""Counters of servers with several engines, several API servers, and one that is started again, over HTTP."""

from __future__ import annotations

import asyncio
import urllib.request
from pathlib import Path

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from vllm_cospec.server import Server
from vllm_cospec.training.measure.demonstration import SERVER_ARGUMENTS

PROMPTS = 48
OURS = ("vllm:cospec_num_mismatches", "vllm:cospec_num_overrides")
RESPONSES = "vllm:cospec_overrides_per_response"


def ask(server: Server, prompts: list[str]) -> list[str]:
    """Ask all at once, so that every engine and every API server gets some."""

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=240) as api:
            answers = await asyncio.gather(
                *(api.completions.create(model="demo", prompt=p, max_tokens=60, temperature=0) for p in prompts)
            )
        return [answer.choices[0].text for answer in answers]

    return asyncio.run(run())


def counts(server: Server) -> dict[str, dict[str, float]]:
    """Our counters, vLLM's drafts, and how many responses are in the histogram, of each engine."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        text = response.read().decode()
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removesuffix("_total")
            if name in (*OURS, f"{RESPONSES}_count", "vllm:spec_decode_num_drafts", "vllm:cospec_info"):
                own = found.setdefault(name, {})
                engine = sample.labels["engine"]
                assert engine not in own, text  # exported once, whoever is asked
                own[engine] = sample.value
    return found


def served(pair: Path, arguments: tuple[str, ...], prompts: list[str], log: Path) -> tuple[list[str], dict]:
    """Start a server, ask it; returns its answers and its counts."""
    with Server(pair / "target", {"method": "cospec"}, SERVER_ARGUMENTS + arguments, log=log) as server:
        server.wait_until_ready(timeout=420)
        answers = ask(server, prompts)
        ask(server, prompts[:1])  # what the last step has counted is exported with the next one
        return answers, counts(server)


def total(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Sum over engines, of what does not depend on who was asked."""
    return {name: sum(own.values()) for name, own in found.items() if name != "vllm:cospec_info"}


@pytest.fixture(scope="module")
def alone(pair: Path, prompts: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict]:
    """One engine behind one API server."""
    answers, found = served(pair, (), prompts[:PROMPTS], tmp_path_factory.mktemp("alone") / "log")
    assert all(set(own) == {"0"} for own in found.values())
    assert found[f"{RESPONSES}_count"]["0"] >= PROMPTS
    return answers, found


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "arguments", [("--data-parallel-size", "2"), ("--api-server-count", "2")], ids=lambda found: found[0][2:]
)
def test_every_engine_s_counts_are_exported_once(
    arguments: tuple[str, ...], alone: tuple[list[str], dict], pair: Path, prompts: list[str], tmp_path: Path
) -> None:
    answers, found = served(pair, arguments, prompts[:PROMPTS], tmp_path / "log")
    expected, single = alone
    assert answers == expected
    assert total(found) == total(single)
    engines = {"0", "1"} if "data" in arguments[0] else {"0"}
    assert all(set(own) == engines for own in found.values())
    assert all(value > 0 for own in found.values() for value in own.values())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_server_that_is_started_again_adds_to_what_a_used_directory_holds(
    alone: tuple[list[str], dict], pair: Path, prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM's own counters do, and every counter of a directory for several processes."""
    directory = tmp_path / "prometheus"
    directory.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(directory))
    rounds = [served(pair, (), prompts[:PROMPTS], tmp_path / f"log{i}")[1] for i in range(2)]
    one = total(alone[1])
    assert total(rounds[0]) == one
    assert total(rounds[1]) == {name: 2 * value for name, value in one.items()}
    assert [found["vllm:cospec_info"] for found in rounds] == [{"0": 1.0}] * 2
