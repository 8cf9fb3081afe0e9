"""Synthesis: training inputs made out of a teacher, without data. The contract is in `base.py`."""
