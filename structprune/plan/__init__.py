"""A plan: what a pruner decided, as a value: keys, one block's decisions, the whole."""
