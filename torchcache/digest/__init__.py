"""Of what: the 128-bit digest of each row, where the row lives."""
