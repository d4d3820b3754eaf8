"""transformers: a callback that tracks the model of a Trainer. Importing this imports transformers."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any, Unpack

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posthoc_ema.errors import TrackingError
from posthoc_ema.torch.distributed.sharding import is_sharded
from posthoc_ema.torch.optimizer_hook import TrackerOptions
from posthoc_ema.torch.resuming import refuse_taken
from posthoc_ema.torch.state_files import SavedState, load_state, save_state, saved_states
from posthoc_ema.torch.tracker import Tracker

_log = logging.getLogger("posthoc_ema")

STATE_FOLDER = "posthoc_ema_state"
"""Folder of the tracker's state inside a checkpoint of the Trainer."""


class PostHocEMACallback(TrainerCallback):
    """Tracks averages of the model that a transformers `Trainer` trains.

    One update follows each optimizer step (not each micro-batch, and none for a step that the gradient
    scaler skipped). The tracker's state is saved inside each checkpoint, as safetensors, and found again
    by `trainer.train(resume_from_checkpoint=...)`, which continues bit for bit. A last snapshot is
    stored when training ends. Of a PEFT model the adapter is tracked, under the names of its file.

    Args:
        folder: where the snapshots go.
        every: store a snapshot whenever training time passes a multiple of this; None for none but the
            last.
        resume_from: the checkpoint that training resumes from. Needed only if it lies outside of
            `output_dir`, because the Trainer does not say which it was.
        **options: further arguments of `Tracker`, see there.

    Example:
        >>> from transformers import Trainer
        >>> from posthoc_ema.torch.transformers import PostHocEMACallback
        >>> ema = PostHocEMACallback("snapshots", every=1000)
        >>> trainer = Trainer(model, arguments, callbacks=[ema])  # doctest: +SKIP
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: int | None,
        resume_from: str | os.PathLike[str] | None = None,
        **options: Unpack[TrackerOptions],
    ) -> None:
        super().__init__()
        self._folder = Path(folder)
        self._every = every
        self._resume_from = None if resume_from is None else Path(resume_from)
        self._options = options
        self._options["resume"] = True  # whether there is something to continue is known below
        self._tracker: Tracker | None = None
        self._running = False

    @property
    def tracker(self) -> Tracker | None:
        """The tracker, from the start of training on (closed at its end); None before."""
        return self._tracker

    def swapped(
        self, model: nn.Module | None = None, *, sigma_rel: float, train: bool | None = None
    ) -> contextlib.AbstractContextManager[Any]:
        """Put an average into the model for the time of a `with` block, see `Tracker.swapped`.

        Before the first step, when there is none yet, the block sees the weights. Wrap the Trainer's
        `evaluate` in it to evaluate an average during training; all processes call it.

        Args:
            model: the module that takes the average; the tracked one by default.
            sigma_rel: relative length.
            train: train flag inside; by default it is left as it is.
        """
        if self._tracker is None or self._tracker.time == 0:
            return contextlib.nullcontext(model)
        return self._tracker.swapped(model, sigma_rel=sigma_rel, train=train, broadcast=True)

    # ---- training

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Begin or continue."""
        assert model is not None
        # With auto_find_batch_size the Trainer begins again after a step that ran out of memory.
        again = self._running and state.global_step == 0 and args.auto_find_batch_size
        self._close()
        if state.global_step == 0 and not again:
            refuse_taken(
                self._folder,
                "Resume that run with trainer.train(resume_from_checkpoint=...); for a new run choose a "
                "new folder.",
            )
        self._tracker = Tracker(model, self._folder, every=self._every, **self._options)
        self._running = True
        if state.global_step:
            self._resume(self._tracker, args, state.global_step)
        elif again:
            self._tracker.restart()

    def _resume(self, tracker: Tracker, args: TrainingArguments, step: int) -> None:
        checkpoint, saved = self._find(args, step)
        targets = {name: tracker._ranks.layout(name) for name in tracker._model.averaged()}
        tracker.load_state_dict(load_state(saved, targets))
        _log.info("tracking goes on at time %d, from %s.", tracker.time, checkpoint)

    def _find(self, args: TrainingArguments, step: int) -> tuple[Path, SavedState]:
        candidates = [Path(args.output_dir or ".", f"checkpoint-{step}")]
        if args.resume_from_checkpoint not in (None, "True", "true", True, False):
            candidates.insert(0, Path(args.resume_from_checkpoint))
        if self._resume_from is not None:
            candidates = [self._resume_from]
        for checkpoint in candidates:
            for saved in reversed(saved_states(checkpoint / STATE_FOLDER)):
                if saved.extra.get("global_step") == step:
                    return checkpoint, saved
        raise TrackingError(
            f"training resumes at step {step}, but {candidates[0] / STATE_FOLDER} holds no state of the "
            "averages for it. Pass PostHocEMACallback(..., resume_from=CHECKPOINT) if it lies elsewhere; "
            "to track from here on choose a new folder and leave the old one."
        )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the step."""
        if self._tracker is not None and not getattr(
            kwargs["optimizer"], "step_was_skipped", False
        ):
            self._tracker.step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Store the last averages; at the end the Trainer may have loaded the best weights."""
        if control.should_training_stop and self._tracker is not None and self._tracker.time:
            self._tracker.snapshot()

    on_epoch_end = on_step_end

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the folder free."""
        self._close()

    def _close(self) -> None:
        self._running = False
        if self._tracker is not None:
            self._tracker.close()

    # ---- checkpoints

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the tracker's state in the checkpoint that has just been written."""
        if self._tracker is None or args.save_only_model:
            return
        checkpoint = Path(args.output_dir or ".", f"checkpoint-{state.global_step}")
        if not checkpoint.is_dir():  # a hyperparameter search saves elsewhere, and does not resume
            return
        tracked = self._tracker.state_dict()
        sharded = any(is_sharded(tensor) for tensor in tracked["averages"].values())
        if sharded or args.should_save:
            extra = {"global_step": state.global_step}
            session = self._tracker.session
            save_state(checkpoint / STATE_FOLDER, tracked, extra, session=session)
