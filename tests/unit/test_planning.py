"""Plans before training: costs of codecs, predicted errors, the cheapest plan."""

from __future__ import annotations

import numpy as np
import pytest

from posthoc_ema import ConfigError, InvalidProfileError, PowerProfile, fit
from posthoc_ema.codecs import (
    CODECS,
    DELTA_WIDTHS,
    decode,
    decode_int8_blocks,
    encode,
    encode_int8_blocks,
)
from posthoc_ema.planning import cheapest_plan, make_plan
from posthoc_ema.retention import targets_of
from posthoc_ema.snapshot_folder import LONGEST_CHAIN
from posthoc_ema.storage_costs import (
    CODEC_FILES,
    FILE_COSTS,
    KEY_EVERY,
    disk_bytes,
    storage_noise,
    tracker_bytes,
)

TRACKED = (0.05, 0.10)

# ---- what codecs cost


def test_costs_speak_of_the_codecs_and_chains_of_the_store():
    """Mathematics may not import storage: here is where the two are compared."""
    assert set(CODEC_FILES) == set(CODECS)
    assert {c: files for c, files in CODEC_FILES.items() if c.startswith("delta")} == DELTA_WIDTHS
    assert KEY_EVERY == LONGEST_CHAIN


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_of_floats_is_what_rounding_loses(rng, dtype):
    values = rng.normal(size=1 << 16).astype(np.float32)
    lost = decode(encode(values, dtype), dtype).astype(np.float64) - values
    assert np.sqrt(np.mean(lost**2)) == pytest.approx(FILE_COSTS[dtype].rounding, rel=0.03)


def test_rounding_of_float32_is_what_rounding_loses(rng):
    values = rng.normal(size=1 << 16)
    lost = values.astype(np.float32) - values
    assert np.sqrt(np.mean(lost**2)) == pytest.approx(FILE_COSTS["float32"].rounding, rel=0.03)


def test_rounding_and_size_of_int8_blocks_are_what_they_are(rng):
    values = rng.normal(size=1 << 16).astype(np.float32)
    stored, scales = encode_int8_blocks(values)
    lost = decode_int8_blocks(stored, scales, np.empty_like(values)).astype(np.float64) - values
    cost = FILE_COSTS["delta-int8"]
    assert np.sqrt(np.mean(lost**2)) == pytest.approx(cost.rounding, rel=0.03)
    assert (stored.nbytes + scales.nbytes) / values.size == cost.bytes_per_weight


@pytest.mark.parametrize(
    ("codec", "shortest", "longer"),
    [
        ("float32", 4 * 36, 4 * 36),
        ("float16", 2 * 36, 2 * 36),
        ("bfloat16", 2 * 36, 2 * 36),
        ("delta-float16", 2 * 4 + 34 * 2, 2 * 4 + 34 * 2),  # two key frames in 36 times
        ("delta-int8", 2 * 4 + 34 * 1.03125, 2 * 4 + 34 * 1.03125),
        ("delta", 2 * 4 + 34 * 2, 2 * 4 + 34 * 1.03125),
    ],
)
def test_disk_counts_key_frames_and_differences(codec, shortest, longer):
    assert KEY_EVERY < 36 <= 2 * KEY_EVERY
    assert disk_bytes(codec, 36, 2, 1000) == pytest.approx(1000 * (shortest + longer))


def test_tracker_holds_a_float32_copy_per_length():
    assert tracker_bytes(3, 7) == 84


def test_noise_of_floats_does_not_depend_on_the_drift():
    a, b = (storage_noise("float16", [1, 2], TRACKED, drift, 2) for drift in (0.1, 1.0))
    assert np.array_equal(a, b)


def test_noise_of_differences_follows_the_drift():
    small, large = (
        storage_noise("delta-int8", range(1, 9), TRACKED, drift, 8) for drift in (0.1, 1.0)
    )
    assert small[0, 0] == large[0, 0] == pytest.approx(FILE_COSTS["float32"].rounding ** 2)
    assert np.allclose(large[1:] / small[1:], 100, rtol=1e-3)


def test_noise_of_the_longer_average_is_that_of_what_the_shorter_ones_do_not_tell():
    noise = storage_noise("delta-float16", range(1, 17), TRACKED, 0.3, 16)
    assert np.all(noise[1:, 1] < noise[1:, 0] / 30)


def test_noise_does_not_depend_on_the_order_of_the_lengths():
    straight = storage_noise("delta", range(1, 20), TRACKED, 0.3, 19)
    assert np.array_equal(
        storage_noise("delta", range(1, 20), TRACKED[::-1], 0.3, 19), straight[:, ::-1]
    )


def test_noise_of_differences_is_what_storing_a_random_walk_loses(rng):
    """The formula against numbers: chains of float16 differences of averages of random walks."""
    steps, num_times, drift = 512, 8, 0.3
    walks = np.cumsum(rng.normal(size=(steps, 4000)), axis=0) * drift / np.sqrt(steps)
    start = rng.normal(size=4000)  # the norm: 1 per element
    times = [steps // num_times * k for k in range(1, num_times + 1)]
    before = lost = None
    for t in times:
        weights = -np.diff(PowerProfile(t, 0.1).tail(np.arange(t + 1)))
        value = start + weights @ walks[:t]
        difference = (value - before).astype(np.float32) if before is not None else None
        if difference is None:
            before = value
            continue
        stored = decode(encode(difference, "float16"), "float16").astype(np.float64)
        before, lost = before + stored, np.mean((before + stored - value) ** 2)
    predicted = storage_noise("delta-float16", times, (0.1,), drift, steps)[-1, 0]
    assert predicted == pytest.approx(lost, rel=0.25)


# ---- plans


def test_plan_counts_files_disk_and_memory():
    plan = make_plan(1000, 30, TRACKED, 1e6, codec="float16")
    assert (plan.num_times, plan.num_files) == (33, 66)
    assert (plan.disk, plan.memory) == (66 * 2e6, 8e6)


def test_plan_predicts_what_a_fit_of_its_averages_has_as_residual():
    plan = make_plan(64, 2, TRACKED, 1, codec="float32", sigma_rels=(0.03, 0.2), drift=0.5)
    inputs = [PowerProfile(2 * k, s) for k in range(1, 33) for s in TRACKED]
    found = fit(inputs, [PowerProfile(64, s) for s in (0.03, 0.2)])
    assert plan.errors == pytest.approx(0.5 / 8 * found.residual, rel=1e-2)


def test_plan_does_not_depend_on_the_unit_of_time():
    steps, images = (make_plan(n * 640, n * 10, TRACKED, 1) for n in (1, 256))
    assert np.allclose(steps.errors, images.errors, rtol=1e-4)


def test_plan_with_a_pace_of_one_is_the_plan_without():
    even, paced = (make_plan(640, 20, TRACKED, 1, density=pace) for pace in (None, np.ones_like))
    assert np.allclose(even.errors, paced.errors, rtol=1e-4)


@pytest.mark.parametrize("codec", CODECS)
def test_plan_with_more_snapshots_is_better_and_dearer(codec):
    few, many = (make_plan(640, every, TRACKED, 1, codec=codec) for every in (40, 10))
    assert many.worst < few.worst
    assert many.disk > few.disk


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"every": 0}, "every must be 1 to the 100 steps"),
        ({"every": 101}, "every must be 1 to the 100 steps"),
        ({"steps": 10**6, "every": 1}, "more than the 4096"),
        ({"tracked": ()}, "at least one tracked sigma_rel"),
        ({"tracked": (0.1, 0.1)}, "must differ"),
        ({"parameters": 0}, "parameters must be positive"),
        ({"parameters": float("inf")}, "parameters must be positive"),
        ({"drift": 0.0}, "drift must be positive"),
        ({"drift": float("nan")}, "drift must be positive"),
        ({"codec": "int4"}, "dtype must be one of"),
    ],
)
def test_plan_refuses_what_makes_no_sense(change, what):
    arguments = {"steps": 100, "every": 10, "tracked": TRACKED, "parameters": 1e6, **change}
    with pytest.raises(ConfigError, match=what):
        make_plan(**arguments)


def test_plan_refuses_lengths_outside_the_family():
    with pytest.raises(InvalidProfileError):
        make_plan(100, 10, (0.05, 0.4), 1e6)


# ---- the cheapest one


def test_cheapest_plan_reaches_the_error_and_one_snapshot_less_does_not():
    plan = cheapest_plan(10_000, 1e6, 1e-3, (0.03, 0.2), tracked=TRACKED, codec="delta")
    assert plan.worst <= 1e-3
    wider = make_plan(
        10_000,
        10_000 // round(plan.num_times / 1.12),
        TRACKED,
        1e6,
        codec="delta",
        sigma_rels=plan.sigma_rels,
    )
    assert wider.worst > 1e-3


def test_cheapest_plan_is_no_dearer_than_any_that_keeps_to_fewer_choices():
    free = cheapest_plan(10_000, 1e6, 1e-3, (0.03, 0.2))
    for fixed in ({"tracked": TRACKED}, {"codec": "float16"}, {"codec": "delta"}):
        assert free.disk <= cheapest_plan(10_000, 1e6, 1e-3, (0.03, 0.2), **fixed).disk


def test_cheapest_plan_says_how_far_it_can_go():
    with pytest.raises(
        ConfigError, match=r"no plan of up to \d+ snapshots reaches .* best one has"
    ):
        cheapest_plan(10_000, 1e6, 1e-5, (0.03, 0.2), tracked=(0.1,), codec="bfloat16")
    with pytest.raises(ConfigError, match="error must be positive"):
        cheapest_plan(10_000, 1e6, 0.0, (0.03, 0.2))


def test_short_runs_have_plans():
    assert cheapest_plan(3, 10, 0.5, (0.1, 0.2), codec="float32").num_times <= 3


def test_targets_of_a_range_hold_both_ends():
    lengths = targets_of((0.03, 0.20))
    assert (lengths[0], lengths[-1]) == (0.03, 0.20)
    assert np.all(np.diff(lengths) > 0)
    assert targets_of((0.1, 0.1)).tolist() == [0.1]
