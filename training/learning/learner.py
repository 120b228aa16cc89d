"""The learner: a clipped policy gradient on the arbiter, and the warm start from branch labels. Needs no Ray.

With r the ratio of an action's probability now and when it was taken, A its advantage, w its weight:

    loss = -mean(w * min(r A, clip(r, 1 - c, 1 + c) A)) - e * mean(entropy) + k * mean(KL(policy || start))

Or, from all branches so far, with d what keeping was worth more than dropping:

    loss = -mean(|d| log p(the action that was worth more)) / mean(|d|),

which is least where p(keep) > 1/2 exactly if keeping is worth more on average.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from vllm_cospec.arbiter import Arbiter, load_artefact
from vllm_cospec.errors import ArtefactError, ConfigError, TrainingError
from vllm_cospec.training.config import LearnerConfig
from vllm_cospec.training.learning.advantages import Samples

SMALLEST_SCALE = 1e-3  # a statistic that hardly varies is not blown up


def initial_arbiter(config: LearnerConfig, seed: int) -> Arbiter:
    """An arbiter that keeps every draft with probability ``initial_keep``, its hidden layers random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        arbiter = Arbiter(tuple(config.hidden_sizes))
    last: Any = arbiter.layers[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, float(np.log(config.initial_keep / (1 - config.initial_keep))))
    return arbiter


def load_start(directory: str, hidden_sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the weights of an artefact to go on from, its standardisation among them.

    Raises:
        ConfigError: it is damaged, or has other hidden sizes.
    """
    try:
        arbiter, _ = load_artefact(Path(directory))
    except ArtefactError as error:
        raise ConfigError(f"learner.start: {error}") from None
    if arbiter.hidden_sizes != hidden_sizes:
        raise ConfigError(
            f"learner.start: {directory} has hidden sizes {list(arbiter.hidden_sizes)}; set learner.hidden_sizes to "
            f"them, {list(hidden_sizes)} cannot go on from it"
        )
    return arbiter.state_dict()


def bernoulli_entropy(logit: Tensor) -> Tensor:
    """Entropy in nats of Bernoulli variables given by their logits, any shape."""
    return binary_cross_entropy_with_logits(logit, logit.sigmoid(), reduction="none")


def bernoulli_kl(logit: Tensor, other: Tensor) -> Tensor:
    """KL(p || q) in nats of Bernoulli variables given by their logits, any shape."""
    p = logit.sigmoid()
    return p * (logsigmoid(logit) - logsigmoid(other)) + (1 - p) * (logsigmoid(-logit) - logsigmoid(-other))


def policy_loss(
    logit: Tensor, keep: Tensor, old_probability: Tensor, advantage: Tensor, weight: Tensor, clip: float
) -> Tensor:
    """The clipped surrogate, a scalar.

    Args:
        logit: of keeping, now, [S].
        keep: the action, bool [S].
        old_probability: of the action when it was taken, [S].
        advantage, weight: [S].
        clip: c.
    """
    log_probability = torch.where(keep, logsigmoid(logit), logsigmoid(-logit))
    ratio = (log_probability - old_probability.clamp(min=1e-6).log()).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -(weight * gain).sum() / weight.sum().clamp(min=1e-12)


class Learner:
    """The arbiter, its optimiser, and everything else a checkpoint has to hold of them."""

    def __init__(self, config: LearnerConfig, seed: int, updates: int):
        """Args:
        config: of the learner.
        seed: of initial weights and minibatches.
        updates: number of calls of :meth:`update` the learning rate is laid out for.
        """
        self.config = config
        self.arbiter = initial_arbiter(config, seed)
        self.normalised = config.start is not None
        if config.start is not None:
            self.arbiter.load_state_dict(load_start(config.start, self.arbiter.hidden_sizes))
        self.start = copy.deepcopy(self.arbiter)
        self.updates = updates
        self.updates_done = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._optimizer = torch.optim.AdamW(
            self.arbiter.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the arbiter's weights."""
        return {name: tensor.detach().clone() for name, tensor in self.arbiter.state_dict().items()}

    def normalise(self, statistics: np.ndarray) -> None:
        """Set mean and scale of the standardising layer from [M, 16]; done once, so that weights keep their meaning.

        Raises:
            TrainingError: a statistic is not finite.
        """
        _require_finite("statistics", statistics)
        rows = torch.from_numpy(statistics).double()
        self.arbiter.mean.copy_(rows.mean(0))
        deviation = rows.std(0) if len(rows) > 1 else torch.ones(rows.shape[1])
        self.arbiter.scale.copy_(torch.where(deviation > SMALLEST_SCALE, deviation, 1.0))
        self.start = copy.deepcopy(self.arbiter)
        self.normalised = True

    def warm_start(self, statistics: np.ndarray, difference: np.ndarray) -> dict[str, float]:
        """Fit the arbiter to branch labels: with which action the answer was better, weighted with by how much.

        Args:
            statistics: [B, 16] float32 of the branched mismatches.
            difference: [B] the task's reward when kept minus that when not; where it is 0 there is no label.

        Returns:
            The final loss and accuracy on the labels.

        Raises:
            TrainingError: no label at all, or something is not finite.
        """
        _require_finite("statistics", statistics)
        _require_finite("rewards", difference)
        labelled = np.flatnonzero(difference)
        if not len(labelled):
            raise TrainingError(
                f"warm start: none of {len(difference)} branches changed its answer; check task.reward, or raise "
                f"warm_start_iterations"
            )
        x = torch.from_numpy(statistics[labelled])
        label = torch.from_numpy(difference[labelled] > 0).float()
        weight = torch.from_numpy(np.abs(difference[labelled])).float()
        loss = torch.zeros(())
        for _ in range(self.config.warm_start_epochs):
            for rows in self._minibatches(len(x)):
                logit = self.arbiter.logit(x[rows])
                terms = binary_cross_entropy_with_logits(logit, label[rows], weight=weight[rows], reduction="sum")
                loss = terms / weight[rows].sum()
                self._step(loss)
        with torch.no_grad():
            right = ((self.arbiter.logit(x) > 0) == (label > 0)).float()
        self.start = copy.deepcopy(self.arbiter)
        return {
            "warm_start_labels": float(len(x)),
            "warm_start_loss": loss.item(),
            "warm_start_accuracy": float((right * weight).sum() / weight.sum()),
        }

    def update(self, samples: Samples) -> dict[str, float]:
        """Take one update; returns means over its steps.

        Raises:
            TrainingError: an input or the loss is not finite.
        """
        for name in ("statistics", "advantage", "probability", "weight"):
            _require_finite(name, getattr(samples, name))
        self._begin_update()
        if not len(samples.keep):
            return {}
        x = torch.from_numpy(samples.statistics)
        keep = torch.from_numpy(samples.keep)
        old, advantage, weight = (
            torch.from_numpy(array).float() for array in (samples.probability, samples.advantage, samples.weight)
        )
        sums: dict[str, float] = {}
        steps = 0
        for _ in range(self.config.epochs):
            for rows in self._minibatches(len(x)):
                logit = self.arbiter.logit(x[rows])
                policy = policy_loss(logit, keep[rows], old[rows], advantage[rows], weight[rows], self.config.clip)
                entropy = bernoulli_entropy(logit).mean()
                with torch.no_grad():
                    start = self.start.logit(x[rows])
                divergence = bernoulli_kl(logit, start).mean()
                loss = policy - self.config.entropy_bonus * entropy + self.config.kl_penalty * divergence
                norm = self._step(loss)
                steps += 1
                for name, value in (
                    ("loss", loss), ("entropy", entropy), ("kl_from_start", divergence), ("grad_norm", norm)
                ):  # fmt: skip
                    sums[name] = sums.get(name, 0.0) + value.item()
        return {name: value / steps for name, value in sums.items()}

    def fit(self, statistics: np.ndarray, worth: np.ndarray, new: int) -> dict[str, float]:
        """Take one update from the branches of all iterations so far; returns means over its steps.

        Args:
            statistics: [B, 16] float32 of the branched mismatches.
            worth: [B] what keeping was worth more than dropping; where it is 0 there is no label.
            new: how many of them are this iteration's; they decide how many steps are taken.

        Raises:
            TrainingError: an input or the loss is not finite.
        """
        _require_finite("statistics", statistics)
        _require_finite("returns", worth)
        self._begin_update()
        labelled = np.flatnonzero(worth)
        if not len(labelled):
            return {}
        x, label = torch.from_numpy(statistics[labelled]), torch.from_numpy(worth[labelled] > 0).float()
        ends = torch.from_numpy(np.abs(worth[labelled])).double().cumsum(0)
        steps = self.config.epochs * max(1, -(-2 * new // self.config.minibatch_size))
        sums = {"loss": 0.0, "grad_norm": 0.0}
        for _ in range(steps):  # drawn with the probabilities that would be their weights: each draw counts alike
            drawn = torch.rand(self.config.minibatch_size, generator=self._generator, dtype=torch.float64) * ends[-1]
            rows = torch.searchsorted(ends, drawn, right=True).clamp(max=len(x) - 1)
            loss = binary_cross_entropy_with_logits(self.arbiter.logit(x[rows]), label[rows])
            sums["grad_norm"] += self._step(loss).item()
            sums["loss"] += loss.item()
        with torch.no_grad():
            entropy = bernoulli_entropy(self.arbiter.logit(x[-new:])).mean()
        return {"entropy": entropy.item(), **{name: value / steps for name, value in sums.items()}}

    def _begin_update(self) -> None:
        """Set the learning rate of the next update."""
        fraction = min(1.0, self.updates_done / max(1, self.updates))
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate * (1 - 0.9 * fraction)
        self.updates_done += 1

    def _minibatches(self, count: int) -> list[Tensor]:
        order = torch.randperm(count, generator=self._generator)
        return list(order.split(self.config.minibatch_size))

    def _step(self, loss: Tensor) -> Tensor:
        if not loss.isfinite():
            raise TrainingError(
                f"loss: {loss.item()} is not finite; the last checkpoint is intact: lower learner.learning_rate and "
                f"continue with --resume"
            )
        self._optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.arbiter.parameters(), self.config.max_grad_norm)
        if not norm.isfinite():
            raise TrainingError(
                "gradient: not finite; the last checkpoint is intact: lower learner.learning_rate and continue with "
                "--resume"
            )
        self._optimizer.step()
        return norm

    def state(self) -> dict[str, Tensor]:
        """Return everything as named tensors: weights, start, moments, random state, counts."""
        tensors = {f"arbiter.{name}": tensor for name, tensor in self.weights().items()}
        tensors |= {f"start.{name}": tensor.detach().clone() for name, tensor in self.start.state_dict().items()}
        for name, parameter in self.arbiter.named_parameters():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value.detach().clone()
        tensors["random"] = self._generator.get_state()
        tensors["counts"] = torch.tensor([self.updates_done, int(self.normalised)])
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what :meth:`state` returned."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        self.arbiter.load_state_dict(part("arbiter."))
        self.start.load_state_dict(part("start."))
        for name, parameter in self.arbiter.named_parameters():
            moments = {
                key: tensors[f"optimizer.{key}.{name}"].clone()
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"optimizer.{key}.{name}" in tensors
            }
            if moments:
                self._optimizer.state[parameter] = moments
        self._generator.set_state(tensors["random"])
        self.updates_done, self.normalised = int(tensors["counts"][0]), bool(tensors["counts"][1])


def _require_finite(name: str, values: np.ndarray) -> None:
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise TrainingError(f"{name}: {bad} of {values.size} values are not finite; the last checkpoint is intact")
