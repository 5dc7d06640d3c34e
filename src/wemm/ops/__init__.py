"""What an op is: its plain-torch definition, the portable backend and the oracle of every kernel.

One file per op. Kernels attach from `wemm.kernels` under the same file name; with none loaded, or
with gradients enabled, the definition runs.
"""
