"""Degradation pipelines and datasets."""
