"""Lightning's own trainer with the callback: same weights as without the cache, epochs logged, references kept."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchcache

pl = pytest.importorskip("lightning.pytorch")


class Probe(pl.LightningModule):
    """A frozen backbone and a head; ``forward`` is what the training step calls."""

    def __init__(self, marked=True):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16)).requires_grad_(False)
        if marked:
            torchcache.mark(self.backbone)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, _):
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.head.parameters())


class Inner(nn.Module):
    def __init__(self, probe):
        super().__init__()
        self.backbone, self.head = probe.backbone, probe.head

    def forward(self, x):
        return self.head(self.backbone(x))


class Wrapper(pl.LightningModule):
    """A module without a forward: its training step calls a child."""

    def __init__(self):
        super().__init__()
        self.model = Inner(Probe())

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.model.head.parameters())


class Log(pl.loggers.logger.DummyLogger):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.epochs = []

    def log_metrics(self, metrics, step=None):
        if "torchcache/hit_rate" in metrics:
            self.epochs.append(metrics)


def fit(module, tmp_path, callbacks, validate=True, sanity=0):
    generator = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(40, 8, generator=generator), torch.randint(3, (40,), generator=generator))
    train = DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3))
    log = Log()
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=log,
        callbacks=callbacks,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=sanity,
    )
    trainer.fit(module, train, DataLoader(data, batch_size=20) if validate else None)
    return trainer, log.epochs


@pytest.fixture
def callback():
    from torchcache.integrations.lightning import TorchCacheCallback

    return TorchCacheCallback


def test_training_is_the_same_and_each_epoch_is_logged(tmp_path, callback, capsys):
    plain = Probe(marked=False)
    plain.backbone.eval()
    fit(plain, tmp_path, [])
    cached = Probe()
    trainer, epochs = fit(cached, tmp_path, [callback()])
    torch.testing.assert_close(cached.state_dict(), plain.state_dict())
    (optimizer,) = trainer.optimizers
    assert optimizer.param_groups[0]["params"][0] is cached.head.weight
    # Trained on and validated on the same rows: half of the first epoch's are there already.
    assert [epoch["torchcache/hit_rate"] for epoch in epochs] == pytest.approx([0.5, 1, 1])
    assert [epoch["torchcache/rows"] for epoch in epochs] == [80] * 3
    assert [epoch["epoch"] for epoch in epochs] == [0, 1, 2]
    assert epochs[-1]["torchcache/memory_bytes"] == 40 * 16 * 4
    assert "spent on the cache" in capsys.readouterr().err


def test_a_module_without_a_forward_has_its_children_transformed(tmp_path, callback):
    module = Wrapper()
    _, epochs = fit(module, tmp_path, [callback(summary=False)], validate=False)
    assert [epoch["torchcache/hit_rate"] for epoch in epochs] == pytest.approx([0, 1, 1])


def test_without_transform_marked_modules_are_cached_when_called(tmp_path, callback):
    module = Probe()
    _, epochs = fit(module, tmp_path, [callback(transform=False)])
    assert [epoch["torchcache/hit_rate"] for epoch in epochs] == pytest.approx([0.5, 1, 1])


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_module_is_cached_by_its_backend(tmp_path, callback, in_place):
    module = Probe()
    options = {"backend": "torchcache", "options": {"inner": "eager"}}
    if in_place:
        module.compile(**options)
    _, epochs = fit(module if in_place else torch.compile(module, **options), tmp_path, [callback()])
    assert [epoch["torchcache/hit_rate"] for epoch in epochs] == pytest.approx([0.5, 1, 1])


def test_a_module_without_marks_is_told_before_training(tmp_path, callback):
    with pytest.raises(torchcache.MarkError, match="nothing in Probe is marked"):
        fit(Probe(marked=False), tmp_path, [callback()])


def test_checkpoints_of_cached_training_are_those_of_plain_training(tmp_path, callback):
    trainer, _ = fit(Probe(), tmp_path, [callback()])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Probe.load_from_checkpoint(tmp_path / "last.ckpt", marked=False)
    torch.testing.assert_close(loaded.state_dict(), trainer.lightning_module.state_dict())


class Images(torch.utils.data.Dataset):
    """Counts what is loaded."""

    loaded = 0

    def __len__(self):
        return 40

    def __getitem__(self, index):
        type(self).loaded += 1
        return torch.randn(400, generator=torch.Generator().manual_seed(index)), index % 3


class ImageProbe(Probe):
    def __init__(self):
        super().__init__(marked=False)
        self.backbone = torchcache.mark(nn.Linear(400, 16), freeze=True, audit=0.0)


@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_takes_our_loader_as_it_is(tmp_path, workers):
    def trained(kind, **options):
        torch.manual_seed(0)
        probe, images = ImageProbe(), Images()
        Images.loaded = 0
        train, validation = (
            kind(images, batch_size=8, shuffle=shuffle, num_workers=workers, **options) for shuffle in (True, False)
        )
        trainer = pl.Trainer(
            max_epochs=4, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(probe, train, validation)
        return probe.head.weight, train

    expected, _ = trained(DataLoader)
    loaded = Images.loaded
    got, loader = trained(torchcache.DataLoader, check=0.0, dataset_id="images")
    assert torch.allclose(got, expected, atol=1e-5)
    assert torchcache.stats(loader).skipped >= 80
    assert workers or Images.loaded < loaded


class Unfreezes(Probe):
    def __init__(self, marked):
        super().__init__(marked=False)
        self.backbone.append(nn.Dropout(0.5))
        if marked:
            torchcache.mark(self.backbone)
        self.modes = []

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.modes += [[part.training for part in self.backbone]]
        return loss


def test_a_backbone_that_is_unfrozen_later_is_in_train_mode(tmp_path, callback):
    """Though the trainer validates before, and sets the mode of each part back to what it saw."""
    module, plain = Unfreezes(True), Unfreezes(False)
    for each, callbacks in ((module, [callback()]), (plain, [])):
        fit(each, tmp_path, [pl.callbacks.BackboneFinetuning(1), *callbacks], sanity=2)
    assert not any(map(any, module.modes[:5]))
    assert module.modes[5:] == plain.modes[5:] == [[True] * 4] * 10
