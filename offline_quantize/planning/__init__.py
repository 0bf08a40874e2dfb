"""Which weights are quantized, how, and what the output will look like."""
