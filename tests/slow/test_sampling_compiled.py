"""Sampling through torch.compile: the images of the plain way, the last batch filled up."""

import numpy as np
import pytest
import torch

from reference_trainer.guidance import Guide, GuidedNetwork
from reference_trainer.precond import Precond
from reference_trainer.presets import PRESETS
from reference_trainer.sampling import evaluated, sample_images


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # of inductor about itself
def test_compiled_sampling_makes_the_images_of_the_plain_way():
    config = PRESETS["digits-xs"]()

    def network(seed):
        torch.manual_seed(seed)
        made = Precond(config.network, config.data)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "gain" in name:
                    parameter.fill_(0.5)
        return made

    guided = GuidedNetwork(network(0), [Guide(network(1), 2.0, (0.1, 5.0))])
    plain = sample_images(guided, range(10), batch_size=4, num_steps=4)
    compiled = sample_images(guided, range(10), batch_size=4, num_steps=4, compiled=True)
    difference = np.abs(plain.astype(int) - compiled.astype(int))
    assert plain.std() > 20
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.02
    assert all(isinstance(m, torch.nn.Module) for m in evaluated(guided, compiled=True).members)
