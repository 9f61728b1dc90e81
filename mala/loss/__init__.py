"""The fast paths of mala/cross_entropy.py: PyTorch's for CPUs, a Triton kernel for GPUs."""
