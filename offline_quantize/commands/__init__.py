"""`precalib quantize`, `dequantize` and `verify`."""
