"""Checks of an MDS set: files, hashes, samples, counts."""
