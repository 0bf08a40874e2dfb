"""Ways to compute with packed weights: one folder each."""
