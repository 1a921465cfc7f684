"""The model and its layers: loading and saving, which linear layers there are and who reads what, sites that are factorized together,
and the pass that takes gradients. Imports `run`.
"""
