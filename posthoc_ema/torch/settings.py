"""The settings of a tracker, checked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from posthoc_ema.codecs import check_codec
from posthoc_ema.errors import ConfigError
from posthoc_ema.profiles import PointProfile, gamma_from_sigma_rel
from posthoc_ema.retention import keep_online
from posthoc_ema.snapshot import CLOCKS
from posthoc_ema.torch.averaging.averages import DTYPES, KERNELS
from posthoc_ema.torch.parameters import SELECTIONS


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a tracker was asked for, see `Tracker`; checked when it is made.

    Raises:
        ConfigError: a value is wrong.
        InvalidProfileError: a sigma_rel lies outside the family.
    """

    sigma_rels: Sequence[float]
    every: int | None
    clock: str
    samples_per_step: int | None
    update_every: int
    dtype: str
    keep: int | None
    keep_range: tuple[float, float]
    raw: str
    tensors: str
    device: str | torch.device | None
    kernel: str
    average_dtype: str
    background: bool
    shard_averages: bool
    on_error: str

    def __post_init__(self) -> None:
        for name in ("every", "samples_per_step", "update_every", "keep"):
            _positive(name, getattr(self, name))
        _one_of("clock", self.clock, CLOCKS)
        if self.clock == "steps" and self.samples_per_step is not None:
            raise ConfigError(
                "samples_per_step needs clock='images'; a step counts as 1 otherwise."
            )
        _one_of("raw", self.raw, ("last", "all", "none"))
        _one_of("tensors", self.tensors, SELECTIONS)
        _one_of("on_error", self.on_error, ("warn", "raise"))
        _one_of("kernel", self.kernel, KERNELS)
        _one_of("average_dtype", self.average_dtype, DTYPES)
        check_codec(self.dtype)
        object.__setattr__(self, "device", _device(self.device))
        object.__setattr__(self, "sigma_rels", _lengths(self.sigma_rels))
        gamma_from_sigma_rel(self.sigma_rels)
        if self.keep is not None:  # the range is checked with the budget
            keep_online([PointProfile(1)], keep=self.keep, sigma_rels_range=self.keep_range)

    @property
    def elapsed_per_step(self) -> int | None:
        """Clock units that a step takes, if they are always the same."""
        return 1 if self.clock == "steps" else self.samples_per_step


def _positive(name: str, value: int | None) -> None:
    if value is not None and (type(value) is not int or value < 1):
        raise ConfigError(f"{name} must be a positive whole number, got {value!r}.")


def _one_of(name: str, value: object, choices: Collection[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def _lengths(sigma_rels: Any) -> tuple[float, ...]:
    """The lengths as a tuple of floats; their range is checked where gamma is computed."""
    rule = f"sigma_rels must be one or more different numbers, such as (0.05, 0.10), got {sigma_rels!r}."
    try:
        lengths = [] if isinstance(sigma_rels, str) else [s + 0.0 for s in sigma_rels]
    except TypeError:
        raise ConfigError(rule) from None
    if not lengths or len(set(lengths)) != len(lengths):
        raise ConfigError(rule)
    return tuple(float(s) for s in lengths)


def _device(device: str | torch.device | None) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device must be one that PyTorch knows, such as 'cpu', or None for averages beside the "
            f"parameters, got {device!r} ({str(error).splitlines()[0]})."
        ) from None
