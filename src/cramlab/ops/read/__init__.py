"""Multi-head attention of some tokens, the readers, to the entries of a buffer."""
