"""Packed mixtures of experts in vLLM: finding them, loading them, computing with them."""
