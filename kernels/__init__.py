"""Tensor operations, each defined in plain torch."""
