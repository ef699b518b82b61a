"""Models on irregular series: `fit` trains one, `study` runs models over seeds, `documents` holds what is written.

`transfer` starts from a model trained on SRCD; `boosting` trains gradient-boosted trees for comparison.
"""
