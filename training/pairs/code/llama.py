"""A small Llama for training on CPUs: bfloat16 products, float32 weights, and a loss that never holds all logits.

Weights carry the names transformers gives them. Its vocabulary is that of the training text: the tokenizer's other
tokens share one row, the last, whose probability is shared out evenly among them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
ROWS_AT_A_TIME = 256  # of logits, so that they stay in the cache
INITIAL_STD = 0.02


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 4
    num_heads: int = 4
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


Weights = dict[str, torch.Tensor]


def new_weights(shape: Shape, embedding: torch.Tensor, seed: int) -> Weights:
    """Return initial weights, float32 leaves that require gradients.

    Args:
        shape: the sizes.
        embedding: initial embedding, [vocabulary, hidden], the shared row last.
        seed: of the matrices.
    """
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, std: float = INITIAL_STD) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * std

    hidden, inner = shape.hidden_size, shape.intermediate_size
    towards_residual = INITIAL_STD / math.sqrt(2 * shape.num_layers)
    weights = {EMBEDDING: embedding.clone().float(), FINAL_NORM: torch.ones(hidden)}
    for layer in range(shape.num_layers):
        name = f"model.layers.{layer}."
        for part in ("q", "k", "v"):
            weights[f"{name}self_attn.{part}_proj.weight"] = matrix(hidden, hidden)
        weights[f"{name}self_attn.o_proj.weight"] = matrix(hidden, hidden, towards_residual)
        for part in ("gate", "up"):
            weights[f"{name}mlp.{part}_proj.weight"] = matrix(inner, hidden)
        weights[f"{name}mlp.down_proj.weight"] = matrix(hidden, inner, towards_residual)
        for part in ("input", "post_attention"):
            weights[f"{name}{part}_layernorm.weight"] = torch.ones(hidden)
    return {name: weight.requires_grad_() for name, weight in weights.items()}


def hidden_states(weights: Weights, ids: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Return the states the logits are made of, bfloat16 [batch, length, hidden], for token ids [batch, length]."""
    batch, length = ids.shape
    cosine, sine = _rotation(length, shape)
    state = functional.embedding(ids, weights[EMBEDDING])  # float32 throughout
    for layer in range(shape.num_layers):
        name = f"model.layers.{layer}."

        def cast(parts: tuple[str, ...], name: str = name) -> torch.Tensor:
            return torch.cat([weights[f"{name}{part}_proj.weight"] for part in parts]).bfloat16()

        normed = _norm(state, weights[f"{name}input_layernorm.weight"], shape)
        qkv = functional.linear(normed, cast(("self_attn.q", "self_attn.k", "self_attn.v")))
        q, k, v = qkv.view(batch, length, 3, shape.num_heads, shape.head_size).permute(2, 0, 3, 1, 4)
        q, k = _rotate(q, cosine, sine), _rotate(k, cosine, sine)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = attended.transpose(1, 2).reshape(batch, length, shape.hidden_size)
        state = state + functional.linear(attended, cast(("self_attn.o",)))
        normed = _norm(state, weights[f"{name}post_attention_layernorm.weight"], shape)
        gate, up = functional.linear(normed, cast(("mlp.gate", "mlp.up"))).chunk(2, dim=-1)
        state = state + functional.linear(functional.silu(gate) * up, cast(("mlp.down",)))
    return _norm(state, weights[FINAL_NORM], shape)


def _norm(state: torch.Tensor, gain: torch.Tensor, shape: Shape) -> torch.Tensor:
    return functional.rms_norm(state, (shape.hidden_size,), gain, shape.norm_eps).bfloat16()


def _rotation(length: int, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of each position's angles, bfloat16 [length, head] each."""
    steps = torch.arange(0, shape.head_size, 2, dtype=torch.float32) / shape.head_size
    angles = torch.outer(torch.arange(length, dtype=torch.float32), shape.rope_theta**-steps)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    one, other = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-other, one], dim=-1) * sine


class _TokenLoss(torch.autograd.Function):
    """Mean cross-entropy; makes the gradients in the forward pass, a few rows of logits at a time."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, embedding: torch.Tensor, targets: torch.Tensor, others: int) -> Any:
        head = embedding.bfloat16()
        loss = 0.0
        grad_states, grad_embedding = torch.empty_like(states), torch.zeros_like(embedding)
        for first in range(0, len(states), ROWS_AT_A_TIME):
            rows, wanted = states[first : first + ROWS_AT_A_TIME], targets[first : first + ROWS_AT_A_TIME, None]
            logits = (rows @ head.T).float()
            logits[:, -1] += math.log(others)
            chosen = logits.gather(1, wanted).sum().item()
            top = logits.amax(dim=1, keepdim=True)
            sums = logits.sub_(top).exp_().sum(dim=1, keepdim=True)
            loss += (sums.log() + top).sum().item() - chosen
            logits.div_(sums)
            logits.scatter_add_(1, wanted, logits.new_full(wanted.shape, -1.0))
            slopes = logits.bfloat16()
            grad_states[first : first + ROWS_AT_A_TIME] = slopes @ head
            grad_embedding += (slopes.T @ rows).float()
        loss += math.log(others) * int((targets == len(embedding) - 1).sum())
        ctx.save_for_backward(grad_states / len(states), grad_embedding / len(states))
        return states.new_tensor(loss / len(states), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        states, embedding = ctx.saved_tensors
        return states * grads[0], embedding * grads[0], None, None


def token_loss(states: torch.Tensor, embedding: torch.Tensor, targets: torch.Tensor, others: int) -> torch.Tensor:
    """Return the mean negative log-probability of the next tokens, natural log, over the tokenizer's whole vocabulary.

    Args:
        states: from :func:`hidden_states`, flattened to [n, hidden].
        embedding: float32 [vocabulary, hidden], the row shared by all other tokens last.
        targets: int64 [n].
        others: number of tokens that share the last row, at least 1.
    """
    return _TokenLoss.apply(states, embedding, targets, others)
