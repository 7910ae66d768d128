"""Datasets in tar shards."""
