"""The tiers: memory over disk, and the bytes of a row."""
