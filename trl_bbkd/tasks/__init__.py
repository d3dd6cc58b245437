"""Benchmarks of a student: lm_eval's tasks, and a user's own."""
