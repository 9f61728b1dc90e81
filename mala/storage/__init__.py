"""What lies on disk: safe files, corpora, weights, adapters, checkpoints; and how a name leads to a model."""
