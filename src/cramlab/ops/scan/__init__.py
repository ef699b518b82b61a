"""The recurrence over tokens, by a fused kernel."""
