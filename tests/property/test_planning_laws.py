"""Laws of planning and pruning over generated runs."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from posthoc_ema import PowerProfile
from posthoc_ema.least_squares import LeastSquares
from posthoc_ema.planning import make_plan
from posthoc_ema.retention import choose, keep_online, targets_of
from posthoc_ema.storage_costs import CODEC_FILES, storage_noise

from .strategies import few, quick, stores, tracked

some = settings(few, max_examples=12)

ranges = st.tuples(st.floats(0.02, 0.25), st.floats(0.02, 0.25)).map(sorted).map(tuple)
noises = st.sampled_from([0.0, 1e-8, 1e-4])
codecs = st.sampled_from(sorted(CODEC_FILES))
sets = st.lists(tracked, min_size=1, max_size=3, unique=True)


def relative(noise, inputs):
    return noise * max(p.t for p in inputs)


@some
@given(stores(most=5), ranges, noises, st.data())
def test_keeping_fewer_is_never_better_than_all(inputs, lengths, noise, data):
    keep = data.draw(st.integers(1, len(inputs)))
    choice = choose(inputs, relative(noise, inputs), lengths, keep=keep)
    assert len(choice.kept) == keep
    assert np.all(choice.errors >= choice.errors_before * (1 - 1e-3) - 1e-6)


@some
@given(stores(most=5), ranges, noises, st.data())
def test_a_choice_holds_an_average_of_the_last_time(inputs, lengths, noise, data):
    keep = data.draw(st.integers(1, len(inputs)))
    last = max(p.t for p in inputs)
    kept = choose(inputs, relative(noise, inputs), lengths, keep=keep).kept
    assert any(inputs[i].t == last for i in kept)
    gone = keep_online(inputs, relative(noise, inputs), keep, lengths)
    assert len(gone) == len(inputs) - keep
    assert any(p.t == last for i, p in enumerate(inputs) if i not in gone)


@some
@given(stores(most=5), ranges, st.integers(1, 8))
def test_a_choice_does_not_depend_on_the_unit_of_time(inputs, lengths, factor):
    longer = [PowerProfile(p.t * 2**factor, p.sigma_rel) for p in inputs]
    noise = relative(1e-6, inputs)
    keep = (len(inputs) + 1) // 2
    one = choose(inputs, noise, lengths, keep=keep)
    other = choose(longer, noise * 2**factor, lengths, keep=keep)
    assert np.isclose(one.worst * 2 ** (factor / 2), other.worst, rtol=1e-3)


@some
@given(stores(most=5), ranges, st.floats(1, 50))
def test_a_choice_by_error_is_good_enough(inputs, lengths, factor):
    noise = relative(1e-6, inputs)
    bound = factor * choose(inputs, noise, lengths, keep=len(inputs)).worst
    assert choose(inputs, noise, lengths, max_error=bound).worst <= bound


@quick
@given(stores(most=5), st.data())
def test_removing_an_average_costs_what_the_inverse_says(inputs, data):
    """x_ij^2 / C_ii, which the search for subsets stands on."""
    assume(len(inputs) > 1)
    i = data.draw(st.integers(0, len(inputs) - 1))
    end = max(p.t for p in inputs)
    targets = [PowerProfile(end, float(s)) for s in targets_of((0.03, 0.2), 4)]
    problem = LeastSquares(inputs, np.full(len(inputs), 1e-4 * end), targets, end)
    everything = problem.solve(np.arange(len(inputs)))
    without = problem.solve(np.delete(np.arange(len(inputs)), i))
    raised = everything.f + everything.x[i] ** 2 / everything.constrained[i, i]
    assert np.allclose(raised, without.f, rtol=1e-6, atol=1e-12)


@quick
@given(codecs, sets, st.integers(1, 12), st.floats(1e-3, 3))
def test_storage_noise_is_positive_and_rises_with_the_drift(codec, lengths, num_times, drift):
    times = range(1, num_times + 1)
    small, large = (storage_noise(codec, times, lengths, d, num_times) for d in (drift, 2 * drift))
    assert small.shape == (num_times, len(lengths))
    assert np.all(small > 0)
    assert np.all(large >= small)


@some
@given(sets, st.integers(2, 20), st.floats(1e-2, 3))
def test_no_codec_is_better_than_float32(lengths, num_times, drift):
    def worst(codec):
        return make_plan(100 * num_times, 100, lengths, 1.0, codec=codec, drift=drift).worst

    assert all(worst(codec) >= worst("float32") * (1 - 1e-3) for codec in CODEC_FILES)
