"""The world in a box: a fictional world to search in, questions about it, and a small model that saw it done badly."""
