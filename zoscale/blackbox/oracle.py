"""The black box: values of f(x) or f(x, xi) with errors, and how many were asked for."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from zoscale.blackbox.draws import subsets, uniforms
from zoscale.noise.generator import Noise

Feedback = Literal["two_point", "one_point"]


class Minibatches:
    """Samples xi of a finite sum: minibatch n, as int64 [size] indices drawn with replacement.

    Args:
        num_examples: terms of the sum.
        size: indices of a minibatch.
        seed: of the draws; minibatch n is a function of (seed, n).
    """

    def __init__(self, num_examples: int, size: int, *, seed: int = 0) -> None:
        if num_examples < 1 or size < 1:
            raise ValueError(f"expected num_examples >= 1 and size >= 1, got {num_examples} and {size}")
        self._draws = subsets(Noise(seed), num_examples, size)

    def __call__(self, number: int) -> Tensor:
        return self._draws[number]


class Oracle:
    """Counts and spoils the values of a function: f(x, xi) + delta, |delta| <= noise.

    Args:
        function: f(x) for float [d] x, or f(x, xi) where samples are given; returns a number. It is also asked at
            points up to tau outside of the feasible set, and must not change x.
        samples: xi by its number 0, 1, ...; None = f is deterministic.
        feedback: the values of one gradient estimate share one xi (`two_point`), or each has its own (`one_point`);
            then differences carry errors of the order of 1 / tau, so tau must be larger.
        noise: bound Delta >= 0 of the error of a value, uniform on [-Delta, Delta] and independent. An error that
            depends on x belongs into the function.
        seed: of the errors.

    Raises:
        ValueError: for impossible options.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        samples: Callable[[int], Any] | None = None,
        feedback: Feedback = "two_point",
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not callable(function):
            raise ValueError(f"expected a callable f(x) or f(x, xi), got {type(function).__name__}")
        if feedback not in get_args(Feedback):
            raise ValueError(f"expected feedback {' or '.join(get_args(Feedback))}, got {feedback!r}")
        if feedback == "one_point" and samples is None:
            raise ValueError("expected samples with one_point feedback, got none; a deterministic f has one value")
        if not 0 <= noise < math.inf:
            raise ValueError(f"expected a finite noise >= 0, got {noise}")
        self.num_calls = 0
        self._function = function
        self._samples = samples
        self._feedback = feedback
        self._noise = noise
        self._errors = uniforms(Noise(seed))
        self._num_samples = 0

    def values(self, points: Iterable[Tensor]) -> list[float]:
        """One value per point, for one gradient estimate; each is a call.

        Raises:
            FloatingPointError: if a value is not finite.
        """
        values = []
        for number, point in enumerate(points):
            arguments = () if self._samples is None else (self._sample(is_first=number == 0),)
            value = float(self._function(point, *arguments))
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"expected a finite value of the function, got {value} in call {self.num_calls}; "
                    "it is also asked up to tau outside of the feasible set"
                )
            if self._noise:
                value += self._noise * (2 * self._errors[self.num_calls] - 1)
            self.num_calls += 1
            values.append(value)
        return values

    def _sample(self, *, is_first: bool) -> Any:
        assert self._samples is not None, "only of stochastic functions"
        if is_first or self._feedback == "one_point":
            self._num_samples += 1
        return self._samples(self._num_samples - 1)


def start_point(x: Any) -> Tensor:
    """A point to start from: a copy, float64 unless it is a tensor of another floating type.

    Raises:
        ValueError: if it is not a finite, non-empty vector.
    """
    is_float = isinstance(x, Tensor) and x.is_floating_point()
    try:
        point = x.detach().clone() if is_float else torch.tensor(x, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected a vector of numbers to start from, got {x!r}") from error
    if point.dim() != 1 or point.numel() == 0 or not bool(point.isfinite().all()):
        raise ValueError(f"expected a finite vector [d], d >= 1, to start from, got {tuple(point.shape)} {point}")
    return point
