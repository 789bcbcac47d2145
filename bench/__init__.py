"""Benches: `pytest bench/` measures, `python -m bench.report result.json --out DIR` makes a table and a picture."""
