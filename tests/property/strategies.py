"""What the laws are tried on: sigma_rels, times, profiles, tensors, names."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from posthoc_ema import SIGMA_REL_MAX, PowerProfile

quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,  # the same cases on every machine; raise max_examples to search
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
"""Settings of laws whose single case is cheap."""

few = settings(quick, max_examples=25)
"""Settings of laws that write files or solve large systems."""

sigma_rels = st.floats(0.005, SIGMA_REL_MAX)
tracked = st.sampled_from([0.02, 0.05, 0.08, 0.1, 0.2, 0.28])
times = st.integers(1, 10**9)
profiles = st.builds(PowerProfile, t=times, sigma_rel=sigma_rels)


@st.composite
def stores(draw, most: int = 12):
    """Profiles of a run: even times, one to three tracked lengths."""
    interval = draw(st.integers(1, 10**6))
    count = draw(st.integers(1, most))
    lengths = draw(st.lists(tracked, min_size=1, max_size=3, unique=True))
    return [PowerProfile(interval * k, s) for k in range(1, count + 1) for s in lengths]


rising_times = st.lists(st.integers(1, 1000), min_size=1, max_size=30).map(
    lambda steps: np.cumsum(steps).tolist()
)
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
names = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
    st.sampled_from(["w", "blocks.0.weight", "größe", "重み", "a b\n", '"', "\\", "\x00", "😀"]),
).filter(lambda name: name != "__metadata__")
number_dtypes = st.sampled_from(
    [
        "float64",
        "float32",
        "float16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint64",
        "uint32",
        "uint16",
        "uint8",
        "bool",
        "complex64",
    ]
)


@st.composite
def arrays(draw):
    """An array of any stored dtype and shape, with infinities, nan and negative zeros."""
    dtype = draw(number_dtypes)
    array = draw(hnp.arrays(dtype, draw(shapes)))
    if array.ndim >= 2 and draw(st.booleans()):
        array = array.T  # not contiguous
    return array


tensor_dicts = st.dictionaries(names, arrays(), max_size=5)
float32_arrays = hnp.arrays(
    np.float32, shapes, elements=st.floats(width=32, allow_nan=True, allow_infinity=True)
)
