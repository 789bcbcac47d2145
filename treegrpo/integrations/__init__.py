"""Adapters to trainers that people already use; each module needs its package and is imported by name."""
