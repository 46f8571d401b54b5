"""Methods that drop visual tokens while a model runs."""
