"""Post-hoc EMA: choose the averaging length of a network's weights after training.

Track a few power-function averages during training, store snapshots of them, and combine the
snapshots later into the average of any length sigma_rel. Importing this package loads no torch; the
PyTorch side is `posthoc_ema.torch`.
"""

from posthoc_ema.averaging import power_average, power_step_weights
from posthoc_ema.classical_profiles import (
    ExponentialProfile,
    TabulatedProfile,
    UniformProfile,
)
from posthoc_ema.codecs import CODECS, DEFAULT_CODEC
from posthoc_ema.conversions import (
    beta_from_sigma_rel,
    gamma_of_sparse_updates,
    half_life_fraction_from_sigma_rel,
    half_life_from_sigma_rel,
    sigma_rel_from_beta,
    sigma_rel_from_half_life,
    sigma_rel_from_half_life_fraction,
)
from posthoc_ema.diagnostics import (
    Scale,
    estimate_scale,
    neighbour_pairs,
    predicted_errors,
    sampled_scale,
)
from posthoc_ema.errors import (
    ConfigError,
    InvalidProfileError,
    MetricError,
    PhemaError,
    PhemaWarning,
    SnapshotError,
    SnapshotFormatError,
    SnapshotMismatchError,
    SnapshotNotFoundError,
    SnapshotWriteError,
    SynthesisError,
    TrackingError,
)
from posthoc_ema.fitting import Fit, fit
from posthoc_ema.profiles import (
    DEFAULT_SIGMA_RELS,
    SIGMA_REL_MAX,
    GammaProfile,
    PointProfile,
    PowerProfile,
    Profile,
    gamma_from_sigma_rel,
    power_beta,
    power_update_weight,
    sigma_rel_from_gamma,
)
from posthoc_ema.reencoding import reencode
from posthoc_ema.snapshot import SnapshotRecord, TensorEntry, TensorTable
from posthoc_ema.snapshot_folder import NewAverage
from posthoc_ema.store import Problem, SnapshotStore
from posthoc_ema.synthesis import (
    RAW,
    Measurement,
    SynthesisPlan,
    Synthesized,
    TargetReport,
    measure,
    plan_synthesis,
    synthesize,
    synthesize_to_files,
)

__version__ = "0.4.0"

__all__ = [
    "CODECS",
    "DEFAULT_CODEC",
    "DEFAULT_SIGMA_RELS",
    "RAW",
    "SIGMA_REL_MAX",
    "ConfigError",
    "ExponentialProfile",
    "Fit",
    "GammaProfile",
    "InvalidProfileError",
    "Measurement",
    "MetricError",
    "NewAverage",
    "PhemaError",
    "PhemaWarning",
    "PointProfile",
    "PowerProfile",
    "Problem",
    "Profile",
    "Scale",
    "SnapshotError",
    "SnapshotFormatError",
    "SnapshotMismatchError",
    "SnapshotNotFoundError",
    "SnapshotRecord",
    "SnapshotStore",
    "SnapshotWriteError",
    "SynthesisError",
    "SynthesisPlan",
    "Synthesized",
    "TabulatedProfile",
    "TargetReport",
    "TensorEntry",
    "TensorTable",
    "TrackingError",
    "UniformProfile",
    "__version__",
    "beta_from_sigma_rel",
    "estimate_scale",
    "fit",
    "gamma_from_sigma_rel",
    "gamma_of_sparse_updates",
    "half_life_fraction_from_sigma_rel",
    "half_life_from_sigma_rel",
    "measure",
    "neighbour_pairs",
    "plan_synthesis",
    "power_average",
    "power_beta",
    "power_step_weights",
    "power_update_weight",
    "predicted_errors",
    "reencode",
    "sampled_scale",
    "sigma_rel_from_beta",
    "sigma_rel_from_gamma",
    "sigma_rel_from_half_life",
    "sigma_rel_from_half_life_fraction",
    "synthesize",
    "synthesize_to_files",
]
