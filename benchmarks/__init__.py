"""Speed and memory, measured side by side with what an engineer would use instead."""
