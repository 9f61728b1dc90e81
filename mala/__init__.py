"""MaLA from scratch: adapt a LLaMA checkpoint to hundreds of languages (arXiv 2401.13303)."""
