"""From a weight to its packed tensors, and the recipes for it."""
