"""Scikit-learn's handwritten digits (UCI, 1797 images of 8x8): carried by the package, no download.

The source counts ink per pixel in 0..16; here that is 0..255, so that everything downstream sees
ordinary 8-bit images.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from posthoc_ema.errors import ConfigError

_INK_MAX = 16


def load_arrays() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the images, uint8 `[1797, 1, 8, 8]` in 0..255, and the labels, int64 `[1797]`.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "data set 'digits' needs scikit-learn, which is not installed. "
            "Run: pip install 'posthoc-ema[trainer]'"
        ) from error
    ink, labels = load_digits(return_X_y=True)
    pixels = np.round(ink * (255 / _INK_MAX)).astype(np.uint8)
    return pixels.reshape(-1, 1, 8, 8), labels.astype(np.int64)
