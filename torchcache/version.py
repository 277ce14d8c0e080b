"""The version of torchcache, for people, packages and the catalogue."""

__version__ = "0.1.0"
