"""Evaluation: tasks on sets, their metrics, and the command ``evaluate.py``."""
