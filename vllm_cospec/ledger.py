"""What this package replaces in vLLM: one entry each, with the reason and the day it can go. Doctor prints it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vllm_cospec.hooks import (
    BLOCK_POOL,
    CONNECTOR,
    HANDLERS,
    OUTPUTS,
    PROPOSER,
    RUNNER,
    SAMPLER,
    STEP_OUTPUT,
    V2,
    V2_NGRAM,
    V2_SAMPLER,
    V2_STANDALONE,
)

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
        OUTPUTS,
        why="what was counted of a request has no field of its own in the engine's messages",
        how="takes it out of the histogram it travels in, then calls the original",
        remove_when="vLLM's metrics of a request have room for a plugin's",
        when="cospec is asked for, and vLLM counts per request (0.33)",
    ),
    Patch(
        STEP_OUTPUT,
        why="the counts of a step's requests are known when its kernels have run, and travel with its output",
        how="calls the original of the step's output, then adds the counts",
        remove_when="vLLM's output of a step has room for a plugin's",
        when="a GPU worker runs with counts per request, or watches for drift",
        level="instance",
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
        BLOCK_POOL,
        why="a head's entry at the end of a block is made of the token behind it, which the block's hash leaves out",
        how="notes what follows a block, then calls the original; a request that goes on otherwise computes it again",
        remove_when="vLLM's block hashes cover what a head reads ahead, for every setting",
        when="cospec runs with EAGLE or MTP heads and a prefix cache whose hashes end with the block",
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
        f"{SAMPLER}:RejectionSampler.forward",
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
        f"{PROPOSER}.prepare_next_token_ids_padded",
        why="a head is fed each token with the one behind it, and at the end of a prompt's chunk stock takes the "
        "prompt's last token for that",
        how="calls the original, then puts in the token that follows the chunk",
        remove_when="vLLM reads the token behind the chunk, as its prepare_next_token_ids_cpu does",
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
        f"{PROPOSER}.dummy_run",
        why="dummy runs of a data-parallel rank write into the drafter's KV cache, where the last step has written",
        how="maps every token nowhere, then calls the original",
        remove_when="vLLM gives a drafter's dummy runs the slots it gives the target's",
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
        f"{RUNNER}._sample",
        why="training compares what follows the two decisions at a mismatch, from the same random numbers on",
        how="calls the original; before it sets the generator of a branch, and after it puts a branch's first token in",
        remove_when="a request may begin with tokens of its response, and with a generator's state",
        when="cospec runs on Model Runner V1 with collect, on a CPU",
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
        f"{V2_SAMPLER}._verify",
        why="there is no hook for verification",
        how="an instance of a subclass takes the place of the runner's sampler; strict chunks go to the stock method",
        remove_when="vLLM lets plugins register rejection samplers",
        when="cospec runs on Model Runner V2", level="instance",
    ),
    Patch(
        f"{V2}.model_states.interface:ModelState.add_request",
        why="a request's settings, and whether the drafter has seen its prompt, must be known with its slot",
        how="calls the original, then writes them down",
        remove_when="per-slot state of plugins is told of requests, with speculative decoding too",
        when="cospec runs on Model Runner V2", level="instance",
    ),
    Patch(
        f"{V2}.sample.sampler:Sampler.apply_staged_writes",
        why="the settings must become visible with the sampler's own",
        how="calls the original, then copies the settings",
        remove_when="per-slot state of plugins is told of requests, with speculative decoding too",
        when="cospec runs on Model Runner V2", level="instance",
    ),
    Patch(
        f"{V2}.model_runner:GPUModelRunner.finish_requests",
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
        f"{SAMPLER}:expand_kernel",
        why="the CPU build drops its result for float32 and int32: temperature, top-k and top-p are garbage",
        how="the same function in torch",
        remove_when="vLLM's CPU build writes the result back",
        when="cospec runs on the CPU", level="registry",
    ),
    Patch(
        "llvmlite.binding.ffi:_lib_wrapper.__getattr__",
        why="numba's library answers for every name, and vLLM's registry of kernels, which looks into whatever modules "
        "hold, takes it for a kernel: no engine starts in a process with numba",
        how="refuses names that begin with two underscores; calls the original for everything else",
        remove_when="llvmlite refuses them itself, or vLLM's registry looks at kernels alone",
        when="cospec runs on Model Runner V1 on a CPU, once the loops are loaded", level="process",
    ),
    Patch(
        "sys:excepthook",
        why="fifty lines of frames hide the sentence that says what to change",
        how="prints the sentence of an error of this package; everything else goes to the hook that was there",
        remove_when="vLLM's command prints errors of its configuration without a traceback",
        when="cospec refuses to start under vLLM's own command", level="process",
    ),
)  # fmt: skip
