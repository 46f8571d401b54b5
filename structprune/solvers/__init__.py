"""What picks weights and updates the others at once, named after the method; and the repairs."""
