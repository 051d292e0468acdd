"""Bottleneck adapters: where they stand in each architecture, and what stands there."""
