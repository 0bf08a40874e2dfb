"""C++ parts of precalib: compiled with the machine's own compiler at first use, then cached."""
