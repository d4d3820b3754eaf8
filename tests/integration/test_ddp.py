"""Replicas: one rank tracks, or all share the averages; either way the store is that of one process."""

from __future__ import annotations

import pytest
import torch

from posthoc_ema import ConfigError, synthesize
from posthoc_ema.torch import Tracker

from .sharded_models import OPTIONS, drive, make_odd
from .test_fsdp import one_thread, run_ranks, same_store, told  # noqa: F401


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "store"
    with Tracker(make_odd(), folder, **OPTIONS) as tracker:
        drive(tracker._model.module, tracker, 7)
        averages = {n: t.clone() for n, t in tracker.averages(0.04).items()}
    return folder, averages


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(
        *(request.param, folder, "replicas", "plain_replicas", "split_replicas", "replicas_by_dcp"),
        *("replicas_of_several_models", "pipeline"),
    )
    return folder


@pytest.mark.parametrize("scenario", ["replicas", "plain_replicas", "split_replicas"])
def test_replicas_store_what_one_process_would(ranks, one, scenario):
    same_store(ranks / scenario, one[0])
    assert synthesize(ranks / scenario, 0.1).keys() == make_odd().state_dict().keys()


def test_only_the_first_replica_holds_averages(ranks):
    first, *others = told(ranks, "replicas")
    assert first["has_averages"]
    for rank in others:
        assert (rank["has_averages"], rank["memory"], rank["snapshots"]) == (False, False, 0)
        assert (rank["time"], rank["times"]) == (7, [3, 6])
        assert "are on rank 0 alone" in rank["refused"]


def test_split_averages_are_equal_parts_of_the_whole(ranks, one):
    held = [rank["held"] for rank in told(ranks, "split_replicas")]
    total = sum(t.numel() for t in one[1].values())
    assert sum(held) == total
    assert max(held) < total / len(held) * 1.05
    whole = torch.load(ranks / "split_replicas.whole.pt")
    assert whole.keys() == one[1].keys()
    for name, average in one[1].items():
        assert torch.equal(whole[name], average)


@pytest.mark.parametrize("name", ["whole", "split"])
def test_replicas_resume_through_distributed_checkpoints(ranks, tmp_path, name):
    with Tracker(make_odd(), tmp_path / "twelve", **OPTIONS) as tracker:
        drive(tracker._model.module, tracker, 12)
    same_store(ranks / "replicas_by_dcp" / name, tmp_path / "twelve")


def test_stages_of_a_pipeline_are_refused(ranks):
    first, *others = told(ranks, "pipeline")
    assert first["failure"].startswith(
        "another rank tracks a model of other tensors than the first"
    )
    assert "All ranks of a tracker hold one model" in first["failure"]
    assert [rank["stored"] for rank in (first, *others)] == [0] * (1 + len(others))


def test_models_that_are_on_the_first_rank_alone_or_on_all_are_tracked(ranks):
    for rank, failures in enumerate(told(ranks, "replicas_of_several_models")):
        assert failures == [None] * (2 if rank else 3)


def test_there_is_nothing_to_split_without_ranks(tmp_path):
    with pytest.raises(ConfigError, match="there is none of several ranks"):
        Tracker(make_odd(), tmp_path, shard_averages=True, **OPTIONS)
