"""What this package needs of vLLM: one table, read by the start-up check, by ``cospec doctor`` and by the tests.

A symbol that is gone or has another signature is found before the engine starts. The hook decides; the version only
warns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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


RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1.update_state_after_alloc"
BLOCK_POOL = "vllm.v1.core.block_pool:BlockPool.cache_full_blocks"
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
SAMPLER = "vllm.v1.sample.rejection_sampler"
V2 = "vllm.v1.worker.gpu"
V2_SAMPLER = f"{V2}.spec_decode.rejection_sampler:RejectionSampler"
V2_NGRAM = f"{V2}.spec_decode.ngram.speculator:NgramGPUSpeculator"
V2_STANDALONE = f"{V2}.spec_decode.standalone_ar.speculator:StandaloneARSpeculator"
V2_KERNELS = f"{V2}.spec_decode.rejection_sampler_utils"
PROPOSER = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"

STEP_OUTPUT = "vllm.v1.outputs:AsyncModelRunnerOutput.get_output"
OUTPUTS = "vllm.v1.engine.output_processor:OutputProcessor.process_outputs"

ENDPOINTS = "vllm.entrypoints.openai"
HANDLERS = (
    f"{ENDPOINTS}.completion.serving:OpenAIServingCompletion.create_completion",
    f"{ENDPOINTS}.chat_completion.serving:OpenAIServingChat.create_chat_completion",
    f"{ENDPOINTS}.chat_completion.batch_serving:OpenAIServingChatBatch.create_batch_chat_completion",
    f"{ENDPOINTS}.responses.serving:OpenAIServingResponses.create_responses",
)
"""The endpoints that take ``vllm_xargs``; Anthropic's goes through the second."""

HOOKS: tuple[Hook, ...] = (
    Hook("translate the flag", "vllm.engine.arg_utils:EngineArgs.create_speculative_config",
         ("self", "target_model_config", "target_parallel_config"), "config"),
    Hook("take JSON and dotted keys together", "vllm.engine.arg_utils:EngineArgs.add_cli_args", ("parser",), "config"),
    Hook("see what a speculators checkpoint replaces", "vllm.engine.arg_utils:maybe_override_with_speculators",
         ("model", "tokenizer", "trust_remote_code"), "config"),
    Hook("keep blocks whole", "vllm.engine.arg_utils:EngineArgs.scheduler_cls", None, "config"),
    Hook("keep blocks whole", f"{SCHEDULER}._reserve_prefill_lookahead",
         ("self", "request", "num_computed_tokens", "num_new_tokens"), "config"),
    Hook("keep blocks whole", f"{SCHEDULER}._preempt_request", None, "config"),
    Hook("keep blocks whole", f"{SCHEDULER}._get_local_prefix_cache_hit", None, "config"),
    Hook("watch requests for drift", f"{SCHEDULER}._free_request", None, "config"),
    Hook("keep blocks whole", f"{SCHEDULER}._update_after_schedule", ("self", "scheduler_output"), "config"),
    Hook("leave out drafts behind a stop", f"{SCHEDULER}._handle_stopped_request", ("self", "request"), "config"),
    Hook("leave out drafts behind a token that is taken back", f"{SCHEDULER}._handle_invalid_blocks",
         ("self", "invalid_block_ids", "num_scheduled_tokens"), "config"),
    Hook("keep blocks whole", f"{SCHEDULER}.update_draft_token_ids", ("self", "draft_token_ids"), "config"),
    Hook("keep blocks whole", "vllm.v1.core.kv_cache_manager:KVCacheManager.truncate_computed_blocks",
         ("self", "blocks", "num_computed_tokens"), "config"),
    Hook("know what follows a cached block", BLOCK_POOL,
         ("self", "request", "blocks", "num_cached_blocks", "num_full_blocks", "block_size", "kv_cache_group_id"),
         "config"),
    Hook("know what the drafter has seen", CONNECTOR,
         ("self", "request", "blocks", "num_external_tokens"), "config"),
    Hook("carry the settings", "vllm.config.speculative:SpeculativeConfig", None, "config"),
    Hook("refuse bad requests", "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
         ("self", "request_id", "prompt", "params", "supported_tasks"), "config"),
    *(Hook("read a request's keys as written", handler, ("self", "request", "raw_request"), "config")
      for handler in HANDLERS),
    Hook("report per request", OUTPUTS,
         ("self", "engine_core_outputs", "engine_core_timestamp", "iteration_stats", "weight_version"), "config"),
    Hook("report per request", STEP_OUTPUT, ("self",), "config"),
    Hook("report per request", f"{SCHEDULER}.update_from_output",
         ("self", "scheduler_output", "model_runner_output"), "config"),
    Hook("export counters", "vllm.v1.metrics.loggers:PrometheusStatLogger._spec_decoding_cls", None, "config"),
    Hook("export counters", "vllm.v1.spec_decode.metrics:SpecDecodingProm.__init__",
         ("self", "speculative_config", "labelnames", "per_engine_labelvalues", "is_diffusion"), "config"),
    Hook("export counters", "vllm.v1.spec_decode.metrics:SpecDecodingProm.observe",
         ("self", "spec_decoding_stats", "engine_idx"), "config"),
    Hook("log counters", "vllm.v1.metrics.loggers:LoggingStatLogger.log", ("self",), "config"),
    Hook("replace verification", f"{SAMPLER}:RejectionSampler.forward",
         ("self", "metadata", "draft_probs", "logits", "sampling_metadata"), "v1"),
    Hook("process logits", f"{SAMPLER}:RejectionSampler.apply_logits_processors",
         ("self", "logits", "sampling_metadata", "metadata"), "v1"),
    Hook("process logits", f"{SAMPLER}:apply_sampling_constraints",
         ("logits", "cu_num_draft_tokens", "sampling_metadata"), "v1"),
    Hook("report logprobs", f"{SAMPLER}:RejectionSampler._get_logprobs_tensors",
         ("self", "max_num_logprobs", "metadata", "logits", "target_logits", "bonus_logits", "sampled_token_ids"),
         "v1"),
    Hook("draw the stock random numbers", f"{SAMPLER}:generate_uniform_probs",
         ("num_tokens", "num_draft_tokens", "generators", "device"), "v1"),
    Hook("draw the stock recovered tokens", f"{SAMPLER}:sample_recovered_tokens",
         ("max_spec_len", "num_draft_tokens", "cu_num_draft_tokens", "draft_token_ids", "draft_probs", "target_probs",
          "sampling_metadata", "device", "use_fp64_gumbel"), "v1"),
    Hook("keep draft logits", f"{PROPOSER}._sample_draft_tokens",
         ("self", "hidden_states", "sampling_metadata"), "v1"),
    Hook("keep draft logits", f"{PROPOSER}._sample_from_logits", ("self", "logits", "sampling_metadata"), "v1"),
    Hook("know what was proposed", f"{PROPOSER}.propose", None, "v1"),
    Hook("run the drafter for every request", f"{PROPOSER}.set_inputs_first_pass", None, "v1"),
    Hook("feed heads the token behind a chunk", f"{PROPOSER}.prepare_next_token_ids_padded",
         ("self", "sampled_token_ids", "requests", "gpu_input_batch", "discard_request_mask"), "v1"),
    Hook("run the drafter for every request", f"{PROPOSER}._update_positions_dependent_metadata",
         ("self", "positions", "common_attn_metadata", "batch_size", "input_batch_size", "block_size"), "v1"),
    Hook("leave caches alone in dummy runs", f"{PROPOSER}.dummy_run", None, "v1"),
    Hook("run the drafter for every request", f"{RUNNER}._input_fits_in_drafter",
         ("self", "common_attn_metadata"), "v1"),
    Hook("know what the drafter has seen", f"{RUNNER}._update_states", ("self", "scheduler_output"), "v1"),
    Hook("withhold drafts beyond the context", f"{RUNNER}.take_draft_token_ids", ("self",), "v1"),
    Hook("know what drafts were drawn from", f"{RUNNER}._get_spec_decode_draft_probs",
         ("self", "spec_decode_metadata"), "v1"),
    Hook("verify in the runner", f"{RUNNER}._sample", ("self", "logits", "spec_decode_metadata"), "v1"),
    Hook("send settings to the device without waiting", "vllm.utils.torch_utils:async_tensor_h2d",
         ("data", "device"), "v1"),
    Hook("mend per-request sampling on the CPU", f"{SAMPLER}:expand_kernel", None, "cpu"),
    Hook("mend per-request sampling on the CPU", "vllm.triton_utils.dispatcher:register_kernels",
         ("overrides",), "cpu"),
    Hook("mend it before the runner is built", "vllm.v1.worker.cpu_worker:CPUWorker.init_device", ("self",), "cpu"),
    Hook("report per request", "vllm.v1.worker.cpu_worker:CPUWorker.sample_tokens", ("self", "grammar_output"), "cpu"),
    Hook("fall back to strict", "vllm.v1.worker.cpu_worker:CPUWorker.execute_model",
         ("self", "scheduler_output"), "cpu"),
    Hook("install before warm-up", "vllm.v1.worker.cpu_worker:CPUWorker.load_model",
         ("self", "load_dummy_weights"), "cpu"),
    Hook("report per request", "vllm.v1.worker.gpu_worker:Worker.sample_tokens", ("self", "grammar_output"), "gpu"),
    Hook("fall back to strict", "vllm.v1.worker.gpu_worker:Worker.execute_model", ("self", "scheduler_output"), "gpu"),
    Hook("install before warm-up", "vllm.v1.worker.gpu_worker:Worker.load_model",
         ("self", "load_dummy_weights"), "gpu"),
    Hook("count no request of the warm-up", "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model",
         ("self",), "gpu"),
    Hook("draw seeded drafts on the device", f"{V2}.sample.gumbel:gumbel_sample",
         ("logits", "expanded_idx_mapping", "temperature", "seed", "pos", "apply_temperature", "is_drafting"), "gpu"),
    Hook("replace verification", f"{V2_SAMPLER}.__init__", ("self", "sampler", "spec_config", "device"), "v2"),
    Hook("replace verification", f"{V2_SAMPLER}._verify",
         ("self", "logits", "draft_logits", "draft_sampled", "pos", "cu_num_logits", "idx_mapping", "idx_mapping_np",
          "expanded_idx_mapping", "expanded_local_pos", "seq_lens_upper_bound_np", "verify_draft_sampled"), "v2"),
    Hook("process logits", f"{V2}.sample.sampler:Sampler.apply_sampling_params", None, "v2"),
    Hook("learn a request's settings", f"{V2}.model_states.interface:ModelState.add_request",
         ("self", "req_index", "new_req_data"), "v2"),
    Hook("learn a request's settings", f"{V2}.sample.sampler:Sampler.apply_staged_writes", ("self",), "v2"),
    Hook("know which drafts are whole", f"{V2_SAMPLER}.__call__",
         ("self", "logits", "input_batch", "draft_logits", "invalid_drafts"), "v2"),
    Hook("know which drafts are whole", f"{V2_NGRAM}.propose", None, "v2"),
    Hook("keep a draft model within its bounds", f"{V2_STANDALONE}._run_model",
         ("self", "input_ids", "positions", "attn_metadata", "slot_mappings", "num_tokens_across_dp"), "v2"),
    Hook("keep a draft model within its bounds", f"{V2_STANDALONE}.propose", None, "v2"),
    Hook("keep a draft model within its bounds", f"{V2_STANDALONE}._copy_request_inputs",
         ("self", "num_reqs", "idx_mapping", "temperature", "seeds", "dummy_run"), "v2"),
    Hook("keep a preempted request's budget", f"{V2}.model_runner:GPUModelRunner.finish_requests",
         ("self", "scheduler_output"), "v2"),
    Hook("draw the stock random numbers", f"{V2}.sample.gumbel:tl_rand32", None, "v2"),
    Hook("decide as stock does", f"{V2_KERNELS}:_compute_max_and_sumexp", None, "v2"),
    Hook("decide as stock does", f"{V2_KERNELS}:_compute_global_target_argmax", None, "v2"),
    Hook("decide as stock does", f"{V2_KERNELS}:_compute_global_logprobs_and_logsumexp", None, "v2"),
    Hook("draw the stock recovered tokens", f"{V2_KERNELS}:_resample_kernel", None, "v2"),
    Hook("draw the stock recovered tokens", f"{V2_KERNELS}:_insert_resampled_kernel", None, "v2"),
)  # fmt: skip
