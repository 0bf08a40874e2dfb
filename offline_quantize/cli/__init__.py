"""The command `precalib`: options, output and `precalib doctor`."""
