"""The truth that the ops are judged by: an oracle in 80-bit floats, written from the formulas, for small N."""
