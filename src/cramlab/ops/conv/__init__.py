"""Short causal convolutions over tokens."""
