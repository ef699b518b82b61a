"""Learning gates and adapters: in closed form from streamed sums, then by gradient steps; the backbone is frozen."""
