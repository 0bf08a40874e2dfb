"""The precalib format, its torch reference and the operators that compute with it."""
