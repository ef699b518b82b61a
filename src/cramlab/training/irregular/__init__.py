"""Models trained on irregular series: fit, study over seeds, transfer between tables, boosted trees beside them."""
