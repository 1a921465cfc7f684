"""Where model, text and questions come from: recipes, hub, packages, local files; and the splits, which never share a document.
Imports `run` and `network`.
"""
