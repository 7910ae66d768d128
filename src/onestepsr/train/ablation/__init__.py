"""Ablation suites."""
