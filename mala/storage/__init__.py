"""Files on disk: safe writing, corpora, weights, adapters, checkpoints; and loading a model by its name."""
