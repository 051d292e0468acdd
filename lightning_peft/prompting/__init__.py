"""Learned keys and values inside attention, and learned tokens inside the sequence."""
