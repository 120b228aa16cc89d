"""What vLLM's own ``create_engine_config`` makes of the flag, with the plugin and without it."""

import copy
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from configurations import (
    LEFT_OUT,
    PARAMETERS,
    Pair,
    build,
    conditions,
    engine_args,
    learned,
    refused,
    settings_of,
    user_config,
    without_counters,
    write_recipe,
)
from heads import random_target
from safetensors.torch import load_file, save_file
from vllm.v1.sample.rejection_sampler import RejectionSampler

import vllm_cospec.demo
from vllm_cospec import compat, translate
from vllm_cospec.config import Settings
from vllm_cospec.errors import CompatibilityError, CoSpecError
from vllm_cospec.kernels.policies import Fly, Random, Typical, policy_class, policy_names
from vllm_cospec.scheduler import CoSpecScheduler
from vllm_cospec.training.pairs.demo import build_tokenizer


def test_vllm_gets_the_inner_method_our_worker_and_the_settings(pair: Pair) -> None:
    config = build(pair.target, user_config(pair, draft_tensor_parallel_size=1, max_model_len=48))
    speculative = config.speculative_config
    assert speculative.method == "draft_model"
    assert speculative.num_speculative_tokens == 3
    assert speculative.draft_model_config.model == str(pair.draft)
    assert speculative.draft_model_config.max_model_len == 48
    assert speculative.draft_sample_method == "greedy"  # vLLM's default
    assert config.parallel_config.worker_cls == "vllm_cospec.workers.cpu.CoSpecCPUWorker"
    assert issubclass(config.scheduler_config.get_scheduler_cls(), CoSpecScheduler)
    assert without_counters(speculative.cospec) == Settings(
        policy=Typical(),
        threshold=0.5,
        max_overrides=None,
        exact_tokens=0,
        collect=False,
        draft_logits=True,
        num_speculative_tokens=3,
        counters="",
    )
    assert Path(speculative.cospec.counters).is_dir()


def test_arguments_that_were_read_before_are_read_alike(pair: Pair) -> None:
    """Several API servers build the configuration from the same arguments."""
    args = engine_args(pair.target, user_config(pair))
    first, second = (args.create_engine_config().scheduler_config.scheduler_cls for _ in range(2))
    assert first == second == translate.SCHEDULER


@pytest.mark.parametrize("method", ["CoSpec", "COSPEC", " cospec", "cospec "])
def test_the_method_is_understood_in_other_letters_and_with_blanks(pair: Pair, method: str) -> None:
    assert settings_of(pair, method=method).policy == Typical()
    short = engine_args(pair.target, user_config(pair, method=LEFT_OUT), spec_method=method)
    assert short.create_engine_config().speculative_config.cospec.policy == Typical()


def test_a_draft_with_swapped_digits_is_refused_before_an_engine_starts(pair: Pair, tmp_path: Path) -> None:
    draft = Path(shutil.copytree(pair.draft, tmp_path / "draft"))
    tokenizer = json.loads((draft / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    three, seven = vocabulary["3"], vocabulary["7"]
    vocabulary |= {"3": seven, "7": three}
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(pair.target, user_config(pair, model=str(draft)), f"has '7' under id {three}, where the target's has '3'")
    settings_of(pair, model=str(draft), arbiter={"policy": "strict"})


def test_an_arbiter_fits_a_target_whose_vocabulary_is_padded(pair: Pair) -> None:
    padded = pair.other_draft  # 8 rows more than tokens
    config = build(padded, user_config(pair, model=str(padded), arbiter=str(pair.artefact)))
    assert config.model_config.get_vocab_size() > len(build_tokenizer().get_vocab())
    assert config.speculative_config.cospec.policy == learned(pair.artefact)


def test_a_trained_arbiter_without_tokenizer_files_is_refused_in_one_sentence(pair: Pair, tmp_path: Path) -> None:
    target = Path(shutil.copytree(pair.target, tmp_path / "target"))
    for path in target.glob("*token*"):
        path.unlink()
    user = user_config(pair, arbiter=str(pair.artefact))
    refused(target, user, "tokenizer: the target's cannot be loaded", skip_tokenizer_init=True)
    rule = build(target, user_config(pair), skip_tokenizer_init=True)
    assert rule.speculative_config.cospec.policy == Typical()


def test_prompts_of_embeddings_are_refused_where_a_model_drafts_on_v1(pair: Pair) -> None:
    refused(pair.target, user_config(pair), "enable_prompt_embeds: True ends", enable_prompt_embeds=True)
    ngram = user_config(pair, draft_method="ngram", model=LEFT_OUT, prompt_lookup_max=4)
    assert build(pair.target, ngram, enable_prompt_embeds=True).speculative_config.method == "ngram"


def test_collecting_is_refused_under_vllms_own_command_and_allowed_in_a_program(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = user_config(pair, collect=True)
    assert build(pair.target, user).speculative_config.cospec.collect
    monkeypatch.setattr(sys, "argv", ["/somewhere/vllm", "serve"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back afterwards
    refused(pair.target, user, "speculative_config.collect: True keeps every decision in memory")


def test_ngram_drafts_without_a_model(pair: Pair) -> None:
    config = build(pair.target, user_config(pair, draft_method="ngram", model=LEFT_OUT, prompt_lookup_max=4))
    assert config.speculative_config.method == "ngram"
    assert config.speculative_config.prompt_lookup_max == 4
    assert not config.speculative_config.cospec.draft_logits


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_gets_through_vllm(pair: Pair, name: str) -> None:
    parameters = {"artefact": str(pair.artefact)} if name == "learned" else PARAMETERS[name]
    settings = settings_of(pair, arbiter={"policy": name, **parameters})
    expected = policy_class(name)(**parameters)
    assert settings.policy == (Fly(window=2) if name == "fly" else expected)


@pytest.mark.parametrize("name", policy_names())
def test_drafts_are_drawn_where_a_policy_looks_at_them(pair: Pair, name: str) -> None:
    parameters = {"artefact": str(pair.artefact)} if name == "learned" else PARAMETERS[name]
    arbiter = {"policy": name, **parameters}
    found = build(pair.target, user_config(pair, arbiter=arbiter)).speculative_config.draft_sample_method
    draws = {"learned", "kl", "fsd", "mixture", "entropy", "ears"}
    assert found == ("probabilistic" if name in draws else "greedy")
    collecting = build(pair.target, user_config(pair, arbiter=arbiter, collect=True))
    assert collecting.speculative_config.draft_sample_method == "probabilistic"


@pytest.mark.parametrize(("arbiter", "way"), [("learned", "greedy"), ("typical", "probabilistic")])
def test_an_explicit_way_of_drafting_stays(pair: Pair, arbiter: str, way: str) -> None:
    policy = str(pair.artefact) if arbiter == "learned" else {"policy": arbiter}
    config = build(pair.target, user_config(pair, arbiter=policy, draft_sample_method=way))
    assert config.speculative_config.draft_sample_method == way


def test_a_trained_arbiter_is_checked_against_the_real_tokenizer(pair: Pair) -> None:
    asked = user_config(pair, arbiter=str(pair.artefact), max_accuracy_loss=0.1)
    settings = build(pair.target, asked, dtype="float32").speculative_config.cospec
    assert settings.policy == learned(pair.artefact)
    assert settings.threshold == 0.6
    assert settings.calibrated.conditions == conditions(pair.draft)


def test_weights_dtype_and_template_that_were_not_calibrated_refuse_a_bound_of_the_loss(
    pair: Pair, tmp_path: Path
) -> None:
    asked = user_config(pair, arbiter=str(pair.artefact), max_accuracy_loss=0.1)

    def difference(target: Path, dtype: str = "float32", **changes: Any) -> str:
        found = str(refused(target, asked | changes, "max_accuracy_loss", dtype=dtype))
        return found.split("what is served (")[1].split(");")[0]

    assert difference(pair.target, "bfloat16") == "dtype bfloat16 instead of float32"
    shutil.copytree(pair.draft, tmp_path / "draft")
    weights = load_file(tmp_path / "draft" / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, tmp_path / "draft" / "model.safetensors")
    assert difference(pair.target, model=str(tmp_path / "draft")) == "another draft"
    shutil.copytree(pair.target, tmp_path / "target")
    (tmp_path / "target" / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert difference(tmp_path / "target") == "another chat template"


def test_the_method_alone_is_enough_beside_a_recipe(pair: Pair, tmp_path: Path) -> None:
    shutil.copytree(pair.target, tmp_path / "target")
    write_recipe(
        tmp_path / "target", {"model": str(pair.draft), "num_speculative_tokens": 4, "arbiter": str(pair.artefact)}
    )
    settings = build(tmp_path / "target", {"method": "cospec"}).speculative_config.cospec
    assert (settings.policy, settings.num_speculative_tokens) == (learned(pair.artefact), 4)


def test_vllms_short_flags_mean_the_same(pair: Pair) -> None:
    args = engine_args(
        pair.target,
        {"arbiter": {"policy": "random", "rate": 0.5}},
        spec_method="cospec",
        spec_model=str(pair.draft),
        spec_tokens=4,
    )
    settings = args.create_engine_config().speculative_config.cospec
    assert (settings.policy, settings.num_speculative_tokens) == (Random(rate=0.5), 4)
    assert (args.spec_method, args.spec_model, args.spec_tokens) == ("cospec", str(pair.draft), 4)


def test_the_users_arguments_are_not_changed_and_give_the_same_twice(pair: Pair) -> None:
    raw = user_config(pair, arbiter={"policy": "typical", "posterior_alpha": 0.4})
    before = copy.deepcopy(raw)
    args = engine_args(pair.target, raw)
    first = args.create_engine_config().speculative_config
    assert raw == before
    assert args.speculative_config == before
    second = args.create_engine_config().speculative_config
    assert raw == before
    third = build(pair.target, raw).speculative_config
    assert without_counters(first.cospec) == without_counters(second.cospec) == without_counters(third.cospec)
    assert first.num_speculative_tokens == second.num_speculative_tokens == third.num_speculative_tokens
    assert first.compute_hash() == second.compute_hash() == third.compute_hash()


def test_a_refusal_changes_the_users_arguments_as_little(pair: Pair) -> None:
    for changes in ({"exact_tokens": -1}, {"arbiter": {"policy": "fly", "window": 3}}, {"quantization": "made-up"}):
        raw = user_config(pair, changes)
        before = copy.deepcopy(raw)
        args = engine_args(pair.target, raw)
        with pytest.raises(CoSpecError):
            args.create_engine_config()
        assert raw == before
        assert args.speculative_config == before


def test_a_second_engine_is_not_refused_for_the_environment_the_first_one_left(pair: Pair) -> None:
    for _ in range(2):
        build(pair.target, user_config(pair), fail_on_environ_validation=True)


@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, lambda value: pickle.loads(pickle.dumps(value))])
def test_the_settings_travel_with_vllms_configuration(pair: Pair, way: Callable[..., Any]) -> None:
    config = build(pair.target, user_config(pair, arbiter=str(pair.artefact), threshold=0.25, max_overrides=3))
    expected = config.speculative_config.cospec
    assert way(config.speculative_config).cospec == expected
    assert way(config).speculative_config.cospec == expected


def test_the_settings_leave_vllms_hash_alone(pair: Pair) -> None:
    stock = build(pair.target, {"model": str(pair.draft), "num_speculative_tokens": 3}).speculative_config
    assert build(pair.target, user_config(pair)).speculative_config.compute_hash() == stock.compute_hash()


def test_lossy_verification_is_warned_of_once(pair: Pair) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign,assignment]
    translate.logger.addHandler(handler)
    try:
        for _ in range(2):
            settings_of(pair, arbiter={"policy": "typical", "posterior_threshold": 0.012345})
    finally:
        translate.logger.removeHandler(handler)
    lines = [record for record in records if "0.012345" in record.getMessage()]
    assert [(line.levelname, "LOSSY" in line.getMessage()) for line in lines] == [("WARNING", True)]


def test_an_untested_version_is_served_when_every_hook_is_there(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.99.0")
    assert settings_of(pair).policy == Typical()


def test_a_vllm_that_lost_a_hook_is_refused_before_an_engine_starts(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(RejectionSampler, "apply_logits_processors")
    error = refused(pair.target, user_config(pair), "RejectionSampler.apply_logits_processors")
    assert isinstance(error, CompatibilityError)
    build(pair.target, {"model": str(pair.draft), "num_speculative_tokens": 3})  # without cospec it still serves


STOCK = """
import dataclasses, re, sys
from vllm.engine.arg_utils import EngineArgs
from vllm_cospec import compat, ledger, plugin

stock = EngineArgs.create_speculative_config
plugin.register()
ours = EngineArgs.create_speculative_config
assert ours is not stock
target, draft = sys.argv[1:]

def outcome(create, config, **flags):
    EngineArgs.create_speculative_config = create
    args = EngineArgs(model=target, max_model_len=64, enforce_eager=True, speculative_config=config, **flags)
    try:
        built = args.create_engine_config()
        made = built.speculative_config
        assert not hasattr(made, "cospec")
        fields = [] if made is None else [(f.name, repr(getattr(made, f.name))) for f in dataclasses.fields(made)]
        result = (type(made), fields, built.parallel_config.worker_cls, sorted(args.speculative_config or ()))
    except Exception as error:
        result = (type(error), str(error))
    return re.sub("0x[0-9a-f]+", "", repr(result))

cases = [
    lambda: (None, {}),
    lambda: ({"model": draft, "num_speculative_tokens": 3}, {}),
    lambda: ({"model": draft, "num-speculative-tokens": 3, "method": "draft_model"}, {}),
    lambda: ({"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}, {}),
    lambda: (None, {"spec_method": "ngram", "spec_tokens": 2}),
    lambda: ({"method": "ngram"}, {"spec_method": "ngram"}),
    lambda: ({"model": draft, "num_speculative_tokens": 3, "max_overrides": 1}, {}),
    lambda: ({"method": "cospecc", "model": draft, "num_speculative_tokens": 3}, {}),
    lambda: ({"method": ["cospec"], "model": draft, "num_speculative_tokens": 3}, {}),
    lambda: ({"model": draft, "num_speculative_tokens": 0}, {}),
]
for case in cases:
    (config, flags), (again, _) = case(), case()
    expected, got = outcome(stock, config, **flags), outcome(ours, again, **flags)
    assert got == expected, (got, expected)
for patch in ledger.PATCHES:
    if patch.level == "symbol" and patch.when != "always":
        assert compat.MARK not in vars(compat.find(patch.symbol)), patch.symbol
print("SAME", len(cases))
"""


def test_without_cospec_everything_is_as_without_the_plugin(pair: Pair) -> None:
    result = subprocess.run(
        [sys.executable, "-c", STOCK, pair.target, pair.draft],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "VLLM_PLUGINS": ""},  # the script registers by itself, after a look at the original
        check=False,
    )
    assert "SAME 10" in result.stdout, result.stderr[-3000:]


@pytest.mark.engine  # as a server does, until it has read its configuration
def test_vllms_own_command_ends_with_the_sentence_alone(pair: Pair) -> None:
    """No traceback of vLLM's above it, and no engine process."""
    module = "vllm.entrypoints.openai.api_server"
    config = json.dumps(user_config(pair, exact_tokens=-1))
    result = subprocess.run(
        [sys.executable, "-m", module, "--model", pair.target, "--max-model-len", "64", "--speculative-config", config],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("cospec: speculative_config.exact_tokens: ")


def test_a_head_of_several_modules_is_refused(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a cache of its own, and cospec follows the first module's."""
    demo = Path(vllm_cospec.demo.__file__).parent
    target = random_target(tmp_path / "target", demo, num_modules=2)
    config = {"method": "cospec", "draft_method": "mtp", "num_speculative_tokens": 2, "arbiter": {"policy": "typical"}}
    assert build(target, config).speculative_config.cospec.num_speculative_tokens == 2  # V1 runs the first one twice
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    refused(target, config, "speculative_config.num_speculative_tokens: 2 needs several modules of this model's MTP")
