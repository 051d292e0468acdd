"""What injection leaves in a network, and what is done with it there."""
