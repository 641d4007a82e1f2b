"""The Triton kernels: a lesson of their own."""
