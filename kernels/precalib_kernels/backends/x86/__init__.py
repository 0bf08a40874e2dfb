"""Products straight from a packed form, in C++ for x86 processors from AVX2 to AMX."""
