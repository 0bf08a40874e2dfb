"""The file format: layouts, tensors, positions, and the torch reference."""
