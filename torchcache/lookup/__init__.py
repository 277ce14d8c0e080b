"""The op: hash, split, call the original, merge."""
