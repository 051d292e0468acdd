"""Adapters to files and back."""
