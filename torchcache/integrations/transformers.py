"""Hugging Face transformers: a callback that transforms the model, logs what the cache does and sums it up."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from torchcache.errors import TorchcacheError
from torchcache.integrations.progress import Epochs, show_summary
from torchcache.marks import marked_modules
from torchcache.trainable import is_frozen
from torchcache.transform import transform

__all__ = ["TorchCacheCallback"]


class TorchCacheCallback(TrainerCallback):
    """Caches the marked modules of a model while a ``Trainer`` trains it.

    When training begins the model is transformed in place: the optimizer, the trainer and the checkpoints keep what
    they hold. A model compiled in place, ``model.compile(backend="torchcache")``, is cached by that backend. At the end
    of each epoch all rows are on disk, and ``trainer.log`` gets ``torchcache/hit_rate``, ``torchcache/rows``,
    ``torchcache/memory_bytes``, ``torchcache/disk_bytes`` and ``torchcache/saved_seconds``, evaluation included.

    Parameters
    ----------
    trainer : transformers.Trainer
        Whose ``log`` is called.
    transform : bool
        Transform the model; without, marked modules are cached when they are called.
    summary : bool
        Print a summary at the end.

    Raises
    ------
    TorchcacheError
        When training begins, for what ``transform`` refuses, and for ``TrainingArguments(torch_compile=True)`` where a
        marked module is partly trainable.

    Examples
    --------
    >>> trainer.add_callback(TorchCacheCallback(trainer))
    """

    def __init__(self, trainer: Trainer, *, transform: bool = True, summary: bool = True) -> None:
        self._trainer = trainer
        self._transforms, self._summarizes = transform, summary
        self._epochs: Epochs | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Transform the model."""
        model: Any = self._trainer.model
        if args.torch_compile and not all(is_frozen(module) for _, module, _ in marked_modules(model)):
            raise TorchcacheError(
                "TrainingArguments(torch_compile=True) knows other backends only, and they cache only marks that are "
                'frozen as a whole: leave it out, and call model.compile(backend="torchcache") before training instead'
            )
        if self._transforms:
            transform(model)
        self._epochs = Epochs(model)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the epoch."""
        found = self._epochs.finish() if self._epochs is not None else {}
        if found:
            self._trainer.log(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print the summary."""
        if self._summarizes and state.is_world_process_zero:
            show_summary(self._trainer.model)
