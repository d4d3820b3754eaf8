"""Networks of other trainers, read into the network of this one."""

from __future__ import annotations

from reference_trainer.interchange.published import (
    PublishedNetwork,
    as_trainer,
    recognise,
    write_weights,
)

__all__ = ["PublishedNetwork", "as_trainer", "recognise", "write_weights"]
