"""Tensors of samples that nobody has loaded: shape, dtype, device and digests, and the data when it is used."""
