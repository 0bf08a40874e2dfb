"""The offline quantizer and its command `precalib`."""
