"""The shape of the U-Net and the choices that make it config A, B, ... or G of EDM2 (table 1).

Each choice is a field of its own and they compose; `CONFIGS` holds the paper's rows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from posthoc_ema import ConfigError
from reference_trainer.config.records import require

CHOICES: dict[str, tuple[str, ...]] = {
    "norm": ("pixel", "group-rms", "group"),
    "attention": ("cosine", "dot-product"),
    "weights": ("forced", "normalized", "plain"),
    "init": ("normal", "uniform", "zero-residual"),
    "embedding": ("fourier", "positional"),
    "modulation": ("scale", "scale-shift"),
    "block": ("edm2", "adm"),
    "functions": ("magnitude-preserving", "plain"),
    "dtype": ("float32", "float16", "bfloat16"),
}
"""Field of `NetworkConfig` to its values, that of config G first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """Size, shape and kind of the U-Net; the defaults are config G of EDM2 (sections 2, 3 and B).

    Attributes:
        img_resolution: side of the images in pixels, a power of two.
        img_channels: channels of the images.
        label_dim: number of classes, 0 for an unconditional network.
        model_channels: channels of the first level; the embedding has as many as the widest level of
            the paper's networks, 4 times as many.
        channel_mult: channels of each level as multiples of `model_channels`, finest level first.
        num_blocks: residual blocks per level of the encoder (the decoder has one more).
        attn_resolutions: resolutions whose blocks attend; the coarsest level's first decoder block
            always does.
        channels_per_head: width of an attention head; a level with fewer channels has one head.
        norm: "group" (group normalisation; configs A, B), "group-rms" (division by the root mean
            square of the group, nothing learned; C to E) or "pixel" (division by the root mean square
            over the channels, only where encoder blocks begin; F, G).
        attention: "dot-product" (with a norm before; A, B) or "cosine" (queries, keys and values
            normalised per head; C to G).
        attention_float32: attend in float32 whatever `dtype` is (A, B).
        weights: "plain" (A to C), "normalized" (what is applied has rows of norm 1; D) or "forced"
            (the stored weights are reset to norm sqrt(fan_in) before every step too; E to G).
        init: "zero-residual" (uniform, zero where a residual branch ends; A, B), "uniform" (C) or
            "normal" (D to G).
        biases: biases in every layer (A, B). Without them the network sees a constant channel.
        embedding: of the noise level: "positional" (A, B) or random "fourier" features (C to G).
        embedding_layers: layers between these features and the sum with the label: 2 (A to E) or 1.
        scale_labels: one-hot rows are multiplied by sqrt(label_dim) (C to G).
        modulation: what the embedding does in a block: "scale-shift" (A, B) or "scale".
        block: "adm" (resampling inside the branch, 1x1 convolution beside it, activation before the
            output convolution; A to E) or "edm2" (both on the main path; F, G).
        functions: "plain" (A to F) or "magnitude-preserving" activations, sums and concatenations.
        gains: zero-initialised scalar gains of the output and of each block's modulation (G).
        label_balance: share of the label in the embedding, t of the magnitude-preserving sum.
        concat_balance: share of the skip connection in the decoder's concatenation.
        res_balance: share of the residual branch.
        attn_balance: share of the attention branch.
        clip_act: activations are clamped to this magnitude after each block; null does without, which
            is safe in float32.
        dropout: probability of dropping an activation in the residual branches, in [0, 1).
        logvar_channels: features of the uncertainty network u(sigma); 0 for none (A).
        dtype: dtype of the activations. Normalisations reduce in float32 in any case, and the
            embedding and all that surrounds the network stay in float32.
    """

    img_resolution: int
    img_channels: int
    label_dim: int
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (16, 8)
    channels_per_head: int = 64
    norm: str = "pixel"
    attention: str = "cosine"
    attention_float32: bool = False
    weights: str = "forced"
    init: str = "normal"
    biases: bool = False
    embedding: str = "fourier"
    embedding_layers: int = 1
    scale_labels: bool = True
    modulation: str = "scale"
    block: str = "edm2"
    functions: str = "magnitude-preserving"
    gains: bool = True
    label_balance: float = 0.5
    concat_balance: float = 0.5
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float | None = 256.0
    dropout: float = 0.0
    logvar_channels: int = 128
    dtype: str = "float32"

    def __post_init__(self) -> None:
        require(self.label_dim >= 0, "label_dim", "not be negative", self.label_dim)
        require(
            self.logvar_channels >= 0, "logvar_channels", "not be negative", self.logvar_channels
        )
        for name in ("img_channels", "model_channels", "num_blocks", "channels_per_head"):
            require(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        for name in ("label_balance", "concat_balance", "res_balance", "attn_balance"):
            require(0 <= getattr(self, name) <= 1, name, "lie in [0, 1]", getattr(self, name))
        require(0 <= self.dropout < 1, "dropout", "lie in [0, 1)", self.dropout)
        valid = self.clip_act is None or self.clip_act > 0
        require(valid, "clip_act", "be positive or null", self.clip_act)
        for name, values in CHOICES.items():
            value = getattr(self, name)
            require(value in values, name, f"be one of {', '.join(values)}", value)
        layers = self.embedding_layers
        require(layers in (1, 2), "embedding_layers", "be 1 or 2", layers)
        even = self.embedding == "fourier" or self.model_channels % 2 == 0
        rule = "be even for the positional embedding, which is of sines and cosines"
        require(even, "model_channels", rule, self.model_channels)
        self._check_levels()

    def _check_levels(self) -> None:
        mult, resolution = self.channel_mult, self.img_resolution
        require(bool(mult) and min(mult) >= 1, "channel_mult", "hold numbers of at least 1", mult)
        power = resolution >= 1 and resolution & (resolution - 1) == 0
        require(power, "img_resolution", "be a power of two", resolution)
        smallest = 2 ** (len(mult) - 1)
        rule = f"be at least {smallest}, because channel_mult has {len(mult)} levels"
        require(resolution >= smallest, "img_resolution", rule, resolution)
        unused = set(self.attn_resolutions) - set(self.resolutions)
        rule = f"name levels of the network, which are {', '.join(map(str, self.resolutions))}"
        require(not unused, "attn_resolutions", rule, self.attn_resolutions)
        for channels in (self.model_channels * m for m in mult):
            heads = max(1, channels // self.channels_per_head)
            rule = f"divide the {channels} channels of a level into {heads} equal heads"
            require(channels % heads == 0, "channels_per_head", rule, self.channels_per_head)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Resolution of each level, finest first."""
        return tuple(self.img_resolution >> level for level in range(len(self.channel_mult)))


_A: dict[str, Any] = {
    "norm": "group",
    "attention": "dot-product",
    "attention_float32": True,
    "weights": "plain",
    "init": "zero-residual",
    "biases": True,
    "embedding": "positional",
    "embedding_layers": 2,
    "scale_labels": False,
    "modulation": "scale-shift",
    "block": "adm",
    "functions": "plain",
    "gains": False,
    "clip_act": None,
    "logvar_channels": 0,
}
_B = _A | {"logvar_channels": 128}
_C = _B | {
    "norm": "group-rms",
    "attention": "cosine",
    "attention_float32": False,
    "init": "uniform",
    "biases": False,
    "embedding": "fourier",
    "scale_labels": True,
    "modulation": "scale",
}
_D = _C | {"weights": "normalized", "init": "normal"}
_E = _D | {"weights": "forced"}
_F = _E | {"norm": "pixel", "block": "edm2", "embedding_layers": 1, "clip_act": 256.0}
_G = _F | {"functions": "magnitude-preserving", "gains": True}

CONFIGS: dict[str, dict[str, Any]] = {
    "A": _A,
    "B": _B,
    "C": _C,
    "D": _D,
    "E": _E,
    "F": _F,
    "G": _G,
}
"""Config of the paper to the fields it fixes; each row is the one before and what it changes."""


def network_of_config(network: NetworkConfig, letter: str) -> NetworkConfig:
    """The same size as another config of EDM2 (section 2, table 1).

    Config A attends at every level but the finest, the others at those that `network` names.
    `clip_act` stays null where `network` has it so.

    Args:
        network: size and shape, as config B to G.
        letter: "A" to "G".

    Raises:
        ConfigError: there is no such config.

    Example:
        >>> small = NetworkConfig(img_resolution=8, img_channels=1, label_dim=10, model_channels=32,
        ...     channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
        >>> network_of_config(small, "C").norm
        'group-rms'
    """
    if letter not in CONFIGS:
        raise ConfigError(f"config must be one of {', '.join(CONFIGS)}, got {letter!r}.")
    values = dict(CONFIGS[letter])
    if network.clip_act is None:
        values["clip_act"] = None
    if letter == "A":
        values["attn_resolutions"] = network.resolutions[1:]
    return dataclasses.replace(network, **values)
