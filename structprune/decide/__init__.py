"""From scores to decisions: which linears, how much of each leaves, and which weights."""
