"""Compiled C kernels and their Python wrappers. For each kernel, there is a fallback in torch operations."""
