"""Who computes: the program behind a mark, the contents of its tensors, and whether either changed."""
