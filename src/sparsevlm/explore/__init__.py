"""A page in the browser: one picture, one question, the dense answer and pruned ones side by side.

Only :mod:`sparsevlm.explore.page` and :mod:`sparsevlm.explore.serve` need gradio.
"""
