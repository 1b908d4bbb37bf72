"""One noisy step: gradients of patients clipped one by one, summed, noised, divided by a constant.

Opacus clips, sums and steps; the noise is our own, because its generators take a seed.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from core.privacy.noise import PrivateRandom
from core.privacy.own_logging import own_logging

with own_logging():
    from opacus.optimizers import DPOptimizer


class PrivateOptimizer:
    """A torch optimiser that sees gradients only with noise.

    **Guarantees**, for whatever gradients are given:
        - One patient changes the sum that gets noise by at most `clip_norm`, in the norm over all
          parameters together. A patient whose gradient is not finite adds nothing.
        - The noise on each coordinate of the sum has deviation noise_multiplier * clip_norm and
          comes from `random`; it is there in a step without patients too.
        - The divisor is `expected_patients`, whatever the number of patients.

    Args:
        optimizer: over the parameters that learn; others of it must not require a gradient.
        parameters: those that learn, by the names under which gradients come.
        noise_multiplier: deviation of the noise in clips.
        clip_norm: longest gradient of a patient.
        expected_patients: a constant of the recipe.
        random: the source of the noise.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        *,
        noise_multiplier: float,
        clip_norm: float,
        expected_patients: int,
        random: PrivateRandom,
    ) -> None:
        self._parameters = dict(parameters)
        self._optimizer = _Noisy(
            optimizer,
            random,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip_norm,
            expected_batch_size=expected_patients,
        )
        assert {id(p) for p in self._parameters.values()} == {id(p) for p in self._optimizer.params}

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Clip the gradients of patients, each once, and add them to the step's sum.

        Args:
            gradients: by parameter name, stacked over patients [n, ...].
        """
        assert gradients.keys() == self._parameters.keys()
        rows = [g.flatten(1).isfinite().all(1) for g in gradients.values()]
        finite = torch.stack(rows).all(0)  # [n]
        for name, parameter in self._parameters.items():
            gradient = gradients[name]
            if not finite.all():
                # Not a product: 0 times NaN is NaN.
                gradient = gradient.where(finite.view(-1, *[1] * parameter.ndim), 0.0)
            parameter.grad_sample = gradient  # type: ignore[attr-defined]
        self._optimizer.signal_skip_step()
        self._optimizer.step()  # clips and adds, no more
        self._optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Noise the sum, divide it, let the optimiser use it, and begin a new sum."""
        for parameter in self._parameters.values():
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


class _Noisy(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimiser with noise from PrivateRandom."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, random: PrivateRandom, **options: float
    ) -> None:
        super().__init__(optimizer, **options)
        self._random = random

    def add_noise(self) -> None:
        """Set each parameter's gradient to the clipped sum and noise."""
        deviation = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            draws = torch.from_numpy(self._random.normal(parameter.numel()))
            noise = (deviation * draws).to(parameter.device).view_as(parameter)
            # In double precision: the sum is rounded once, with the noise in it.
            parameter.grad = (parameter.summed_grad + noise).to(parameter.dtype)
