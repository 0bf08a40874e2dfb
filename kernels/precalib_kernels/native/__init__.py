"""C++ parts of precalib: compiled at installation where there is a compiler, else at first use."""
