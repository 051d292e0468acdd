"""Many methods on one task under one budget: trained, measured, and set side by side."""
