"""Tasks: data from a seed; none of them knows a model."""
