"""ARMOR's solver: an N:M core between two block-diagonal wrappers, by exact descent."""
