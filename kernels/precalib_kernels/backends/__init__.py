"""Ways to compute with packed weights.

`base` says what a backend is, `registry` which there are and which one computes a layer. Each has a
folder of its own, but for `reference`, which is plain torch.
"""
