"""Compiles precalib's C++ sources: at installation where there is a compiler, else at first use."""
