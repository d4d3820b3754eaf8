"""Lightning: a callback that tracks a LightningModule. Importing this imports Lightning."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from torch import nn

from posthoc_ema.errors import ConfigError, PhemaError
from posthoc_ema.profiles import DEFAULT_SIGMA_RELS
from posthoc_ema.torch.distributed.sharding import is_sharded
from posthoc_ema.torch.optimizer_hook import TrackerOptions, attach
from posthoc_ema.torch.resuming import refuse_taken
from posthoc_ema.torch.stepping import parameters_of
from posthoc_ema.torch.tracker import Tracker

if TYPE_CHECKING or (
    importlib.util.find_spec("lightning")
    and not ("pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules)
):
    from lightning.pytorch import Callback, LightningModule, Trainer
else:  # the same under its old name, for programs that use that
    from pytorch_lightning import Callback, LightningModule, Trainer


_log = logging.getLogger("posthoc_ema")


class PostHocEMA(Callback):
    """Tracks averages of a LightningModule while a Lightning Trainer fits it.

    One update follows each optimizer step, under automatic and manual optimization, gradient
    accumulation and several optimizers (one update for an iteration of all). The tracker's state travels
    in Lightning's checkpoints, so `trainer.fit(..., ckpt_path=...)` continues bit for bit. A last
    snapshot is stored when fitting ends. Names in the store are those of the LightningModule's
    state_dict: a synthesized file loads with `model.load_state_dict(load_file(path))`.

    Args:
        folder: where the snapshots go.
        every: store a snapshot whenever training time passes a multiple of this; None for none but the
            last.
        module: name of the submodule to track, such as "net"; the whole LightningModule by default.
            Two callbacks can track two submodules.
        validate_with: a tracked length: validation loops of `fit` then see that average instead of the
            weights. The weights, buffers and train flags come back afterwards, after errors too.
        **options: further arguments of `Tracker`, see there.

    Raises:
        ConfigError: validate_with is not among the tracked lengths.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from posthoc_ema.torch.lightning import PostHocEMA
        >>> trainer = Trainer(callbacks=[PostHocEMA("snapshots", every=1000)])  # doctest: +SKIP
        >>> trainer.fit(model, data)  # doctest: +SKIP
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: int | None,
        module: str | None = None,
        validate_with: float | None = None,
        **options: Unpack[TrackerOptions],
    ) -> None:
        super().__init__()
        tracked = tuple(options.get("sigma_rels", DEFAULT_SIGMA_RELS))
        if validate_with is not None and validate_with not in tracked:
            raise ConfigError(
                f"validate_with must be a tracked length, got {validate_with!r}; tracked are {tracked}. "
                "Add it to sigma_rels: one more costs one more copy of the weights."
            )
        self._folder = Path(folder)
        self._every = every
        self._module = module
        self._validate_with = validate_with
        self._options = options
        self._options["resume"] = True  # whether there is something to continue is known below
        self._tracker: Tracker | None = None
        self._ended = False
        self._state: dict[str, Any] | None = None  # of a tracker that is not there yet, or no more
        self._swap = contextlib.ExitStack()

    @property
    def tracker(self) -> Tracker | None:
        """The tracker, from the start of fitting on (closed at its end); None before."""
        return self._tracker

    @property
    def state_key(self) -> str:
        """Under which Lightning's checkpoints hold this callback's state."""
        return self._generate_state_key(module=self._module)

    # ---- fitting

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin or continue; the optimizers are there, and a checkpoint has been loaded."""
        if getattr(trainer, "fast_dev_run", False):
            _log.info("fast_dev_run: nothing is tracked.")
            return
        module = pl_module if self._module is None else pl_module.get_submodule(self._module)
        self._tracker = self._begin(module, trainer.global_step)
        owned = {id(parameter) for parameter in module.parameters()}
        optimizers = [
            optimizer
            for optimizer in trainer.optimizers
            if not owned.isdisjoint(map(id, parameters_of(optimizer)))
        ]
        attach(self._tracker, optimizers)

    def _begin(self, module: nn.Module, step: int) -> Tracker:
        if self._state is None:
            refuse_taken(
                self._folder,
                "Resume that run with trainer.fit(..., ckpt_path=...) from a checkpoint that was saved "
                "with this callback; for a new run choose a new folder.",
            )
            if step:
                _log.warning(
                    "the checkpoint of step %d holds no state of PostHocEMA: averages begin now, at time 0.",
                    step,
                )
        tracker = Tracker(module, self._folder, every=self._every, **self._options)
        if self._state is not None:
            try:
                tracker.load_state_dict(self._state)
            except BaseException:
                tracker.close()
                raise
        self._state, self._ended = None, False
        return tracker

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the last averages."""
        if self._tracker is not None and self._tracker.time:
            self._tracker.snapshot()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the folder free; the state stays, for checkpoints that are saved later."""
        if stage == "fit":
            self._end()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Put the weights back if validation failed, and give the folder free."""
        self._swap.close()
        self._end()

    def _end(self) -> None:
        if self._tracker is not None and not self._ended:
            self._ended = True
            self._state = self._tracker.state_dict() if self._tracker.time else None
            self._tracker.close()

    # ---- validating

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in."""
        if self._validate_with is None or self._tracker is None or trainer.state.fn != "fit":
            return
        swap = self._tracker.swapped(sigma_rel=self._validate_with, train=None, broadcast=True)
        try:
            self._swap.enter_context(swap)
        except PhemaError as error:  # on all ranks alike
            if self._options.get("on_error") == "raise":
                raise
            _log.error("validation sees the weights, not their average: %s", error)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights back."""
        self._swap.close()

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The tracker's state, for the checkpoint that Lightning saves; all ranks make it together."""
        tracker = self._tracker
        if tracker is not None and tracker.time and not self._ended:
            return _whole(tracker.state_dict())
        return _whole(self._state) if self._state else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the tracker is there."""
        self._state = state_dict


def _whole(state: dict[str, Any]) -> dict[str, Any]:
    """A state with sharded averages made whole: the first rank's checkpoint is the only one."""
    averages = {
        name: tensor.full_tensor().cpu() if is_sharded(tensor) else tensor
        for name, tensor in state["averages"].items()
    }
    return {**state, "averages": averages}
