"""Rows of libraries' models are found by processes that hash otherwise, and in which other models were made before."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("transformers")

RUN = """
    import json, sys
    sys.path.insert(0, sys.argv[1])
    import torchvision_operators  # before anything imports torchvision
    import torch, transformers
    import torchcache

    directory, order = sys.argv[2:]
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    text, images = dict(small, vocab_size=100), dict(small, image_size=32, patch_size=8)
    of = transformers
    MODELS = {
        "bert": lambda: of.BertModel(of.BertConfig(**text)),
        "bert with a head": lambda: of.BertForSequenceClassification(of.BertConfig(**text)),
        "clip": lambda: of.CLIPVisionModel(of.CLIPVisionConfig(**images)),
        "dinov2": lambda: of.AutoModel.from_config(of.Dinov2Config(**images)),
        "llama": lambda: of.LlamaForCausalLM(of.LlamaConfig(**text, use_cache=False)),
        "siglip": lambda: of.SiglipVisionModel(of.SiglipVisionConfig(**images)),
        "t5": lambda: of.T5EncoderModel(of.T5Config(d_model=32, num_layers=1, num_heads=2, d_ff=32, vocab_size=100)),
        "vit": lambda: of.ViTModel(of.ViTConfig(**images)),
    }
    try:
        import diffusers
    except ImportError:
        pass
    else:
        size = dict(block_out_channels=(32,), norm_num_groups=8)
        MODELS["vae"] = lambda: diffusers.AutoencoderKL(**size)


    def exported():
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten()).eval()
        rows = torch.export.Dim("rows", min=2, max=64)
        return torch.export.export(net, (torch.randn(4, 3, 32, 32),), dynamic_shapes=({0: rows},)).module()


    MODELS["exported"] = exported
    found = {}
    for name in sorted(MODELS, reverse=order == "last first"):
        torch.manual_seed(0)
        model = MODELS[name]().requires_grad_(False)
        if name != "exported":  # it has no modes
            model.eval()
        sees = name in ("clip", "dinov2", "exported", "siglip", "vit", "vae")
        inputs = torch.randn(6, 3, 32, 32) if sees else torch.randint(3, 99, (6, 7))
        method = {"vae": "_encode"}.get(name, "forward")
        torchcache.mark(model, method=method, persistent=True, persistent_cache_dir=directory)
        with torch.no_grad():
            for _ in range(2):
                getattr(model, method)(inputs) if name == "vae" else model(inputs)
        stats = torchcache.stats(model)
        found[name] = [stats.misses, stats.bypasses, sum(region.disk_hits for region in stats.regions)]
    print(json.dumps(found))
"""


def run(directory, order, seed):
    """Misses, bypasses and disk hits of each model in a process that hashes texts by this seed."""
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    here = os.path.dirname(os.path.abspath(__file__))
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(RUN), here, str(directory), order]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.once
def test_rows_are_found_whatever_a_process_hashes_by_and_made_before(tmp_path):
    stored = run(tmp_path, "first first", "1")
    assert {name: counts[:2] for name, counts in stored.items()} == {name: [6, 0] for name in stored}
    found = run(tmp_path, "last first", "2")
    assert found == {name: [0, 0, 6] for name in stored}
