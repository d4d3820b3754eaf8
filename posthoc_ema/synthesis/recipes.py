"""What is to be written and where its numbers come from, whatever the inputs of a synthesis are."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posthoc_ema.codecs import AnyArray
from posthoc_ema.snapshot import TensorTable
from posthoc_ema.store import SnapshotStore
from posthoc_ema.synthesis.combine import Block, Group, combine
from posthoc_ema.synthesis.plan import RAW, SynthesisPlan
from posthoc_ema.synthesis.reading import SnapshotSource


@dataclass(frozen=True)
class Recipe:
    """A synthesis that is ready to be executed.

    Attributes:
        table: the tensors that are there.
        labels: name of each target in file names, (num_targets).
        provenance: what is recorded of each target, JSON values, (num_targets).
        metadata: string map of the run that its outputs carry on.
        blocks: streams some averaged tensors of some targets: (names, target numbers) -> blocks.
        copy: bits of a copied tensor.
        bytes_read: size of the inputs.
    """

    table: TensorTable
    labels: tuple[str, ...]
    provenance: tuple[Mapping[str, Any], ...]
    metadata: Mapping[str, str]
    blocks: Callable[[Sequence[str], Sequence[int]], Iterator[Block]]
    copy: Callable[[str], AnyArray]
    bytes_read: int


def sizes_of(table: TensorTable, names: Sequence[str]) -> dict[str, int]:
    """Elements of the averaged ones among `names`, in the order of the table; empty ones left out."""
    wanted = set(names)
    sizes = {
        e.name: math.prod(e.shape)
        for e in table.entries.values()
        if e.averaged and e.name in wanted
    }
    return {name: size for name, size in sizes.items() if size}


def label_of(sigma_rel: float, time: int) -> str:
    """Name of a target in file names; repr of a float is exact."""
    length = "raw" if sigma_rel == RAW else f"sigma_rel-{sigma_rel!r}"
    return f"{length}-at-{time}"


def store_recipe(store: SnapshotStore, plan: SynthesisPlan, *, device: str | None = None) -> Recipe:
    """Recipe of a plan on a store; files are opened when the first block is asked for.

    Args:
        store: where the averages are.
        plan: from `plan_synthesis` on the same store.
        device: where the arithmetic runs, see `combine`.
    """

    @functools.cache
    def sources() -> list[SnapshotSource]:
        return [SnapshotSource.open(store, record) for record in plan.files]

    def blocks(names: Sequence[str], targets: Sequence[int]) -> Iterator[Block]:
        sizes = sizes_of(store.table, names)
        if not sizes:
            return iter(())
        parts = plan.weights(sizes, targets)
        return combine(sources(), [Group(part, weights) for part, weights in parts], device=device)

    def copy(name: str) -> AnyArray:
        return at_time().read_copy(name)

    @functools.cache
    def at_time() -> SnapshotSource:
        return SnapshotSource.open(store, next(r for r in store.records if r.time == plan.time))

    return Recipe(
        store.table,
        tuple(label_of(s, plan.time) for s in plan.sigma_rels),
        tuple(_provenance(store, plan, i) for i in range(len(plan.sigma_rels))),
        store.metadata,
        blocks,
        copy,
        plan.bytes_read,
    )


def _provenance(store: SnapshotStore, plan: SynthesisPlan, target: int) -> dict[str, Any]:
    used = [
        {
            "file": r.file,
            "time": r.time,
            "sigma_rel": r.sigma_rel,
            "coefficient": x,
            "header_xxh3": r.header_checksum,
        }
        for r, x in zip(plan.inputs, plan.coefficients[:, target].tolist(), strict=True)
        if x != 0.0 or plan.overrides
    ]
    error = float(plan.predicted_error[target])
    return {
        "tool": tool(),
        "kind": "synthesized",
        "sigma_rel": plan.sigma_rels[target],
        "time": plan.time,
        "clock": store.clock,
        "run_id": store.run_id,
        "norm": plan.norm,
        "predicted_error": None if math.isnan(error) else error,
        "profile_error": float(plan.profile_error[target]),
        "amplification": float(plan.amplification[target]),
        "overrides": {o.pattern: o.sigma_rel for o in plan.overrides},
        "inputs": used,
    }


def tool() -> str:
    """Name and version of this tool."""
    # By name: the package's own namespace imports this module.
    return f"posthoc-ema {importlib.import_module('posthoc_ema').__version__}"
