"""The configuration of a training run: frozen records that validate themselves and travel as JSON.

`TrainConfig` nests one record per subject. Everything is checked when a record is made, so a record
that exists is usable; unknown keys are errors that suggest the nearest one. The resolved configuration
is written to the run folder before the first step. Lengths of the run (total, intervals) are counted
in images and are multiples of the batch size.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from posthoc_ema import CODECS, DEFAULT_CODEC, DEFAULT_SIGMA_RELS, SIGMA_REL_MAX, ConfigError


def _require(ok: bool, name: str, rule: str, value: object, remedy: str = "") -> None:
    if not ok:
        raise ConfigError(f"{name} must {rule}, got {value!r}.{' ' if remedy else ''}{remedy}")


def _is_power_of_two(n: int) -> bool:
    return n >= 1 and n & (n - 1) == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """Size and shape of the U-Net, config G of EDM2 (sections 3 and B of the paper).

    Attributes:
        img_resolution: side of the images in pixels, a power of two.
        img_channels: channels of the images.
        label_dim: number of classes, 0 for an unconditional network.
        model_channels: channels of the first level; the embedding has 4 times as many.
        channel_mult: channels of each level as multiples of `model_channels`, finest level first.
        num_blocks: residual blocks per level of the encoder (the decoder has one more).
        attn_resolutions: resolutions whose blocks attend; the coarsest level's first decoder block
            always does.
        channels_per_head: width of an attention head; a level with fewer channels has one head.
        label_balance: share of the label in the embedding, t of the magnitude-preserving sum.
        concat_balance: share of the skip connection in the decoder's concatenation.
        res_balance: share of the residual branch.
        attn_balance: share of the attention branch.
        clip_act: activations are clamped to this magnitude after each block; null does without, which
            is safe in float32.
        dropout: probability of dropping an activation in the residual branches, in [0, 1).
        logvar_channels: Fourier features of the uncertainty network u(sigma).
        dtype: dtype of the activations on an accelerator; a CPU always computes in float32.
    """

    img_resolution: int
    img_channels: int
    label_dim: int
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (16, 8)
    channels_per_head: int = 64
    label_balance: float = 0.5
    concat_balance: float = 0.5
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float | None = 256.0
    dropout: float = 0.0
    logvar_channels: int = 128
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _require(self.label_dim >= 0, "label_dim", "not be negative", self.label_dim)
        counts = ("img_channels", "model_channels", "num_blocks", "channels_per_head")
        for name in (*counts, "logvar_channels"):
            _require(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        for name in ("label_balance", "concat_balance", "res_balance", "attn_balance"):
            _require(0 <= getattr(self, name) <= 1, name, "lie in [0, 1]", getattr(self, name))
        _require(0 <= self.dropout < 1, "dropout", "lie in [0, 1)", self.dropout)
        valid = self.clip_act is None or self.clip_act > 0
        _require(valid, "clip_act", "be positive or null", self.clip_act)
        dtypes = ("float32", "float16", "bfloat16")
        _require(self.dtype in dtypes, "dtype", f"be one of {', '.join(dtypes)}", self.dtype)
        self._check_levels()

    def _check_levels(self) -> None:
        mult, resolution = self.channel_mult, self.img_resolution
        _require(bool(mult) and min(mult) >= 1, "channel_mult", "hold numbers of at least 1", mult)
        _require(_is_power_of_two(resolution), "img_resolution", "be a power of two", resolution)
        smallest = 2 ** (len(mult) - 1)
        rule = f"be at least {smallest}, because channel_mult has {len(mult)} levels"
        _require(resolution >= smallest, "img_resolution", rule, resolution)
        unused = set(self.attn_resolutions) - set(self.resolutions)
        rule = f"name levels of the network, which are {', '.join(map(str, self.resolutions))}"
        _require(not unused, "attn_resolutions", rule, self.attn_resolutions)
        for channels in (self.model_channels * m for m in mult):
            heads = max(1, channels // self.channels_per_head)
            rule = f"divide the {channels} channels of a level into {heads} equal heads"
            _require(channels % heads == 0, "channels_per_head", rule, self.channels_per_head)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Resolution of each level, finest first."""
        return tuple(self.img_resolution >> level for level in range(len(self.channel_mult)))


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Distribution of noise levels in training: ln sigma ~ N(p_mean, p_std^2) (EDM2 table 6).

    Attributes:
        p_mean: mean of ln sigma.
        p_std: standard deviation of ln sigma, positive.
    """

    p_mean: float = -0.4
    p_std: float = 1.0

    def __post_init__(self) -> None:
        _require(self.p_std > 0, "p_std", "be positive", self.p_std)


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
    """

    lr_ref: float = 0.01
    t_ref: float | None = 70_000.0
    rampup_images: int = 10_000_000
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _require(self.lr_ref > 0, "lr_ref", "be positive", self.lr_ref)
        _require(self.t_ref is None or self.t_ref > 0, "t_ref", "be positive or null", self.t_ref)
        _require(self.rampup_images >= 0, "rampup_images", "not be negative", self.rampup_images)
        _require(0 <= self.beta1 < 1, "beta1", "lie in [0, 1)", self.beta1)
        _require(0 <= self.beta2 < 1, "beta2", "lie in [0, 1)", self.beta2)
        _require(self.eps > 0, "eps", "be positive", self.eps)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The data set and its mapping to network units: (pixel / 127.5 - 1 - mean) * scale.

    Attributes:
        name: name of the data set.
        mean: mean of pixel / 127.5 - 1 over the data set, subtracted.
        scale: factor that brings the standard deviation to `sigma_data`.
        sigma_data: standard deviation of the mapped images, as the preconditioning assumes it.
    """

    name: str = "digits"
    mean: float = 0.0
    scale: float = 1.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _require(self.scale > 0, "scale", "be positive", self.scale)
        _require(self.sigma_data > 0, "sigma_data", "be positive", self.sigma_data)


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
        _require(bool(self.sigma_rels), "sigma_rels", "hold at least one number", self.sigma_rels)
        for name in ("sigma_rels", "direct_sigma_rels"):
            values = getattr(self, name)
            valid = all(0 < s <= SIGMA_REL_MAX for s in values)
            _require(valid, name, f"lie in (0, {SIGMA_REL_MAX:.4f}]", values)
            _require(len(set(values)) == len(values), name, "differ from each other", values)
        _require(self.dtype in CODECS, "dtype", f"be one of {', '.join(CODECS)}", self.dtype)


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
        name: name of the preset it came from, for people.

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
    name: str = "custom"
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        _require(self.seed >= 0, "seed", "not be negative", self.seed)
        _require(self.batch_size >= 1, "batch_size", "be at least 1", self.batch_size)
        lengths = {
            "total_images": self.total_images,
            "checkpoint_every": self.checkpoint_every,
            "status_every": self.status_every,
            "track.snapshot_every": self.track.snapshot_every,
        }
        for name, images in lengths.items():
            below = images // self.batch_size * self.batch_size
            nearest = max(below, self.batch_size)
            rule = f"be a positive multiple of batch_size = {self.batch_size}"
            _require(images > 0 and images == below, name, rule, images, f"Try {nearest}.")

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionary of plain values; tuples become lists."""
        return typing.cast(dict[str, Any], _encode(self))

    def to_json(self) -> str:
        """Indented JSON with a newline at its end."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: a key is unknown or missing, or a value has the wrong type or range.
        """
        return _decode_record(cls, values, "")

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
        _require(isinstance(values, dict), "The configuration", "be a JSON object", values)
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


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_encode(v) for v in value] if isinstance(value, tuple) else value


def _decode_record(cls: type[Any], values: Any, prefix: str) -> Any:
    _require(
        isinstance(values, Mapping), prefix.rstrip(".") or "configuration", "be an object", values
    )
    hints, fields = typing.get_type_hints(cls), dataclasses.fields(cls)
    names = [f.name for f in fields]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f" Did you mean {prefix}{near[0]}?" if near else f" Known: {', '.join(names)}."
            raise ConfigError(f"{prefix}{key} is no field of {cls.__name__}.{hint}")
    for f in fields:
        optional = (
            f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        )
        if f.name not in values and not optional:
            raise ConfigError(f"{prefix}{f.name} is missing, and it has no default.")
    return cls(**{k: _decode(hints[k], v, prefix + k) for k, v in values.items()})


def _decode(kind: Any, value: Any, name: str) -> Any:
    """Check one JSON value against its annotation and convert lists to tuples."""
    if dataclasses.is_dataclass(kind):
        return _decode_record(typing.cast(type[Any], kind), value, f"{name}.")
    if typing.get_origin(kind) is tuple:
        _require(isinstance(value, list | tuple), name, "be a list", value)
        item = typing.get_args(kind)[0]
        return tuple(_decode(item, v, name) for v in value)
    if isinstance(kind, types.UnionType):
        inner = next(k for k in typing.get_args(kind) if k is not types.NoneType)
        return None if value is None else _decode(inner, value, name)
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _require(number and math.isfinite(value), name, "be a finite number", value)
        return float(value)
    valid = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    _require(valid, name, f"be of type {kind.__name__}", value)
    return value
