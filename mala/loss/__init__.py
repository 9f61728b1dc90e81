"""The fast paths of mala/cross_entropy.py: one for CPUs, one Triton kernel for GPUs."""
