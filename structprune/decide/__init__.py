"""From scores to decisions: how much leaves (`sparsity`, `budget`) and which (`select`)."""
