"""Datasets in folders and at URLs, and the path from them to training batches.

``blocks``, ``index`` and ``format`` (shards), ``manifest`` and ``verify`` (whole datasets), ``remote``,
``cache`` and ``files`` (where their files are) and ``tokens`` (tokenizers) know nothing about training.
"""
