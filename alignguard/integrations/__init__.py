"""The guard and DriftCheck inside other people's tools; each module imports its tool, and nothing here imports a module.

Tools are extras of the package (``fishergeo[inspect]``, ``[lm-eval]``, ``[trl]``, ``[axolotl]``).
"""
