"""The families: ways to run a call, each with its plan (`plan.py`) and its launches (`launch.py`) side by side.

- A plan has `candidates(problem, device, kernels)`, each with its cost or the reason why it can't run, and `INSTANCES`
  where its kernels are this package's. It knows no torch.
- `registry.py` names, for each operator, what prepares a candidate of a family for tensors of one signature.
"""
