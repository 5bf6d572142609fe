"""Kernels for the CPU and the GPU, and what chooses, builds and launches them; nothing is imported here."""
