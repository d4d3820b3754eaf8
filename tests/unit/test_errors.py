from __future__ import annotations

import inspect

import pytest

import posthoc_ema.errors as errors
from posthoc_ema import PhemaError, PhemaWarning

CLASSES = [
    c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__
]
ERRORS = [c for c in CLASSES if c is not PhemaWarning]

BUILT_IN = {
    "InvalidProfileError": ValueError,
    "SnapshotNotFoundError": LookupError,
    "SnapshotWriteError": OSError,
    "ConfigError": ValueError,
}


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.__name__)
def test_one_base_class_catches_every_error(error):
    assert issubclass(error, PhemaError)
    with pytest.raises(PhemaError, match=r"^what, where$"):
        raise error("what, where")


@pytest.mark.parametrize("name", BUILT_IN)
def test_errors_are_also_of_the_builtin_kind_that_callers_expect(name):
    assert issubclass(getattr(errors, name), BUILT_IN[name])


def test_warning_is_a_user_warning_and_no_error():
    assert issubclass(PhemaWarning, UserWarning)
    assert not issubclass(PhemaWarning, PhemaError)


def test_picture_of_the_tree_shows_every_class():
    """The module's docstring is where readers look first."""
    for cls in CLASSES:
        assert cls.__name__ in errors.__doc__
        assert cls.__doc__
    for name, builtin in BUILT_IN.items():
        line = next(line for line in errors.__doc__.splitlines() if name in line)
        assert builtin.__name__ in line
