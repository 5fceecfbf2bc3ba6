"""How good images are.

`quality.py` has the shipped classifier of Fashion-MNIST: the share of samples that it recognises,
and the Fréchet distance between its features of samples and of real images.
"""
