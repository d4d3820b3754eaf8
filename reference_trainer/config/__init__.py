"""The configuration of a training run: frozen records that check themselves and travel as JSON."""

from __future__ import annotations

from reference_trainer.config.network import CHOICES, CONFIGS, NetworkConfig, network_of_config
from reference_trainer.config.training import (
    ComputeConfig,
    DataConfig,
    LossConfig,
    OptimConfig,
    TrackConfig,
    TrainConfig,
    differing_fields,
)

__all__ = [
    "CHOICES",
    "CONFIGS",
    "ComputeConfig",
    "DataConfig",
    "LossConfig",
    "NetworkConfig",
    "OptimConfig",
    "TrackConfig",
    "TrainConfig",
    "differing_fields",
    "network_of_config",
]
