"""Bytes on disk: a strict reader, an atomic writer with one tensor in memory, the manifest of our folders."""
