"""What the trackers are driven with: tensors whose values at each step are known, and their averages.

NumPy only: the values are made in every process from the name of the history alone.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from posthoc_ema import gamma_from_sigma_rel, power_step_weights

SIGMA_RELS = (0.05, 0.10, 0.28)
STEPS = 60
EVERY = 20
"""Snapshots at 20, 40 and 60 of the histories that count steps."""


@dataclass(frozen=True)
class Spec:
    """One tensor of a model.

    Attributes:
        name: with dots for submodules.
        shape: its shape.
        dtype: PyTorch's name of its dtype.
        kind: "parameter", "frozen" (a parameter without gradient) or "buffer".
        tied_to: name of the parameter that this one is, if it is another's second name.
        transposed: memory runs along the first dimension, as that of a transposed parameter does.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    kind: str = "parameter"
    tied_to: str | None = None
    transposed: bool = False

    @property
    def averaged(self):
        return self.kind == "parameter" and self.tied_to is None


@dataclass(frozen=True)
class History:
    """A training run whose weights are known in advance.

    Attributes:
        name: key in HISTORIES.
        specs: tensors of the model.
        elapsed: clock units that each step takes.
        impulse: number i of each parameter is 1 during step i and 0 otherwise: the average of the
            parameter is then the weight of each step, which is the profile itself.
    """

    name: str
    specs: tuple[Spec, ...]
    elapsed: tuple[int, ...] = (1,) * STEPS
    impulse: bool = False

    @property
    def times(self):
        """Training time after each step."""
        return np.cumsum(self.elapsed)

    @property
    def samples_per_step(self):
        """Clock units of every step, or None where they differ."""
        return self.elapsed[0] if len(set(self.elapsed)) == 1 else None

    @property
    def clock(self):
        return "steps" if set(self.elapsed) == {1} else "images"

    @property
    def averaged(self):
        return [spec for spec in self.specs if spec.averaged]

    def value(self, spec, step):
        """Values of a tensor after `step` steps; step 0 is what the model is built with.

        float16 and bfloat16 come as float32 that they can hold exactly.
        """
        moves = 0 if spec.kind == "frozen" else step
        seed = zlib.crc32(f"{self.name}/{spec.tied_to or spec.name}/{moves}".encode())
        rng = np.random.default_rng(seed)
        if spec.dtype == "bool":
            return rng.random(spec.shape) < 0.5
        if spec.dtype.startswith("int"):
            return rng.integers(-(2**30), 2**30, spec.shape).astype(spec.dtype)
        if self.impulse and spec.kind == "parameter":
            values = np.zeros(spec.shape, np.float32)
            if step == 0:
                return values + 7  # initial weights that would be seen in an average
            values.reshape(-1)[step - 1] = 1
            return values
        values = np.asarray(rng.normal(size=spec.shape) + moves / 8)
        if spec.dtype == "float64":
            return values
        values = values.astype(np.float32)
        if spec.dtype == "float16":
            return values.astype(np.float16).astype(np.float32)
        if spec.dtype == "bfloat16":
            return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        return values

    def expected(self, sigma_rel, updates):
        """Closed form of the averages, float64, by name.

        Args:
            sigma_rel: relative length.
            updates: steps after which the averages are updated; the last of them is where they are
                asked for. The last step of an interval stands for all of it.
        """
        times = [int(self.times[step - 1]) for step in updates]
        weights = power_step_weights(times, float(gamma_from_sigma_rel(sigma_rel)))
        return {
            spec.name: sum(
                weight * self.value(spec, step).astype(np.float64)
                for weight, step in zip(weights.tolist(), updates, strict=True)
            )
            for spec in self.averaged
        }

    def largest(self, name):
        """Largest magnitude that a tensor ever has: what rounding is measured against."""
        spec = next(spec for spec in self.specs if spec.name == name)
        values = [self.value(spec, step) for step in range(1, len(self.elapsed) + 1)]
        return max((float(np.abs(v).max()) for v in values if v.size), default=0.0)


_IMPULSE = (Spec("w", (STEPS,)),)
_LARGE_STEPS = (8,) * 20 + (128,) * 20 + (64, 3, 1, 7) * 5

_ALL = (
    History("impulse", _IMPULSE, impulse=True),
    History("impulse-fixed-samples", _IMPULSE, elapsed=(8,) * STEPS, impulse=True),
    History("impulse-samples", _IMPULSE, elapsed=_LARGE_STEPS, impulse=True),
    History(
        "tied",
        (
            Spec("embed.weight", (6, 4)),
            Spec("head.weight", (6, 4), tied_to="embed.weight"),
            Spec("head.bias", (6,)),
        ),
    ),
    History(
        "buffers",
        (
            Spec("weight", (5, 3)),
            Spec("mean", (5,), kind="buffer"),
            Spec("narrow", (5,), "float16", kind="buffer"),
            Spec("count", (), "int64", kind="buffer"),
            Spec("table", (2, 3), "int32", kind="buffer"),
            Spec("mask", (4,), "bool", kind="buffer"),
            Spec("anchor", (3, 2), kind="frozen"),
        ),
    ),
    History("float64", (Spec("a", (7, 3), "float64"), Spec("b", (5,), "float64"))),
    History("float16", (Spec("a", (7, 3), "float16"), Spec("b", (5,), "float16"))),
    History("bfloat16", (Spec("a", (7, 3), "bfloat16"), Spec("b", (5,), "bfloat16"))),
    History(
        "mixed-dtypes",
        tuple(
            Spec(f"layer{i}.w", (4, i + 2), dtype)
            for i, dtype in enumerate(("float32", "bfloat16", "float64", "float16", "float32"))
        ),
    ),
    History(
        "scalars-and-empty",
        (
            Spec("gain", ()),
            Spec("none", (0,)),
            Spec("inner.none", (3, 0, 2)),
            Spec("one", (1,)),
            Spec("matrix", (2, 2)),
        ),
    ),
    History(
        "shapes",
        (
            Spec("odd", (7, 3)),
            Spec("prime", (13,)),
            Spec("cube", (2, 3, 5)),
            Spec("long", (40, 17)),
            *(Spec(f"many.p{i}", (i % 5 + 1,)) for i in range(30)),
        ),
    ),
    History("transposed", (Spec("turned", (5, 4), transposed=True), Spec("straight", (4,)))),
)
HISTORIES = {history.name: history for history in _ALL}
