"""The training of the code pair's draft, on a model of a few thousand weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.config import bundled
from vllm_cospec.training.pairs.code import build
from vllm_cospec.training.pairs.code.draft import (
    DECAY_SHARE,
    HELD,
    LOG,
    STATE,
    Hyperparameters,
    Run,
    exact_match,
    training,
)
from vllm_cospec.training.pairs.code.llama import EMBEDDING, Shape, hidden_states, new_weights, token_loss
from vllm_cospec.training.pairs.code.oracle import END, Choices, figures
from vllm_cospec.training.pairs.code.text import Vocabulary, line_ends, token_stream, vocabulary_of, windows
from vllm_cospec.training.tasks import Problem
from vllm_cospec.training.tasks.code_corpus import Source, fingerprint, read_corpus
from vllm_cospec.training.tasks.code_lines import Place

FULL = 300
SHAPE = Shape(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2)
VOCABULARY = Vocabulary(torch.arange(5, 45), FULL)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def new_run(hyperparameters: Hyperparameters | None = None, vocabulary: Vocabulary = VOCABULARY) -> Run:
    hyperparameters = hyperparameters or Hyperparameters(SHAPE, batch=4, length=16)
    embedding = torch.randn(len(vocabulary.used) + 1, SHAPE.hidden_size, generator=torch.manual_seed(3)) * 0.2
    return Run(hyperparameters, vocabulary, new_weights(SHAPE, embedding, seed=1))


def text(seed: int = 1) -> torch.Tensor:
    """Ids in which each is followed by the next, with a rare one now and then."""
    ids = torch.arange(2000) % 40 + 5
    ids[torch.randperm(2000, generator=torch.manual_seed(seed))[:30]] = 200
    return ids.int()


def as_transformers(run: Run) -> LlamaForCausalLM:
    weights = {name: weight.detach() for name, weight in run.weights.items()}
    small = weights[EMBEDDING]
    rows = small[run.vocabulary.rows(torch.arange(FULL))]
    model = LlamaForCausalLM(build.llama_config(SHAPE, FULL)).float().eval()
    model.load_state_dict({**weights, EMBEDDING: rows, "lm_head.weight": rows})
    return model


def test_the_loss_and_its_gradients_are_those_of_the_whole_vocabulary() -> None:
    states = torch.randn(600, 32, generator=torch.manual_seed(1)).bfloat16().requires_grad_()
    embedding = torch.randn(41, 32, generator=torch.manual_seed(2)).bfloat16().float().requires_grad_()
    full_targets = torch.randint(FULL, (600,), generator=torch.manual_seed(3))
    loss = token_loss(states, embedding, VOCABULARY.rows(full_targets), VOCABULARY.others)
    (3 * loss).backward()
    assert states.grad is not None
    found = states.grad.float(), embedding.grad
    same_states, same_embedding = states.detach().float().requires_grad_(), embedding.detach().requires_grad_()
    logits = same_states @ same_embedding[VOCABULARY.rows(torch.arange(FULL))].T
    wanted = torch.nn.functional.cross_entropy(logits, full_targets)
    (3 * wanted).backward()
    # logits, slopes and products are bfloat16, of which a number keeps 8 bits
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-3)
    for ours, theirs in zip(found, (same_states.grad, same_embedding.grad), strict=True):
        assert theirs is not None
        torch.testing.assert_close(ours, theirs, atol=0.01 * theirs.abs().max().item(), rtol=0)


def test_the_model_is_the_llama_that_transformers_runs() -> None:
    run = new_run()
    ids = torch.randint(FULL, (3, 20), generator=torch.manual_seed(5))
    ours = hidden_states(run.weights, run.vocabulary.rows(ids), SHAPE).float()
    theirs = as_transformers(run).model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=0.03, rtol=0)  # states around 1 in bfloat16
    expected = as_transformers(run)(input_ids=ids[:, :-1]).logits.flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(expected, ids[:, 1:].flatten())
    assert run.loss(ids).item() == pytest.approx(wanted.item(), rel=2e-3)


def test_it_learns_and_ends_with_a_rate_of_zero(tmp_path: Path) -> None:
    run = new_run()
    held, decay = 110, round(110 * DECAY_SHARE)
    records = list(training(run, text(), tmp_path, minutes=5, steps=held))
    assert [record["step"] for record in records] == list(range(1, held + decay + 1))
    assert records[0]["loss"] > 4
    assert records[-1]["loss"] < 1
    rates = [record["rate"] for record in records]
    assert rates[99 : held + 1] == [1] * (held - 98)
    assert rates[held + 1] < 1
    assert rates[-1] == pytest.approx(1 / decay, abs=1e-4)
    assert (tmp_path / HELD).is_file()


def test_the_decay_begins_when_it_takes_the_rest_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 5))  # the clock is read twice a step: 10 seconds each
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    run = new_run()
    list(training(run, text(), tmp_path, minutes=20, steps=10_000))
    assert run.progress.decay_from == pytest.approx(120 / (1 + DECAY_SHARE), abs=1)
    assert run.progress.decay_steps == round(run.progress.decay_from * DECAY_SHARE)
    assert run.progress.finished


def test_a_run_that_was_stopped_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    list(training(straight := new_run(), text(), whole, minutes=5, steps=24))
    straight.save(whole / STATE)
    for at in (7, 26, 1000):  # before and in the decay
        run = new_run()
        if (parts / STATE).exists():
            run.restore(parts / STATE)
        for record in training(run, text(), parts, minutes=5, steps=24):
            if record["step"] == at:
                break
        run.save(parts / STATE)
    one, other = load_file(whole / STATE), load_file(parts / STATE)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    again = new_run()
    again.restore(parts / HELD)
    assert again.progress.step == 24
    assert again.progress.decay_from < 0
    with pytest.raises(ConfigError, match="other hyperparameters"):
        new_run(Hyperparameters(SHAPE, batch=5, length=16)).restore(parts / STATE)
    with pytest.raises(ConfigError, match="another text"):
        new_run(vocabulary=Vocabulary(torch.arange(6, 46), FULL)).restore(parts / STATE)


def test_each_pass_takes_every_window_once() -> None:
    stream = torch.arange(1000).int()
    rows = torch.cat([windows(stream, step, batch=7, length=10, seed=1) for step in range(28)])
    assert rows.shape == (196, 11)
    assert (rows.diff(dim=1) == 1).all()
    for one in (rows[:98, 0], rows[98:, 0]):
        assert one.sort().values.diff().eq(10).all()
    assert not torch.equal(rows[:98, 0], rows[98:, 0])


def test_the_vocabulary_keeps_what_occurs_often_enough() -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled("target"))
    sources = [Source("a.py", "abab" * 5 + "\n", "pretrain"), Source("b.py", "ababz", "pretrain")]
    stream = token_stream(sources, tokenizer)
    assert tokenizer.decode(stream[:20].tolist()) == "abab" * 5
    assert stream.tolist().count(0) == 2
    vocabulary = vocabulary_of(stream, len(tokenizer))
    assert tokenizer.convert_ids_to_tokens(vocabulary.used.tolist()) == ["a", "b"]
    a, b, z = (tokenizer.convert_tokens_to_ids(letter) for letter in "abz")
    assert vocabulary.rows(torch.tensor([b, z, a])).tolist() == [1, 2, 0]
    assert vocabulary.others == len(tokenizer) - 2


def test_an_exact_match_is_the_answer_and_the_end_of_its_line() -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled("target"))
    vocabulary = Vocabulary(torch.arange(len(tokenizer)), len(tokenizer) + 1)
    run = new_run(vocabulary=vocabulary)
    assert line_ends(tokenizer) == [tokenizer.convert_tokens_to_ids("\n")]
    loop = tokenizer.encode("0123456789\n", add_special_tokens=False)
    stream = torch.tensor(loop * 200).int()
    for step in range(150):
        run.learn(windows(stream, step, 8, 16, seed=1))
    right = Problem("89\n01", "23456789", Place("a.py", 2, "0123456789"))
    longer = Problem("89\n01", "234567890", Place("a.py", 2, "01234567890"))
    shorter = Problem("89\n01", "234567", Place("a.py", 2, "01234567"))
    assert exact_match(run, [right], tokenizer) == 1
    assert exact_match(run, [right, longer, shorter, right], tokenizer) == 0.5


def test_a_packed_draft_is_the_trained_one_over_the_whole_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "LEARNT_PACKAGE", "typer")  # a small one
    splits = fingerprint(read_corpus("typer"))
    target = bundled("target")
    tokenizer = AutoTokenizer.from_pretrained(target)
    vocabulary = Vocabulary(torch.arange(8, 60), len(tokenizer))
    run = new_run(vocabulary=vocabulary)
    work = tmp_path / "work"
    work.mkdir()
    end = json.dumps({"step": 5, "held_out_loss": 1.5}) + "\n"
    (work / LOG).write_text(json.dumps({"text": splits["test"]}) + "\n" + end)
    with pytest.raises(ConfigError, match="holds no training run"):
        build.pack(work, tmp_path / "packed")
    list(training(run, torch.arange(8, 60).repeat(40).int(), work, minutes=5, steps=4))
    run.save(work / STATE)
    with pytest.raises(ConfigError, match="other files of typer"):
        build.pack(work, tmp_path / "packed")
    (work / LOG).write_text(json.dumps({"text": splits["pretrain"]}) + "\n" + end)
    build.pack(work, tmp_path / "packed")
    made = json.loads((tmp_path / "packed" / build.TRAINING).read_text())
    assert made["splits"] == splits
    assert made["last_measured"]["held_out_loss"] == 1.5
    assert made["progress"]["step"] == run.progress.step
    build.build_draft(tmp_path / "packed", tokenizer, target, tmp_path / "draft")
    full = LlamaForCausalLM.from_pretrained(tmp_path / "draft", dtype=torch.float32).eval()
    ids = torch.randint(len(tokenizer), (2, 30), generator=torch.manual_seed(4))
    logits = full(input_ids=ids).logits
    ours = hidden_states(run.weights, vocabulary.rows(ids), SHAPE).float() @ run.weights[EMBEDDING].T
    torch.testing.assert_close(logits, ours[..., vocabulary.rows(torch.arange(len(tokenizer)))], atol=0.1, rtol=0)
    assert math.isclose(logits[0, 0, 0].item(), logits[0, 0, 70].item())
    ends = json.loads((tmp_path / "draft" / "generation_config.json").read_text())["eos_token_id"]
    assert set(line_ends(tokenizer)) < set(ends)
    with pytest.raises(ConfigError, match="holds no packed draft"):
        build.build_draft(tmp_path, tokenizer, target, tmp_path / "draft")


def test_the_room_for_an_arbiter_is_counted_along_the_right_answer() -> None:
    both = Choices([1, 2, END], target=[1, 2, END], draft=[1, 2, END])
    once = Choices([1, 2, END], target=[1, 8, END], draft=[1, 2, 9])
    twice = Choices([1, 2, END], target=[8, 2, 8], draft=[1, 9, END])
    never = Choices([1, 2, END], target=[1, 8, END], draft=[1, 9, END])
    assert [row.overrides_needed for row in (both, once, twice, never)] == [0, 1, 2, None]
    found = figures([both, once, twice, never], [4])
    assert found["target"] == found["either"] == 0.25
    assert found["draft"] == 0.25
    assert found["at_most_one_override"] == 0.5
    assert found["any_overrides"] == 0.75
    assert found["num_mismatches"] == 6
    assert found["mismatches_draft_right"] == 3 / 6
    # once: the first token comes after the prompt alone, then a block of the draft's; twice is wrong at that first one
    assert found["blocks"][4]["oracle"] == 0.5
    assert found["blocks"][4]["strict_tokens_per_step"] == pytest.approx(12 / 11)
