"""A seed means an image: whatever the batch size, the other seeds, the processes, churn or guides."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reference_trainer.guidance import Guide, GuidedNetwork, guided_steps
from reference_trainer.sampling import SamplerConfig, image_batches, sample_images, sigma_schedule


class Mixer(nn.Module):
    """Keeps noise and class in the picture; its arithmetic does not depend on the batch."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))
        self.img_channels, self.img_resolution, self.label_dim = 2, 4, 5
        self.data_mean, self.data_scale = (0.1, -0.1), (1.0, 1.4)

    def forward(self, x, sigma, labels=None):
        variance = sigma.reshape(-1, 1, 1, 1) ** 2
        mean = 0.1 * labels.reshape(-1, 1, 1, 1) - 0.2 + self.shift
        return (0.2 * x + variance * mean) / (0.2 + variance)


NETWORKS = [Mixer(), GuidedNetwork(Mixer(), [Guide(Mixer(-0.1), 1.7, (0.1, 3.0))])]
seeds_of = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=9)
samplers = st.builds(
    SamplerConfig,
    method=st.sampled_from(["heun", "euler"]),
    num_steps=st.integers(6, 8),
    churn=st.sampled_from([0.0, 3.0]),
    dtype=st.sampled_from(["float32", "float64"]),
)


@settings(max_examples=40, deadline=None)
@given(
    seeds=seeds_of,
    batch_size=st.integers(1, 10),
    world_size=st.integers(1, 4),
    sampler=samplers,
    network=st.sampled_from(NETWORKS),
)
def test_images_depend_on_neither_batch_size_nor_processes(
    seeds, batch_size, world_size, sampler, network
):
    whole = sample_images(network, seeds, batch_size=len(seeds), sampler=sampler)
    parts = {}
    for rank in range(world_size):
        options = {"batch_size": batch_size, "sampler": sampler, "rank": rank}
        for batch in image_batches(network, seeds, world_size=world_size, **options):
            assert batch.seeds == tuple(seeds[batch.first : batch.first + batch_size])
            parts[batch.first] = batch.images
    assert np.array_equal(np.concatenate([parts[first] for first in sorted(parts)]), whole)


@settings(max_examples=40, deadline=None)
@given(seeds=seeds_of, wanted=st.sets(st.integers(0, 8)), batch_size=st.integers(1, 4))
def test_batches_that_are_not_wanted_are_passed_over_and_the_others_stay(seeds, wanted, batch_size):
    options = {"batch_size": batch_size, "sampler": SamplerConfig(num_steps=2)}
    network, chosen = NETWORKS[0], {seeds[i] for i in wanted if i < len(seeds)}
    whole = {b.first: b.images for b in image_batches(network, seeds, **options)}
    some = list(
        image_batches(network, seeds, wanted=lambda seeds: not chosen.isdisjoint(seeds), **options)
    )
    assert all(np.array_equal(batch.images, whole[batch.first]) for batch in some)
    assert all(not chosen.isdisjoint(batch.seeds) for batch in some)
    assert chosen <= {seed for batch in some for seed in batch.seeds}


@settings(max_examples=200, deadline=None)
@given(
    num_steps=st.integers(2, 64),
    low=st.floats(0, 79, allow_subnormal=False),
    factor=st.floats(3.0, 1000.0),
)
def test_guided_steps_are_those_between_the_nearest_levels(num_steps, low, factor):
    sigmas = sigma_schedule(num_steps, rho=3.0)
    high = max(low, 1e-3) * factor
    positive = sigmas[:-1]
    inside = [i for i, sigma in enumerate(positive) if low < sigma <= high]
    try:
        steps = guided_steps((low, high), sigmas)
    except ValueError:
        assert len(inside) <= 1
        return
    # Moving an end to the nearest level takes in or leaves out one step at most.
    assert abs(steps.start - (inside or [steps.start])[0]) <= 1
    assert abs(steps.stop - ((inside or [steps.stop])[-1] + 1)) <= 1


@pytest.mark.parametrize("churn", [0.0, 5.0])
def test_another_seed_gives_another_image(churn):
    sampler = SamplerConfig(num_steps=4, churn=churn)
    images = sample_images(NETWORKS[0], range(50), sampler=sampler, labels=[0] * 50)
    assert len(np.unique(images.reshape(50, -1), axis=0)) == 50
