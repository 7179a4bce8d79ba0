"""Triton kernels for what a workbench of language models does most: each with the plain PyTorch that it must equal.

Every operation is a folder: `__init__` (the menu), `reference` (the truth, written to be read), `kernel` (Triton),
`bench`. It needs torch; triton only where a kernel runs. `impl="auto"` decides per call: see `dispatch.choose`.
"""

__version__ = "0.1.0"
