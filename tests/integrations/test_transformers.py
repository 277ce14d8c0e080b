"""transformers' own trainer with the callback: same weights as without the cache, epochs logged, references kept."""

import copy

import pytest
import torch
from torch.utils.data import Dataset

import torchcache

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Images(Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(2)
        self.pixels = torch.randn(24, 3, 16, 16, generator=generator)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": index % 3}


def classifier():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    config.num_labels = 3
    model = transformers.ViTForImageClassification(config)
    model.vit.requires_grad_(False)
    return model


def trainer_for(model, tmp_path, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        seed=5,
        **options,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=Images(), eval_dataset=Images())


def test_training_is_the_same_and_each_epoch_is_logged(tmp_path, capsys):
    from torchcache.integrations.transformers import TorchCacheCallback

    plain = classifier()
    cached = copy.deepcopy(plain)
    torchcache.mark(cached.vit, persistent=True, persistent_cache_dir=str(tmp_path / "cache"))
    plain.vit.eval()  # as a mark keeps it
    plain.vit.train = lambda mode=True: plain.vit
    trainer_for(plain, tmp_path).train()
    trainer = trainer_for(cached, tmp_path, eval_strategy="epoch")
    trainer.add_callback(TorchCacheCallback(trainer))
    trainer.train()
    torch.testing.assert_close(cached.state_dict(), plain.state_dict())
    assert trainer.model is cached
    epochs = [entry for entry in trainer.state.log_history if "torchcache/hit_rate" in entry]
    assert [entry["epoch"] for entry in epochs] == [1, 2, 3]
    # The first evaluation belongs to the second epoch: it comes after the first one's end.
    assert [entry["torchcache/hit_rate"] for entry in epochs] == pytest.approx([0, 1, 1])
    assert [entry["torchcache/rows"] for entry in epochs] == [24, 48, 48]
    assert epochs[-1]["torchcache/disk_bytes"] > 0
    assert "eval_loss" in trainer.evaluate()
    assert "spent on the cache" in capsys.readouterr().err


@pytest.mark.parametrize("door", ["eager", "compile"])
def test_without_transform_the_other_doors_are_open(tmp_path, door):
    from torchcache.integrations.transformers import TorchCacheCallback

    model = classifier()
    torchcache.mark(model.vit)
    if door == "compile":
        model.compile(backend="torchcache", options={"inner": "eager"})
    trainer = trainer_for(model, tmp_path)
    trainer.add_callback(TorchCacheCallback(trainer, transform=door == "compile", summary=False))
    trainer.train()
    epochs = [entry for entry in trainer.state.log_history if "torchcache/hit_rate" in entry]
    assert [entry["torchcache/hit_rate"] for entry in epochs] == pytest.approx([0, 1, 1])


def test_what_cannot_work_is_told_before_training(tmp_path):
    from torchcache.integrations.transformers import TorchCacheCallback

    trainer = trainer_for(classifier(), tmp_path)
    trainer.add_callback(TorchCacheCallback(trainer))
    with pytest.raises(torchcache.MarkError, match="nothing in ViTForImageClassification is marked"):
        trainer.train()
    trainer = trainer_for(torchcache.mark(classifier()), tmp_path)
    trainer.add_callback(TorchCacheCallback(trainer))
    trainer.args.torch_compile = True
    with pytest.raises(torchcache.TorchcacheError, match=r'call model.compile\(backend="torchcache"\)'):
        trainer.train()


def test_what_is_frozen_as_a_whole_is_cached_in_compiled_models(tmp_path):
    from torchcache.integrations.transformers import TorchCacheCallback

    model = classifier()
    torchcache.mark(model.vit, freeze=True)
    trainer = trainer_for(model, tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    trainer.add_callback(TorchCacheCallback(trainer))
    trainer.train()
    assert torchcache.stats(model).hits >= 24


class Words(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        ids = torch.randint(3, 40, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("checkpoints", ["no", "epoch"])
def test_a_language_models_backbone_is_served_in_every_later_epoch(tmp_path, checkpoints):
    """The trainer hands a count for the loss through the backbone, and notes in its configuration what it saves."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, use_cache=False
    )
    model = transformers.LlamaForCausalLM(config)
    model.config.dtype = torch.float32  # as from_pretrained leaves it
    torchcache.mark(model.model, freeze=True)
    trainer = trainer_for(model, tmp_path)
    trainer.args.save_strategy = transformers.IntervalStrategy(checkpoints)
    trainer.train_dataset = Words()
    trainer.train()
    stats = torchcache.stats(model)
    assert (stats.hits, stats.misses, stats.bypasses) == (48, 24, 0)


def test_the_number_of_items_is_left_to_code_that_reads_it():
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64,
        vocab_size=100,
    )  # fmt: skip

    class Reads(transformers.LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            return self.model(input_ids, use_cache=False).last_hidden_state / kwargs.get("num_items_in_batch", 1)

    plain = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    plain.model.layers[-1].requires_grad_(True)
    own = Reads(config).eval().requires_grad_(False)
    ids = torch.randint(5, 100, (4, 8))
    mask = torch.ones_like(ids)
    marked, marked_own = (torchcache.mark(copy.deepcopy(model)) for model in (plain, own))
    for step in range(3):
        given = {"num_items_in_batch": torch.tensor(50 + 20 * step)}
        one, other = (
            model(ids, mask, None, None, None, ids, use_cache=False, **given).loss for model in (plain, marked)
        )
        assert torch.allclose(one, other, rtol=1e-4)
        assert torch.allclose(own(ids, **given), marked_own(ids, **given), rtol=1e-4)


def test_other_models_that_are_made_meanwhile_change_nothing():
    model = classifier().vit.eval().requires_grad_(False)
    torchcache.mark(model)
    pixels = Images().pixels[:8]
    model(pixels)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=20))
    model(pixels)
    stats = torchcache.stats(model)
    assert (stats.hits, stats.misses) == (8, 8)
