"""Data loaders and the cache: one that works a batch ahead, and one pass that fills the cache before training."""
