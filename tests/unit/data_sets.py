"""Small data sets of files for the tests of the data package."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
from PIL import Image


def png(pixels, **options):
    """A PNG file of uint8 [h, w] or [h, w, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", **options)
    return buffer.getvalue()


def npy(values):
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def pictures(count, side=8, channels=3, seed=0):
    """uint8 [count, channels, side, side]."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, channels, side, side), dtype=np.uint8)


def edm2_files(values, labels=None, prefix="img", suffix="png"):
    """Files of a data set in the EDM2 layout, by name."""
    encode = (
        npy if suffix == "npy" else (lambda v: png(v[0] if len(v) == 1 else v.transpose(1, 2, 0)))
    )
    names = [f"{i // 1000:05d}/{prefix}{i:08d}.{suffix}" for i in range(len(values))]
    files = dict(zip(names, map(encode, values), strict=True))
    rows = None if labels is None else [[n, int(k)] for n, k in zip(names, labels, strict=True)]
    return {**files, "dataset.json": json.dumps({"labels": rows}).encode()}


def write_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_zip(path, files, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path
