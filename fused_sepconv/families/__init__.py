"""One module a family of kernels: which problems its instances can run, and at what predicted cost.

A family has `candidates(problem, device, kernels)`, each with its cost or the reason why it can't run, and, where its
kernels are this package's, `INSTANCES`.
"""
