"""Operators that know no memory: how tokens are read, scanned and selected, each with a slow twin beside it."""
