"""What the GPU worker installs, and that neither runner's adapter waits for the device. There is no GPU here."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import arbitration_cases as cases
import numpy as np
import pytest
import torch
import v1_cases
from vllm.v1.worker.gpu.sample import gumbel
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import GPUWatermarkSampler, RejectionSampler
from vllm.v1.worker.gpu_worker import Worker

from vllm_cospec import compat
from vllm_cospec.config import Settings
from vllm_cospec.errors import CompatibilityError
from vllm_cospec.health import REASONS
from vllm_cospec.kernels.policies import Kl
from vllm_cospec.kernels.reach import STOPS
from vllm_cospec.kernels.triton import launch, mismatch, scan, target, verdict
from vllm_cospec.kernels.triton.policies import compile_policy
from vllm_cospec.kernels.triton.step import Slots
from vllm_cospec.runners import v1, v1_gpu, v2
from vllm_cospec.runners.parts import Parts
from vllm_cospec.runners.v2_drafter import Arbitrated
from vllm_cospec.workers.gpu import CoSpecGPUWorker

META = torch.device("meta")
K, VOCAB = 4, 111


@pytest.mark.parametrize(("uses_v2", "module"), [(True, v2), (False, v1_gpu)], ids=["v2", "v1"])
def test_the_worker_installs_and_warms_up_for_the_runner_vllm_chose(
    uses_v2: bool, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def install(runner: Any, settings: Any, engine: int) -> Any:
        calls.append((runner, settings, engine))
        names = ("warm_up", "hold_counts", "start_counts")
        return SimpleNamespace(**{name: functools.partial(calls.append, name) for name in names})

    monkeypatch.setattr(Worker, "load_model", lambda self, load_dummy_weights=False: calls.append("load"))
    monkeypatch.setattr(module, "install", install)
    worker: Any = object.__new__(CoSpecGPUWorker)
    worker.use_v2_model_runner = uses_v2
    worker.model_runner = "runner"
    worker.vllm_config = SimpleNamespace(
        speculative_config=SimpleNamespace(cospec="settings"), parallel_config=SimpleNamespace(data_parallel_index=3)
    )
    worker.load_model()
    assert calls == ["load", ("runner", "settings", 3), "warm_up", "hold_counts"]
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", lambda self: calls.append("vLLM's warm-up"))
    worker.compile_or_warm_up_model()
    assert calls[4:] == ["vLLM's warm-up", "start_counts"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"enable_adaptive_verification": True},
         "speculative_config.enable_adaptive_verification: True cannot be combined with cospec; leave it out"),
        ({"watermark_key": 5}, "watermark_config: cannot be combined with cospec; leave it out"),
        ({"rejection_sample_method": "block"},
         "speculative_config.rejection_sample_method: 'block' cannot be combined with cospec; leave it out"),
        ({"batch_sharder": object()}, "batch-sharded sampling: cannot be combined with cospec; switch it off"),
        ({"draft_logits": None},
         "speculative_config.draft_sample_method: 'greedy' keeps no draft logits, which policy 'kl' reads; leave it "
         "out, or pass 'probabilistic'"),
        ({}, None),
    ],
    ids=["adaptive", "watermark", "block", "sharded", "no logits", "nothing"],
)  # fmt: skip
def test_what_arbitration_cannot_be_combined_with_on_v2_is_refused(
    changes: dict[str, Any], sentence: str | None
) -> None:
    names = {"num_speculative_tokens": K, "enable_adaptive_verification": False, "rejection_sample_method": "standard"}
    # 0.33 reads the parameters of its own fly, whatever the method
    fly = dict.fromkeys(("fly_entropy_threshold", "fly_entropy_top_k", "fly_window_size"))
    own = {key: changes.get(key, names[key]) for key in names}
    config: Any = SimpleNamespace(draft_sample_method="greedy", **fly, **own)
    watermarking: Any = object.__new__(GPUWatermarkSampler)
    runner = SimpleNamespace(
        rejection_sampler=RejectionSampler(watermarking, config, META, watermark_key=changes.get("watermark_key")),
        speculative_config=config,
        batch_sharder=changes.get("batch_sharder"),
        speculator=SimpleNamespace(draft_logits=changes.get("draft_logits", torch.zeros(0))),
    )
    settings: Any = SimpleNamespace(reads_draft_logits=True, collect=False, policy=Kl(max_kl=1.0))
    if sentence is None:
        v2.check(runner, settings)
        runner.speculator.draft_logits, settings.reads_draft_logits = None, False
        v2.check(runner, settings)
        return
    with pytest.raises(CompatibilityError) as caught:
        v2.check(runner, settings)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("wanted", [None, True, False])
def test_both_runners_are_served_on_a_gpu(wanted: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.envs
    import vllm.platforms

    platform = SimpleNamespace(device_type="cuda", is_cpu=lambda: False, is_cuda_alike=lambda: True)
    monkeypatch.setattr(vllm.platforms, "_current_platform", platform)
    monkeypatch.setattr(vllm.envs, "VLLM_USE_V2_MODEL_RUNNER", wanted, raising=False)
    place = compat.placement()
    assert place.problem is None
    assert place.runner == ("v1" if wanted is False else "v2")
    # vLLM may still fall back to V1, so the hooks of both have to be there
    assert set(place.scopes) == {"config", "v1", "v2", "gpu"}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched; none runs, so tensors need no memory."""
    names: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: names.append(self.name)

    for module in (target, verdict, mismatch, scan, launch.stock, gumbel):
        for name in list(vars(module)):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(name))
    with pytest.raises(RuntimeError):
        torch.zeros(1, device=META).item()  # the premise: on meta tensors every read of a value raises
    return names


def settings_of(directory: Path) -> Settings:
    return Settings(
        policy=Kl(max_kl=1.0), threshold=0.5, max_overrides=None, exact_tokens=0, collect=True, draft_logits=True,
        num_speculative_tokens=K, counters=str(directory),
    )  # fmt: skip


def counters() -> Any:
    on_device = torch.zeros(K + 1 + len(REASONS), dtype=torch.int64, device=META)
    return SimpleNamespace(on_device=on_device, unhealthy=on_device[K + 1 :], export=lambda: None)


def test_verification_on_v2_waits_for_nothing(launched: list[str], tmp_path: Path) -> None:
    case = cases.make_case(1, requests=3, k=K, full=True)
    cu, slot, expanded, local = (t.to(META) for t in case.layout())
    logits = case.raw.to(META)
    slots = Slots(**{name: value.to(META) for name, value in vars(case.slots).items()})
    sampler: Any = object.__new__(v2.V2Sampler)
    sampler._settings = settings_of(tmp_path)
    sampler._slots = SimpleNamespace(
        on_device=lambda arbitrated: replace(slots, arbitrated=arbitrated),
        ends=torch.zeros(99, 1 + STOPS, dtype=torch.int32, device=META),
        parts=Parts(99, sampler._settings, META),
    )  # fmt: skip
    sampler._counters = counters()
    sampler._arbitrated = Arbitrated(np.ones(99), slots.arbitrated)
    sampler._program, sampler._device = compile_policy(sampler._settings.policy, META, collect=True), META
    sampler.load_memory(torch.zeros(K + 1, dtype=torch.int64, device=META), VOCAB, 3 * (K + 1), 3, use_fp64=False)
    sampler._steps, sampler.sample_actions, sampler.num_speculative_steps = [], False, K
    sampler._runner = SimpleNamespace(req_states=SimpleNamespace(index_to_req_id={}))
    states = SimpleNamespace(
        temperature=SimpleNamespace(gpu=case.temperature.to(META)), seeds=SimpleNamespace(gpu=case.seed.to(META))
    )
    sampler.sampler = SimpleNamespace(
        apply_sampling_params=lambda logits, *rest: logits.float().clone(), sampling_states=states,
        use_fp64_gumbel=False,
    )  # fmt: skip
    drafts = case.draft_sampled.to(META)
    processed, sampled, num_sampled = sampler._verify(
        logits, case.draft.to(META), drafts, case.pos.to(META), cu, slot, np.array(case.slot), expanded, local,
        np.zeros(3), drafts,
    )  # fmt: skip
    assert sampled.device == num_sampled.device == processed.device == META
    assert launched == [
        "target_statistics_kernel", "verdict_kernel", "mismatch_kernel", "scan_kernel", "_resample_kernel",
        "_insert_resampled_kernel",
    ]  # fmt: skip


def test_drafting_and_verification_on_v1_wait_for_nothing(
    launched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # stock draws these; its kernels cannot run on meta tensors
    monkeypatch.setattr(
        v1, "sample_recovered_tokens", lambda *args: torch.zeros(args[3].shape, dtype=torch.int32, device=META)
    )
    monkeypatch.setattr(v1, "apply_sampling_constraints", lambda logits, *rest: logits)
    monkeypatch.setattr(v1_gpu, "DeviceCounters", lambda *args: counters())
    ids = ["a", "b", "c", "late"]
    runner = v1_cases.Runner(ids, {"b": {"cospec_policy": "strict"}})
    seeded = runner.requests["c"].sampling_params
    assert seeded is not None
    seeded.seed = 5
    runner.device, runner.positions = META, torch.zeros(64, dtype=torch.int64, device=META)
    sampling = v1_cases.Step(0, ids[:3], 1.0).sampling()
    sampling.temperature = torch.ones(3, device=META)

    class Drafter(v1_cases.Drafter):
        def propose(self, **_: Any) -> torch.Tensor:
            return torch.stack([self._sample_draft_tokens(step, sampling)[0] for step in range(K)], 1)

        def _sample_from_logits(self, logits: torch.Tensor, metadata: Any, step: Any = None) -> Any:
            return logits.argmax(-1), logits.softmax(-1)

    runner.drafter = Drafter()
    runner.drafter.model.compute_logits = lambda hidden: torch.zeros(3, v1_cases.VOCAB, device=META)
    sampler = v1_gpu.V1GPUSampler(runner, settings_of(tmp_path), None)
    runner.input_batch.req_ids, runner.input_batch.num_reqs = ids[:3], 3
    runner.drafter.propose(common_attn_metadata=SimpleNamespace(seq_lens=torch.zeros(3, device=META)))

    step = v1_cases.Step(0, ids[:3], 1.0)
    metadata = step.metadata()
    for name, value in vars(metadata).items():
        if isinstance(value, torch.Tensor):
            setattr(metadata, name, value.to(META))
    runner.input_batch.num_computed_tokens_cpu = np.zeros(3, np.int32)
    runner.query_start_loc = SimpleNamespace(np=np.cumsum([0, *(n + 1 for n in step.num_drafts)]))
    bonus = torch.zeros(3, 1, dtype=torch.int64, device=META)
    monkeypatch.setattr(sampler.sampler, "forward", lambda **_: SimpleNamespace(sampled_token_ids=bonus))
    output = sampler(metadata, None, step.logits.to(META), sampling).sampled_token_ids
    assert output.device == META
    assert output.shape == (3, K + 1)
    assert output.dtype == torch.int32
    assert launched == [
        *["_gumbel_sample_kernel"] * K, "target_statistics_kernel", "given_verdict_kernel", "mismatch_kernel",
        "scan_kernel",
    ]  # fmt: skip
