"""Training after pruning, in which what was removed stays removed."""
