"""Image quality metrics, evaluations, comparisons and reports."""
