"""Files of weights: find, read, start from, export, describe."""
