"""`precalib eval`: KL divergence and multiple choice against the original."""
