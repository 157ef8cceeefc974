"""Datasets on disk and the path from them to training batches.

``blocks`` and ``format`` (shards and their indices), ``manifest`` and ``verify`` (whole datasets) and
``tokens`` (tokenizers) know nothing about training.
"""
