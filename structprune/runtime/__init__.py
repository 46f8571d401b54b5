"""What runs a model with fewer tokens than it was given."""
