"""What ranks compare: the clocks by which they came to a snapshot, and the tables of their tensors."""

from __future__ import annotations

import pytest
import torch

from posthoc_ema.errors import TrackingError
from posthoc_ema.torch.distributed.ranks import Ranks
from posthoc_ema.torch.distributed.replicas import table_hash
from posthoc_ema.torch.distributed.sharding import Layout


def ranks_that_came_by(times):
    ranks = Ranks((0, 1), 0, True, _layouts={"w": Layout((2,), (0,), (2,))})
    for time in times:
        ranks.updated(time)
    ranks.begin_snapshot()
    ranks.updated(times[-1] + 1)  # while the snapshot is still to be stored
    return ranks, ranks.clock(times[-1])


def test_equal_clocks_are_accepted():
    ranks, clock = ranks_that_came_by([4, 8, 12])
    ranks.check_clocks([clock, ranks_that_came_by([4, 8, 12])[1]])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ([4, 7, 11], "time is 11 on rank 1 and 12 on rank 0: "),
        ([4, 12], "the number of updates up to time 12 is 2 on rank 1 and 3 on rank 0: "),
        ([4, 7, 12], "rank 1 came to time 12 by other times than the first rank: "),
    ],
)
def test_clocks_that_differ_are_refused(other, message):
    ranks, clock = ranks_that_came_by([4, 8, 12])
    with pytest.raises(TrackingError, match=message + "give `advance` the global batch"):
        ranks.check_clocks([clock, ranks_that_came_by(other)[1]])


def test_tables_differ_by_names_shapes_and_dtypes_only():
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(3)}
    assert table_hash(tensors) == table_hash({"b": torch.ones(3), "a": torch.ones(2, 3)})
    others = [
        {"a": torch.zeros(2, 3)},
        {"a": torch.zeros(2, 3), "c": torch.zeros(3)},
        {"a": torch.zeros(3, 2), "b": torch.zeros(3)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(3, dtype=torch.bfloat16)},
    ]
    assert table_hash(tensors) not in {table_hash(other) for other in others}
