"""The exceptions of this library.

    PhemaError
      + InvalidProfileError   (also ValueError)  sigma_rel, gamma or a time outside the formula's domain
      + SnapshotError
      |   - SnapshotFormatError                  not ours, damaged, malformed, or of a newer schema
      |   - SnapshotMismatchError                names, shapes, dtypes or runs differ where they must agree
      |   - SnapshotNotFoundError  (LookupError) nothing in the store satisfies the request
      |   - SnapshotWriteError     (OSError)     a file could not be written, for example a full disk
      + SynthesisError                           the target cannot be made from these snapshots
      + TrackingError                            the tracker was used in a way that would give wrong averages
      + ConfigError            (also ValueError) an option or a configuration value is wrong
      + MetricError                              the metric of a sweep failed or printed no number

    PhemaWarning (UserWarning)                   a result is returned, but something deserves attention

Every message is one to three sentences: the rule, the value that was given, the remedy. The command
line turns a `PhemaError` into one line on stderr and exit code 1; other exceptions are bugs and keep
their traceback.
"""

from __future__ import annotations


class PhemaError(Exception):
    """Base class of every error that this library raises on purpose."""


class InvalidProfileError(PhemaError, ValueError):
    """A sigma_rel, gamma or time lies outside the domain of the formula."""


class SnapshotError(PhemaError):
    """Base class of everything that is wrong with stored files."""


class SnapshotFormatError(SnapshotError):
    """A file is not a snapshot of ours, is damaged, or has a newer schema than this version reads."""


class SnapshotMismatchError(SnapshotError):
    """Two things that must agree (tensor names, shapes, dtypes, run ids) do not."""


class SnapshotNotFoundError(SnapshotError, LookupError):
    """Nothing in the store satisfies the request."""


class SnapshotWriteError(SnapshotError, OSError):
    """A file could not be written; what was stored before is untouched."""


class SynthesisError(PhemaError):
    """The wanted average cannot be made from these snapshots."""


class TrackingError(PhemaError):
    """The tracker was used in a way that would make its averages wrong."""


class ConfigError(PhemaError, ValueError):
    """An option or a configuration value is wrong or unknown."""


class MetricError(PhemaError):
    """The metric of a sweep failed, or its output holds no number."""


class PhemaWarning(UserWarning):
    """A result is returned, but something about it deserves attention."""
