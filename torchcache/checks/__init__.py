"""Whether a region is row-wise, before it is believed, and whether it is still true, while it runs."""
