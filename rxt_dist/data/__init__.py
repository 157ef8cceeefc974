"""Datasets on disk and the path from them to training batches.

``format`` (shards and indices), ``manifest`` and ``verify`` (whole datasets) and ``tokens`` (tokenizers)
know nothing about training.
"""
