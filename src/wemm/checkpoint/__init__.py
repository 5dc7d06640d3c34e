"""Files on disk → named tensors of one rank. Knows no model code and no engine."""
