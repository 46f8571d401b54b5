"""What makes up for the weights that left: one file each."""
