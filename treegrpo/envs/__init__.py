"""Environments with tools, and what they search in."""
