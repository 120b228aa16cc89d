"""Logistic regression on standardised statistics, and the network that computes it: what a trained one is judged by."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from vllm_cospec.arbiter import Arbiter


def logistic_regression(x: Tensor, keep: Tensor, weight: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Fit to the optimum, in the precision of ``x``; returns the weights, [16], and the bias, a scalar.

    Args:
        x: standardised statistics, [M, 16].
        keep: [M], 1 where the draft is to be kept, else 0.
        weight: [M], what each of them counts for.
        penalty: on the squared weights, so that an optimum exists.
    """
    weights = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros((), dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        terms = binary_cross_entropy_with_logits(x @ weights + bias, keep, weight=weight, reduction="sum")
        loss = terms / weight.sum() + penalty * weights.square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    return weights.detach(), bias.detach()


def linear_arbiter(weights: Tensor, bias: Tensor, hidden_sizes: tuple[int, ...]) -> Arbiter:
    """Return a logistic regression on standardised statistics in the shape of an arbiter: relu(z) - relu(-z) is z.

    Args:
        weights: [16].
        bias: scalar.
        hidden_sizes: at least two each.
    """
    arbiter = Arbiter(hidden_sizes)
    state = {name: torch.zeros_like(tensor) for name, tensor in arbiter.state_dict().items()}
    state["scale"] += 1
    state["layers.0.weight"][:2] = torch.stack([weights, -weights])
    state["layers.0.bias"][:2] = torch.stack([bias, -bias])
    last = len(hidden_sizes)
    for layer in range(1, last):
        state[f"layers.{layer}.weight"][:2, :2] = torch.eye(2)
    state[f"layers.{last}.weight"][0, :2] = torch.tensor([1.0, -1.0])
    arbiter.load_state_dict(state)
    return arbiter
