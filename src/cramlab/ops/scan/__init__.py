"""The linear recurrence `s[t] = exp(-rate * gap[t]) * s[t-1] + u[t]` over irregular gaps."""
