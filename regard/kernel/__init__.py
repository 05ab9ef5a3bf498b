"""Kernels: compiled ways to run a form. Nothing optional is loaded until one is asked for."""
