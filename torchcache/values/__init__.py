"""Arguments and outputs as flat tensors and back: complete, or a bypass."""
