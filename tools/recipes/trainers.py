"""``torchcache.DataLoader`` under accelerate and under transformers' trainer (pip install accelerate transformers).

Both make loaders of a class of their own of what they are given, which load every sample. Here each process makes its
own loader, with its share of the samples, and it is not passed to ``prepare``.
"""

import argparse
import tempfile

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset, DistributedSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

import torchcache


class Samples(Dataset):
    """Stands for your files: what takes long to load."""

    def __init__(self, count, size):
        self.count, self.size = count, size

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).standard_normal((3, self.size, self.size))
        return {"pixels": torch.from_numpy(pixels).float(), "labels": index % 10}


class Classifier(nn.Module):
    """A frozen backbone, and a linear head on what it gives."""

    def __init__(self, width, size):
        super().__init__()
        backbone = nn.Sequential(
            nn.Conv2d(3, width, 4, 4), nn.GELU(), nn.Flatten(), nn.Linear(width * (size // 4) ** 2, 64)
        )
        self.backbone = torchcache.mark(backbone, freeze=True)
        self.head = nn.Linear(64, 10)

    def forward(self, pixels, labels):
        logits = self.head(self.backbone(pixels))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def with_accelerate(model, samples, epochs):
    """The loop as accelerate's documentation has it, but for the loader."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    sampler = DistributedSampler(samples, accelerator.num_processes, accelerator.process_index, seed=0)
    loader = torchcache.DataLoader(samples, batch_size=10, sampler=sampler)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            loss = model(batch["pixels"].to(accelerator.device), batch["labels"].to(accelerator.device))["loss"]
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return loader, losses


class SkippingTrainer(Trainer):
    """transformers' trainer with a loader of torchcache's for training."""

    def get_train_dataloader(self):
        self.sampler = DistributedSampler(self.train_dataset, self.args.world_size, self.args.process_index, seed=0)
        self.loader = torchcache.DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size,
            sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )
        return self.loader


class Shuffle(TrainerCallback):
    """Another order in every epoch."""

    def __init__(self):
        self.trainer = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.sampler.set_epoch(round(state.epoch))


def with_transformers(model, samples, epochs, folder):
    """transformers' trainer."""
    arguments = TrainingArguments(
        folder, num_train_epochs=epochs, per_device_train_batch_size=10, learning_rate=0.1, optim="sgd",
        logging_steps=1, lr_scheduler_type="constant", save_strategy="no", report_to=[],
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    shuffle = Shuffle()
    trainer = shuffle.trainer = SkippingTrainer(model, arguments, train_dataset=samples, callbacks=[shuffle])
    trainer.train()
    return trainer.loader, [step["loss"] for step in trainer.state.log_history if "loss" in step]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trainer", choices=["accelerate", "transformers"], default="accelerate")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args(argv)

    torch.manual_seed(0)
    samples, model = Samples(given.samples, given.size), Classifier(given.width, given.size)
    with tempfile.TemporaryDirectory() as folder:
        if given.trainer == "accelerate":
            loader, losses = with_accelerate(model, samples, given.epochs)
        else:
            loader, losses = with_transformers(model, samples, given.epochs, folder)
    print(torchcache.stats(loader))
    return model, losses


if __name__ == "__main__":
    main()
