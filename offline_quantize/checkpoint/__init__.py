"""Checkpoints on disk: reading, downloading, and writing whole or not at all."""
