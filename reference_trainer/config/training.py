"""The configuration of a training run: one frozen record per subject, nested in `TrainConfig`.

Everything is checked when a record is made, so a record that exists is usable. The resolved
configuration is written to the run folder before the first step. Lengths of the run (total, intervals)
are counted in images and are multiples of the batch size.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from posthoc_ema import CODECS, DEFAULT_CODEC, DEFAULT_SIGMA_RELS, SIGMA_REL_MAX, ConfigError
from reference_trainer.config.network import NetworkConfig
from reference_trainer.config.records import decode_record, encode, require


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The denoising loss and its noise levels: ln sigma ~ N(p_mean, p_std^2) (EDM2 table 6).

    Attributes:
        p_mean: mean of ln sigma.
        p_std: standard deviation of ln sigma, positive.
        weighting: "uncertainty", lambda / e^u |D - y|^2 + u with the learned u(sigma) (EDM2 eq. 21), or
            "static", lambda |D - y|^2 (EDM; config A).
    """

    p_mean: float = -0.4
    p_std: float = 1.0
    weighting: str = "uncertainty"

    def __post_init__(self) -> None:
        known = ("uncertainty", "static")
        require(
            self.weighting in known, "weighting", f"be one of {', '.join(known)}", self.weighting
        )
        require(self.p_std > 0, "p_std", "be positive", self.p_std)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Adam and its learning rate alpha_ref / sqrt(max(t / t_ref, 1)) * ramp-up (EDM2 eq. 67).

    Attributes:
        lr_ref: alpha_ref, the learning rate before the decay.
        t_ref: optimizer step at which the decay starts, null for a constant learning rate.
        rampup_images: images over which the learning rate rises linearly from 0 (0: no ramp-up).
        beta1: decay of Adam's first moment.
        beta2: decay of Adam's second moment.
        eps: Adam's epsilon.
        loss_scale: constant factor of the loss in the backward pass, taken out of the gradients before
            Adam: it keeps gradients in the range of float16 (100 in configs A to C).
    """

    lr_ref: float = 0.01
    t_ref: float | None = 70_000.0
    rampup_images: int = 10_000_000
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        require(self.loss_scale > 0, "loss_scale", "be positive", self.loss_scale)
        require(self.lr_ref > 0, "lr_ref", "be positive", self.lr_ref)
        require(self.t_ref is None or self.t_ref > 0, "t_ref", "be positive or null", self.t_ref)
        require(self.rampup_images >= 0, "rampup_images", "not be negative", self.rampup_images)
        require(0 <= self.beta1 < 1, "beta1", "lie in [0, 1)", self.beta1)
        require(0 <= self.beta2 < 1, "beta2", "lie in [0, 1)", self.beta2)
        require(self.eps > 0, "eps", "be positive", self.eps)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The data set and its mapping to network units: (v - mean) * scale, channel by channel.

    v is pixel / 127.5 - 1 for images, and the latent for latents.

    Attributes:
        name: name of a built-in data set, or what to call the one at `path`.
        path: folder, zip or Hugging Face data set on disk; null for a built-in one. A run may go on with
            another path to the same data.
        kind: "pixels" or "latents".
        mean: mean of v over the data set, subtracted; one number or one per channel.
        scale: factor that brings the standard deviation to `sigma_data`; one number or one per channel.
        sigma_data: standard deviation of the mapped images, as the preconditioning assumes it.
    """

    name: str = "digits"
    path: str | None = None
    kind: str = "pixels"
    mean: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        kinds = ("pixels", "latents")
        require(self.kind in kinds, "kind", f"be one of {', '.join(kinds)}", self.kind)
        require(bool(self.mean), "mean", "hold at least one number", self.mean)
        positive = bool(self.scale) and min(self.scale) > 0
        require(positive, "scale", "hold positive numbers, at least one", self.scale)
        require(self.sigma_data > 0, "sigma_data", "be positive", self.sigma_data)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackConfig:
    """Which averages are tracked and how often they are stored.

    Attributes:
        sigma_rels: relative widths of the tracked power profiles.
        snapshot_every: images between two snapshots.
        dtype: dtype of the stored averages.
        direct_sigma_rels: further widths that are tracked and stored once, in float32, at the end of
            the run, to check syntheses against.
    """

    snapshot_every: int
    sigma_rels: tuple[float, ...] = DEFAULT_SIGMA_RELS
    dtype: str = DEFAULT_CODEC
    direct_sigma_rels: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        require(bool(self.sigma_rels), "sigma_rels", "hold at least one number", self.sigma_rels)
        for name in ("sigma_rels", "direct_sigma_rels"):
            values = getattr(self, name)
            valid = all(0 < s <= SIGMA_REL_MAX for s in values)
            require(valid, name, f"lie in (0, {SIGMA_REL_MAX:.4f}]", values)
            require(len(set(values)) == len(values), name, "differ from each other", values)
        require(self.dtype in CODECS, "dtype", f"be one of {', '.join(CODECS)}", self.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeConfig:
    """How the arithmetic is carried out; results agree within tolerance whatever is chosen here.

    A run may go on with other values than it began with; only then is it not bit for bit the same.

    Attributes:
        microbatch: images per forward pass and process; null takes a process's whole share of the batch.
        compile: compile the training step with torch.compile.
        parallel: how several processes share the network: "ddp" (each holds all of it) or "fsdp2"
            (weights, gradients and moments in shards).
    """

    microbatch: int | None = None
    compile: bool = False
    parallel: str = "ddp"

    def __post_init__(self) -> None:
        valid = self.microbatch is None or self.microbatch >= 1
        require(valid, "microbatch", "be at least 1 or null", self.microbatch)
        ways = ("ddp", "fsdp2")
        require(self.parallel in ways, "parallel", f"be one of {', '.join(ways)}", self.parallel)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that determines a run, except the folder and the device.

    Attributes:
        network: the U-Net.
        track: the tracked averages.
        total_images: length of the run.
        batch_size: images per optimizer step.
        checkpoint_every: images between two checkpoints (what resuming needs).
        status_every: images between two lines of the log.
        seed: seeds weights, data order, noise and dropout.
        keep_checkpoints: newest checkpoints that are kept, at least 1.
        telemetry_every: images between two measurements of the training dynamics, a multiple of
            `status_every`; null for none.
        name: name of the preset it came from, for people.
        loss: the loss and its noise levels.
        optim: optimizer and learning rate.
        data: the data set.
        compute: how the arithmetic is carried out.

    Example:
        >>> from reference_trainer.presets import PRESETS
        >>> config = PRESETS["digits-xs"]()
        >>> TrainConfig.from_json(config.to_json()) == config
        True
    """

    network: NetworkConfig
    track: TrackConfig
    total_images: int
    checkpoint_every: int
    status_every: int
    batch_size: int = 64
    seed: int = 0
    keep_checkpoints: int = 2
    telemetry_every: int | None = None
    name: str = "custom"
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", "not be negative", self.seed)
        require(self.batch_size >= 1, "batch_size", "be at least 1", self.batch_size)
        keep = self.keep_checkpoints
        require(keep >= 1, "keep_checkpoints", "be at least 1", keep)
        self._check_lengths()
        self._check_channels()

    def _check_lengths(self) -> None:
        lengths = {
            "total_images": self.total_images,
            "checkpoint_every": self.checkpoint_every,
            "status_every": self.status_every,
            "track.snapshot_every": self.track.snapshot_every,
        }
        if self.telemetry_every is not None:
            lengths["telemetry_every"] = self.telemetry_every
            reported = self.telemetry_every % self.status_every == 0
            rule = f"be a multiple of status_every = {self.status_every}, which reports it"
            require(reported, "telemetry_every", rule, self.telemetry_every)
        for name, images in lengths.items():
            below = images // self.batch_size * self.batch_size
            nearest = max(below, self.batch_size)
            rule = f"be a positive multiple of batch_size = {self.batch_size}"
            require(images > 0 and images == below, name, rule, images, f"Try {nearest}.")

    def _check_channels(self) -> None:
        channels, network = self.network.img_channels, self.network
        for name, values in (("data.mean", self.data.mean), ("data.scale", self.data.scale)):
            fits = len(values) in (1, channels)
            rule = f"hold one number or one per channel of the network, which has {channels}"
            require(fits, name, rule, values)
        learned = self.loss.weighting == "uncertainty"
        rule = "be positive for loss.weighting 'uncertainty', and 0 for 'static'"
        fits = learned == (network.logvar_channels > 0)
        require(fits, "network.logvar_channels", rule, network.logvar_channels)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionary of plain values; tuples become lists."""
        return typing.cast(dict[str, Any], encode(self))

    def to_json(self) -> str:
        """Indented JSON with a newline at its end."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: a key is unknown or missing, or a value has the wrong type or range.
        """
        return typing.cast(Self, decode_record(cls, values))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of `to_json`.

        Raises:
            ConfigError: the text is no JSON object, or `from_dict` refuses it.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"The configuration is not valid JSON: {error}.") from error
        require(isinstance(values, dict), "The configuration", "be a JSON object", values)
        return cls.from_dict(values)


def differing_fields(a: TrainConfig, b: TrainConfig) -> list[str]:
    """Dotted names of the fields in which two configurations differ, with both values.

    Example:
        >>> from reference_trainer.presets import PRESETS
        >>> config = PRESETS["digits-xs"]()
        >>> differing_fields(config, dataclasses.replace(config, seed=3))
        ['seed (0 and 3)']
    """
    flat_a, flat_b = dict(_flatten(a.to_dict())), dict(_flatten(b.to_dict()))
    return [f"{k} ({flat_a[k]} and {flat_b[k]})" for k in flat_a if flat_a[k] != flat_b[k]]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        pairs += _flatten(value, f"{prefix}{key}.") if nested else [(prefix + key, value)]
    return pairs
