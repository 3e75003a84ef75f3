"""Attention from Python: signatures, docstrings and the choice between NumPy's path and PyTorch's."""
