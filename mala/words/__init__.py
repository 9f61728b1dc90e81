"""Tokenizers: text to pieces, how a vocabulary grows, the rows of new pieces, and what all that brings."""
