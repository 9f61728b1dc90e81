"""Tokenizers: how text becomes pieces, how a vocabulary grows, and how the rows of new pieces start."""
