"""Distributed pretraining of Reactive Transformers."""

__version__ = "0.1.0"
