"""Model Runner V1's adapter to the fused path, on interpreted kernels: against stock V1 and against our CPU path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from v1_cases import EXTRA, IDS, POLICIES, K, Runner, Step, installed, save_arbiter
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler

from vllm_cospec.config import Settings
from vllm_cospec.errors import ConfigError
from vllm_cospec.kernels.policies import Kl, Learned, Random, Typical
from vllm_cospec.runners import device, v1_cpu, v1_gpu

pytestmark = pytest.mark.usefixtures("poison")

NEVER = Random(rate=0.0)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_arbiter(tmp_path_factory.mktemp("arbiter") / "arbiter")


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed import parallel_state

    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: SimpleNamespace(is_first_rank=True))


@pytest.mark.parametrize("name", POLICIES)
def test_decisions_are_those_of_the_cpu_path(name: str, artefact: str, tmp_path: Path) -> None:
    policy = POLICIES[name] or Learned(artefact=artefact)
    overrides = 0
    for sampled in (0.0, 0.6):
        (theirs, cpu), (ours, device) = (
            installed(module, policy, tmp_path / str(sampled), IDS, EXTRA) for module in (v1_cpu, v1_gpu)
        )
        for seed in range(4):
            # requests change places between the steps; what is counted for them must not
            ids = [IDS[(i + seed) % len(IDS)] for i in range(len(IDS))]
            step = Step(10 * seed + int(10 * sampled), ids, sampled)
            assert torch.equal(ours.run(device, step), theirs.run(cpu, step)), seed
            want, got = (
                sorted(s.take_decisions(), key=lambda d: (d.request_id, d.output_position)) for s in (cpu, device)
            )
            for a, b in zip(want, got, strict=True):
                assert (a.request_id, a.output_position, a.block_position, a.kept) == (
                    b.request_id, b.output_position, b.block_position, b.kept
                )  # fmt: skip
                # float32 sums of 111 terms in another order
                torch.testing.assert_close(b.statistics, a.statistics, rtol=1e-4, atol=1e-4)
            overrides += sum(d.kept for d in got)
        counted = device._counters._counters.totals()
        assert counted.mismatches == cpu._counters.totals().mismatches
        assert counted.overrides.tolist() == cpu._counters.totals().overrides.tolist()
    assert overrides > 1, "nothing was overridden: the test shows nothing"


@pytest.mark.parametrize("probabilities", [True, False])
@pytest.mark.parametrize("sampled", [0.0, 0.5, 1.0])
def test_a_policy_that_keeps_nothing_emits_what_stock_v1_emits(
    sampled: float, probabilities: bool, tmp_path: Path
) -> None:
    runner, sampler = installed(v1_gpu, NEVER, tmp_path, IDS)
    stock = RejectionSampler(Sampler())
    for seed in range(12):
        step = Step(seed, IDS, sampled, probabilities)
        torch.manual_seed(seed)
        want = stock(step.metadata(), step.draft_probabilities, step.logits.clone(), step.sampling())
        assert torch.equal(runner.run(sampler, step), want.sampled_token_ids), seed
    assert sampler._counters.on_device[K] > 5, "the fused path was not taken"


def test_strict_requests_beside_arbitrated_ones_emit_what_stock_v1_emits(tmp_path: Path) -> None:
    extra = {name: {"cospec_policy": "strict"} for name in ("b", "d")}
    runner, sampler = installed(v1_gpu, Random(rate=1.0), tmp_path, IDS, extra)
    stock, changed = RejectionSampler(Sampler()), 0
    for seed in range(8):
        step = Step(seed, IDS)
        torch.manual_seed(seed)
        want = stock(step.metadata(), step.draft_probabilities, step.logits.clone(), step.sampling())
        got = runner.run(sampler, step)
        assert torch.equal(got[[1, 3]], want.sampled_token_ids[[1, 3]]), seed
        changed += int((got != want.sampled_token_ids).any())
    assert changed > 4


def test_logprobs_are_those_of_the_tokens_emitted(tmp_path: Path) -> None:
    runner, sampler = installed(v1_gpu, Random(rate=1.0), tmp_path, IDS)
    step = Step(2, IDS, sampled=0.0, junk=False)
    sampling = replace(step.sampling(), max_num_logprobs=1)
    step.sampling = lambda: sampling  # type: ignore[method-assign]
    runner.input_batch.req_ids = IDS
    outputs = []
    forward = sampler.forward
    sampler.forward = lambda *args: outputs.append(forward(*args)) or outputs[-1]  # type: ignore[func-returns-value]
    tokens = runner.run(sampler, step)
    logprobs = outputs[0].logprobs_tensors
    starts = np.cumsum([0] + [n + 1 for n in step.num_drafts[:-1]])
    for request, start in enumerate(starts):
        for i, token in enumerate(t for t in tokens[request].tolist() if t >= 0):
            place = request * tokens.shape[1] + i
            want = step.logits[start + i].log_softmax(-1)[token]
            assert int(logprobs.logprob_token_ids[place, 0]) == token
            torch.testing.assert_close(logprobs.logprobs[place, 0], want)


def test_a_preempted_request_takes_its_budget_along(tmp_path: Path) -> None:
    """Two slots for three requests: one leaves the batch, another takes its slot, then the first comes back."""
    extra = {"a": {"cospec_max_overrides": 3}}
    runner, sampler = installed(v1_gpu, Random(rate=1.0), tmp_path, ["a", "b", "c"], extra, size=2)
    kept = 0
    for seed in range(12):
        ids = [["a", "b"], ["c", "b"], ["c", "b"]][seed % 3]
        runner.run(sampler, Step(seed, ids, sampled=0.0, junk=False))
        kept += sum(d.kept for d in sampler.take_decisions() if d.request_id == "a")
    assert kept == 3


def test_a_finished_request_leaves_its_slot_to_the_next(tmp_path: Path) -> None:
    runner, sampler = installed(v1_gpu, Random(rate=1.0), tmp_path, [], size=2, max_overrides=1)
    for n in range(6):
        name = f"r{n}"
        runner.add(name, 4)
        for seed in range(4):
            runner.run(sampler, Step(seed, [name], sampled=0.0, junk=False))
        assert sum(d.kept for d in sampler.take_decisions()) == 1  # a budget of its own, not its predecessor's
        del runner.requests[name]


def test_drafters_on_the_host_have_no_logits_and_ragged_drafts(tmp_path: Path) -> None:
    for module in (v1_cpu, v1_gpu):
        (tmp_path / module.__name__).mkdir()
    outputs = []
    for module in (v1_cpu, v1_gpu):
        runner, sampler = installed(module, Typical(posterior_threshold=0.1), tmp_path, IDS, draft_logits=False)
        step = Step(4, IDS, sampled=0.0)
        ragged = [row[:n] for row, n in zip(step.proposed.tolist(), step.num_drafts, strict=True)]
        recorder = sampler.recorder
        recorder._propose = lambda ragged=ragged, **_: ragged
        outputs.append(runner.run(sampler, step))
        decisions = sampler.take_decisions()
        assert decisions
        assert all((d.statistics[5:10] == 0).all() for d in decisions)
    assert torch.equal(*outputs)


def test_a_rule_that_ignores_draft_logits_keeps_none_where_nothing_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(device, "logger", SimpleNamespace(info=lambda text, *args: said.append(text % args)))
    policy = Typical(posterior_threshold=0.1)
    settings = Settings(
        policy=policy, threshold=0.5, max_overrides=None, exact_tokens=0, collect=False, draft_logits=True,
        num_speculative_tokens=K, counters=str(tmp_path),
    )  # fmt: skip
    samplers, outputs = {}, []
    for method in ("probabilistic", "greedy"):
        runner = Runner(IDS, {})
        runner.speculative_config.draft_sample_method = method
        samplers[method] = v1_gpu.install(runner, settings, 0)
        outputs.append(torch.stack([runner.run(samplers[method], Step(4, IDS, sampled=0.0)) for _ in range(2)]))
    assert torch.equal(*outputs)
    assert samplers["greedy"].recorder.logits is None
    kept = samplers["probabilistic"].recorder.logits
    assert kept is not None
    assert said == [
        f"CoSpec keeps draft logits: {kept.nbytes / 2**30:.2f} GiB on the device, in proportion to max_num_seqs; with "
        f"speculative_config.draft_sample_method 'greedy' there are none."
    ]
    samplers["probabilistic"].set_policy(Kl(max_kl=1.0))
    samplers["greedy"].set_policy(NEVER)
    with pytest.raises(ConfigError) as caught:
        samplers["greedy"].set_policy(Kl(max_kl=1.0))
    assert str(caught.value) == (
        "policy 'kl': reads draft logits, and this engine keeps none; start it with "
        "speculative_config.draft_sample_method 'probabilistic'"
    )


def test_dummy_batches_and_steps_without_drafts_go_to_stock(tmp_path: Path) -> None:
    runner, sampler = installed(v1_gpu, Random(rate=1.0), tmp_path, IDS)
    step = Step(1, IDS)
    runner.input_batch.req_ids = []  # vLLM's profiling run
    out = sampler(step.metadata(), step.draft_probabilities, step.logits.clone(), step.sampling())
    assert out.sampled_token_ids.shape == (len(IDS), max(step.num_drafts) + 1)
    assert int(sampler._counters.on_device.sum()) == 0


def test_what_is_decided_before_counting_starts_is_forgotten(tmp_path: Path) -> None:
    runner, sampler = installed(v1_gpu, Random(rate=1.0), tmp_path, IDS)
    again, counted = installed(v1_gpu, Random(rate=1.0), tmp_path / "again", IDS)
    sampler.hold_counts()
    for seed in range(4):
        runner.run(sampler, Step(seed, IDS))
    assert sampler._counters.on_device[:K].sum() > 0
    sampler.start_counts()
    step = Step(9, IDS, sampled=0.0)
    assert torch.equal(runner.run(sampler, step), again.run(counted, step))
    totals, expected = sampler._counters._counters.totals(), counted._counters._counters.totals()
    assert totals.overrides.tolist() == expected.overrides.tolist()
    assert totals.overrides.sum() > 0
    assert totals.mismatches == expected.mismatches
    assert len(sampler.take_decisions()) == len(counted.take_decisions())


def test_other_rejection_methods_are_refused(tmp_path: Path) -> None:
    settings = Settings(
        policy=NEVER, threshold=0.5, max_overrides=None, exact_tokens=0, collect=False, draft_logits=False,
        num_speculative_tokens=K, counters=str(tmp_path),
    )  # fmt: skip
    runner = Runner(IDS, {})
    runner.speculative_config.rejection_sample_method = "synthetic"
    with pytest.raises(v1_gpu.CompatibilityError, match="rejection_sample_method: 'synthetic'"):
        v1_gpu.install(runner, settings, 0)
