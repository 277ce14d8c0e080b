"""``python -m torchcache`` and ``torchcache``: arguments in, tables or JSON out; what is done is done in the store."""
