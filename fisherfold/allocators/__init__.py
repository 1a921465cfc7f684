"""Who gets which rank under one budget: uniform, `fisher`, FermiGrad (arXiv 2512.03062), ASVD's sensitivity, LEMS' integer programme, ZS-SVD.
Imports `run`, `linalg`, `network`, `statistics`.
"""
