"""Callbacks for training frameworks; each is imported by itself, and needs its framework."""
