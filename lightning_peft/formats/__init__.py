"""Adapters in the formats of other libraries, and the card that goes with them."""
