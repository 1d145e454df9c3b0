"""Builds the native module `fused_sepconv.native.lib._native` out of `csrc/`; setup.py is its only caller.

toolkit.py finds CUDA and chooses architectures, compile.py writes a ninja file and runs it, and resources.py turns
what ptxas says about every kernel into a report. None of them asks for a GPU or imports torch: the native code knows
neither torch nor the machine that it will run on.
"""
