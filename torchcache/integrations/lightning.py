"""Lightning: a callback that transforms the model, logs what the cache does and sums it up."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import nn

from torchcache.integrations.progress import Epochs, show_summary
from torchcache.marks import marked_modules
from torchcache.modes import held, hold
from torchcache.transform import transform

__all__ = ["TorchCacheCallback"]


class TorchCacheCallback(pl.Callback):
    """Caches the marked modules of a ``LightningModule`` while it is fitted.

    At the start of ``fit`` the module is transformed in place: the optimizer, the strategy and the checkpoints keep
    what they hold. Where the module has no ``forward`` of its own, its children with marks are transformed instead,
    since they are what ``training_step`` calls. A module that is compiled is cached by its backend, which
    has to be "torchcache". At the end
    of each epoch all rows are on disk, and the trainer's logger gets ``torchcache/hit_rate``, ``torchcache/rows``,
    ``torchcache/memory_bytes``, ``torchcache/disk_bytes`` and ``torchcache/saved_seconds``, validation included.

    Parameters
    ----------
    transform : bool
        Transform the module; without, marked modules are cached when they are called.
    summary : bool
        Print a summary at the end.

    Examples
    --------
    >>> trainer = lightning.Trainer(callbacks=[TorchCacheCallback()])
    """

    def __init__(self, *, transform: bool = True, summary: bool = True) -> None:
        self._transforms, self._summarizes = transform, summary
        self._epochs: Epochs | None = None
        self._modes: list[tuple[nn.Module, list[nn.Module]]] = []
        self._validated = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Transform the module."""
        if self._transforms:
            for part in _called(pl_module):
                transform(part)
        self._epochs = Epochs(pl_module)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note which parts stay in eval mode: after a validation the trainer has each in the mode that it saw."""
        self._modes = [(module, held(module)) for _, module, _ in marked_modules(pl_module)]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Note them before a validation that may follow."""
        self.on_sanity_check_start(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The trainer is about to set modes."""
        self._validated = True

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What is unfrozen from here on is to be in the mode that was asked for."""
        for module, parts in self._modes if self._validated else ():
            hold(module, parts)
        self._validated = False

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """The same within an epoch."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the epoch."""
        found = self._epochs.finish() if self._epochs is not None else {}
        if found:
            # Not by way of ``log_dict``, which would have ranks wait for each other to average their counters.
            for logger in trainer.loggers:
                logger.log_metrics({**found, "epoch": trainer.current_epoch}, step=trainer.global_step)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the summary."""
        if self._summarizes and trainer.is_global_zero:
            show_summary(pl_module)


def _called(module: pl.LightningModule) -> list[nn.Module]:
    """What ``training_step`` calls, by the conventions of the framework."""
    if type(module).forward is not pl.LightningModule.forward:
        return [module]
    children = [child for child in module.children() if next(marked_modules(child), None) is not None]
    return children or [module]  # without any mark, transform says what is missing
