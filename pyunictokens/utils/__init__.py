"""Files, errors, signals, time-outs, memory and profiling: what every part uses. Knows no model."""
