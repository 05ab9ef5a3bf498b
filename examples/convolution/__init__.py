"""Experiments on convolution and attention; docs/convolution.md shows their results."""
