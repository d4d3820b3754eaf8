"""Post-hoc EMA: choose the averaging length of a network's weights after training.

Track a few power-function averages during training, store snapshots of them, and combine the
snapshots later into the average of any length sigma_rel. Importing this package loads no torch; the
PyTorch side is `posthoc_ema.torch`.
"""

from posthoc_ema.averaging import power_average, power_step_weights
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
    SIGMA_REL_MAX,
    PointProfile,
    PowerProfile,
    Profile,
    gamma_from_sigma_rel,
    power_beta,
    power_update_weight,
    sigma_rel_from_gamma,
)
from posthoc_ema.snapshot import SnapshotRecord, TensorEntry, TensorTable
from posthoc_ema.store import NewAverage, Problem, SnapshotStore
from posthoc_ema.synthesis import (
    RAW,
    SynthesisPlan,
    plan_synthesis,
    synthesize,
    synthesize_to_files,
)

__version__ = "0.1.0"

__all__ = [
    "RAW",
    "SIGMA_REL_MAX",
    "ConfigError",
    "Fit",
    "InvalidProfileError",
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
    "TensorEntry",
    "TensorTable",
    "TrackingError",
    "__version__",
    "estimate_scale",
    "fit",
    "gamma_from_sigma_rel",
    "neighbour_pairs",
    "plan_synthesis",
    "power_average",
    "power_beta",
    "power_step_weights",
    "power_update_weight",
    "predicted_errors",
    "sampled_scale",
    "sigma_rel_from_gamma",
    "synthesize",
    "synthesize_to_files",
]
