"""Pruners that make a model smaller: whole heads, channels, experts, modules and blocks leave."""
