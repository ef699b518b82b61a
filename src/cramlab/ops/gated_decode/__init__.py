"""Attention of one token a sequence in two parts: the near keys always, the far keys only where a gate is open."""
