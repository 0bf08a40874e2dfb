"""`precalib bench`: servers measured beside each other by `vllm bench serve`, in rounds."""
