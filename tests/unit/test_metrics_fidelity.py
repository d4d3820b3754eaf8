"""Our numbers against torch-fidelity's own, on the same images and the same (random) weights."""

import numpy as np
import pytest
import torch

from reference_trainer.metrics import (
    FeatureStatistics,
    Reference,
    collect,
    frechet_distance,
    in_batches,
)
from reference_trainer.metrics.collection import keep_all
from reference_trainer.metrics.feature_sets import kernel_distance, precision_recall
from reference_trainer.metrics.inception import open_inception

from .metric_weights import fidelity, write_inception

COUNT = 16


def pictures(seed, brightness):
    """Smooth colourful images, uint8 `[n, 3, 32, 32]`."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(COUNT, 3, 5, 5, generator=generator) * brightness
    smooth = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    return (255 * smooth).to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What torch-fidelity says, and the features that we see."""
    weights = write_inception(tmp_path_factory.mktemp("weights") / "inception.pth")
    generated, real = pictures(0, 0.6), pictures(1, 1.0)
    layers = {f"feature_layer_{name}": "64" for name in ("fid", "kid", "prc")}
    theirs = fidelity(
        generated, real, weights, fid=True, kid=True, prc=True, kid_subset_size=COUNT, **layers
    )
    extractor = open_inception(weights, layer="64")
    ours = [
        collect(in_batches(x, batch_size=5), [extractor], keep={"inception": keep_all})["inception"]
        for x in (generated, real)
    ]
    return theirs, *ours


def test_frechet_distance_is_that_of_torch_fidelity(both):
    theirs, generated, real = both
    ours = frechet_distance(generated.statistics, real.statistics)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert ours > 0.01


def test_kernel_distance_is_that_of_torch_fidelity(both):
    """Ours in double precision; torch-fidelity leaves the features' float32."""
    theirs, generated, real = both
    ours = kernel_distance(generated.features, real.features)
    assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)


def test_precision_and_recall_are_those_of_torch_fidelity(both):
    theirs, generated, real = both
    expected = (theirs["precision"], theirs["recall"])
    assert precision_recall(generated.features, real.features) == pytest.approx(expected, abs=1e-9)


def test_singular_covariances_agree_with_the_formula_of_torch_fidelity(rng):
    """Fewer vectors than features: the eigenvalues of the plain product, real parts of their roots."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    features = [np.abs(rng.normal(size=(24, 192))).astype(np.float32) * s for s in (1.0, 1.3)]
    theirs = [fid_features_to_statistics(torch.from_numpy(x)) for x in features]
    (expected,) = fid_statistics_to_metric(*theirs, False).values()
    ours = frechet_distance(*(FeatureStatistics.empty(192).updated(x) for x in features))
    assert ours == pytest.approx(expected, rel=1e-6)


def test_a_stored_reference_gives_the_same_distance(both):
    _, generated, real = both
    reference = Reference("inception", real.statistics.moments)
    direct = frechet_distance(generated.statistics, real.statistics)
    assert frechet_distance(generated.statistics, reference.moments) == direct
